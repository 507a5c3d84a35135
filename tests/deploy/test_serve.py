"""`evenhand serve` as a program: what it says and does with good and bad input, and that it leaves nothing running."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.deploy import serve_program
from tests.deploy.fake_hub import NAME, NEEDED, running, there
from tests.deploy.processes import MARK, eventually, marked, new_mark

LIMIT_S = 120.0  # for a busy machine, or one that stands still
HANGING = f"{sys.executable} -c 'import time; time.sleep(600)'"


@dataclass
class Program:
    """`evenhand serve` with an engine of the test's choice, and everything that it started, found by a mark."""

    folder: Path
    mark: str = field(default_factory=new_mark)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        model = self.folder / "toy"
        model.mkdir()
        (model / "config.json").write_text("{}")

    def argv(self, *args: str) -> list[str]:
        toy = str(self.folder / "toy")
        return ["--model", toy, "--port", str(self.port), "--state-folder", str(self.folder), *args]

    def start(self, *args: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.serve_program", *self.argv(*args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: self.mark, **environ},
        )
        self.processes.append(process)
        return process

    def refused(self, *args: str) -> str:
        """Runs to the end, which must be an error of one sentence; returns that sentence."""
        process = self.start(*args)
        _, _, err = ended(process)
        assert process.returncode in (1, 2)
        assert marked(self.mark) == {}
        return sentence_in(err)

    def ready(self, *args: str, **environ: str) -> subprocess.Popen[str]:
        process = self.start(*args, **environ)
        assert eventually(lambda: self.status("/ready") == 200 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    def status(self, path: str) -> int:
        """0 while nobody answers."""
        return self.get(path)[0]

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    one = Program(tmp_path)
    yield one
    left = marked(one.mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in one.processes:
        process.communicate()
    assert left == {}


def behind(gate: Path) -> str:
    """The fake engine, which starts only while there is this file: who waits for it to be away does not miss that."""
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
    code += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    engine = "-m loadtest.fake.engine --port {port} --model {model} --cost instant"
    return f"{sys.executable} -c '{code}' {gate} {engine}"


def sentence_in(err: str) -> str:
    """The one sentence that was said; fails if it is not one."""
    assert err.startswith("evenhand serve: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def refused(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """What `evenhand serve` says, run in this process, before it starts anything; it must be one sentence."""

    def run(*args: str, **environ: str) -> str:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert serve_program.main(program.argv(*args)) in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        return sentence_in(err)

    return run


def ended(process: subprocess.Popen[str], within_s: float = LIMIT_S) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within_s)
    assert "Traceback" not in out + err
    return process.returncode, out, err


def heard(process: subprocess.Popen[str], words: str) -> str:
    """What it has said once these words are among it; read past Popen's buffer, so that the rest is left to `ended`."""
    said = b""
    assert process.stdout is not None
    while words.encode() not in said:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        assert piece, said
        said += piece
    return said.decode(errors="replace")


def test_it_serves_says_how_to_ask_and_after_ctrl_c_leaves_nothing(program: Program) -> None:
    process = program.ready("--policy", "vtc")
    body = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    request = urllib.request.Request(
        f"http://127.0.0.1:{program.port}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, err) == (130, "")
    assert f"Ready: toy at http://127.0.0.1:{program.port}/v1, policy vtc" in out
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions", out)
    assert "\x1b" not in out


def test_a_chat_goes_through_an_engine_that_reads_and_one_that_answers(program: Program) -> None:
    process = program.ready(
        "--prefill-workers", "1", "--decode-workers", "1", EVENHAND_DISAGGREGATION__MIN_PROMPT_TOKENS="1"
    )
    assert eventually(lambda: program.get("/ready")[1].count('"state":"ready"') == 2)
    body = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    request = urllib.request.Request(
        f"http://127.0.0.1:{program.port}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]
    metrics = program.get("/metrics")[1]
    assert 'evenhand_placements_total{placement="apart"} 1.0' in metrics
    assert 'evenhand_prefills_total{outcome="read"} 1.0' in metrics
    process.terminate()
    code, out, _ = ended(process)
    assert code == 0
    assert re.search(r"prefill-0 +reads prompts on CPU core", out) and re.search(
        r"decode-0 +writes answers on CPU core", out
    )
    assert "policy fcfs, prompts from 1 tokens on are read apart" in out


def test_a_gateway_of_several_processes_knows_every_engine_and_leaves_nothing(program: Program) -> None:
    gate = program.folder / "gate"
    gate.touch()
    options = ("--gateway-processes", "2", "--workers", "2", "--policy", "vtc")
    process = program.start(*options, TEST_ENGINE=behind(gate))
    assert eventually(lambda: all(program.get("/ready")[1].count('"state":"ready"') == 2 for _ in range(16)))
    assert process.poll() is None, process.communicate()
    said = heard(process, "Ready: toy at")
    assert eventually(lambda: "evenhand_replicas 2.0" in program.get("/metrics")[1])
    engines = [
        pid for pid, command in marked(program.mark).items() if "fake.engine" in command and "reaper" not in command
    ]
    gate.unlink()
    os.kill(engines[0], signal.SIGKILL)
    assert eventually(lambda: any(program.get("/ready")[1].count('"state":"ready"') < 2 for _ in range(8)))
    gate.touch()
    assert eventually(lambda: all(program.get("/ready")[1].count('"state":"ready"') == 2 for _ in range(16)))
    process.terminate()
    code, out, err = ended(process)
    out = said + out
    assert (code, err) == (0, "")
    assert out.count("Ready: toy at") == 1 and out.count("is OPEN") == 1


def test_the_gateway_s_own_processes_do_not_outlive_a_killed_serve(program: Program) -> None:
    process = program.ready("--gateway-processes", "2")
    process.kill()
    assert eventually(lambda: not marked(program.mark))


def test_engines_that_cannot_hand_over_kv_are_not_started(refused: Callable[..., str]) -> None:
    said = refused("--prefill-workers", "1", "--decode-workers", "1", TEST_NIXL="no")
    assert "NIXL, which is not installed here: run `make install`" in said


@pytest.mark.parametrize(("gpus", "in_turn"), [("1", True), ("2", False)])
def test_engines_that_share_a_gpu_start_one_after_the_other(
    program: Program, tmp_path: Path, gpus: str, in_turn: bool
) -> None:
    gate = tmp_path / "gate"
    environ = {"TEST_ENGINE": behind(gate), "TEST_BUILD": "cuda", "TEST_GPUS": gpus, "TMPDIR": str(tmp_path)}
    process = program.start("--workers", "2", **environ)
    out = heard(process, "importing the engine")
    while not in_turn and out.count("importing the engine") < 2:
        out += heard(process, "importing the engine")
    gate.touch()
    out += heard(process, "Ready: ")
    process.send_signal(signal.SIGINT)
    ended(process)
    assert ("share GPU 0" in out) is in_turn
    steps = re.findall(r"worker-[01] +│ (importing|ready)", out)
    assert steps == (["importing", "ready"] * 2 if in_turn else ["importing"] * 2 + ["ready"] * 2)


def test_sigterm_to_a_ready_server_is_a_clean_end(program: Program) -> None:
    process = program.ready()
    process.terminate()
    assert ended(process)[0] == 0


def test_a_closed_terminal_stops_it(program: Program) -> None:
    process = program.ready()
    process.send_signal(signal.SIGHUP)
    assert ended(process)[0] == 129


def test_a_killed_supervisor_leaves_no_engine_behind(program: Program) -> None:
    process = program.ready("--workers", "2")
    assert len(marked(program.mark)) == 5
    process.kill()
    assert eventually(lambda: not marked(program.mark))


def test_an_engine_that_dies_is_replaced_and_requests_are_taken_again(program: Program) -> None:
    gate = program.folder / "gate"
    gate.touch()
    process = program.ready(TEST_ENGINE=behind(gate))
    engine = next(
        pid for pid, command in marked(program.mark).items() if command.count("fake.engine") and "reaper" not in command
    )
    gate.unlink()
    os.kill(engine, signal.SIGKILL)
    assert eventually(lambda: program.status("/ready") != 200)
    gate.touch()
    assert eventually(lambda: program.status("/ready") == 200)
    process.terminate()
    assert "died: one of its processes was killed" in ended(process)[1]


def test_it_is_alive_at_once_and_tells_the_stage_until_it_is_ready(program: Program) -> None:
    process = program.start(TEST_ENGINE=HANGING)
    assert eventually(lambda: program.status("/health") == 200)
    assert eventually(lambda: program.get("/ready")[1] and "importing the engine" in program.get("/ready")[1])
    assert program.status("/ready") == 503
    process.send_signal(signal.SIGINT)
    code, out, _ = ended(process)
    assert code == 130
    assert "Nothing is left running" in out


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_leaves_nothing(program: Program) -> None:
    for moment_s in (0.4, 0.7, 1.0, 1.3):  # from the imports to the engines' first stage
        process = program.start("--workers", "2")
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=moment_s)
        process.send_signal(signal.SIGINT)
        code, _, _ = ended(process)
        assert code in (130, -signal.SIGINT)
        assert marked(program.mark) == {}


def test_a_second_ctrl_c_stops_at_once_what_does_not_want_to_stop(program: Program) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print(2, flush=True)); "
        "print(1, flush=True); time.sleep(600)"
    )
    process = program.start(TEST_ENGINE=f"{sys.executable} -c '{stubborn}'", TEST_GRACE_S="600")
    assert eventually(lambda: "1" in log_of(program))
    process.send_signal(signal.SIGINT)
    assert eventually(lambda: "2" in log_of(program)), "the engine was asked to stop"
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130


def log_of(program: Program) -> list[str]:
    path = program.folder / str(program.port) / "worker-0.log"
    return path.read_text().splitlines() if path.exists() else []


def test_a_taken_port_is_said_with_a_way_out(program: Program, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", program.port)):
        said = refused()
    assert f"port {program.port} on 127.0.0.1 is taken" in said
    assert "--port" in said


@pytest.mark.slow
def test_a_second_serve_says_that_the_port_is_taken_and_the_first_goes_on(program: Program) -> None:
    first = program.ready()
    second = program.start()
    _, err = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 1
    assert "perhaps by another `evenhand serve`" in err
    assert program.status("/ready") == 200
    first.terminate()
    ended(first)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model", "/no/such/model"], "there is no model folder at /no/such/model"),
        (["--model", "/tmp"], "has no config.json"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy-option", "levels=4"], "policy 'fcfs' has no option 'levels'"),
        (["--prefill-workers", "1"], "prefill and decode workers need each other"),
        (["--engine-arg=--port=1"], "--engine-arg=--port cannot be given"),
        (["--workers", "-1"], "worker_count"),
        (["--workers", "0"], "no worker is left to serve requests"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml does not exist"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(args: list[str], sentence: str, refused: Callable[..., str]) -> None:
    assert sentence in refused(*args)


def test_too_little_memory_is_refused_in_one_sentence(refused: Callable[..., str]) -> None:
    assert "too little memory" in refused(TEST_FREE_BYTES=str(1024**3))


def test_an_unsupported_engine_version_is_refused_in_one_sentence(refused: Callable[..., str]) -> None:
    assert "vLLM 0.12.0 is installed" in refused(TEST_VERSION="0.12.0")


def test_a_cuda_build_without_a_gpu_is_refused_in_one_sentence(refused: Callable[..., str]) -> None:
    assert "no NVIDIA GPU is visible" in refused(TEST_BUILD="cuda", CUDA_VISIBLE_DEVICES="")


def test_an_engine_that_dies_at_start_is_one_sentence_with_its_cause(program: Program) -> None:
    said = program.refused("--engine-arg=--nonsense")  # the fake engine refuses it as vLLM does
    assert "worker-0 did not start" in said
    assert "--nonsense" in said
    assert str(program.folder) in said


@pytest.mark.slow
def test_of_two_engines_one_that_cannot_start_stops_both(program: Program) -> None:
    assert "did not start" in program.refused("--workers", "2", "--engine-arg=--nonsense")


def test_serve_fetches_the_model_first_and_says_so(program: Program, tmp_path: Path) -> None:
    with running() as hub:
        process = program.ready("--model", NAME, **hub.environ(tmp_path / "home"))
    assert there(tmp_path / "home") == NEEDED
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert f"downloading {NAME}: 0.4 MB" in out


def test_a_model_whose_engines_fetch_another_revision_is_left_to_them(program: Program, tmp_path: Path) -> None:
    other = program.folder / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with running() as hub:
        process = program.start(
            "--model",
            NAME,
            "--model",
            str(other),
            f"--engine-arg={NAME}:--revision=v2",
            **hub.environ(tmp_path / "home"),
        )
        process.communicate(timeout=120)
    assert hub.sent == []


def test_serve_says_why_it_cannot_fetch_the_model(program: Program, tmp_path: Path) -> None:
    with running() as hub:
        hub.refused = "RepoNotFound"
        process = program.start("--model", NAME, **hub.environ(tmp_path / "home"))
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "has no model owner/model" in err
