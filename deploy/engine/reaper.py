"""Runs a command so that neither it nor its descendants outlive the process that asked for it, even after a SIGKILL.

`python -I -S reaper.py GRACE_S CORES COMMAND…` starts the command with three knots:
- standard input is the leash: when its other end closes, whoever held it is gone, and the command is stopped;
- orphans of the command are adopted (PR_SET_CHILD_SUBREAPER), so that its grandchildren can be found and ended;
- the command gets SIGKILL when this process itself is killed (PR_SET_PDEATHSIG).

SIGTERM asks the command to stop, and after GRACE_S seconds everything below this process is killed. The exit code is
the command's, or 128 + the signal that ended it. CORES ("2,3") are those on which the command may run, "-" is all.
Only the standard library is needed, so it starts in milliseconds.
"""

import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAST_WORDS_S = 1.0  # how long the command's own helpers may tidy up (shared memory, for one) after it has ended
STDIN = 0


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def spawn(command: list[str]) -> int:
    """Starts the command with an empty standard input; returns its process id."""
    leash = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leash:  # killed before the line above took hold
            os._exit(128 + signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), STDIN)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"reaper.py: error: cannot run {command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def descendants() -> list[int]:
    """Process ids of everything alive below this process, by /proc; empty where there is no /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        if after_name[0] != "Z":
            parents[int(stat.parent.name)] = int(after_name[1])
    found = {os.getpid()}
    while below := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= below
    return sorted(found - {os.getpid()})


class Reaper:
    """The command and the loop that watches its end, its holder and the signals."""

    def __init__(self, command: list[str]) -> None:
        self.asked_to_stop = False
        self.exit_code: int | None = None
        self._wake, wake_end = os.pipe()
        for end in (self._wake, wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop_asked)
        self.pid = spawn(command)

    def _stop_asked(self, *_: object) -> None:
        self.asked_to_stop = True

    def reap(self) -> None:
        """Collects every child that ended, the adopted ones too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.exit_code = code if code >= 0 else 128 - code

    def watch(self, deadline: float | None) -> None:
        """Returns when the command has ended, at the deadline, or (without one) when it is to be stopped."""
        while self.exit_code is None and not (deadline is None and self.asked_to_stop):
            wait_s = None if deadline is None else deadline - time.monotonic()
            if wait_s is not None and wait_s <= 0:
                return
            # Once the holder is gone its end stays readable for ever, so it is watched only until then.
            readable, _, _ = select.select([self._wake] if self.asked_to_stop else [self._wake, STDIN], [], [], wait_s)
            if STDIN in readable and not os.read(STDIN, 4096):
                self.asked_to_stop = True
            if self._wake in readable:
                os.read(self._wake, 4096)
            self.reap()

    def stop(self, grace_s: float) -> None:
        """Asks, waits, and ends whatever is left; returns when nothing is."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGTERM)
            self.watch(time.monotonic() + grace_s)
        if self.exit_code is not None:
            patience_ends = time.monotonic() + LAST_WORDS_S
            while descendants() and time.monotonic() < patience_ends:
                time.sleep(0.02)
                self.reap()
        while left := descendants():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
            self.reap()
        self.reap()


def main() -> int:
    grace_s, cores, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if cores != "-":
        os.sched_setaffinity(0, map(int, cores.split(",")))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    leash = Reaper(command)
    leash.watch(deadline=None)
    leash.stop(grace_s)
    return leash.exit_code if leash.exit_code is not None else 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main())
