"""Measures how late the event loop runs: its delays distort every measurement made on it."""

import asyncio
from collections.abc import Callable
from time import perf_counter

from loadtest.thinned import Values

_TICK_S = 0.02


class Watch:
    """While entered, appends to `late_s` every 20 ms by how many seconds the running loop was late.

    The loop's timers bound the resolution: libuv, and so uvloop, counts in milliseconds.
    """

    def __init__(self, late_s: Values | list[float], clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._late_s = late_s

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._clock() + _TICK_S
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        """Every tick that passed counts: a loop that stood still for long was late for many."""
        now = self._clock()
        while self._due <= now:
            self._late_s.append(now - self._due)
            self._due += _TICK_S
        self._timer = self._loop.call_later(self._due - self._clock(), self._tick)
