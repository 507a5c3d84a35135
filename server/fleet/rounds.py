"""The schedule of worker probes: one timer for all workers, with their probes spread over time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from heapq import heappop, heappush
from random import Random

from server.background import Background

log = logging.getLogger("evenhand.fleet")

TICK_S = 0.02  # looks that are due within it begin together
SPREAD = 0.1  # of a pause: workers that joined together are soon looked at one by one


class Rounds:
    """Looks at things by name, again and again.

    look: one look; what it raises is told to `background`, and the next look comes all the same. pause_s: from the end
    of a look at a thing to the next one.
    """

    def __init__(
        self,
        look: Callable[[str], Awaitable[None]],
        pause_s: Callable[[str], float],
        *,
        clock: Callable[[], float],
        background: Background,
    ) -> None:
        self._look = look
        self._pause_s = pause_s
        self._clock = clock
        self._background = background
        self._random = Random(0)  # noqa: S311 - no secret
        self._due: dict[str, float] = {}  # those that are not being looked at
        self._heap: list[tuple[float, str]] = []
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._woken = asyncio.Event()
        self._timer: asyncio.Task[None] | None = None

    def add(self, name: str) -> None:
        """A thing is there; it is looked at now. Needs a running loop."""
        if self._timer is None:
            self._timer = self._background.start("probe workers", self._run)
        self._plan(name, self._clock())
        self._woken.set()

    def soon(self, name: str) -> None:
        """Checks an item now; if a check is running already, once more after it."""
        if name in self._looking:
            self._again.add(name)
        elif name in self._due:
            self._plan(name, self._clock())
            self._woken.set()

    async def remove(self, name: str) -> None:
        """A thing is not looked at any more. Returns when a look at it is over."""
        self._due.pop(name, None)
        self._again.discard(name)
        if (looking := self._looking.pop(name, None)) is not None:
            await Background.stop(looking)

    async def close(self) -> None:
        """Nothing is looked at any more."""
        for name in [*self._due, *self._looking]:
            await self.remove(name)
        if self._timer is not None:
            await Background.stop(self._timer)
            self._timer = None

    def _plan(self, name: str, due: float) -> None:
        self._due[name] = due
        heappush(self._heap, (due, name))

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            self._begin_due()
            wait_s = max(TICK_S, self._heap[0][0] - self._clock()) if self._heap else None
            try:
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
            except TimeoutError:
                continue

    def _begin_due(self) -> None:
        now, heap = self._clock(), self._heap
        while heap and heap[0][0] <= now:
            due, name = heappop(heap)
            if self._due.get(name) == due:  # else it was removed, or planned anew
                del self._due[name]
                self._looking[name] = asyncio.get_running_loop().create_task(self._once(name), name=f"probe {name}")

    async def _once(self, name: str) -> None:
        try:
            await self._look(name)
        except Exception as error:  # whatever it is, the next look must come
            log.exception("the check of %r failed", name)
            self._background.failed(f"probe {name}", f"{type(error).__name__}: {error}")
        pause_s = self._pause_s(name) * (1 + SPREAD * (self._random.random() - 0.5))
        if name in self._again:
            self._again.discard(name)
            pause_s = 0.0
        if self._looking.pop(name, None) is not None:
            self._plan(name, self._clock() + pause_s)
            if not pause_s or self._heap[0][1] == name:
                self._woken.set()
