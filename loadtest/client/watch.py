"""How late an event loop sees what arrives: what bends a measurement, bends this first.

On Linux it is looked for with a timer of the kernel, which becomes readable at known times, as a connection does when
a token arrives. The loop's own timers are good to a millisecond only (libuv counts in those); elsewhere they must do.
"""

import asyncio
import ctypes
import os
import sys
import time
from time import perf_counter

_TICK_S = 0.02
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class _Spec(ctypes.Structure):
    """The kernel's `itimerspec`: how often, and when first."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Watch:
    """While it is entered: `late_s` gets, every 20 ms, how many seconds too late the running event loop noticed.

    kernel: by a timer of the kernel, where there is one.
    """

    def __init__(self, late_s: list[float], *, kernel: bool = True) -> None:
        self._late_s = late_s
        self._kernel = kernel
        self._timer: asyncio.TimerHandle | None = None
        self._fd: int | None = None
        self._due = 0.0

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = perf_counter() + _TICK_S
        self._fd = _kernel_timer(self._due) if self._kernel else None
        if self._fd is None:
            self._timer = self._loop.call_at(self._loop.time() + _TICK_S, self._woke)
        else:
            self._loop.add_reader(self._fd, self._readable)

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _readable(self) -> None:
        assert self._fd is not None
        ticks = int.from_bytes(os.read(self._fd, 8), sys.byteorder)
        self._noticed(ticks)

    def _woke(self) -> None:
        self._noticed(1 + max(0, int((perf_counter() - self._due) / _TICK_S)))
        self._timer = self._loop.call_later(max(0.0, self._due - perf_counter()), self._woke)

    def _noticed(self, ticks: int) -> None:
        """Each tick that went by counts: a loop that stood still for long was late for many."""
        now = perf_counter()
        for _ in range(ticks):
            self._late_s.append(max(0.0, now - self._due))
            self._due += _TICK_S


def _kernel_timer(first: float) -> int | None:
    """A descriptor that is readable at `first`, in perf_counter's seconds, and then at every tick. None: not here."""
    if not sys.platform.startswith("linux") or "MONOTONIC" not in time.get_clock_info("perf_counter").implementation:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        return None
    whole, part = divmod(round(first * 1e9), 10**9)
    spec = _Spec(0, round(_TICK_S * 1e9), whole, part)
    if libc.timerfd_settime(fd, _ABSOLUTE, ctypes.byref(spec), None) != 0:
        os.close(fd)
        return None
    return fd
