"""A store over several: what is asked of one shard and of all, and what a shard that fails, lags or forgets does."""

import asyncio
from collections.abc import Iterable

import pytest

from scheduler.jobs import Job
from server.cluster.agreement import PATIENCE_S, REDIS_SERVERS, Agreement
from server.cluster.replicas import TTL_S
from server.store.sharded import ShardedStore, store_at
from server.store.store import ROUND, MemoryStore, News, Offer, StoreAway
from tests.server.conftest import LIMIT_S, eventually
from tests.server.replicated import Member, Store, World
from tests.server.test_ledger import CLOCK, SCENES, Gateway, Scene, charge, counters, sync, waits_elsewhere

TENANTS = [f"t{number}" for number in range(12)]


class Shard(Store):
    """One that can be held up for a replica: what it offers arrives late."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock)
        self.late: dict[str, asyncio.Event] = {}
        self.offers: list[Offer] = []

    async def exchange(self, offer: Offer) -> News:
        if offer.replica in self.late:
            await self.late[offer.replica].wait()
        self.offers.append(offer)
        return await super().exchange(offer)


class Site:
    """Gateways, each with a client of its own to the same shards."""

    def __init__(self, names: Iterable[str] = ("one", "two"), shards: int = 2) -> None:
        self.world = World()
        self.shards = [Shard(self.world) for _ in range(shards)]
        self.members = {name: self.join(name) for name in names}
        for name in TENANTS:
            self.world.tenant(name, requests_per_minute=600.0, concurrency=100, tokens_per_day=10**6)

    def join(self, name: str) -> Member:
        member = self.world.replica(name)
        member.replicas.store = ShardedStore(self.shards)
        return member

    async def sync(self, times: int = 3) -> None:
        for _ in range(times):
            self.world.now += 0.1
            for member in self.members.values():
                await member.sync()

    def serve(self, name: str, tokens: int = 10) -> None:
        """A request of each tenant begins and ends there."""
        gate = self.members[name].gate
        for tenant in TENANTS:
            standing = gate.enter(self.world.tenants[tenant], tokens, Headers())
            gate.leave(standing, tokens, tokens)

    def used(self, name: str) -> list[int]:
        return [max(self.members[name].gate.usage(tenant).values(), default=0) for tenant in TENANTS]


class Headers:
    extra_headers = b""


async def test_every_row_of_a_tenant_is_in_one_shard_and_all_shards_have_some() -> None:
    site = Site(shards=3)
    await site.sync()
    site.serve("one")
    site.serve("two")
    await site.sync()
    rows = [{key for offer in shard.offers for key in offer.live if key.startswith("limit:")} for shard in site.shards]
    assert all(rows) and sum(map(len, rows)) == len(set().union(*rows)) == len(TENANTS)
    names = [{name for offer in shard.offers for _, name, _ in offer.kept} for shard in site.shards]
    assert all(names) and sum(map(len, names)) == len(set().union(*names)) == len(TENANTS)


async def test_records_shelves_and_workers_are_in_the_first_shard() -> None:
    world = World()
    first, second = Store(world.clock), Store(world.clock)
    store = ShardedStore([first, second])
    await store.put("tenant", "acme", "{}")
    await store.shelve("day", "a", "1", 60.0)
    await store.register("w", "x", 60.0)
    assert await first.records("tenant") == await store.records("tenant") == {"acme": "{}"}
    assert await first.shelved("day") == {"a": "1"} and await first.workers() == {"w": "x"}
    assert not await second.records("tenant") and not await second.shelved("day") and not await second.workers()


async def test_a_round_counts_when_its_rows_are_there_in_every_shard() -> None:
    """`one` writes to the first shard, and its words to the second are late: `two` must not take it for heard."""
    for late in (0, 1):
        site = Site()
        await site.sync()
        one, two = site.members.values()
        two_at = two.replicas.ring.round
        while await round_after(two) > two_at:  # until it waits for a word of the other
            two_at += 1
        site.serve("one")
        held = site.shards[late].late["one"] = asyncio.Event()
        writes = asyncio.create_task(one.sync())
        told = site.shards[1 - late].offers
        await eventually(lambda told=told: told[-1].replica == "one", "one shard is told")
        assert site.shards[late].offers[-1].replica == "two"
        for _ in range(3):
            assert await round_after(two) == two_at, "it waits for what is late"
        heard = [use > 0 for use in site.used("two")]
        assert any(heard) and not all(heard), "the tenants of one shard are heard"
        held.set()
        await writes
        assert await round_after(two) > two_at
        assert all(site.used("two"))


async def round_after(member: Member) -> int:
    """Its round after one more exchange, which worked."""
    await member.sync()
    assert member.replicas.up
    return member.replicas.ring.round


async def test_a_replica_is_known_when_all_shards_know_it_and_of_two_values_the_larger_is_kept() -> None:
    world = World()
    shards = [Store(world.clock), Store(world.clock)]
    store = ShardedStore(shards)
    assert not (await store.exchange(Offer("one", 60.0))).known
    assert (await store.exchange(Offer("one", 60.0))).known
    for number, shard in enumerate(shards):
        await shard.exchange(Offer("two", 60.0, kept={("day:1", name, "old"): 5 + number for name in TENANTS}))
        await shard.exchange(Offer("two", 60.0, kept={("day:2", name, "old"): 6 - number for name in TENANTS}))
    kept = (await store.exchange(Offer("one", 60.0))).kept
    assert set(kept.values()) == {6} and len(kept) == 2 * len(TENANTS)
    for lost in shards:
        lost.clear()
        assert not (await store.exchange(Offer("one", 60.0))).known


async def test_what_a_store_says_of_a_round_is_the_least_of_its_shards() -> None:
    world = World()
    shards = [Shard(world), Shard(world)]
    writer, reader = ShardedStore(shards), ShardedStore(shards)

    async def heard() -> dict[str, str]:
        nonlocal news
        news = await reader.exchange(Offer("two", 60.0, news.cursor, news.generation))
        return dict(news.live.get("one", {}))

    news = await reader.exchange(Offer("two", 60.0))
    held = shards[1].late["one"] = asyncio.Event()
    writes = asyncio.create_task(writer.exchange(Offer("one", 60.0, live={ROUND: "1 5"})))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await heard() == {}, "one shard has not heard of it"
    assert news.alive == {"one", "two"}, "and the other has"
    held.set()
    said = await writes
    assert await heard() == {ROUND: "1 5"}
    held.clear()
    writes = asyncio.create_task(writer.exchange(Offer("one", 60.0, said.cursor, said.generation, {ROUND: "2 7"})))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await heard() == {ROUND: "1 7"}
    held.set()
    await writes
    assert await heard() == {ROUND: "2 7"}


@pytest.mark.parametrize("away", [0, 1])
async def test_while_a_shard_is_away_all_serve_on_what_they_know_and_agree_when_it_is_back(away: int) -> None:
    site = Site()
    await site.sync()
    site.serve("one")
    await site.sync()
    before = site.used("two")
    assert before == site.used("one") == [10] * len(TENANTS)
    rounds = [member.replicas.ring.round for member in site.members.values()]
    site.shards[away].away = True
    site.serve("one")
    await site.sync(times=100)
    assert not any(member.replicas.up for member in site.members.values())
    assert [member.replicas.ring.round for member in site.members.values()] == rounds, "shares are those of an outage"
    assert all(member.replicas.problem == "the network is down" for member in site.members.values())
    assert site.used("two") == before
    site.serve("two")
    site.shards[away].away = False
    await site.sync()
    assert all(member.replicas.up for member in site.members.values())
    assert site.used("one") == site.used("two") == [30] * len(TENANTS)
    assert [member.replicas.count for member in site.members.values()] == [2, 2]


async def test_who_cannot_reach_one_shard_is_soon_gone_from_all() -> None:
    site = Site(("one", "two", "three"))
    await site.sync()
    site.shards[1].cut_off.add("three")
    await site.sync(times=round(TTL_S / 0.1) + 2)
    for name in ("one", "two"):
        assert site.members[name].replicas.up and site.members[name].replicas.count == 2
    assert not site.members["three"].replicas.up
    site.shards[1].cut_off.clear()
    site.serve("three")
    await site.sync()
    assert [member.replicas.count for member in site.members.values()] == [3] * 3
    assert site.used("one") == site.used("two") == [10] * len(TENANTS)


@pytest.mark.parametrize("loses", [0, 1])
async def test_a_shard_that_lost_its_rows_gets_them_again_and_nobody_is_taken_for_gone(loses: int) -> None:
    site = Site(("one", "two", "three"))
    await site.sync()
    site.serve("one")
    standings = [site.members["two"].gate.enter(site.world.tenants[name], 0, Headers()) for name in TENANTS]
    await site.sync()
    lost: list[str] = []
    for name, member in site.members.items():
        member.replicas.on_loss.append(lambda name=name: lost.append(name))  # type: ignore[misc]
    site.shards[loses].clear()
    for member in site.members.values():
        await member.sync()
        assert member.replicas.count == 3
    assert lost == (["one", "two", "three"] if loses == 0 else []), "records are in the first shard"
    await site.sync()
    assert all(site.used(name) == [10] * len(TENANTS) for name in site.members)
    late = site.members["late"] = site.join("late")
    await site.sync()
    assert site.used("late") == [10] * len(TENANTS), "a gateway that starts now hears what was used"
    assert late.replicas.count == 4
    elsewhere = [site.members["one"].gate._standings[name].elsewhere for name in TENANTS]
    assert elsewhere == [1] * len(TENANTS) == [standing.in_flight for standing in standings]


async def test_with_another_number_of_shards_what_was_used_is_known() -> None:
    site = Site(shards=1)
    await site.sync()
    site.serve("one")
    await site.sync()
    site.shards.append(Shard(site.world))
    site.members = {"new": site.join("new"), "newer": site.join("newer")}
    await site.sync()
    site.serve("new")
    await site.sync()
    assert site.used("newer") == [20] * len(TENANTS)


async def test_what_is_forgotten_is_forgotten_in_every_shard() -> None:
    site = Site()
    store = ShardedStore(site.shards)
    await store.exchange(Offer("one", 60.0, kept={("day:1", name, "one"): 1 for name in TENANTS}))
    await store.forget("day:1")
    assert (await store.exchange(Offer("two", 60.0))).kept == {}


async def test_vtc_is_as_fair_over_two_gateways_and_two_shards_as_over_one_gateway() -> None:
    scene = "seven tenants, each with a side of its own"
    one = await Scene(SCENES[scene], gateways=1, slots=16).run(6000, warm_up=500)
    two = await Scene(SCENES[scene], gateways=2, slots=16, shards=2).run(6000, warm_up=500)
    for tenant, share in one.items():
        assert two[tenant] == pytest.approx(share, rel=0.05), (one, two)


async def charged(shards: list[Store]) -> tuple[list[Gateway], list[list[float]]]:
    """Two gateways that both serve every tenant and keep some of its requests waiting; the counters of each."""
    lines = [Gateway(f"gateway-{number}", 4, ShardedStore(shards), CLOCK) for number in range(2)]
    await sync(lines)
    for number, line in enumerate(lines):
        for tenant in TENANTS:
            charge(line, tenant, 100 * (number + 1))
        for tenant in TENANTS:
            line.lanes.push(Job(f"{tenant}-{number}", tenant, 1, 0.0), 0.0)
    await sync(lines)
    return lines, [counters(lines, tenant) for tenant in TENANTS]


async def test_service_is_the_same_as_with_one_store_and_waiting_ends_with_the_replica() -> None:
    shards = [Store(CLOCK), Store(CLOCK)]
    lines, service = await charged(shards)
    assert min(map(min, service)) >= 100.0
    assert service == (await charged([Store(CLOCK)]))[1]
    assert all(waits_elsewhere(lines[0], tenant) for tenant in TENANTS)
    shards[1].cut_off.add("gateway-1")
    await sync(lines, times=20)
    assert not any(waits_elsewhere(lines[0], tenant) for tenant in TENANTS)


async def test_one_server_under_two_names_is_told() -> None:
    one = MemoryStore(World().clock)
    with pytest.raises(StoreAway, match="addresses 1 and 3 of --redis-url lead to the same Redis"):
        await ShardedStore([one, MemoryStore(World().clock), one]).exchange(Offer("one", 60.0))


async def test_gateways_with_other_servers_or_another_order_say_so_and_still_hear_one_another() -> None:
    world = World()
    first, second = Store(world.clock), Store(world.clock)
    orders: dict[str, list[Store]] = {"a": [first, second], "b": [first, second], "turned": [second, first]}
    told: dict[str, Agreement] = {}
    members = {}
    for name, order in orders.items():
        told[name] = Agreement(REDIS_SERVERS, lambda name=name: members[name].replicas.generation, world.clock)  # type: ignore[misc]
        members[name] = world.replica(name, told[name])
        members[name].replicas.store = ShardedStore(order)
    for _ in range(round(PATIENCE_S) + 3):
        world.now += 1.0
        for member in members.values():
            await member.sync()
    assert [member.replicas.count for member in members.values()] == [3] * 3
    assert told["turned"].problem().startswith("2 other gateways have a different list of Redis servers, so")
    assert told["a"].problem().startswith("1 other gateway has a different list")


def test_a_wrong_list_is_refused_in_a_sentence_without_passwords() -> None:
    for urls, said in (
        (["redis://h", "redis://:secret@h:6379/0"], "names h:6379/0 twice"),
        (["redis://h", "http://:secret@h"], "address 2 of --redis-url: write it as redis://HOST:PORT/0"),
        (["secret"], "--redis-url: write it as redis://HOST:PORT/0"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            store_at(urls)
        assert "secret" not in str(refused.value)


async def test_a_shard_that_is_away_is_named() -> None:
    store = store_at(["redis://:secret@127.0.0.1:1/0", "redis://127.0.0.1:2/0"])
    with pytest.raises(StoreAway, match=r"the Redis at 127\.0\.0\.1:1/0 does not answer: .*the Redis at 127.0.0.1:2/0"):
        await store.exchange(Offer("one", 1.0))
    with pytest.raises(StoreAway, match=r"127\.0\.0\.1:1/0"):
        await store.records("tenant")
    await store.close()


async def test_an_exchange_over_shards_can_be_cancelled_and_the_next_one_repeats_it() -> None:
    site = Site()
    store, other = ShardedStore(site.shards), ShardedStore(site.shards)
    news = await other.exchange(Offer("two", 60.0))
    held = site.shards[1].late["one"] = asyncio.Event()
    rows = {name: "1" for name in TENANTS}
    asking = asyncio.create_task(store.exchange(Offer("one", 60.0, live=rows)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.wait([asking])
    assert asking.cancelled()
    held.set()
    await store.exchange(Offer("one", 60.0, live=rows))
    assert (await other.exchange(Offer("two", 60.0, news.cursor, news.generation))).live == {"one": rows}
