"""Several fake engines behind one gateway, and faults that strike whichever of them is asked."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from loadtest.fake.engine import EngineSetup, FakeEngine, SeenRequest
from loadtest.fake.faults import HEALTHY, Faults
from tests.server.conftest import INSTANT, Running, eventually, serving


class Struck(FakeEngine):
    """An engine whose faults are shared with others: what has struck one of them is over for all."""

    crowd: "Crowd"

    def _strike(self) -> None:
        self.crowd.struck()


class Crowd:
    """A gateway over several engines. `strike` arms faults: the first for whichever is asked first, and so on."""

    def __init__(self, setup: EngineSetup, count: int) -> None:
        self.engines = [Struck(setup, die=partial(self._die, number)) for number in range(count)]
        self.dead: set[Struck] = set()
        self.strikes = 0
        self.coming: list[Faults] = []
        self.gateway: Running
        for engine in self.engines:
            engine.crowd = self

    def strike(self, *faults: Faults) -> None:
        self.strikes = 0
        self.coming = [*faults, HEALTHY]
        self._arm()

    def _arm(self) -> None:
        faults = self.coming.pop(0)
        for engine in self.engines:
            engine.faults = faults

    def struck(self) -> None:
        self.strikes += 1
        self._arm()

    def _die(self, number: int) -> None:
        self.dead.add(self.engines[number])
        self.engines[number].die()

    async def mend(self) -> None:
        """All are there again, and nothing is left to strike."""
        for engine in self.engines:
            engine.heal()
        while self.dead:
            await self.dead.pop().listen()
        await eventually(lambda: len(self.gateway.server.fleet.ready()) == len(self.engines), "all workers are ready")

    @property
    def asked(self) -> list[SeenRequest]:
        return [seen for engine in self.engines for seen in engine.seen]


@contextlib.asynccontextmanager
async def over_crowd(setup: EngineSetup = INSTANT, *, count: int = 2, **settings: Any) -> AsyncIterator[Crowd]:
    crowd = Crowd(setup, count)
    settings = {"probe_s": 0.02, "health": {"failures": 1000}} | settings
    async with contextlib.AsyncExitStack() as stack:
        for engine in crowd.engines:
            await stack.enter_async_context(engine)
        urls = [engine.url for engine in crowd.engines]
        crowd.gateway = await stack.enter_async_context(serving(*urls, **settings))
        await crowd.mend()
        yield crowd
