"""How long one exchange between two gateways holds their event loops, by the tenants that changed since the last."""

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

    async def cpu_ms(self) -> float:
        """CPU of one exchange, in milliseconds; the process waits for Redis in between."""
        began = time.process_time()
        await self.replicas.exchange()
        return 1e3 * (time.process_time() - began)


async def _measured(url: str, tenants: int) -> Mapping[str, float]:
    one, other = Teller("one", url), Teller("other", url)
    told, heard = [], []
    for _ in range(ROUNDS):
        one.serve(tenants)
        told.append(await one.cpu_ms())
        heard.append(await other.cpu_ms())
    await one.store.close()
    await other.store.close()
    return {"tell_ms": median(told[1:]), "hear_ms": median(heard[1:])}


def exchange_cost(url: str, tenants: int) -> Mapping[str, float]:
    """Medians of `ROUNDS` − 1 exchanges: telling of so many changed tenants, and hearing of them."""
    costs: Mapping[str, float] = uvloop.run(_measured(url, tenants))
    return costs
