"""Finds processes by a mark in their environment, however they were re-parented: what a process listing would show."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "EVENHAND_TEST_MARK"


def new_mark() -> str:
    return uuid.uuid4().hex


def marked(mark: str) -> dict[int, str]:
    """Process id → command line of everything alive that was started with `mark` in its environment."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a zombie has none
                    found[int(folder.name)] = command
        except OSError:  # ended while we looked
            continue
    return found


def in_session(session: int) -> dict[int, str]:
    """As `marked`, but by session: vLLM's processes rename themselves, which overwrites their environment in /proc."""
    found: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
            state, _, _, sid, *_ = rest.split()
            if int(sid) == session and state != "Z":
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(stat.parent.name)] = command or name
        except OSError:
            continue
    return found


def eventually(holds: Callable[[], object], within_s: float = 120.0) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
