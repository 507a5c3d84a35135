"""What one exchange between two gateways costs, and how long it holds an event loop, by the tenants that changed."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from statistics import median

import uvloop

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.tiers import TieredLanes
from server.cluster.account_sync import AccountSync
from server.cluster.replicas import KnownRing, Replicas
from server.store.redis_store import RedisStore

MODEL = "bench"
ROUNDS = 6  # the first is not counted: it tells everything
_TURN_S = 20e-6  # an idle turn of the loop, which is not the exchange's, takes less


@dataclass
class Teller:
    """One gateway's accounts and its place among the replicas of a Redis."""

    name: str
    url: str
    lanes: TieredLanes = field(default_factory=lambda: TieredLanes(build("vtc", {})))

    def __post_init__(self) -> None:
        self.store = RedisStore(self.url, timeout_s=30.0)
        accounts = AccountSync(lambda: {MODEL: self}, time.monotonic)
        self.replicas = Replicas(self.name, self.store, KnownRing(), (accounts,), clock=time.monotonic)
        self._number = count()

    def settle(self, now: float) -> None:
        """Nothing is charged later than it is made here."""

    def serve(self, tenants: int) -> None:
        """A request of each tenant."""
        for number in range(tenants):
            now = time.monotonic()
            self.lanes.push(Job(f"{next(self._number)}", f"t{number}", 10, now), now)
            self.lanes.finish(self.lanes.pop(now), Outcome.DONE, now)

    async def cost_ms(self) -> tuple[float, float]:
        """CPU of one exchange, and the most of it without a turn for others, in milliseconds."""
        spans: list[float] = []
        watch = asyncio.create_task(_turns(spans))
        await asyncio.sleep(0)
        await self.replicas.exchange()
        await asyncio.sleep(0)  # its last turn counts, too
        watch.cancel()
        return 1e3 * sum(span for span in spans if span > _TURN_S), 1e3 * max(spans)


async def _turns(spans: list[float]) -> None:
    """Adds the CPU seconds between its turns, in which others ran."""
    before = time.thread_time()
    while True:
        await asyncio.sleep(0)
        now = time.thread_time()
        spans.append(now - before)
        before = now


async def _measured(url: str, tenants: int) -> Mapping[str, float]:
    one, other = Teller("one", url), Teller("other", url)
    told, heard = [], []
    for _ in range(ROUNDS):
        one.serve(tenants)
        told.append(await one.cost_ms())
        heard.append(await other.cost_ms())
    await one.store.close()
    await other.store.close()
    (tell, tell_hold), (hear, hear_hold) = (map(median, zip(*costs[1:], strict=True)) for costs in (told, heard))
    return {"tell_ms": tell, "tell_hold_ms": tell_hold, "hear_ms": hear, "hear_hold_ms": hear_hold}


def exchange_cost(url: str, tenants: int) -> Mapping[str, float]:
    """Medians of `ROUNDS` − 1 exchanges: telling of so many changed tenants, and hearing of them."""
    costs: Mapping[str, float] = uvloop.run(_measured(url, tenants))
    return costs
