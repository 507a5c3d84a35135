"""One contract over all stores: in memory, over a Unix socket, a real Redis, and shards in memory and in Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from server.store.redis_store import RedisStore
from server.store.sharded import ShardedStore
from server.store.socket_store import LOCAL, SHARED, SocketStore, listen_at, serving_stores
from server.store.store import MemoryStore, News, Offer, Store, StoreAway
from tests.server.conftest import LIMIT_S

NAMES = count()
SHORT_S = 0.15  # what is to expire while a test waits for it


class OverSocket(SocketStore):
    """A store over a socket, with what it is over."""

    def __init__(self, path: Path, memory: MemoryStore) -> None:
        super().__init__(path, SHARED, timeout_s=LIMIT_S)
        self.memory = memory


@asynccontextmanager
async def over_socket(path: Path) -> AsyncIterator[OverSocket]:
    memory = MemoryStore(time.monotonic)
    async with serving_stores(listen_at(path), {SHARED: memory}):
        store = OverSocket(path, memory)
        yield store
        await store.close()


@pytest.fixture(params=["memory", "socket", "redis", "shards", "two Redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore(time.monotonic)
        return
    if request.param == "socket":
        async with over_socket(tmp_path / "store") as store:
            yield store
        return
    if request.param == "shards":
        yield ShardedStore([MemoryStore(time.monotonic) for _ in range(3)])
        return
    names = ("redis_url", "second_redis_url") if request.param == "two Redis" else ("redis_url",)
    prefix = f"test-{next(NAMES)}"
    servers = [RedisStore(request.getfixturevalue(name), prefix=prefix, timeout_s=LIMIT_S) for name in names]
    redis = servers[0] if len(servers) == 1 else ShardedStore(servers)
    yield redis
    await redis.close()


async def lose_everything(store: Store) -> None:
    """What a restart does to a server that keeps nothing on disk."""
    if isinstance(store, MemoryStore):
        store.clear()
        return
    if isinstance(store, OverSocket):
        store.memory.clear()
        return
    if isinstance(store, ShardedStore):
        for shard in store._shards:
            await lose_everything(shard)
        return
    assert isinstance(store, RedisStore)
    keys = [key async for key in store._redis.scan_iter(f"{store._tag}:*")]
    await store._redis.delete(*keys)


class Reader:
    """A replica that keeps its cursor, as a gateway does."""

    def __init__(self, store: Store, name: str, ttl_s: float = 60.0) -> None:
        self.store, self.name, self.ttl_s = store, name, ttl_s
        self.news: News | None = None

    async def says(
        self, live: dict[str, str] | None = None, kept: dict[tuple[str, str, str], int] | None = None
    ) -> News:
        cursor, generation = (self.news.cursor, self.news.generation) if self.news else (0, "")
        self.news = await self.store.exchange(
            Offer(self.name, self.ttl_s, cursor, generation, live=live or {}, kept=kept or {})
        )
        return self.news


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_replica_hears_what_others_said_and_not_itself(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    await one.says({"a": "1", "b": "2"})
    news = await two.says({"a": "9"})
    assert news.live == {"one": {"a": "1", "b": "2"}}
    assert news.alive == {"one", "two"}
    assert (await one.says()).live == {"two": {"a": "9"}}


async def test_only_what_changed_since_the_last_time_is_heard(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    await one.says({"a": "1", "b": "2"})
    await two.says()
    assert (await two.says()).live == {}
    await one.says({"b": "3"})
    assert (await two.says()).live == {"one": {"b": "3"}}


async def test_an_offer_that_is_repeated_changes_nothing(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    for _ in range(3):
        await one.says({"a": "5"}, {("day:1", "acme", "one"): 7})
    news = await two.says()
    assert news.live == {"one": {"a": "5"}}
    assert news.kept == {("day:1", "acme", "one"): 7}


async def test_a_kept_row_never_falls_back_to_a_smaller_value(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    row = ("day:1", "acme", "one")
    await one.says(kept={row: 10})
    await two.says(kept={row: 4})  # what another one remembers of it may be older
    assert (await Reader(store, "three").says()).kept == {row: 10}


async def test_live_rows_go_with_their_replica_and_kept_rows_stay(store: Store) -> None:
    gone, stays = Reader(store, "gone"), Reader(store, "stays")
    await gone.says({"a": "1"}, {("day:1", "acme", "gone"): 3})
    assert "gone" in (await stays.says()).alive
    gone.ttl_s = SHORT_S
    await gone.says()

    async def buried() -> bool:
        return "gone" not in (await stays.says()).alive

    await until(buried)
    news = await Reader(store, "new").says()
    assert "gone" not in news.live
    assert news.kept == {("day:1", "acme", "gone"): 3}


async def test_a_replica_that_was_taken_for_gone_is_told_so(store: Store) -> None:
    late, other = Reader(store, "late"), Reader(store, "other")
    assert not (await late.says({"a": "1"})).known
    late.ttl_s = SHORT_S
    assert (await late.says()).known

    async def buried() -> bool:
        return "late" not in (await other.says()).alive

    await until(buried)
    assert not (await late.says()).known


async def test_a_store_that_lost_everything_says_so_and_gives_everything_again(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    await one.says({"a": "1"})
    before = await two.says({"b": "1"})
    await lose_everything(store)
    await one.says({"a": "2"})
    after = await two.says()
    assert after.generation != before.generation
    assert not after.known
    assert after.live == {"one": {"a": "2"}}


async def test_forgetting_a_period_drops_its_rows_alone(store: Store) -> None:
    one = Reader(store, "one")
    await one.says(kept={("day:1", "acme", "one"): 1, ("day:11", "acme", "one"): 2})
    await store.forget("day:1")
    assert (await Reader(store, "two").says()).kept == {("day:11", "acme", "one"): 2}


async def test_names_may_hold_anything_but_the_separator(store: Store) -> None:
    one, two = Reader(store, "host:a|b-1"), Reader(store, "two")
    key = "service:acme org/model:v1 |{}*"
    await one.says({key: "1.5 2.5 0"})
    assert (await two.says()).live == {"host:a|b-1": {key: "1.5 2.5 0"}}


async def test_many_rows_come_in_one_exchange(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    rows = {f"limit:tenant-{number}": f"{number} 0 0" for number in range(20_000)}
    await one.says(rows)
    assert (await two.says()).live == {"one": rows}


async def test_records_are_kept_by_kind_and_every_change_shows_in_the_version(store: Store) -> None:
    one = Reader(store, "one")
    versions = [(await one.says()).version]
    await store.put("tenant", "acme", "{}")
    versions.append((await one.says()).version)
    await store.put("policy", "live", "x")
    versions.append((await one.says()).version)
    assert await store.records("tenant") == {"acme": "{}"}
    assert await store.drop("tenant", "acme")
    versions.append((await one.says()).version)
    assert not await store.drop("tenant", "acme")
    assert await store.records("tenant") == {}
    assert await store.records("policy") == {"live": "x"}
    assert len(set(versions)) == 4


async def test_a_worker_is_listed_until_its_heartbeats_stop(store: Store) -> None:
    await store.register("w-0", "one", ttl_s=60.0)
    await store.register("w-1", "two", ttl_s=60.0)
    assert await store.workers() == {"w-0": "one", "w-1": "two"}
    await store.register("w-1", "two", ttl_s=SHORT_S)

    async def expired() -> bool:
        return await store.workers() == {"w-0": "one"}

    await until(expired)
    await store.register("w-0", "other", ttl_s=60.0)
    assert await store.workers() == {"w-0": "other"}
    await store.leave("w-0")
    await store.leave("w-0")
    assert await store.workers() == {}


async def test_a_question_that_is_cancelled_ends_in_whatever_moment_it_is(store: Store) -> None:
    """Whoever stops a gateway waits for those that ask: a cancellation that is lost would let it wait for ever."""
    one = Reader(store, "one")
    for steps in range(30):
        await one.says()  # the connection is there, so that a question is sent at once
        asking = asyncio.create_task(one.says())
        for _ in range(steps):
            await asyncio.sleep(0)
        if asking.cancel():
            await asyncio.wait([asking])
            assert asking.cancelled(), f"it was cancelled after {steps} steps, and went on"
            assert await store.records("none") == {}, "and its answer is not taken for the next one's"


STEPS = st.lists(
    st.tuples(st.sampled_from(["one", "two", "three"]), st.sampled_from("ab"), st.integers(0, 50), st.booleans()),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_all_stores_say_the_same_in_any_order_of_exchanges(
    redis_url: str, tmp_path: Path, steps: list[tuple[str, str, int, bool]]
) -> None:
    redis = RedisStore(redis_url, prefix=f"both-{next(NAMES)}", timeout_s=LIMIT_S)
    shards = ShardedStore([MemoryStore(time.monotonic) for _ in range(3)])
    heard: list[list[object]] = []
    async with over_socket(tmp_path / "store") as socket:
        for store in (MemoryStore(time.monotonic), socket, redis, shards):
            heard.append(await said_by(store, steps))
    await redis.close()
    assert heard[0] == heard[1] == heard[2] == heard[3]


async def said_by(store: Store, steps: list[tuple[str, str, int, bool]]) -> list[object]:
    replicas = {name: Reader(store, name) for name in ("one", "two", "three")}
    said: list[object] = []
    for name, key, value, lost in steps:
        news = await replicas[name].says({key: str(value)}, {("day:1", key, name): value})
        if lost and value == 50:
            await lose_everything(store)
        said.append((news.known, news.alive, news.live, news.kept, news.cursor))
    return said


async def test_a_redis_that_is_not_there_is_one_kind_of_error() -> None:
    store = RedisStore("redis://127.0.0.1:1/0")
    with pytest.raises(StoreAway, match="Redis does not answer"):
        await store.exchange(Offer("one", 1.0))
    with pytest.raises(StoreAway):
        await store.records("tenant")
    await store.close()


async def test_a_node_of_a_redis_cluster_says_what_it_is(cluster_node: str) -> None:
    store = RedisStore(cluster_node, timeout_s=LIMIT_S)
    with pytest.raises(StoreAway, match="Redis is a node of a Redis Cluster, which is not supported"):
        await store.exchange(Offer("one", 1.0))
    await store.close()


async def test_a_redis_that_accepts_and_says_nothing_is_given_up_in_time() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    store = RedisStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", timeout_s=0.1)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreAway):
            await store.workers()
    await store.close()
    server.close()


async def test_all_keys_of_a_system_share_one_hash_tag(redis_url: str) -> None:
    prefix = f"tagged-{next(NAMES)}"
    store = RedisStore(redis_url, prefix=prefix, timeout_s=LIMIT_S)
    await store.exchange(Offer("one", 60.0, live={"a": "1"}))
    await store.put("tenant", "acme", "{}")
    await store.register("w", "x", 60.0)
    client = Redis.from_url(redis_url, decode_responses=True)
    keys = [key async for key in client.scan_iter(f"*{prefix}*")]
    assert keys and all(key.startswith(f"{{{prefix}}}:") for key in keys)
    await client.aclose()
    await store.close()


async def test_a_socket_that_nobody_serves_is_one_kind_of_error_and_is_found_when_somebody_does(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = SocketStore(path, SHARED, timeout_s=LIMIT_S)
    with pytest.raises(StoreAway, match="does not answer"):
        await store.records("tenant")
    for round_number in range(2):  # whoever serves it may come and go
        memory = MemoryStore(time.monotonic)
        async with serving_stores(listen_at(path), {SHARED: memory}):
            await store.put("tenant", "acme", str(round_number))
            assert await memory.records("tenant") == {"acme": str(round_number)}
        with pytest.raises(StoreAway):
            await store.records("tenant")
    await store.close()


async def test_a_socket_that_says_nothing_is_given_up_in_time_and_late_answers_are_nobody_s(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    class Slow(MemoryStore):
        async def records(self, kind: str) -> dict[str, str]:
            if kind == "slow":
                await waiting.wait()
            return {"kind": kind}

    async with serving_stores(listen_at(tmp_path / "store"), {SHARED: Slow(time.monotonic)}):
        store = SocketStore(tmp_path / "store", SHARED, timeout_s=0.1)
        with pytest.raises(StoreAway):
            await store.records("slow")
        store._timeout_s = LIMIT_S  # what it asks now is answered, however slowly
        patient = SocketStore(tmp_path / "store", SHARED, timeout_s=LIMIT_S)
        cancelled = asyncio.create_task(patient.records("slow"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        waiting.set()
        assert await store.records("a") == {"kind": "a"}
        assert await patient.records("b") == {"kind": "b"}
        for one in (store, patient):
            await one.close()


async def test_spaces_are_apart_and_one_that_is_not_served_says_so(tmp_path: Path) -> None:
    path = tmp_path / "store"
    async with serving_stores(
        listen_at(path), {SHARED: MemoryStore(time.monotonic), LOCAL: MemoryStore(time.monotonic)}
    ):
        shared, local, other = (SocketStore(path, space, timeout_s=LIMIT_S) for space in (SHARED, LOCAL, "other"))
        await shared.put("tenant", "acme", "{}")
        assert await local.records("tenant") == {}
        with pytest.raises(StoreAway, match="'other'"):
            await other.records("tenant")
        for one in (shared, local, other):
            await one.close()


async def test_nonsense_on_the_socket_ends_that_connection_alone(tmp_path: Path) -> None:
    async with over_socket(tmp_path / "store") as store:
        await store.put("tenant", "acme", "{}")
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x01\x90"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "store")
            writer.write(nonsense)
            async with asyncio.timeout(LIMIT_S):
                assert await reader.read() == b""
            writer.close()
        assert await store.records("tenant") == {"acme": "{}"}


async def test_thousands_of_rows_go_both_ways_in_one_exchange(store: Store) -> None:
    one, two = Reader(store, "one"), Reader(store, "two")
    live = {f"tenant-{number}": str(number) for number in range(2500)}
    kept = {("day", f"tenant-{number}", "one"): number for number in range(2500)}
    await one.says(live, kept)
    news = await two.says({"x": "1"}, {row: amount - 1 for row, amount in kept.items()})
    assert news.live == {"one": live}
    assert {row: amount for row, amount in news.kept.items() if row[2] == "one"} == kept


async def test_commands_of_an_exchange_do_not_grow_with_its_rows(redis_url: str) -> None:
    store = RedisStore(redis_url, prefix=f"test-{next(NAMES)}", timeout_s=LIMIT_S)
    one, two = Reader(store, "one"), Reader(store, "two")
    await one.says({"a": "0"})
    await two.says()

    async def commands() -> int:
        return int((await store._redis.info("stats"))["total_commands_processed"])

    async def taken(rows: int) -> int:
        before = await commands()
        await one.says({f"t{number}": "1" for number in range(rows)}, {("d", f"t{n}", "one"): n for n in range(rows)})
        await two.says()
        return await commands() - before

    await taken(1)  # the script is loaded
    few, many = await taken(10), await taken(900)
    await store.close()
    assert many <= few + 2 <= 40


async def test_shelves_hold_values_that_nobody_is_told_of_until_they_are_over(store: Store) -> None:
    version = (await store.exchange(Offer("one", 10.0))).version
    await store.shelve("day", "a", "1", LIMIT_S)
    await store.shelve("day", "b", "2", LIMIT_S)
    await store.shelve("day", "a", "3", LIMIT_S)
    await store.shelve("other", "a", "4", SHORT_S)
    assert await store.shelved("day") == {"a": "3", "b": "2"}
    assert (await store.exchange(Offer("one", 10.0))).version == version
    await asyncio.sleep(2 * SHORT_S)
    assert await store.shelved("other") == {} == await store.shelved("none")
    assert await store.shelved("day") == {"a": "3", "b": "2"}
