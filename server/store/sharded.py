"""`Store` over several others, its shards, so that what one Redis would have to do is divided among several."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from zlib import crc32

from server.store.redis_store import RedisStore
from server.store.store import ROUND, SLICE, Kept, News, Offer, Store, StoreAway

T = TypeVar("T")


@dataclass(slots=True)
class _Heard:
    """How far a replica has heard a shard.

    rounds: the number and birth that each other replica last told there.
    """

    cursor: int = 0
    generation: str = ""
    rounds: dict[str, tuple[int, int]] = field(default_factory=dict)


class ShardedStore:
    """Spreads rows over `shards`: live rows by their key and kept rows by their name, so that all replicas' rows of one
    tenant are in one shard and are seen at one moment. Records, shelves and workers are in the first shard.

    An exchange asks all shards at once. It succeeds when all of them answer: otherwise it is StoreAway, and nothing is
    heard. After that, the shards that were away are asked first, and the others only when those answer: so a replica
    that cannot reach one shard is soon gone from all of them, and does not seem to wait for ever to those that can.

    A replica is alive if any shard knows it: one that has just joined, or is not yet back in a shard that lost its
    rows, counts, which makes limits tighter and never wider. A round counts when it has been heard in all shards.

    shards: in the same order at every gateway.
    """

    def __init__(self, shards: Sequence[Store]) -> None:
        self._shards = shards
        self._first = shards[0]
        self._away: frozenset[int] = frozenset()
        self._heard: dict[str, tuple[tuple[int, str], Sequence[_Heard]]] = {}  # by replica: what it was given last

    async def exchange(self, offer: Offer) -> News:
        given, before = self._heard.get(offer.replica, ((0, ""), ()))
        if not before or given != (offer.cursor, offer.generation):
            before = [_Heard() for _ in self._shards]
        news = await self._exchange_all(await self._divided(offer, before))
        heard = [_Heard(one.cursor, one.generation, _rounds(old, one)) for old, one in zip(before, news, strict=True)]
        merged = await _merged(news, heard)
        self._heard[offer.replica] = (merged.cursor, merged.generation), heard
        return merged

    async def _divided(self, offer: Offer, heard: Sequence[_Heard]) -> list[Offer]:
        """What each shard is offered."""
        count = len(self._shards)
        everywhere = {ROUND: offer.live[ROUND]} if ROUND in offer.live else {}
        live: list[dict[str, str]] = [dict(everywhere) for _ in range(count)]
        kept: list[dict[Kept, int]] = [{} for _ in range(count)]
        for number, (key, value) in enumerate(offer.live.items(), 1):
            if key != ROUND:
                live[_shard_of(key, count)][key] = value
            if number % SLICE == 0:
                await asyncio.sleep(0)
        for number, (row, amount) in enumerate(offer.kept.items(), 1):
            kept[_shard_of(row[1], count)][row] = amount
            if number % SLICE == 0:
                await asyncio.sleep(0)
        return [
            replace(offer, cursor=at.cursor, generation=at.generation, live=live[number], kept=kept[number])
            for number, at in enumerate(heard)
        ]

    async def _exchange_all(self, offers: Sequence[Offer]) -> list[News]:
        news: dict[int, News] = {}
        away = self._away
        for numbers in (sorted(away), sorted(set(range(len(offers))) - away)):
            asked = [self._shards[number].exchange(offers[number]) for number in numbers]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            news |= self._answered(numbers, answers)
        _check_different([news[number].generation for number in range(len(offers))])
        return [news[number] for number in range(len(offers))]

    def _answered(self, numbers: Iterable[int], answers: Sequence[News | BaseException]) -> dict[int, News]:
        """The answers of these shards. StoreAway if one of them is away."""
        problems: dict[int, StoreAway] = {}
        news: dict[int, News] = {}
        for number, answer in zip(numbers, answers, strict=True):
            if isinstance(answer, StoreAway):
                problems[number] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                news[number] = answer
        self._away = (self._away - news.keys()) | problems.keys()
        if problems:
            raise StoreAway("; ".join(str(problem).rstrip(".") for problem in problems.values()))
        return news

    async def forget(self, period: str) -> None:
        await _all(shard.forget(period) for shard in self._shards)

    async def put(self, kind: str, name: str, value: str) -> None:
        await self._first.put(kind, name, value)

    async def drop(self, kind: str, name: str) -> bool:
        return await self._first.drop(kind, name)

    async def records(self, kind: str) -> dict[str, str]:
        return await self._first.records(kind)

    async def shelve(self, shelf: str, name: str, value: str, ttl_s: float) -> None:
        await self._first.shelve(shelf, name, value, ttl_s)

    async def shelved(self, shelf: str) -> dict[str, str]:
        return await self._first.shelved(shelf)

    async def register(self, worker_id: str, value: str, ttl_s: float) -> None:
        await self._first.register(worker_id, value, ttl_s)

    async def leave(self, worker_id: str) -> None:
        await self._first.leave(worker_id)

    async def workers(self) -> dict[str, str]:
        return await self._first.workers()

    async def close(self) -> None:
        await _all(shard.close() for shard in self._shards)


def _shard_of(name: str, count: int) -> int:
    return crc32(name.encode()) % count


def _rounds(before: _Heard, news: News) -> dict[str, tuple[int, int]]:
    """The last round of each replica in a shard."""
    rounds = before.rounds if before.generation == news.generation else {}
    told: dict[str, tuple[int, int]] = {}
    for replica, rows in news.live.items():
        if ROUND in rows:
            number, born = rows[ROUND].split()
            told[replica] = int(number), int(born)
    return {replica: at for replica, at in rounds.items() if replica in news.alive} | told


async def _merged(news: Sequence[News], heard: Sequence[_Heard]) -> News:
    live: dict[str, dict[str, str]] = {}
    kept: dict[Kept, int] = {}
    for one in news:
        for replica, rows in one.live.items():
            live.setdefault(replica, {}).update(rows)
        for number, (row, amount) in enumerate(one.kept.items(), 1):
            if amount > kept.get(row, -1):  # it is in two shards after the number of shards has changed
                kept[row] = amount
            if number % SLICE == 0:
                await asyncio.sleep(0)
    for replica, rows in live.items():
        if rows.pop(ROUND, None) is not None and all(replica in shard.rounds for shard in heard):
            numbers, births = zip(*(shard.rounds[replica] for shard in heard), strict=True)
            rows[ROUND] = f"{min(numbers)} {max(births)}"
    return News(
        generation=" ".join(one.generation for one in news),
        cursor=news[0].cursor,
        known=all(one.known for one in news),
        version=news[0].version,
        alive=frozenset().union(*(one.alive for one in news)),
        live={replica: rows for replica, rows in live.items() if rows},
        kept=kept,
        records=news[0].generation,
    )


def _check_different(generations: Sequence[str]) -> None:
    """StoreAway if two shards are one: then a host has two names."""
    for number, generation in enumerate(generations):
        first = generations.index(generation)
        if first < number:
            raise StoreAway(
                f"addresses {first + 1} and {number + 1} of --redis-url lead to the same Redis, or to a copy of it: "
                "name each server once"
            )


async def _all(asked: Iterable[Awaitable[None]]) -> None:
    """Waits for all of them; then raises the first problem, if there is one."""
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer


def store_at(urls: Sequence[str]) -> Store:
    """The Redis at this address, or the shards at several. ValueError for a wrong one, or one that is named twice."""
    several = len(urls) > 1
    stores: list[RedisStore] = []
    for number, url in enumerate(urls, 1):
        try:
            store = RedisStore(url, named=several)
        except ValueError:
            which = f"address {number} of --redis-url" if several else "--redis-url"
            raise ValueError(f"{which}: write it as redis://HOST:PORT/0, or rediss:// for TLS") from None
        if any(store.address == other.address for other in stores):
            raise ValueError(f"--redis-url names {store.address} twice: name each server once")
        stores.append(store)
    return ShardedStore(stores) if several else stores[0]
