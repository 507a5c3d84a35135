"""What a benchmark runs against: a server that runs already, or a command that starts one on a free port."""

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import httpx2

_POLL_S = 0.5
_TERMINATE_S = 20.0


class CannotStart(Exception):
    """A target did not become ready; the message names its log."""


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """One thing to measure. Exactly one of url and command is set.

    command: with {port} and any other {name} of the setting, for example {slots}.
    """

    name: str
    url: str = ""
    command: str = ""

    @classmethod
    def parse(cls, text: str) -> "BenchTarget":
        """NAME=URL, or NAME=COMMAND with {port} in it; ValueError says what is missing."""
        name, _, value = text.partition("=")
        if value.startswith(("http://", "https://")):
            return cls(name, url=value)
        if not name or "{port}" not in value:
            raise ValueError(f"{text!r} is neither NAME=URL nor NAME=COMMAND with {{port}} in it.")
        return cls(name, command=value)


@contextmanager
def running(target: BenchTarget, setting: Mapping[str, object], logs: Path, ready_s: float) -> Iterator[str]:
    """The target's URL while it runs; what was started is stopped, with all it started itself."""
    if target.url:
        yield target.url
        return
    port = free_port()
    command = shlex.split(target.command.format_map({"port": port, **setting}))
    logs.mkdir(parents=True, exist_ok=True)
    name = "-".join([target.name, *(str(value) for value in setting.values())])
    path = logs / f"{name}.log"
    with path.open("wb") as log:
        # A session of its own: an engine's workers go with it.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(url, process, path, ready_s)
        yield url
    finally:
        _stop(process)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_ready(url: str, process: "subprocess.Popen[bytes]", log: Path, ready_s: float) -> None:
    deadline = monotonic() + ready_s
    while monotonic() < deadline:
        if process.poll() is not None:
            raise CannotStart(f"It ended with code {process.returncode} before it was ready: see {log}.")
        if _serves(url):
            return
        sleep(_POLL_S)
    raise CannotStart(f"It was not ready within {ready_s:.0f} s: see {log}.")


def _serves(url: str) -> bool:
    try:
        answer = httpx2.get(f"{url}/v1/models", timeout=2)
        return answer.status_code == 200 and bool(answer.json()["data"])
    except (httpx2.HTTPError, ValueError, KeyError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    ask: Callable[[int], None] = lambda kind: os.killpg(process.pid, kind)  # noqa: E731
    try:
        ask(signal.SIGTERM)
        process.wait(_TERMINATE_S)
        ask(signal.SIGKILL)  # whoever of its group is left
    except subprocess.TimeoutExpired:
        ask(signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()
