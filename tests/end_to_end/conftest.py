"""The whole system as the README starts it, `make serve` with the bundled model: once, for all tests here."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import httpx2
import pytest
from openai import OpenAI

from loadtest.bench.bench_target import free_port

START_S = 400.0
LIMIT_S = 60.0  # for a busy machine, or one that stands still
MODEL = "smollm2"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stack:
    """A running `evenhand serve`."""

    url: str
    engine_url: str
    engine_key: str
    model: str
    client: OpenAI

    def engine_running(self) -> float:
        """Requests that the engine itself says it runs or holds waiting."""
        text = httpx2.get(f"{self.engine_url}/metrics", timeout=LIMIT_S).text
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.MULTILINE)
        assert counts
        return sum(map(float, counts))

    def engine_made(self) -> float:
        """Tokens that the engine itself says it has made."""
        text = httpx2.get(f"{self.engine_url}/metrics", timeout=LIMIT_S).text
        return sum(map(float, re.findall(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)", text, re.MULTILINE)))

    def metric(self, name: str) -> float:
        """The sum of a gateway metric over its labels."""
        text = httpx2.get(f"{self.url}/metrics", timeout=LIMIT_S).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def until(condition: Callable[[], bool], limit_s: float, what: str) -> float:
    """Seconds until the condition held; fails when it does not within the limit."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"after {limit_s} s still not: {what}"
        time.sleep(0.02)  # between two looks at another process, not a wait for luck
    return time.monotonic() - began


def engine_port(pid: int) -> int:
    """The port of the API server among a process's descendants."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if "vllm.entrypoints.openai.api_server" in words and "--port" in words and _descends(session, pid):
            return int(words[words.index("--port") + 1])
    raise AssertionError("no engine process found")


def serve_pid(make_pid: int) -> int:
    """The process that `make` waits for; make's own number if there is none."""
    children = Path(f"/proc/{make_pid}/task/{make_pid}/children").read_text().split()
    return int(children[0]) if children else make_pid


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`make serve ARGS="--policy vtc …"`: gateway, plug-in, real vLLM, bundled model."""
    port, key = free_port(), token_hex(16)
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    arguments = f"--port {port} --policy vtc --engine-arg=--max-model-len=2048"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["make", "serve", f"ARGS={arguments}"],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env={**os.environ, "EVENHAND_ENGINE_KEY": key},
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, f"evenhand serve ended with {process.returncode}:\n{log.read_text()}"
        try:
            return httpx2.get(f"{url}/ready", timeout=LIMIT_S).status_code == 200
        except httpx2.HTTPError:
            return False

    try:
        until(ready, START_S, f"ready; its log is {log}")
        yield Stack(
            url,
            f"http://127.0.0.1:{engine_port(process.pid)}",
            key,
            MODEL,
            OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0),
        )
    finally:
        os.kill(serve_pid(process.pid), signal.SIGTERM)
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, log.read_text()


def in_ci() -> bool:
    return os.environ.get("CI", "") not in ("", "0", "false")
