"""The exchange with this gateway's replicas, several times a second, through the store.

Nobody waits for this. Between two exchanges everybody decides on what is known; when the store is away that is what
was last known, and when it is back everybody tells everything again.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from server.store.store import ROUND, SLICE, Kept, News, Offer, Store, StoreAway

log = logging.getLogger("evenhand.replicas")

SYNC_S = 0.1
TTL_S = 3.0
AWAY_S = 0.5  # between two tries while the store is away
FORGET_S = 24 * 3600.0


class Part(Protocol):
    """Something that is shared: rows under a prefix of their own, each with an absolute value."""

    prefix: str

    def changed(self, *, everything: bool) -> Iterator[tuple[str, str] | None]:
        """Own rows, key and value, that are not the same as when this was last called; all of them if `everything`.

        Requests may go on between two rows, and where it yields None, which it does while it looks at many others.
        """

    def heard(self, rows: Mapping[str, Mapping[str, str]], from_zero: Collection[str]) -> Iterator[None]:
        """Takes over others' rows by replica and key, all seen at one moment; yields where requests may go on.

        from_zero: replicas whose new rows count from zero, for this one has followed them all along; of any other the
        first value of a row is where it begins, for what was before is in others' state already.
        """

    def gone(self, replica: str) -> None:
        """A replica is gone: what it used still counts, what it had running does not. It may return."""

    def forget(self, replica: str) -> None:
        """A replica has been gone for so long that it will not come back."""


class KeptPart(Protocol):
    """Something that outlives replicas."""

    def kept_changed(self, *, everything: bool) -> dict[Kept, int]:
        """Rows that changed; all that are known, others' too, if `everything`."""

    def kept_heard(self, rows: dict[Kept, int]) -> None:
        """Rows as they stand in the store."""

    def kept_over(self) -> Iterable[str]:
        """Periods whose rows nobody needs any more, each named once."""


@dataclass(slots=True)
class KnownRing:
    """What this replica knows of all of them; `Replicas` keeps it.

    count: how many there are, this one too; as last known when the store is away.
    round: grows when every replica that is there has told what it did in the round before; it stands still while one
    of them, or the store, is not heard.
    """

    count: int = 1
    round: int = 0


class Replicas:
    """The replicas as this one sees them. parts, kept: the state that they exchange."""

    def __init__(
        self,
        name: str,
        store: Store,
        ring: KnownRing,
        parts: Sequence[Part],
        kept: Sequence[KeptPart] = (),
        *,
        clock: Callable[[], float],
        sync_s: float = SYNC_S,
    ) -> None:
        self.name = name
        self.store = store
        self.ring = ring
        self._parts = parts
        self._kept = kept
        self.on_records: list[Callable[[], None]] = []
        self.on_loss: list[Callable[[], None]] = []
        self.on_silence: list[Callable[[], None]] = []
        self.up = False
        self.problem = "the store has not been contacted yet"
        self.exchanges = 0
        self._clock = clock
        self._sync_s = sync_s
        self._ttl_s = max(TTL_S, 10 * sync_s)
        self._news: News | None = None
        self._version: int | None = None
        self._records = ""  # the generation of what holds the records
        self._everything = True
        self._restore = False
        self._rounds: dict[str, int] = {}
        self._met: set[str] = set()
        self._forgotten: set[str] = set()
        self._gone: dict[str, float] = {}
        self._heard_at = clock()
        self._born = 0
        self._one_at_a_time = asyncio.Lock()
        self._running: set[asyncio.Future[None]] = set()  # so that none is collected while it runs

    @property
    def count(self) -> int:
        """How many there are, this one too."""
        return self.ring.count

    @property
    def generation(self) -> str:
        """Of the store, as last heard; empty before that."""
        return self._news.generation if self._news is not None else ""

    async def run(self) -> None:
        """Exchanges until it is cancelled."""
        while True:
            began = self._clock()
            await self.exchange()
            pause_s = self._sync_s if self.up else AWAY_S
            await asyncio.sleep(max(pause_s / 4, pause_s - (self._clock() - began)))

    async def confirm(self) -> None:
        """One more exchange, now. StoreAway if the store does not answer."""
        await self.exchange()
        if not self.up:
            raise StoreAway(self.problem)

    async def exchange(self) -> None:
        """Tells and hears once, one at a time. Never raises StoreAway: `up` says how it went.

        Goes on if whoever asked for it is cancelled: what a half-heard exchange has left out is not said again.
        """
        running = asyncio.ensure_future(self._alone())
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        await asyncio.shield(running)

    async def _alone(self) -> None:
        async with self._one_at_a_time:
            await self._exchange()

    async def _exchange(self) -> None:
        everything, self._everything = self._everything, True  # until what follows is known to be written
        offer = await self._offer(everything=everything)
        try:
            news = await self.store.exchange(offer)
        except StoreAway as error:
            if self.up or self._news is None:
                said = str(error).rstrip(".")
                log.error("%s. Serving from the last known state; %d replicas share the limits.", said, self.count)
            self.up, self.problem = False, str(error)
            if self._clock() - self._heard_at > self._ttl_s:
                for callback in self.on_silence:
                    callback()
            return
        if not self.up:
            log.info("the shared store answers; %d replicas", len(news.alive))
        await self._hear(news)
        self.up, self.problem = True, ""
        self.exchanges += 1
        await self._forget()

    async def _offer(self, *, everything: bool) -> Offer:
        live = {ROUND: f"{self.ring.round} {self._born}"}
        for part in self._parts:
            for row in part.changed(everything=everything):
                if row is not None:
                    live[part.prefix + row[0]] = row[1]
                if row is None or len(live) % SLICE == 0:
                    await asyncio.sleep(0)
        kept: dict[Kept, int] = {}
        for keeper in self._kept:
            kept |= keeper.kept_changed(everything=self._restore or everything)
        news = self._news
        return Offer(
            self.name, self._ttl_s, news.cursor if news else 0, news.generation if news else "", live=live, kept=kept
        )

    async def _hear(self, news: News) -> None:
        before, self._news = self._news, news
        self._heard_at = self._clock()
        lost = before is not None and before.generation != news.generation
        self._everything = self._restore = not news.known or lost
        if before is None or lost:
            self._born = news.cursor
        self.ring.count = max(1, len(news.alive | {self.name}))
        self._part_from(news.alive)
        await self._hear_rows(news)
        coming = iter(news.kept.items())
        while rows := dict(islice(coming, SLICE)):
            for keeper in self._kept:
                keeper.kept_heard(rows)
            await asyncio.sleep(0)
        self._next_round(news.alive - {self.name})
        holds_records = news.records or news.generation
        records_lost = self._records not in ("", holds_records)
        changed = news.version != self._version or records_lost
        self._version, self._records = news.version, holds_records
        for callback in [*(self.on_loss if records_lost else ()), *(self.on_records if changed else ())]:
            callback()

    def _part_from(self, alive: frozenset[str]) -> None:
        now = self._clock()
        for replica in [replica for replica in self._rounds if replica not in alive]:
            del self._rounds[replica]
            self._gone[replica] = now
            for part in self._parts:
                part.gone(replica)
        for replica in [replica for replica, since in self._gone.items() if replica in alive or now - since > FORGET_S]:
            del self._gone[replica]
            if replica not in alive:
                self._met.discard(replica)
                self._forgotten.add(replica)
                for part in self._parts:
                    part.forget(replica)

    async def _hear_rows(self, news: News) -> None:
        live = {replica: dict(rows) for replica, rows in news.live.items() if replica in news.alive}
        from_zero = self._met & live.keys()
        for replica, rows in live.items():
            self._rounds.setdefault(replica, -1)
            if ROUND in rows:
                number, born = rows.pop(ROUND).split()
                self._rounds[replica] = int(number)
                if int(born) > self._born and replica not in self._forgotten:
                    from_zero.add(replica)
        self._met |= live.keys()
        self._forgotten -= live.keys()
        own = await self._by_part(live)
        for part in self._parts:
            for _ in part.heard(own[part.prefix], from_zero):
                await asyncio.sleep(0)

    async def _by_part(self, live: Mapping[str, Mapping[str, str]]) -> Mapping[str, dict[str, dict[str, str]]]:
        """The rows by the prefix of their part, then by replica and key."""
        own: dict[str, dict[str, dict[str, str]]] = {part.prefix: {name: {} for name in live} for part in self._parts}
        number = 0
        for replica, rows in live.items():
            for name, value in rows.items():
                prefix, colon, key = name.partition(":")
                if (part := own.get(prefix + colon)) is not None:  # newer gateways may tell more
                    part[replica][key] = value
                number += 1
                if number % SLICE == 0:
                    await asyncio.sleep(0)
        return own

    def _next_round(self, others: frozenset[str]) -> None:
        rounds = [self._rounds.get(replica, -1) for replica in others]
        if all(number >= self.ring.round for number in rounds):
            self.ring.round = max([self.ring.round + 1, *rounds])

    async def _forget(self) -> None:
        for keeper in self._kept:
            for period in keeper.kept_over():
                try:
                    await self.store.forget(period)
                except StoreAway as error:
                    log.warning("%s. The rows of %s stay in the store.", error, period)
