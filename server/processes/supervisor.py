"""Several processes behind one port: a small parent starts them, restarts those that die, and stops all together.

Each listens on a socket of its own (SO_REUSEPORT), and the kernel spreads new connections over them. The parent forks
them; so that it can do that at any time it has no thread and no event loop, only a `select`.
"""

import errno
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

log = logging.getLogger("evenhand.processes")

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEADY_S = 30.0  # who lived for so long is started anew at once
LONGEST_PAUSE_S = 10.0
KILL_S = 10.0  # beyond what running answers may take


class ChildCommand(Enum):
    """What the parent tells a process; the end of the pipe, when the parent is gone, means STOP."""

    STOP = b"s"
    STOP_AT_ONCE = b"q"


@dataclass(frozen=True, slots=True)
class Post:
    """A process' side: where its orders come from, and how it says that it is ready. again: it takes the place of one
    that had been ready."""

    orders: int
    status: int
    name: bytes
    again: bool

    def ready(self) -> None:
        """It serves."""
        os.write(self.status, self.name + b"\n")


@dataclass(frozen=True, slots=True)
class Program:
    """What a process does: `main` runs in it and returns its exit code. `last`: it ends when the others have."""

    name: str
    main: Callable[[Post], int]
    last: bool = False


@dataclass(slots=True, eq=False)
class _Child:
    program: Program
    pid: int = 0
    orders: int = -1
    started_at: float = 0.0
    ready: bool = False  # at any time: one that never was is not tried again
    failures: int = 0
    due_at: float | None = None  # when it is started again

    @property
    def runs(self) -> bool:
        return self.pid != 0


class Supervisor:
    """The parent. `run` returns when everything has ended."""

    def __init__(
        self, programs: Sequence[Program], *, grace_s: float, clock: Callable[[], float], all_ready: Callable[[], None]
    ) -> None:
        self._children = [_Child(program) for program in programs]
        self._grace_s = grace_s
        self._clock = clock
        self._all_ready = all_ready
        self._said_ready = False
        self._stop_asked = 0
        self._kill_at: float | None = None
        self._exit_code = 0

    def run(self) -> int:
        """Starts all and watches them: 0 after a signal, else the exit code of the one that could not be started."""
        self._status, self._status_end = os.pipe()
        self._wake, self._wake_end = os.pipe()
        for end in (self._status, self._wake, self._wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noted)
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # else: started by nohup
                signal.signal(number, _noted)
        for child in self._children:
            self._start(child)
        while any(child.runs or child.due_at is not None for child in self._children):
            self._wait()
            self._reap()
            self._start_due()
            self._end_last()
        return self._exit_code

    def _start(self, child: _Child) -> None:
        child.due_at = None
        child.started_at = self._clock()
        read_end, child.orders = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child.pid = os.fork()
        if child.pid == 0:
            self._become(child.program, read_end, again=child.ready)
        os.close(read_end)

    def _become(self, program: Program, orders: int, *, again: bool) -> None:
        """In the new process: lets go of what is the parent's, and never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in STOPPING:  # a Ctrl-C reaches the whole group, and only the parent is to heed it
                signal.signal(number, signal.SIG_IGN)
            for end in (self._status, self._wake, self._wake_end, *(c.orders for c in self._children if c.orders >= 0)):
                os.close(end)
            code = program.main(Post(orders, self._status_end, program.name.encode(), again))
        except BaseException:  # noqa: BLE001 - the outermost border of this process: the stack of the parent ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _wait(self) -> None:
        """Returns on a signal, when a process is ready, or when something is due."""
        due = [child.due_at for child in self._children if child.due_at is not None]
        due += [self._kill_at] if self._kill_at is not None else []
        timeout = max(0.0, min(due) - self._clock()) if due else None
        readable, _, _ = select.select([self._wake, self._status], [], [], timeout)
        if self._wake in readable:
            for number in os.read(self._wake, 4096):
                if number in STOPPING:
                    self._stop()
        if self._status in readable:
            self._note_ready(os.read(self._status, 4096).decode().split())
        if self._kill_at is not None and self._clock() >= self._kill_at:
            self._kill_at = self._clock() + KILL_S
            running = [child for child in self._children if child.runs]
            for child in [child for child in running if not child.program.last] or running:
                os.kill(child.pid, signal.SIGKILL)

    def _note_ready(self, names: list[str]) -> None:
        for child in self._children:
            if child.program.name in names:
                child.ready = True
        if not self._said_ready and all(child.ready for child in self._children):
            self._said_ready = True
            self._all_ready()

    def _stop(self) -> None:
        """First: everybody finishes what it has; again: everybody stops at once."""
        self._stop_asked += 1
        order = ChildCommand.STOP if self._stop_asked == 1 else ChildCommand.STOP_AT_ONCE
        if self._kill_at is None:
            self._kill_at = self._clock() + self._grace_s + KILL_S
        for child in self._children:
            child.due_at = None
            if not child.program.last:
                self._order(child, order)

    def _order(self, child: _Child, order: ChildCommand) -> None:
        if child.runs:
            try:
                os.write(child.orders, order.value)
            except OSError as error:
                if error.errno != errno.EPIPE:  # it has just ended
                    raise

    def _end_last(self) -> None:
        """Those that the others need end after them."""
        if self._stop_asked and not any(child.runs for child in self._children if not child.program.last):
            for child in self._children:
                self._order(child, ChildCommand.STOP)

    def _reap(self) -> None:
        for child in self._children:
            if not child.runs:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                os.close(child.orders)
                child.pid, child.orders = 0, -1
                self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, code: int) -> None:
        name = child.program.name
        if self._stop_asked:
            if code != 0 and not self._exit_code:
                log.error("process %s ended with %s", name, _in_words(code))
                self._exit_code = code if code > 0 else 128 - code
            return
        if not child.ready:  # what stands in its way now stands there the next time, too
            log.error("process %s did not start: it ended with %s", name, _in_words(code))
            self._exit_code = code if code > 0 else 128 - code if code else 1
            self._stop()
            return
        now = self._clock()
        child.failures = 0 if now - child.started_at > STEADY_S else child.failures + 1
        pause_s = min(LONGEST_PAUSE_S, 0.1 * 2**child.failures) if child.failures else 0.0
        child.due_at = now + pause_s
        log.error("process %s ended with %s; restarting it in %.1f s", name, _in_words(code), pause_s)

    def _start_due(self) -> None:
        for child in self._children:
            if child.due_at is not None and self._clock() >= child.due_at:
                self._start(child)


def _noted(number: int, frame: object) -> None:
    """The number goes through the wake-up pipe."""


def _in_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
