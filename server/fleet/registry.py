"""Workers that join through the store: their registrations, and a fleet that follows these."""

import logging
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from scheduler.workers import Role, Worker
from server.engine.access import Access
from server.fleet.fleet import Fleet
from server.store.store import Store, StoreAway

log = logging.getLogger("evenhand.registry")

HEARTBEAT_S = 2.0
WORKER_TTL_S = 10.0


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A worker's registration, as JSON in the store. draining: it finishes its requests and wants no new ones.

    key: what it wants to be asked with. Whoever reads the store has it, so no log, answer or metric may hold this text.
    ca, cert, cert_key: files of the gateway, for a worker that an operator names.
    """

    url: str
    role: Role = Role.BOTH
    slots: int = 256
    plugin: bool = False
    draining: bool = False
    hands_over: bool = False
    dtype: str = ""
    key: str = ""
    ca: str = ""
    cert: str = ""
    cert_key: str = ""
    gpus: int = 1

    @property
    def access(self) -> Access:
        """ValueError for a key or certificates that cannot be."""
        return Access(self.key, self.ca, self.cert, self.cert_key)

    def worker(self, worker_id: str) -> Worker:
        url = self.url.rstrip("/")
        return Worker(
            worker_id,
            url,
            self.role,
            self.slots,
            self.plugin,
            hands_over=self.hands_over,
            dtype=self.dtype,
            gpus=max(1, self.gpus),
        )


def registration_from(worker_id: str, text: str) -> Registration:
    """A registration read. ValueError if it is not one, or if its address cannot be one."""
    try:
        said = msgspec.json.decode(text, type=Registration)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ValueError(f"worker {worker_id!r}: {error}") from None
    if not said.url.startswith(("http://", "https://")) or said.slots < 1:
        raise ValueError(f"worker {worker_id!r} needs a URL that begins with http:// or https:// and one slot or more")
    check_access(worker_id, said.url, said)
    try:
        port = urlsplit(said.url).port
        if port == 0 or not urlsplit(said.url).hostname:
            raise ValueError("no host, or port 0")
    except ValueError as error:
        raise ValueError(f"worker {worker_id!r}: {said.url!r} is not an address: {error}") from None
    return said


def check_access(worker_id: str, url: str, said: Registration) -> None:
    """ValueError for a key or certificates that cannot be, or that the URL has no use for."""
    try:
        if said.access.for_tls and url.startswith("http://"):
            raise ValueError("certificates are for a URL that begins with https://")
    except ValueError as error:
        raise ValueError(f"worker {worker_id!r}: {error}") from None


def registration_of(worker: Worker, access: Access = Access(), *, draining: bool = False) -> str:  # noqa: B008 - frozen
    """What a worker writes into the store."""
    said = Registration(
        worker.url,
        worker.role,
        worker.slots,
        worker.plugin,
        draining,
        worker.hands_over,
        worker.dtype,
        access.key,
        access.ca,
        access.cert,
        access.cert_key,
        worker.gpus,
    )
    return msgspec.json.encode(said).decode()


class Registry:
    """Keeps a fleet as the store has it. Workers that came another way are left alone.

    A worker that is no longer listed stays for one more `WORKER_TTL_S`: after an outage the store may be empty, and
    its workers need a heartbeat to be back.
    """

    def __init__(self, store: Store, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._joined: dict[str, tuple[Worker, Access]] = {}
        self._missing_since: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._leaving: set[str] = set()

    async def follow(self) -> None:
        """Adds new workers and removes those that are gone. Nothing changes while the store is unavailable."""
        try:
            listed = await self._store.workers()
        except StoreAway:
            self._missing_since.clear()
            return
        now = self._clock()
        for worker_id in list(self._joined):
            if worker_id in listed:
                self._missing_since.pop(worker_id, None)
            elif now - self._missing_since.setdefault(worker_id, now) >= WORKER_TTL_S:
                await self._remove(worker_id, "its registration expired")
        for worker_id, text in listed.items():
            await self._take_in(worker_id, text)

    async def _take_in(self, worker_id: str, text: str) -> None:
        if self._refused.get(worker_id) == text:
            return
        try:
            said = registration_from(worker_id, text)
            worker, access = said.worker(worker_id), said.access
            if self._joined.get(worker_id) not in (None, (worker, access)):
                await self._remove(worker_id, "another worker took its name")
            if worker_id not in self._joined:
                self._fleet.add(worker, access)
        except ValueError as error:
            self._refused[worker_id] = text
            log.error("ignoring a registered worker: %s", error)
            return
        if worker_id not in self._joined:
            log.info("worker %s joined: %s", worker_id, worker.url)
        self._joined[worker_id] = worker, access
        self._let_leave(worker_id, said.draining)

    def _let_leave(self, worker_id: str, draining: bool) -> None:
        """A worker that is about to stop gets nothing new; one that has changed its mind does."""
        if worker_id not in self._fleet.members:  # deleted by hand
            return
        if draining and worker_id not in self._leaving:
            log.info("worker %s is about to leave: it gets no new requests", worker_id)
            self._leaving.add(worker_id)
            self._fleet.drain(worker_id)
        elif not draining and worker_id in self._leaving:
            self._leaving.discard(worker_id)
            self._fleet.resume(worker_id)

    async def _remove(self, worker_id: str, why: str) -> None:
        del self._joined[worker_id]
        self._leaving.discard(worker_id)
        self._missing_since.pop(worker_id, None)
        log.warning("worker %s left: %s", worker_id, why)
        if worker_id in self._fleet.members:
            await self._fleet.remove(worker_id)
