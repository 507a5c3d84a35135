"""Models without traffic sleep; the next request wakes them once, and waits or is told how long it takes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from loadtest.fake.engine import FakeEngine
from scheduler.workers import Worker
from server.admission.sleeper import CannotSleep, Sleeper
from server.fleet.fleet import WorkerState
from server.settings import SleepSettings
from tests.server.conftest import INSTANT, MODEL, Reply, Running, chat, eventually, over_fake, serving

SLEEPY = replace(INSTANT, sleep_mode=True)
CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def over(*engines: FakeEngine, after_s: float = 3600.0, **sleep: Any) -> AsyncIterator[Running]:
    """A gateway whose models go to sleep when a test says so."""
    async with serving(
        *(engine.url for engine in engines), probe_s=0.01, sleep={"after_s": after_s} | sleep
    ) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == len(engines))
        yield gateway


def sleeper(gateway: Running) -> Sleeper:
    found = gateway.server.sleeper
    assert found is not None
    return found


def states(gateway: Running) -> set[str]:
    return {member.state.value for member in gateway.server.fleet.members.values()}


async def put_to_sleep(gateway: Running) -> None:
    """As if there had been no traffic for long."""
    await sleeper(gateway).look()
    now = sleeper(gateway)._clock()
    sleeper(gateway).used_at.update(dict.fromkeys(sleeper(gateway).used_at, now - 1e6))
    await sleeper(gateway).look()


async def test_a_model_without_traffic_sleeps_and_one_request_of_many_wakes_it() -> None:
    async with FakeEngine(SLEEPY) as engine, over(engine) as gateway:
        assert (await gateway.ask(CHAT, chat())).status == 200
        await sleeper(gateway).look()
        assert not engine.asleep
        await put_to_sleep(gateway)
        assert engine.asleep and states(gateway) == {"asleep"}
        ready = await gateway.ask("/ready", method="GET")
        assert ready.status == 200 and ready.json()["workers"][0]["state"] == "asleep"
        listed = await gateway.ask("/v1/models", method="GET")
        assert [entry["id"] for entry in listed.json()["data"]] == [MODEL]
        replies: list[Reply] = await asyncio.gather(
            *(gateway.ask(CHAT, chat(stream=number % 2 == 0)) for number in range(8))
        )
        assert [reply.body for reply in replies if reply.status != 200] == []
        assert engine.woken == 1 and states(gateway) == {"ready"}
        metrics = await gateway.metrics()
        assert metrics["evenhand_wakes_total", (("model", MODEL),)] == 1
        assert metrics["evenhand_requests_awaiting_wake", (("model", MODEL),)] == 0
        assert metrics["evenhand_worker_asleep", (("worker", "worker-0"),)] == 0


async def test_it_goes_to_sleep_by_itself_after_its_time() -> None:
    async with FakeEngine(SLEEPY) as engine:
        async with serving(engine.url, ready=False, probe_s=0.01, sleep={"after_s": 0.01}) as gateway:
            await eventually(lambda: engine.asleep)
            assert (await gateway.ask(CHAT, chat())).status == 200


async def test_what_runs_waits_or_came_by_another_gateway_keeps_it_awake() -> None:
    async with FakeEngine(replace(SLEEPY, cost=replace(SLEEPY.cost, iteration_s=0.02))) as engine:
        async with over(engine) as gateway, over(engine) as other:
            asked = asyncio.create_task(gateway.ask(CHAT, chat(stream=True, max_tokens=100)))
            await eventually(lambda: engine.running)
            await put_to_sleep(gateway)
            await eventually(lambda: any(member.load.others for member in other.server.fleet.members.values()))
            await put_to_sleep(other)
            assert not engine.naps
            assert (await asked).status == 200


async def test_traffic_that_came_and_went_by_another_gateway_keeps_it_awake() -> None:
    """Nothing of it runs when the sleeper looks: only the engine's own count shows it."""
    now, after_s = 0.0, 10.0
    async with over_fake(SLEEPY, probe_s=0.01) as (here, engine), serving(engine.url) as other:
        watcher = Sleeper(here.server.fleet, SleepSettings(after_s=after_s), lambda: now)
        (member,) = here.server.fleet.members.values()
        await eventually(lambda: member.output.generated == 0)
        await watcher.look()
        made = (await other.ask(CHAT, chat())).json()["usage"]["completion_tokens"]
        await eventually(lambda: member.output.generated == made and not member.load.others)
        now = 2 * after_s
        await watcher.look()
        assert not engine.naps
        now = 3 * after_s
        await watcher.look()
        assert engine.naps == 1, "nothing more has come"


async def test_a_model_that_another_gateway_has_put_to_sleep_is_woken_by_a_request_here() -> None:
    async with FakeEngine(SLEEPY) as engine, over(engine) as gateway, over(engine) as other:
        await put_to_sleep(gateway)
        await eventually(lambda: states(other) == {"asleep"})
        assert (await other.ask(CHAT, chat())).status == 200
        await eventually(lambda: states(gateway) == {"ready"})


async def test_requests_in_line_wake_a_model_that_another_gateway_puts_to_sleep() -> None:
    """Its engine finishes what it has; what waits here has never reached it."""
    one_slot = replace(SLEEPY, cost=replace(SLEEPY.cost, max_seqs=1, iteration_s=0.01))
    async with FakeEngine(one_slot) as engine:
        sleeps = {"after_s": 3600.0}
        async with serving(engine.url, slots=1, probe_s=0.01, sleep=sleeps, admission={"ahead": 0}) as gateway:
            running = asyncio.create_task(gateway.ask(CHAT, chat(max_tokens=50)))
            await eventually(lambda: engine.running)
            waiting = asyncio.create_task(gateway.ask(CHAT, chat()))
            await eventually(lambda: gateway.waiting)
            engine.asleep = True
            await eventually(lambda: states(gateway) == {"asleep"})
            assert (await running).status == (await waiting).status == 200 and engine.woken == 1


async def test_a_gateway_that_starts_while_its_engine_sleeps_wakes_it_for_the_first_request() -> None:
    async with FakeEngine(SLEEPY) as engine:
        engine.asleep = True
        async with serving(engine.url, ready=False, probe_s=0.01, sleep={"after_s": 3600.0}) as gateway:
            await eventually(lambda: states(gateway) == {"asleep"})
            assert (await gateway.ask(CHAT, chat())).status == 200 and engine.woken == 1


async def test_an_engine_without_a_sleep_mode_goes_on_and_says_why() -> None:
    async with FakeEngine(INSTANT) as engine, over(engine) as gateway:
        await put_to_sleep(gateway)
        await gateway.ready()
        worker = (await gateway.ask("/ready", method="GET")).json()["workers"][0]
        assert worker["state"] == "ready" and "cannot sleep: it has no sleep mode" in worker["note"]
        assert (await gateway.ask(CHAT, chat())).status == 200


async def test_where_one_worker_of_a_model_cannot_sleep_the_others_stay_awake_with_it() -> None:
    """Requests that it serves would never wake them."""
    async with FakeEngine(SLEEPY) as able, FakeEngine(INSTANT) as unable, over(able, unable) as gateway:
        for _ in range(2):
            await put_to_sleep(gateway)
            await eventually(lambda: states(gateway) == {"ready"})
        assert (able.woken, able.asleep) == (1, False)


class BrokenNap:
    """A worker that fails to wake up at first."""

    def __init__(self, gateway: Running) -> None:
        self.gateway = gateway
        self.woken = 0

    async def sleep(self) -> None:
        return

    async def wake(self) -> None:
        self.woken += 1
        if self.woken == 1:
            raise CannotSleep("it broke")
        self.gateway.server.fleet.put(self.gateway.server.fleet.members["worker-0"], WorkerState.STARTING)


async def test_a_model_that_did_not_wake_up_is_tried_again_by_the_next_request() -> None:
    async with FakeEngine(INSTANT) as engine, over(engine) as gateway:
        nap = gateway.server.fleet.naps["worker-0"] = BrokenNap(gateway)
        await put_to_sleep(gateway)
        first = await gateway.ask(CHAT, chat())
        assert (first.status, first.error["code"], "retry-after" in first.headers) == (503, "waking", True)
        assert (await gateway.ask(CHAT, chat())).status == 200
        assert nap.woken == 2


class LateNap:
    """A worker that takes its time."""

    def __init__(self, gateway: Running) -> None:
        self.gateway = gateway
        self.may_wake = asyncio.Event()
        self.woken = 0

    async def sleep(self) -> None:
        return

    async def wake(self) -> None:
        self.woken += 1
        await self.may_wake.wait()
        member = self.gateway.server.fleet.members["worker-0"]
        self.gateway.server.fleet.put(member, WorkerState.STARTING)


async def test_who_may_not_wait_so_long_gets_503_with_the_time_that_is_left() -> None:
    async with FakeEngine(INSTANT) as engine, over(engine, max_wait_s=0.05) as gateway:
        nap = gateway.server.fleet.naps["worker-0"] = LateNap(gateway)
        await put_to_sleep(gateway)
        late = await gateway.ask(CHAT, chat())  # nobody knows yet how long it takes: it waits, and gives up
        assert late.status == 503 and late.error["code"] == "waking" and "retry-after" in late.headers
        nap.may_wake.set()
        await gateway.ready()
        assert nap.woken == 1
        sleeper(gateway)._took_s[MODEL] = 40.0
        nap.may_wake.clear()
        await put_to_sleep(gateway)
        told = await gateway.ask(CHAT, chat())  # this one does not even begin to wait
        assert told.status == 503 and 35 <= int(told.headers["retry-after"]) <= 40
        nap.may_wake.set()
        await gateway.ready()
        assert nap.woken == 2 and (await gateway.ask(CHAT, chat())).status == 200


async def test_a_client_that_leaves_while_a_model_wakes_does_not_keep_others_from_it() -> None:
    async with FakeEngine(INSTANT) as engine, over(engine) as gateway:
        nap = gateway.server.fleet.naps["worker-0"] = LateNap(gateway)
        await put_to_sleep(gateway)
        left = asyncio.create_task(gateway.ask(CHAT, chat()))
        await eventually(lambda: sleeper(gateway).awaited[MODEL] == 1)
        stays = asyncio.create_task(gateway.ask(CHAT, chat()))
        await eventually(lambda: sleeper(gateway).awaited[MODEL] == 2)
        left.cancel()
        gateway.wires[0].reset()
        await eventually(lambda: sleeper(gateway).awaited[MODEL] == 1)
        nap.may_wake.set()
        assert (await stays).status == 200 and nap.woken == 1


async def test_requests_wait_for_a_model_that_is_started_elsewhere_and_the_metric_says_so() -> None:
    async with serving(sleep={"from_zero": [MODEL]}) as gateway:
        assert (await gateway.ask("/ready", method="GET")).status == 200
        asked = asyncio.create_task(gateway.ask(CHAT, chat()))
        await eventually(lambda: sleeper(gateway).awaited[MODEL] == 1)
        assert (await gateway.metrics())["evenhand_requests_awaiting_wake", (("model", MODEL),)] == 1
        unknown = await gateway.ask(CHAT, chat(model="nobody"))
        assert unknown.status == 404
        async with FakeEngine(INSTANT) as engine:
            gateway.server.fleet.add(Worker("fresh", engine.url))
            assert (await asked).status == 200
            await gateway.server.fleet.remove("fresh")


async def test_without_the_setting_nothing_sleeps_and_nothing_is_woken() -> None:
    async with FakeEngine(SLEEPY) as engine, serving(engine.url, probe_s=0.01) as gateway:
        assert gateway.server.sleeper is None
        engine.asleep = True
        await eventually(lambda: states(gateway) == {"asleep"})
        assert (await gateway.ask("/ready", method="GET")).status == 503
        assert (await gateway.ask(CHAT, chat())).status in (404, 503)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="after_s"):
        SleepSettings(after_s=0)
