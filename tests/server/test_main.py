"""The gateway as a process: what it imports, and how it reports a wrong option."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("EVENHAND_")}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=240, env=CLEAN)


def test_the_gateway_loads_neither_torch_nor_vllm() -> None:
    ran = python("-c", "import sys, server.__main__, server.app; print(*sys.modules)")
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
def test_wrong_options_end_in_one_sentence(args: list[str], said: str) -> None:
    ran = python("-m", "server", *args)
    assert ran.returncode == 2
    assert said in ran.stderr and "Traceback" not in ran.stderr


def test_each_option_of_the_policy_is_told_with_its_place_also_where_it_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("policy: vtc\npolicy_options: {within: gittins, predict: none}")
    ran = subprocess.run(
        [sys.executable, "-m", "server", "--config", "gateway.yaml", "--policy", "mlfq", "--policy-option", "levels=4"],
        cwd=tmp_path,
        env=CLEAN | {"EVENHAND_POLICY_OPTIONS": '{"patience_s": "5"}', "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 2 and "has no option 'within'" in ran.stderr
    for place in ("within=gittins (gateway.yaml)", "patience_s=5 (EVENHAND_POLICY_OPTIONS)", "levels=4 (command line)"):
        assert place in ran.stderr
