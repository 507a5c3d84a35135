"""`evenhand serve --sleep-after`: an engine without a sleep mode is stopped, and started for the next request."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from loadtest.bench.bench_target import free_port
from tests.deploy.processes import MARK, eventually, marked, new_mark
from tests.deploy.test_serve import Program, ended, program  # noqa: F401 - the fixture


def asked(port: int, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=280) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def states(port: int) -> list[str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
            return [worker["state"] for worker in json.load(answer)["workers"]]
    except OSError:
        return []


def engines(mark: str, named: str) -> int:
    return sum(named in command and "reaper" not in command for command in marked(mark).values())


def test_an_idle_engine_is_stopped_and_the_next_request_starts_it(program: Program) -> None:  # noqa: F811
    process = program.ready("--sleep-after", "1", "--workers", "2", EVENHAND_PROBE_S="0.1")
    assert eventually(lambda: states(program.port) == ["asleep", "asleep"])
    assert eventually(lambda: engines(program.mark, "fake.engine") == 0)
    assert program.status("/ready") == 200
    assert asked(program.port, "toy") and engines(program.mark, "fake.engine")
    assert eventually(lambda: states(program.port) == ["asleep", "asleep"])
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0


@pytest.mark.slow
@pytest.mark.engine
def test_a_real_engine_says_the_same_after_its_sleep(tmp_path: Path) -> None:
    mark, port = new_mark(), free_port()
    options = ["--sleep-after", "3", "--port", str(port), "--state-folder", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "serve", "--model", "tiny-random", *options],
        stdout=subprocess.DEVNULL,
        env={**os.environ, MARK: mark},
    )
    try:
        assert eventually(lambda: states(port) == ["ready"], 280)
        before = asked(port, "tiny-random")
        assert eventually(lambda: states(port) == ["asleep"], 60)
        assert eventually(lambda: engines(mark, "EngineCore") + engines(mark, "api_server") == 0, 60)
        assert asked(port, "tiny-random") == before
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert eventually(lambda: marked(mark) == {})
