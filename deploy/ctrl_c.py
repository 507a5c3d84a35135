"""Ctrl-C that cannot get lost: an import that swallows every exception swallows what it raises, not what it notes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """A handler for SIGINT that raises KeyboardInterrupt, as Python's own does, and remembers that it was called."""

    def __init__(self) -> None:
        self.heard = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """While this lasts, SIGINT is remembered; it stays as it was in another thread, or where it was set otherwise."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, CtrlC())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def heard() -> bool:
    """Whether a Ctrl-C has come since `remembered` began."""
    handler = signal.getsignal(signal.SIGINT)
    return isinstance(handler, CtrlC) and handler.heard
