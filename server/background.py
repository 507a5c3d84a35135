"""Long-lived tasks: one that fails is logged, shown in /ready and started again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

log = logging.getLogger("evenhand.background")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a task that has run for so long since its last failure is healthy again


@dataclass(slots=True)
class _Failure:
    said: str
    count: int
    at: float


class Background:
    """The long-lived tasks of one gateway. Every such task is started here, so that none can end unseen."""

    def __init__(self, clock: Callable[[], float] = monotonic, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._clock = clock
        self._first_pause_s = first_pause_s
        self._failures: dict[str, _Failure] = {}

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Runs `work()`, which should not return, until the task is cancelled. Needs a running loop.

        If it raises or returns, it is called again after a pause that doubles up to `LONGEST_PAUSE_S`.
        """
        return asyncio.get_running_loop().create_task(self._keep(name, work), name=name)

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                try:
                    await work()
                    self.failed(name, "it returned")
                except Exception as error:  # whatever it is, the task must go on
                    log.exception("the task %r failed", name)
                    self.failed(name, f"{type(error).__name__}: {error}")
                pause_s = self._first_pause_s * 2 ** (self._failures[name].count - 1)
                await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))
        finally:
            self._failures.pop(name, None)

    def failed(self, name: str, said: str) -> None:
        """Notes a failure."""
        now = self._clock()
        before = self._failures.get(name)
        count = 1 if before is None or now - before.at > STEADY_S else min(before.count + 1, 32)
        self._failures[name] = _Failure(said, count, now)
        log.error("the task %r failed %d times, last: %s", name, count, said)

    def problems(self) -> dict[str, str]:
        """Tasks that failed within the last `STEADY_S` seconds, and why."""
        now = self._clock()
        return {name: failure.said for name, failure in list(self._failures.items()) if now - failure.at <= STEADY_S}

    @staticmethod
    async def stop(*tasks: asyncio.Task[None]) -> None:
        """Cancels tasks and waits for their end."""
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
