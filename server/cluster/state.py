"""State that outlives a request and that gateways may share: tenants, limits, fairness, operators' changes."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any

from server.admission.dispatch import Lines
from server.admission.limits import Gate
from server.admission.live_policy import LivePolicy
from server.background import Background
from server.cluster.account_sync import AccountSync
from server.cluster.agreement import REDIS_SERVERS, TENANT_FILE, Agreement
from server.cluster.local_sync import Process
from server.cluster.records import Records
from server.cluster.replicas import AWAY_S, KnownRing, Replicas
from server.fleet.fleet import Fleet
from server.fleet.registry import Registry
from server.request.directory import TenantFile, Tenants
from server.request.tiers import TierCosts
from server.settings import Settings, admin_address
from server.store.sharded import store_at
from server.store.socket_store import LOCAL, SHARED, SocketStore
from server.store.store import MemoryStore, Store

log = logging.getLogger("evenhand.shared")

FOLLOW_S = 0.25
REGISTRY_S = 1.0
STORE_START_S = 10.0  # for how long a process waits for the process that holds the stores of its gateway


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_private(settings: Settings) -> bool:
    """Whether nobody but this machine reaches the gateway, at either of its addresses."""
    address = admin_address(settings, settings.port)
    return is_loopback(settings.host) and (address is None or is_loopback(address[0]))


class ClusterState:
    """The shared state of one gateway. Without a Redis it is the state of this process alone, or of all processes of
    this gateway, and ends with them."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        lines: Lines,
        policy: LivePolicy,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        process: Process | None = None,
        background: Background | None = None,
    ) -> None:
        """ValueError for a tenant file or an address that cannot be, and for an open gateway that others can reach."""
        self._background = background or Background(clock)
        self._ring = bool(settings.redis_url) or process is not None  # there may be other replicas
        self._hosted = not settings.redis_url and process is not None  # the store is a process of this gateway
        self._speaks = process is None or process.number == 0
        _refuse_strangers(settings)
        may_be_open = settings.allow_open or is_private(settings)
        self.tenants = Tenants(wall, open=may_be_open, learned=not self._ring)
        self.file = self._tenant_file(settings)
        self.store: Store = _store(settings, clock, process)
        self.local: Store = MemoryStore(clock) if process is None else SocketStore(process.socket, LOCAL)
        name = f"{settings.replica or socket.gethostname()}-{token_hex(4)}"
        ring = KnownRing()
        costs = TierCosts(settings.tiers.flex_cost, settings.tiers.priority_cost)
        self.gate = Gate(name, self.tenants.named, clock=clock, wall=wall, ring=ring, costs=costs)
        self.same_tenants = Agreement(TENANT_FILE, self._file_digest, clock)
        self.same_servers = Agreement(REDIS_SERVERS, lambda: self.replicas.generation, clock)
        self.replicas = self._replicas(name, ring, AccountSync(lambda: lines.by_model, clock), clock, settings.sync_s)
        self.records = Records(
            self.store,
            self.tenants,
            policy,
            lines.names,
            fleet,
            lambda: lines.by_model.values(),
            self.replicas.confirm if self._ring else None,
        )
        self.replicas.on_records.append(self.records.are_stale)
        self.replicas.on_loss.append(self.records.are_lost)
        self._names = lines.names
        self._registry = Registry(self.store, fleet, clock)

    def _replicas(
        self, name: str, ring: KnownRing, ledger: AccountSync, clock: Callable[[], float], sync_s: float
    ) -> Replicas:
        """This gateway among its replicas, and what it exchanges with them: limits, accounts, how it is configured."""
        parts = (self.gate, ledger, self.same_tenants, self.same_servers)
        replicas = Replicas(name, self.store, ring, parts, (self.gate,), clock=clock, sync_s=sync_s)
        replicas.on_silence.append(ledger.silence)
        return replicas

    def _file_digest(self) -> str:
        """Of the tenant file; empty without one."""
        return "" if self.file is None else self.file.digest

    def _tenant_file(self, settings: Settings) -> TenantFile | None:
        if settings.tenants is None:
            return None
        return TenantFile(settings.tenants, self.tenants, metered=settings.cost.meter)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps everything fresh while the block runs. What the store has is known before it begins, if it answers."""
        if self._ring:
            await self.replicas.exchange()
        await self.records.follow()
        if self._hosted:
            await self._learn_tenants()
        if self._speaks and self.tenants.open and self.tenants.learned:
            log.warning(
                "no tenant is configured: this gateway is OPEN, anybody who reaches it may use it without a key"
            )
        tasks = [self._background.start("follow shared state", self._follow)]
        if self._ring:
            tasks.append(self._background.start("exchange with replicas", self.replicas.run))
            tasks.append(self._background.start("follow worker registry", self._follow_registry))
        try:
            yield
        finally:
            await Background.stop(*tasks)
            if self._ring:
                await self.replicas.exchange()  # what was used last is told, too
            await self.store.close()

    async def _learn_tenants(self) -> None:
        """Waits for a store of this gateway that is being started anew: the other processes serve meanwhile, and this
        one would refuse every key."""
        for _ in range(round(STORE_START_S / AWAY_S)):
            if self.tenants.learned:
                return
            await asyncio.sleep(AWAY_S)
            await self.replicas.exchange()
            await self.records.follow()

    async def _follow(self) -> None:
        while True:
            if self.file is not None and self.file.changed():
                await asyncio.to_thread(self.file.look)  # a large file takes a second to read
            await self.records.follow()
            await asyncio.sleep(FOLLOW_S)

    async def _follow_registry(self) -> None:
        while True:
            await self._registry.follow()
            await asyncio.sleep(REGISTRY_S)

    def store_state(self) -> tuple[bool, int]:
        """Whether the store answers, and how many gateways share it."""
        return (self.replicas.up, self.replicas.count) if self._ring else (True, 1)

    def notes(self) -> dict[str, Any]:
        """The part of /ready on shared state: a gateway without its store, or with a broken tenant file, serves from
        its last known state."""
        notes: dict[str, Any] = {}
        if self._ring:
            notes["store"] = {
                "up": self.replicas.up,
                "replicas": self.replicas.count,
                **({"problem": problem} if (problem := self.replicas.problem or self.same_servers.problem()) else {}),
            }
        wrong = (self.file.problem if self.file is not None else "", self.same_tenants.problem())
        if any(wrong):
            notes["tenants"] = {"problem": " ".join(filter(None, wrong))}
        if problems := self._names.problems():
            notes["model_names"] = {"problems": problems}
        if problems := self._names.adapters.problems():
            notes["adapters"] = {"problems": problems}
        return notes


def _refuse_strangers(settings: Settings) -> None:
    """ValueError for a gateway without tenants that other machines can reach, unless that is allowed."""
    if settings.redis_url or settings.tenants or settings.allow_open or is_private(settings):
        return
    reached = settings.admin_host if is_loopback(settings.host) else settings.host
    raise ValueError(
        f"without tenants anybody who reaches {reached} could use this gateway: use --tenants FILE, "
        "listen on 127.0.0.1, or pass --allow-open if you want that"
    )


def _store(settings: Settings, clock: Callable[[], float], process: Process | None) -> Store:
    if settings.redis_url:
        return store_at([url.get_secret_value() for url in settings.redis_url])
    return MemoryStore(clock) if process is None else SocketStore(process.socket, SHARED)
