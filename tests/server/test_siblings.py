"""Processes of one gateway, over one store: workers that come and go, and what was counted."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.workers import Role, Worker
from server.background import Background
from server.cluster.local_sync import READY, STARTING, WORKER, LocalSync, Process
from server.fleet.fleet import Fleet
from server.observe.telemetry import Telemetry
from server.store.store import MemoryStore, StoreAway
from tests.server.conftest import LIMIT_S

NOWHERE = "http://127.0.0.1:9"


class Away(MemoryStore):
    """A store that can be away."""

    away = False

    async def records(self, kind: str) -> dict[str, str]:
        if self.away:
            raise StoreAway("it is away")
        return await super().records(kind)

    async def put(self, kind: str, name: str, value: str) -> None:
        if self.away:
            raise StoreAway("it is away")
        await super().put(kind, name, value)


class One:
    """A process."""

    def __init__(self, store: MemoryStore, number: int) -> None:
        self.fleet = Fleet(probe_s=60)
        self.telemetry = Telemetry(lambda: [("m", number + 1)], lambda: [], self.fleet.rows)
        self.siblings = LocalSync(
            store, number, self.fleet, self.telemetry.registry, Background(), lambda: f"of {number}"
        )

    @property
    def workers(self) -> set[str]:
        return set(self.fleet.members)

    async def metrics(self) -> Counter[str]:
        """The sum of each metric's samples over its labels."""
        text = (await self.siblings.metrics()).decode()
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] += sample.value  # type: ignore[assignment]
        return sums


@pytest.fixture
def store() -> Away:
    return Away(lambda: 0.0)


async def test_a_worker_that_one_process_is_given_all_have(store: Away) -> None:
    one, other = One(store, 0), One(store, 1)
    await one.siblings.add(Worker("w", NOWHERE, Role.DECODE, 7))
    await other.siblings.follow()
    assert other.fleet.members["w"].worker == Worker("w", NOWHERE, Role.DECODE, 7)
    with pytest.raises(ValueError, match="already"):
        await other.siblings.add(Worker("w", NOWHERE))
    await other.siblings.remove("w")
    await one.siblings.follow()
    assert one.workers == other.workers == set()
    with pytest.raises(KeyError):
        await one.siblings.remove("w")


async def test_a_configured_worker_that_was_taken_out_stays_out_in_a_process_that_is_started_anew(store: Away) -> None:
    one = One(store, 0)
    one.fleet.add(Worker("worker-0", NOWHERE))
    await one.siblings.remove("worker-0")
    new = One(store, 1)
    new.fleet.add(Worker("worker-0", NOWHERE))  # its settings name it
    await new.siblings.follow()
    assert new.workers == set()
    await one.siblings.add(Worker("worker-0", NOWHERE, slots=3))
    await new.siblings.follow()
    assert new.fleet.members["worker-0"].worker.slots == 3
    for process in (one, new):
        await process.fleet.close()


async def test_a_worker_that_is_the_same_is_left_alone_and_one_that_moved_is_not(store: Away) -> None:
    one, other = One(store, 0), One(store, 1)
    other.fleet.add(Worker("w", NOWHERE, plugin=True))
    member = other.fleet.members["w"]
    await one.siblings.add(Worker("w", NOWHERE))
    await other.siblings.follow()
    assert other.fleet.members["w"] is member
    await one.siblings.remove("w")
    await one.siblings.add(Worker("w", "http://127.0.0.1:10"))
    await other.siblings.follow()
    assert other.fleet.members["w"].worker.url == "http://127.0.0.1:10"
    for process in (one, other):
        await process.fleet.close()


async def test_a_store_that_was_started_anew_is_told_what_it_has_lost(store: Away) -> None:
    one = One(store, 0)
    await one.siblings.add(Worker("w", NOWHERE))
    store.clear()
    await one.siblings.follow()
    assert one.workers == {"w"}
    new = One(store, 1)
    await new.siblings.follow()
    assert new.workers == {"w"}
    for process in (one, new):
        await process.fleet.close()


async def test_while_the_store_is_away_nothing_changes(store: Away) -> None:
    one = One(store, 0)
    await one.siblings.add(Worker("w", NOWHERE))
    store.away = True
    await one.siblings.follow()
    await one.siblings.publish()
    with pytest.raises(StoreAway):
        await one.siblings.remove("w")
    with pytest.raises(StoreAway):
        await one.siblings.add(Worker("v", NOWHERE))
    assert one.workers == {"w"}
    assert (await one.metrics())["evenhand_queue_depth"] == 1
    await one.fleet.close()


async def test_whoever_starts_the_workers_says_how_far_they_are_and_hears_who_is_ready(store: Away) -> None:
    one, other = One(store, 0), One(store, 1)
    await store.put(STARTING, "worker-0", "loading the model")
    for process in (one, other):
        await process.siblings.follow()
        assert process.fleet.starting == {"worker-0": "loading the model"}
    assert await store.records(READY) == {"0": "0", "1": "0"}


async def test_metrics_are_those_of_all_processes(store: Away) -> None:
    one, other = One(store, 0), One(store, 1)
    one.telemetry.refused("/v1/x", "overloaded")
    other.telemetry.refused("/v1/x", "overloaded")
    await other.siblings.publish()
    one.telemetry.refused("/v1/x", "overloaded")
    seen = await one.metrics()
    assert seen["evenhand_requests_total"] == 3
    assert seen["evenhand_queue_depth"] == 1 + 2


async def test_each_sees_what_the_others_show_operators_and_not_its_own(store: Away) -> None:
    one, other = One(store, 0), One(store, 1)
    await one.siblings.publish()
    await other.siblings.publish()
    assert await one.siblings.views() == ["of 1"] and await other.siblings.views() == ["of 0"]
    store.away = True
    assert await one.siblings.views() == []


async def test_a_process_that_is_started_anew_goes_on_counting_where_it_ended(store: Away) -> None:
    one, before = One(store, 0), One(store, 1)
    for _ in range(5):
        before.telemetry.refused("/v1/x", "overloaded")
    await before.siblings.publish()
    after = One(store, 1)
    async with after.siblings.running(Process(1, Path())):
        after.telemetry.refused("/v1/x", "overloaded")
        assert (await after.metrics())["evenhand_requests_total"] == 6
    assert (await one.metrics())["evenhand_requests_total"] == 6
    assert (await one.metrics())["evenhand_queue_depth"] == 1 + 2


async def test_a_process_that_replaces_another_serves_once_it_has_asked_its_workers(store: Away) -> None:
    asked, answer, serving = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def engine(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await answer.wait()
        writer.close()

    async def serve(process: Process) -> None:
        async with one.siblings.running(process):
            serving.set()

    async with await asyncio.start_server(engine, "127.0.0.1", 0) as server:
        one = One(store, 1)
        one.fleet.add(Worker("w", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        task = asyncio.create_task(serve(Process(1, Path(), again=True)))
        await asyncio.wait_for(asked.wait(), LIMIT_S)
        assert not serving.is_set()
        answer.set()
        await asyncio.wait_for(task, LIMIT_S)
        assert serving.is_set() and one.fleet.has_asked_all()
        await one.fleet.close()


async def test_a_gateway_of_one_process_asks_nobody(store: Away) -> None:
    store.away = True
    one = One(store, 0)
    async with one.siblings.running(None):
        assert (await one.metrics())["evenhand_queue_depth"] == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://:80", "http://a:0"])
async def test_a_worker_whose_address_is_none_is_refused_before_others_hear_of_it(store: Away, url: str) -> None:
    one = One(store, 0)
    with pytest.raises(ValueError, match="is not an address"):
        await one.siblings.add(Worker("w", url))
    assert not await store.records(WORKER)


async def test_a_record_that_is_no_worker_harms_nobody(store: Away, caplog: pytest.LogCaptureFixture) -> None:
    one = One(store, 0)
    await store.put(WORKER, "bad", '{"url":"http://127.0.0.1:99999"}')
    await store.put(WORKER, "good", '{"url":"http://127.0.0.1:9"}')
    for _ in range(2):
        await one.siblings.follow()
    assert one.workers == {"good"} and caplog.text.count("bad") == 1
    await one.fleet.close()
