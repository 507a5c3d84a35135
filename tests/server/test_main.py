"""The gateway as a program: what it imports, and how it reports a wrong option."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.__main__ import main


@pytest.fixture
def log_as_it_was() -> Iterator[None]:
    """A gateway that starts takes over the process's log."""
    loggers = [
        logging.root,
        *(one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)),
    ]
    levels, handlers = [one.level for one in loggers], logging.root.handlers[:]
    logging.root.handlers.clear()
    yield
    logging.root.handlers[:] = handlers
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)


@pytest.fixture
def refused(
    log_as_it_was: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `python -m server` says, run in this process, when it ends with 2."""
    for name in os.environ:
        if name.startswith("EVENHAND_"):
            monkeypatch.delenv(name)

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evenhand gateway", *args])
        assert main() == 2
        return capsys.readouterr().err

    return run


def test_the_gateway_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, server.__main__, server.app; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.split())
    assert "uvicorn" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "tokenizers", "numpy", "rich", "loadtest", "deploy"}


@pytest.mark.parametrize(
    "args, said",
    [
        (["--policy", "lottery"], "lottery"),
        (["--policy", "mlfq", "--policy-option", "quantum"], "KEY=VALUE"),
        (["--worker", "127.0.0.1:1"], "http://HOST:PORT"),
        (["--worker", "http://127.0.0.1:1,slots=none"], "slots"),
        (["--worker", "http://127.0.0.1:1,role=cook"], "role"),
        (["--port", "70000"], "port"),
        (["--gateway-processes", "0"], "gateway_processes"),
        (["--gateway-processes", "2", "--record", "/tmp"], "--record"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
)
def test_wrong_options_end_in_one_sentence(args: list[str], said: str, refused: Callable[..., str]) -> None:
    assert said in refused(*args)


def test_each_option_of_the_policy_is_told_with_its_place_also_where_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    (tmp_path / "gateway.yaml").write_text("policy: vtc\npolicy_options: {within: gittins, predict: none}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENHAND_POLICY_OPTIONS", '{"patience_s": "5"}')
    said = refused("--config", "gateway.yaml", "--policy", "mlfq", "--policy-option", "levels=4")
    assert "has no option 'within'" in said
    for place in ("within=gittins (gateway.yaml)", "patience_s=5 (EVENHAND_POLICY_OPTIONS)", "levels=4 (command line)"):
        assert place in said


@pytest.mark.parametrize("step", ["read_settings({}, None, Settings)", "GatewayServer(settings)"])
def test_ctrl_c_while_pydantic_builds_validators_is_no_error_of_its_own(step: str) -> None:
    program = (
        "import os, signal, sys\n"
        "from server.app import GatewayServer\n"
        "from server.settings import Settings, read_settings\n"
        "def ctrl_c(frame, event, arg):\n"
        "    if frame.f_code.co_name == 'create_schema_validator':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        f"settings = read_settings({{}}, None, Settings)\nsys.setprofile(ctrl_c)\n{step}"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
