"""Gateways over a real Redis: what they share, and what happens when it goes and comes back."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from loadtest.bench.bench_target import free_port
from loadtest.fake.engine import FakeEngine
from scheduler.workers import Role, Worker
from server.app import GatewayServer
from server.cluster.local_sync import Process
from server.cluster.records import TENANT
from server.fleet.fleet import Fleet, WorkerState
from server.fleet.registry import WORKER_TTL_S, Registry, registration_of
from server.request.tenants import new_key
from server.settings import Settings
from server.store.redis_store import RedisStore
from server.store.sharded import ShardedStore
from server.store.socket_store import SHARED, listen_at, serving_stores
from server.store.store import MemoryStore
from tests.conftest import start_redis
from tests.server.conftest import INSTANT, LIMIT_S, Running, chat, eventually, serving
from tests.server.test_admin import ADMIN_KEY, admin, ask
from tests.server.test_tenants import KEY, OTHER


class OwnRedis:
    """A Redis that a test may kill. It keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = start_redis(self.folder, self.port)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    redis = OwnRedis(tmp_path)
    redis.start()
    yield redis
    redis.kill()


@contextlib.asynccontextmanager
async def two_gateways(url: str | list[str], **settings: object) -> AsyncIterator[tuple[Running, Running]]:
    async with (
        FakeEngine(INSTANT) as engine,
        serving(engine.url, redis_url=url, admin_key=ADMIN_KEY, sync_s=0.05, **settings) as one,
        serving(engine.url, redis_url=url, admin_key=ADMIN_KEY, sync_s=0.05, **settings) as other,
    ):
        for gateway in (one, other):  # a machine that stands still for seconds takes neither Redis nor a replica away
            for redis in redis_of(gateway):
                redis._timeout_s = LIMIT_S
            gateway.server.shared.replicas._ttl_s = LIMIT_S
        await eventually(lambda: replicas(one) == replicas(other) == 2, "they know each other")
        yield one, other


def store_of(gateway: Running) -> RedisStore:
    store = gateway.server.shared.store
    assert isinstance(store, RedisStore)
    return store


def redis_of(gateway: Running) -> list[RedisStore]:
    """Its only Redis, or the shards."""
    store = gateway.server.shared.store
    found = store._shards if isinstance(store, ShardedStore) else [store]
    return [redis for redis in found if isinstance(redis, RedisStore)]


def replicas(gateway: Running) -> int:
    return gateway.server.shared.replicas.count


async def exchanged(*gateways: Running) -> None:
    """Everybody has told and heard everything that is there by now."""
    for gateway in gateways:
        shared = gateway.server.shared.replicas
        until = shared.exchanges + 4
        await eventually(lambda shared=shared, until=until: shared.exchanges >= until)


def use_of(gateway: Running, tenant: str) -> int:
    return max(gateway.server.shared.gate.usage(tenant).values())


async def test_tenants_limits_policy_and_drains_are_shared(own_redis: OwnRedis) -> None:
    async with two_gateways(own_redis.url) as (one, other):
        record = {"keys": [KEY], "requests_per_minute": 4, "budget": {"tokens_per_day": 10**6}}
        assert (await admin(one, "PUT", "/tenants/acme", record)).status == 200
        await eventually(lambda: other.server.shared.tenants.named("acme"), "the tenant is known at the other")
        assert [await ask(gateway, KEY) for gateway in (one, one)] == [200, 200]
        await exchanged(one, other)
        assert await ask(other, KEY) == 200
        await exchanged(one, other)
        assert await ask(one, KEY) == 200
        await exchanged(one, other)
        assert [await ask(gateway, KEY) for gateway in (one, other)] == [429, 429]
        assert use_of(one, "acme") == use_of(other, "acme") > 0

        assert (await admin(other, "PUT", "/policy", {"policy": "vtc"})).status == 200
        await eventually(lambda: one.server.policy.name == "vtc", "the policy is the same at both")
        assert (await admin(one, "POST", "/workers/worker-0/drain")).status == 200
        await eventually(lambda: not other.server.fleet.ready(), "the worker is drained at both")
        assert (await admin(one, "POST", "/workers/worker-0/resume")).status == 200
        await eventually(lambda: other.server.fleet.ready(), "the worker is back at both")


async def test_without_redis_gateways_serve_on_what_they_know_say_so_and_reconcile(own_redis: OwnRedis) -> None:
    async with two_gateways(own_redis.url) as (one, other):
        record = {"keys": [KEY], "tokens_per_minute": 10**6, "budget": {"tokens_per_day": 10**6}}
        await admin(one, "PUT", "/tenants/acme", record)
        await eventually(lambda: other.server.shared.tenants.named("acme"))
        assert await ask(one, KEY) == await ask(other, KEY) == 200
        await exchanged(one, other)
        before = use_of(one, "acme")
        assert before == use_of(other, "acme") > 0

        own_redis.kill()
        await eventually(lambda: not one.server.shared.replicas.up and not other.server.shared.replicas.up)
        assert [await ask(gateway, KEY) for gateway in (one, other, one)] == [200] * 3
        assert await ask(one, OTHER) == 401
        told = await one.ask("/ready", method="GET")
        assert told.status == 200 and told.json()["store"]["up"] is False
        assert (await one.metrics())["evenhand_store_up", ()] == 0
        refused = await admin(one, "PUT", "/tenants/late", {"keys": [OTHER]})
        assert (refused.status, refused.error["code"]) == (503, "store_unreachable")

        before_it_is_back = [gateway.server.shared.replicas.exchanges for gateway in (one, other)]
        own_redis.start()  # empty
        await eventually(lambda: use_of(one, "acme") == use_of(other, "acme") > before, "they agree again")
        since = [gateway.server.shared.replicas.exchanges for gateway in (one, other)]
        # One finds it empty, one tells all, one hears all; how long these take is the machine's business.
        assert min(now - then for now, then in zip(since, before_it_is_back, strict=True)) <= 6
        await exchanged(one, other)
        assert use_of(one, "acme") == use_of(other, "acme") == before * 5 // 2
        assert (await one.metrics())["evenhand_store_up", ()] == 1
        assert await ask(one, KEY) == 200


async def test_tenants_of_the_store_survive_its_loss_in_the_gateways_that_know_them(own_redis: OwnRedis) -> None:
    async with two_gateways(own_redis.url) as (one, other):
        await admin(one, "PUT", "/tenants/acme", {"keys": [KEY]})
        await admin(one, "PUT", "/policy", {"policy": "vtc"})
        await eventually(lambda: other.server.shared.tenants.named("acme") and other.server.policy.name == "vtc")
        own_redis.kill()
        own_redis.start()
        await eventually(lambda: one.server.shared.replicas.up and other.server.shared.replicas.up)
        await exchanged(one, other)
        assert await ask(one, KEY) == 200
        assert await ask(other, KEY) == 200
        assert one.server.policy.name == other.server.policy.name == "vtc"
        await put_back(own_redis.url, {"acme"})  # a gateway that starts now knows it too


async def test_two_redis_servers_carry_one_account_and_one_that_is_killed_comes_back_empty(tmp_path: Path) -> None:
    names, keys = ["acme", "zenith", "beta", "gamma"], [new_key() for _ in range(4)]
    (tmp_path / "second").mkdir()
    servers = [OwnRedis(tmp_path), OwnRedis(tmp_path / "second")]
    for server in servers:
        server.start()
    tenants = tmp_path / "tenants.json"
    rows = [
        {"name": name, "keys": [key], "budget": {"tokens_per_day": 10**6}}
        for name, key in zip(names, keys, strict=True)
    ]
    tenants.write_text(json.dumps({"tenants": rows}))

    def used(gateway: Running) -> list[int]:
        return [max(gateway.server.shared.gate.usage(name).values(), default=0) for name in names]

    try:
        async with two_gateways([server.url for server in servers], tenants=tenants) as (one, other):
            assert [await ask(one, key) for key in keys] == [200] * 4
            alone = used(one)
            assert [await ask(other, key) for key in keys] == [200] * 4
            await eventually(lambda: used(one) == used(other) == [2 * use for use in alone], "it is one account")
            before = used(one)
            assert all([await own_rows(server) for server in servers]), "both servers have tenants"
            servers[1].kill()
            await eventually(lambda: not one.server.shared.replicas.up and not other.server.shared.replicas.up)
            told = (await one.ask("/ready", method="GET")).json()
            assert f"the Redis at 127.0.0.1:{servers[1].port}/0 does not answer" in told["store"]["problem"]
            assert [await ask(gateway, key) for key in keys for gateway in (one, other)] == [200] * 8
            servers[1].start()  # empty
            await eventually(lambda: used(one) == used(other) == [2 * use for use in before], "they agree again")
            assert replicas(one) == replicas(other) == 2
    finally:
        for server in servers:
            server.kill()


async def own_rows(server: OwnRedis) -> list[str]:
    """The rows of tenants in a Redis."""
    async with Redis.from_url(server.url, decode_responses=True) as client:
        return [name for name in await client.hkeys("{evenhand}:rows") if "limit:" in name or name.startswith("K")]


async def put_back(url: str, tenants: set[str]) -> None:
    """Returns when the store has the records of these tenants, and of no others."""
    store = RedisStore(url, timeout_s=LIMIT_S)
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                if set(await store.records("tenant")) == tenants:
                    return
                await asyncio.sleep(0.01)  # between two looks
    finally:
        await store.close()


async def test_records_read_before_anybody_noticed_that_the_store_is_empty_are_not_put_in_force(
    own_redis: OwnRedis,
) -> None:
    far_apart = {"redis_url": own_redis.url, "admin_key": ADMIN_KEY, "sync_s": 5.0}  # nothing is noticed by itself
    async with FakeEngine(INSTANT) as engine, serving(engine.url, **far_apart) as gateway:
        store_of(gateway)._timeout_s = LIMIT_S
        await admin(gateway, "PUT", "/tenants/acme", {"keys": [KEY]})
        own_redis.kill()
        own_redis.start()
        records = gateway.server.shared.records
        records.are_stale()
        await eventually(lambda: not records.stale, "it has begun to read them")
        await put_back(own_redis.url, {"acme"})
        assert gateway.server.shared.tenants.named("acme") is not None


async def test_a_gateway_that_starts_without_its_redis_serves_the_tenants_of_its_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    away = "redis://127.0.0.1:1/0"
    async with FakeEngine(INSTANT) as engine:
        async with serving(engine.url, redis_url=away, tenants=path) as gateway:
            assert await ask(gateway, KEY) == 200
            assert await ask(gateway, OTHER) == 503  # it may be a tenant of the store
        async with serving(engine.url, redis_url=away) as gateway:
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 503


async def test_a_slow_redis_delays_no_request(tmp_path: Path) -> None:
    asking: set[asyncio.StreamWriter] = set()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asking.add(writer)
        await reader.read()
        asking.discard(writer)
        writer.close()

    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: acme, keys: [{KEY}], requests_per_minute: 600}}]")
    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    async with FakeEngine(INSTANT) as engine, serving(engine.url, redis_url=url, tenants=path) as gateway:
        store_of(gateway)._timeout_s = 3600.0  # whoever waited for it now would wait for ever
        known = set(asking)
        await eventually(lambda: asking - known, "somebody waits for it without end")
        assert [await ask(gateway, KEY) for _ in range(20)] == [200] * 20
        assert asking and not gateway.server.shared.replicas.up
        server.close()
        for writer in asking:
            writer.transport.abort()


# workers that join through the store
async def test_a_worker_joins_a_fleet_through_redis_and_leaves_it(redis_url: str) -> None:
    store = RedisStore(redis_url, timeout_s=LIMIT_S)
    async with FakeEngine(INSTANT) as engine, serving(redis_url=redis_url) as gateway:
        await store.register("far-0", registration_of(Worker("far-0", engine.url, Role.BOTH, 16)), ttl_s=60.0)
        await gateway.ready()
        member = gateway.server.fleet.members["far-0"]
        assert (member.worker.slots, member.worker.role) == (16, Role.BOTH)
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
    await store.leave("far-0")
    await store.close()


async def test_a_fleet_follows_the_registry_with_patience(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    def clock() -> float:
        return now

    store, fleet = MemoryStore(clock), Fleet(probe_s=60.0)
    registry = Registry(store, fleet, clock)
    url = "http://127.0.0.1:1"
    await store.register("w", registration_of(Worker("w", url)), ttl_s=5.0)
    await store.register("bad", '{"url": 3}', ttl_s=1000.0)
    fleet.add(Worker("static", url))
    await store.register("static", registration_of(Worker("static", url)), ttl_s=1000.0)
    await registry.follow()
    await registry.follow()
    assert set(fleet.members) == {"w", "static"}
    assert len([record for record in caplog.records if "ignoring a registered worker" in record.message]) == 2

    now = 6.0  # its heartbeat is late, or the store was lost
    await registry.follow()
    assert "w" in fleet.members
    await store.register("w", registration_of(Worker("w", url)), ttl_s=5.0)
    await registry.follow()
    now = 12.0
    await registry.follow()
    now += WORKER_TTL_S
    await registry.follow()
    assert set(fleet.members) == {"static"}

    await store.register("w", registration_of(Worker("w", url)), ttl_s=1000.0)
    await registry.follow()
    await store.register("w", registration_of(Worker("w", url, Role.PREFILL, 4)), ttl_s=1000.0)
    await registry.follow()
    assert fleet.members["w"].worker.role is Role.PREFILL
    await fleet.close()


async def test_a_worker_that_is_about_to_leave_gets_nothing_new_and_may_change_its_mind() -> None:
    store = MemoryStore(lambda: 0.0)
    async with FakeEngine(INSTANT) as engine:
        fleet = Fleet(probe_s=0.05)
        registry = Registry(store, fleet, lambda: 0.0)
        worker = Worker("w", engine.url)
        try:
            for draining in (True, False, True):
                await store.register("w", registration_of(worker, draining=draining), ttl_s=60.0)
                await registry.follow()
                await registry.follow()
                wanted = WorkerState.DRAINING if draining else WorkerState.READY
                await eventually(lambda wanted=wanted: fleet.members["w"].state is wanted)
            await fleet.remove("w")  # an operator is quicker
            await registry.follow()
        finally:
            await fleet.close()


async def test_a_process_that_starts_while_its_gateway_s_store_does_knows_the_tenants_before_it_listens(
    tmp_path: Path,
) -> None:
    path, memory = tmp_path / "stores", MemoryStore(time.monotonic)
    await memory.put(TENANT, "acme", json.dumps({"name": "acme", "keys": [{"key": KEY}]}))
    shared = GatewayServer(Settings(port=0, workers=[]), Process(1, path)).shared
    knows = asyncio.Event()

    async def runs() -> None:
        async with shared.running():
            knows.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(runs())
    await eventually(lambda: "does not answer" in shared.replicas.problem, "it has asked in vain")
    async with serving_stores(listen_at(path), {SHARED: memory}):
        await asyncio.wait_for(knows.wait(), LIMIT_S)
        assert shared.tenants.identify(f"Bearer {KEY}".encode(), None).name == "acme"
        running.cancel()
        await asyncio.wait([running])
