"""The parent of several processes: it starts them, starts anew who dies, and stops all together, whatever happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIMIT_S = 120.0  # a gateway of several processes starts in ten times its usual time, too


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.01)  # between two looks


class Parent:
    """The program of `supervised.py` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, behaviour: str = "") -> "Parent":
        command = [sys.executable, "-m", "tests.server.supervised", str(self.folder), behaviour]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        return self

    def ready(self) -> "Parent":
        until((self.folder / "ready").exists, "all are ready")
        return self

    def pid(self, name: str) -> int:
        file = self.folder / f"{name}.pid"
        until(lambda: file.exists() and file.read_text(), f"{name} has started")
        return int(file.read_text())

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def orders(self) -> list[str]:
        file = self.folder / "orders"
        return file.read_text().split() if file.exists() else []

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        _, said = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, said


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    parent = Parent(tmp_path)
    yield parent
    if parent.process is not None:
        try:
            os.killpg(parent.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        parent.process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_signal_stops_all_the_needed_ones_last_and_is_a_clean_end(parent: Parent) -> None:
    parent.start().ready().send(signal.SIGTERM)
    code, _ = parent.end()
    assert code == 0
    assert parent.orders()[-1] == "last:s"
    assert sorted(parent.orders()[:2]) == ["a:s", "b:s"]


def test_a_signal_to_the_whole_group_counts_once(parent: Parent) -> None:
    parent.start("slow").ready()
    assert parent.process is not None
    os.killpg(parent.process.pid, signal.SIGINT)  # as a Ctrl-C in a terminal does
    until(lambda: "b:s" in parent.orders(), "b was told")
    assert "a:q" not in parent.orders()
    assert is_alive(parent.pid("a")), "what it had to finish was cut off"
    parent.send(signal.SIGINT)
    assert parent.end()[0] == 0
    assert "a:q" in parent.orders()


def test_who_dies_is_started_again_and_the_others_never_notice(parent: Parent) -> None:
    parent.start().ready()
    first, other = parent.pid("a"), parent.pid("b")
    os.kill(first, signal.SIGKILL)
    until(lambda: parent.pid("a") != first, "a was started again")
    assert is_alive(parent.pid("a")) and parent.pid("b") == other and is_alive(other)
    parent.send(signal.SIGTERM)
    assert parent.end()[0] == 0


@pytest.mark.parametrize("behaviour, code, said", [("never starts", 3, "exit code 3"), ("raises", 1, "this cannot be")])
def test_one_that_cannot_start_stops_all_with_its_exit_code(
    parent: Parent, behaviour: str, code: int, said: str
) -> None:
    parent.start(behaviour)
    ended = parent.end()
    assert ended[0] == code
    assert "process b did not start" in ended[1] and said in ended[1]
    assert not is_alive(parent.pid("a"))


def test_what_fails_while_it_stops_is_the_exit_code(parent: Parent) -> None:
    parent.start("fails at the end").ready().send(signal.SIGTERM)
    code, said = parent.end()
    assert code == 5
    assert "process a ended with exit code 5" in said


def test_who_does_not_stop_is_killed(parent: Parent) -> None:
    parent.start("deaf").ready().send(signal.SIGTERM)
    code, said = parent.end()
    assert code == 128 + signal.SIGKILL
    assert "process a ended with signal SIGKILL" in said
    assert not is_alive(parent.pid("a"))


def test_when_the_parent_is_killed_all_end(parent: Parent) -> None:
    parent.start().ready()
    pids = [parent.pid(name) for name in ("a", "b", "last")]
    parent.send(signal.SIGKILL)
    until(lambda: not any(map(is_alive, pids)), "all have ended")
    assert sorted(parent.orders()) == ["a:end", "b:end", "last:end"]
