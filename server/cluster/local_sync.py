"""State that the processes of one gateway share: local workers that join and leave, and each process's metrics.

They meet in a store of their own, that of this gateway alone: records that each writes and all read several times a
second. A gateway of one process has it in its own memory.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.registry import CollectorRegistry

from scheduler.workers import Worker
from server.background import Background
from server.cluster.merged_metrics import Family, exposition, joined, lasting, read, taken, written
from server.engine.access import Access
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member
from server.fleet.registry import Registration, registration_from, registration_of
from server.store.store import Store, StoreAway

log = logging.getLogger("evenhand.siblings")

FOLLOW_S = 0.25
PUBLISH_S = 1.0
ASK_S = 10.0  # for how long a process waits for words of workers before it serves beside others
ASKED_S = 0.02  # between two looks
# Kinds of records. A worker's is its registration, empty once it was taken out; the others are by process number.
WORKER, STARTING, READY, METRICS, VIEW = "worker", "starting", "ready", "metrics", "view"


@dataclass(frozen=True, slots=True)
class Process:
    """One of the processes that are a gateway. socket: where their stores are served. again: it takes the place of one
    that has ended, while the others serve."""

    number: int
    socket: Path
    again: bool = False


class LocalSync:
    """One process among them. view: what operators see of it, published beside its metrics."""

    def __init__(
        self,
        store: Store,
        number: int,
        fleet: Fleet,
        registry: CollectorRegistry,
        background: Background,
        view: Callable[[], str],
    ) -> None:
        self._store = store
        self._background = background
        self._number = str(number)
        self._fleet = fleet
        self._registry = registry
        self._applied: dict[str, str] = {}
        self._inherited: list[Family] = []
        self._said_ready = ""
        self._view = view

    @asynccontextmanager
    async def running(self, process: Process | None) -> AsyncIterator[None]:
        """Follows the others while the block runs; what they did is known before it begins, if their store answers.

        process: this one, None if it is alone.
        """
        if process is None:
            yield
            return
        await self._inherit()
        await self.follow()
        if process.again:
            await self._ask_workers()
        tasks = [
            self._background.start("follow the other processes", lambda: self._repeat(self.follow, FOLLOW_S)),
            self._background.start("publish metrics", lambda: self._repeat(self.publish, PUBLISH_S)),
        ]
        try:
            yield
        finally:
            await Background.stop(*tasks)
            await self.publish()
            await self._store.close()

    async def _ask_workers(self) -> None:
        """Waits until every worker was asked how it is: before that, this process would refuse requests that the other
        processes, if they still serve, would answer."""
        for _ in range(round(ASK_S / ASKED_S)):
            if self._fleet.has_asked_all():
                return
            await asyncio.sleep(ASKED_S)

    async def _repeat(self, step: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            await step()
            await asyncio.sleep(pause_s)

    # workers
    async def add(self, worker: Worker, access: Access = Access()) -> None:  # noqa: B008 - frozen
        """A worker for all processes. StoreAway, and no change; ValueError if its id is taken."""
        if worker.id in self._fleet.members:
            raise ValueError(f"a worker named {worker.id!r} is already in the fleet")
        text = registration_of(worker, access)
        registration_from(worker.id, text)
        EngineClient(worker.url, access)  # tries its certificates
        await self._store.put(WORKER, worker.id, text)
        self._applied[worker.id] = text
        self._fleet.add(worker, access)

    async def remove(self, worker_id: str) -> None:
        """No process has this worker any more. StoreAway, and no change; KeyError if it is unknown here."""
        if worker_id not in self._fleet.members:
            raise KeyError(worker_id)
        await self._store.put(WORKER, worker_id, "")
        self._applied[worker_id] = ""
        await self._fleet.remove(worker_id)

    async def follow(self) -> None:
        """Applies changes made at the other processes. Nothing changes while the store is unavailable."""
        try:
            found = await self._store.records(WORKER)
            for worker_id, text in self._applied.items():
                if worker_id not in found:  # whoever holds the store was started anew, and knows nothing
                    await self._store.put(WORKER, worker_id, text)
            self._fleet.starting = await self._store.records(STARTING)
            await self._tell_ready()
        except StoreAway:
            return
        for worker_id, text in found.items():
            if self._applied.get(worker_id) != text:
                self._applied[worker_id] = text
                await self._apply(worker_id, text)

    async def _apply(self, worker_id: str, text: str) -> None:
        member = self._fleet.members.get(worker_id)
        try:
            said = registration_from(worker_id, text) if text else None
            if member is not None and said is not None and same_place(member, said):
                return
            if member is not None:
                await self._fleet.remove(worker_id)
            if said is not None:
                self._fleet.add(said.worker(worker_id), said.access)
        except ValueError as error:  # of another version, written by hand, or with certificates that are not here
            log.error("ignoring a registered worker: %s", error)

    async def _tell_ready(self) -> None:
        ready = str(len(self._fleet.ready()))
        if ready != self._said_ready:
            await self._store.put(READY, self._number, ready)
            self._said_ready = ready

    # metrics
    async def _inherit(self) -> None:
        """What a process with this number counted before it ended goes on counting, or rates would jump."""
        try:
            text = (await self._store.records(METRICS)).get(self._number)
        except StoreAway:
            return
        if text is not None:
            self._inherited = lasting(read(text))

    def _own(self) -> list[Family]:
        own = taken(self._registry)
        return joined([own, self._inherited]) if self._inherited else own

    async def publish(self) -> None:
        """Says what was counted here."""
        try:
            await self._store.put(METRICS, self._number, written(self._own()))
            await self._store.put(VIEW, self._number, self._view())
        except StoreAway as error:
            log.warning("%s", error)

    async def views(self) -> list[str]:
        """What operators see of the other processes, as of up to a second ago; nothing while their store is away."""
        try:
            told = await self._store.records(VIEW)
        except StoreAway:
            return []
        return [text for number, text in told.items() if number != self._number]

    async def metrics(self) -> bytes:
        """What all processes counted, the others up to a second ago; this one's alone while their store is away."""
        own = self._own()
        try:
            told = await self._store.records(METRICS)
        except StoreAway:
            told = {}
        others = [read(text) for number, text in told.items() if number != self._number]
        return exposition(joined([own, *others]) if others else own)


def same_place(member: Member, said: Registration) -> bool:
    """Whether two workers are the same, apart from what probes have learned of them."""
    worker, other = member.worker, said.worker(member.worker.id)
    same = (worker.url, worker.role, worker.slots) == (other.url, other.role, other.slots)
    return same and member.access == said.access
