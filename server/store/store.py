"""What several gateways share: `Store` says how, and `MemoryStore` does it for gateways of one process.

Nothing here is ever waited for by a request. Each gateway writes only what is its own, as absolute values, so that
writing it again, late or twice, changes nothing: after an outage everybody writes all that it has, and it is right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Protocol

Kept = tuple[str, str, str]  # period, name, replica
ROUND = "round"  # the live row "NUMBER BORN", two whole numbers, that says how far its replica has told everything
SLICE = 100  # rows after which others get their turn: some 0.4 ms


class StoreAway(Exception):
    """The store does not answer, or not in time; the message says why."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a gateway tells the others in one exchange.

    replica: who it is; a name that no other process ever had.
    ttl_s: it counts as gone if nothing was heard of it for so long.
    cursor, generation: from its last `News`; 0 and "" at first.
    live: its own rows that changed, as they stand now; the store drops them when the replica is gone. The row `ROUND`
    is heard as NUMBER only when everything that was offered up to then can be heard.
    kept: rows that outlive replicas, until their period is forgotten; of two values for one row the larger holds.
    """

    replica: str
    ttl_s: float
    cursor: int = 0
    generation: str = ""
    live: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[Kept, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What a gateway hears in one exchange: everything that changed since its cursor, all seen at one moment.

    generation: another one than before means that the store lost what it had.
    cursor: to be given in the next offer, with the generation.
    records: the generation of what holds the records, where that is only a part of the store; "" is all of it.
    known: the replica was alive for the store; if not, its live rows were dropped, and it must offer all of them.
    version: changes whenever a record does.
    alive: the replicas that are there, the asking one among them.
    live: rows of the other replicas, by replica and key. kept: rows of all.
    """

    generation: str
    cursor: int
    known: bool
    version: int
    alive: frozenset[str]
    live: Mapping[str, Mapping[str, str]]
    kept: Mapping[Kept, int]
    records: str = ""


class Store(Protocol):
    """Shared state. Every method may raise StoreAway."""

    async def exchange(self, offer: Offer) -> News:
        """Writes the offer and reads what is new, in one atomic step. An offer that is repeated changes nothing."""

    async def forget(self, period: str) -> None:
        """Drops all kept rows of a period."""

    async def put(self, kind: str, name: str, value: str) -> None:
        """Writes a record, e.g. a tenant."""

    async def drop(self, kind: str, name: str) -> bool:
        """Deletes a record; whether there was one."""

    async def records(self, kind: str) -> dict[str, str]:
        """All records of a kind by name."""

    async def shelve(self, shelf: str, name: str, value: str, ttl_s: float) -> None:
        """Writes a value without notifying anybody; the shelf is removed after `ttl_s` without a write."""

    async def shelved(self, shelf: str) -> dict[str, str]:
        """All values of a shelf by name."""

    async def register(self, worker_id: str, value: str, ttl_s: float) -> None:
        """A worker is there, for so long unless it says so again."""

    async def leave(self, worker_id: str) -> None:
        """A worker goes; no error if it is unknown."""

    async def workers(self) -> dict[str, str]:
        """The workers whose time has not run out, by id."""

    async def close(self) -> None:
        """Ends all connections."""


class MemoryStore:
    """The store of gateways in one process; what it holds ends with the process. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Loses everything, as a server does that keeps nothing on disk and is started anew."""
        self._generation = token_hex(8)
        self._seq = 0
        self._version = 0
        self._alive: dict[str, float] = {}
        self._live: dict[str, dict[str, tuple[int, str]]] = {}
        self._kept: dict[Kept, tuple[int, int]] = {}
        self._records: dict[str, dict[str, str]] = {}
        self._workers: dict[str, tuple[float, str]] = {}
        self._shelves: dict[str, tuple[float, dict[str, str]]] = {}

    async def exchange(self, offer: Offer) -> News:
        now = self._clock()
        self._bury(now)
        known = offer.replica in self._alive
        self._alive[offer.replica] = now + offer.ttl_s
        self._seq += 1
        own = self._live.setdefault(offer.replica, {})
        own.update({key: (self._seq, value) for key, value in offer.live.items()})
        for row, amount in offer.kept.items():
            if amount > self._kept.get(row, (0, -1))[1]:
                self._kept[row] = (self._seq, amount)
        cursor = offer.cursor if offer.generation == self._generation else 0
        live = {
            replica: {key: value for key, (seq, value) in rows.items() if seq > cursor}
            for replica, rows in self._live.items()
            if replica != offer.replica
        }
        return News(
            generation=self._generation,
            cursor=self._seq,
            known=known,
            version=self._version,
            alive=frozenset(self._alive),
            live={replica: rows for replica, rows in live.items() if rows},
            kept={row: amount for row, (seq, amount) in self._kept.items() if seq > cursor},
        )

    def _bury(self, now: float) -> None:
        for replica in [replica for replica, until in self._alive.items() if until <= now]:
            del self._alive[replica]
            self._live.pop(replica, None)

    async def forget(self, period: str) -> None:
        self._kept = {row: value for row, value in self._kept.items() if row[0] != period}

    async def put(self, kind: str, name: str, value: str) -> None:
        self._records.setdefault(kind, {})[name] = value
        self._version += 1

    async def drop(self, kind: str, name: str) -> bool:
        self._version += 1
        return self._records.get(kind, {}).pop(name, None) is not None

    async def records(self, kind: str) -> dict[str, str]:
        return dict(self._records.get(kind, {}))

    async def shelve(self, shelf: str, name: str, value: str, ttl_s: float) -> None:
        now = self._clock()
        self._shelves = {name: held for name, held in self._shelves.items() if held[0] > now}
        _, values = self._shelves.get(shelf, (0.0, {}))
        self._shelves[shelf] = now + ttl_s, values | {name: value}

    async def shelved(self, shelf: str) -> dict[str, str]:
        until, values = self._shelves.get(shelf, (0.0, {}))
        return dict(values) if until > self._clock() else {}

    async def register(self, worker_id: str, value: str, ttl_s: float) -> None:
        self._workers[worker_id] = (self._clock() + ttl_s, value)

    async def leave(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    async def workers(self) -> dict[str, str]:
        now = self._clock()
        self._workers = {worker_id: entry for worker_id, entry in self._workers.items() if entry[0] > now}
        return {worker_id: value for worker_id, (_, value) in self._workers.items()}

    async def close(self) -> None:
        return
