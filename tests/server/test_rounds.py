"""One timer looks at every worker: now when it joins, again after its pause, and never twice at once."""

import asyncio

import pytest

from scheduler.workers import Worker
from server.background import Background
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member, WorkerState
from server.fleet.health import told_in
from server.fleet.rounds import SPREAD, TICK_S, Rounds
from server.request.errors import EngineUnreachable
from tests.server.conftest import in_virtual_time


class Looks:
    """Notes when which thing was looked at."""

    def __init__(self, pause_s: float = 10.0, takes_s: float = 0.0) -> None:
        self.clock = asyncio.get_running_loop().time
        self.at: list[tuple[str, float]] = []
        self.takes_s = takes_s
        self.most = self.now = 0
        self.broken = False
        self.background = Background(self.clock)
        self.rounds = Rounds(self.look, lambda name: pause_s, clock=self.clock, background=self.background)

    async def look(self, name: str) -> None:
        self.at.append((name, self.clock()))
        if self.broken:
            raise RuntimeError("a bug")
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.takes_s)
        self.now -= 1

    def times(self, name: str) -> list[float]:
        return [at for seen, at in self.at if seen == name]


def test_each_is_looked_at_once_in_a_pause_and_those_that_joined_together_drift_apart() -> None:
    async def run() -> None:
        looks = Looks(pause_s=10.0)
        began = looks.clock()
        for number in range(100):
            looks.rounds.add(f"w{number}")
        await asyncio.sleep(1000.0)
        await looks.rounds.close()
        for number in range(100):
            times = looks.times(f"w{number}")
            assert times[0] == began
            gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
            assert all(10 * (1 - SPREAD) <= gap <= 10 * (1 + SPREAD) + 2 * TICK_S for gap in gaps)
        last = sorted(at for _, at in looks.at if at > began + 900)
        busiest = max(sum(1 for at in last if low <= at < low + 1.0) for low in last)
        assert busiest <= 35, "ten a second on average"
        assert len(asyncio.all_tasks()) == 1

    in_virtual_time(run())


def test_soon_is_now_or_right_after_the_look_that_is_going_on() -> None:
    async def run() -> None:
        looks = Looks(pause_s=100.0, takes_s=5.0)
        looks.rounds.add("w")
        await asyncio.sleep(1.0)
        looks.rounds.soon("w")
        looks.rounds.soon("w")
        await asyncio.sleep(20.0)
        looks.rounds.soon("w")
        looks.rounds.soon("nobody")
        await asyncio.sleep(20.0)
        first, second, third = looks.times("w")
        assert 5.0 <= second - first <= 5.1 and 21.0 <= third - first <= 21.1
        assert looks.most == 1
        await looks.rounds.close()

    in_virtual_time(run())


def test_who_is_removed_is_not_looked_at_again_even_in_the_middle_of_a_look() -> None:
    async def run() -> None:
        looks = Looks(pause_s=1.0, takes_s=5.0)
        looks.rounds.add("w")
        looks.rounds.add("v")
        await asyncio.sleep(1.0)
        await looks.rounds.remove("w")
        await asyncio.sleep(50.0)
        assert len(looks.times("w")) == 1 and len(looks.times("v")) > 5
        await looks.rounds.close()
        assert len(asyncio.all_tasks()) == 1

    in_virtual_time(run())


def test_a_look_that_meets_a_bug_is_told_and_the_next_one_comes() -> None:
    async def run() -> None:
        looks = Looks(pause_s=1.0)
        looks.broken = True
        looks.rounds.add("w")
        await asyncio.sleep(5.0)
        assert looks.background.problems() == {"probe w": "RuntimeError: a bug"}
        looks.broken = False
        await asyncio.sleep(5.0)
        assert len(looks.at) >= 8 and looks.most == 1
        await looks.rounds.close()

    in_virtual_time(run())


def test_of_an_engines_metrics_only_what_is_needed_is_read() -> None:
    page = (
        b'vllm:num_requests_running{engine="0"} 3.0\n# HELP vllm:num_requests_waiting As it says.\n'
        b'vllm:num_requests_waiting{engine="0"} 4.0\nvllm:e2e_request_latency_seconds_bucket{le="1"} 9\n'
        b'vllm:kv_cache_usage_perc{engine="0"} 0.5'
    )
    assert told_in(page).splitlines() == [
        'vllm:num_requests_running{engine="0"} 3.0',
        'vllm:num_requests_waiting{engine="0"} 4.0',
        'vllm:kv_cache_usage_perc{engine="0"} 0.5',
    ]
    assert told_in(b"") == ""


@pytest.mark.parametrize(
    "line",
    [
        b'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0',
        b'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0',
        b"vllm:nixl_bytes_transferred_sum 7.0",
        b"evenhand_engine_slots 8.0",
        b"evenhand_engine_step_tokens 512.0",
        b'evenhand_engine_policy_info{policy="vtc"} 1.0',
        b"vllm:generation_tokens_total 5.0",
    ],
)
def test_what_the_fleet_looks_for_is_among_it(line: bytes) -> None:
    assert told_in(b"# HELP nothing\n" + line + b"\nother 1.0\n") == line.decode()


async def test_a_thousand_workers_that_fail_at_once_are_out_with_a_sentence_each_and_back_when_they_are_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = Fleet()
    for number in range(1000):
        worker = Worker(f"w{number}", "http://127.0.0.1:9", slots=4)
        fleet.enroll(Member(worker, EngineClient(worker.url), WorkerState.READY, ("m",)))
    for member in fleet.members.values():
        for _ in range(5):
            fleet.suspect(member, EngineUnreachable("The engine cannot be reached."))
    assert not fleet.serves("m") and not fleet.ready() and not fleet.pools.all()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1000 and len(set(said)) == 1000
    assert "worker w7 gets no requests until it answers again" in said[7]
    for member in fleet.members.values():
        fleet.put(member, WorkerState.READY)
    assert len(fleet.pools.of("m")[0].workers) == 1000
    assert next(iter(fleet.pools.of("m")[0].in_order())).worker.id == "w0"
    await fleet.close()
