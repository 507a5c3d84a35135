"""Several gateways' shared state in virtual time, over one store."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from server.admission.limits import AtLimit, Gate, LimitStanding
from server.cluster.replicas import KnownRing, Part, Replicas
from server.request.tenants import Limits, Tenant
from server.store.store import MemoryStore, News, Offer, StoreAway

NOON_S = 1_748_779_200.0  # 2025-06-01 12:00 UTC


class Store(MemoryStore):
    """A store that can be away, for all or for some."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.away = False
        self.cut_off: set[str] = set()
        self.loses_replies = False

    async def exchange(self, offer: Offer) -> News:
        if self.away or offer.replica in self.cut_off:
            raise StoreAway("the network is down")
        news = await super().exchange(offer)
        if self.loses_replies:
            raise StoreAway("the answer was lost")
        return news


@dataclass
class Answer:
    """An answer that takes headers."""

    extra_headers: bytes = b""

    def header(self, name: str) -> str | None:
        for line in self.extra_headers.decode().split("\r\n"):
            key, _, value = line.partition(": ")
            if key == name:
                return value
        return None


@dataclass
class World:
    """A clock that is moved by hand, a store, and the tenants."""

    now: float = 1000.0
    tenants: dict[str, Tenant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.clock)

    def clock(self) -> float:
        return self.now

    def wall(self) -> float:
        return NOON_S + self.now - 1000.0

    def tenant(self, name: str = "acme", **limits: float) -> Tenant:
        tenant = Tenant(name, limits=Limits(**limits))  # type: ignore[arg-type]  # whole numbers where it wants them
        self.tenants[name] = tenant
        return tenant

    def gate(self, name: str = "only") -> Gate:
        return Gate(name, self.tenants.get, clock=self.clock, wall=self.wall)

    def replica(self, name: str, *parts: Part) -> "Member":
        return Member(self, name, parts)


class Member:
    """One gateway: its gate, and the exchanges that it makes when it is told to."""

    def __init__(self, world: World, name: str, parts: tuple[Part, ...]) -> None:
        self.name = name
        ring = KnownRing()
        self.gate = Gate(name, world.tenants.get, clock=world.clock, wall=world.wall, ring=ring)
        self.replicas = Replicas(name, world.store, ring, [self.gate, *parts], [self.gate], clock=world.clock)

    async def sync(self) -> None:
        await self.replicas.exchange()

    def try_enter(self, tenant: Tenant, tokens: int = 0) -> LimitStanding | None:
        return try_enter(self.gate, tenant, tokens)


def try_enter(gate: Gate, tenant: Tenant, tokens: int = 0) -> LimitStanding | None:
    try:
        return gate.enter(tenant, tokens, Answer())
    except AtLimit:
        return None


async def sync_all(members: list[Member], times: int = 3, order: random.Random | None = None) -> None:
    for _ in range(times):
        for member in order.sample(members, len(members)) if order else members:
            await member.sync()
