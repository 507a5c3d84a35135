"""When a worker is out, and when it is back."""

import asyncio
from time import monotonic

import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import HEALTHY, Faults
from scheduler.workers import Worker
from server.fleet.fleet import Fleet, WorkerState
from server.fleet.health import Breaker, Output
from server.settings import HealthSettings
from tests.server.conftest import (
    INSTANT,
    LIMIT_S,
    SLOW,
    VLLM,
    ScriptedEngine,
    chat,
    eventually,
    over_fake,
    plain,
    request,
    says,
    serving,
    streamed,
)
from tests.server.crowd import over_crowd

CHAT = "/v1/chat/completions"


def test_a_circuit_opens_after_so_many_failures_and_each_pause_is_twice_as_long() -> None:
    breaker = Breaker()
    opened, pauses = [], []
    for call in range(11):
        breaker.failed(f"call {call}", "a", proven=True)
        opened.append(breaker.opens(100.0, 3, several=False))
        pauses.append(breaker.retry_at - 100.0)
    assert opened == [False] * 2 + [True] * 9
    assert pauses[2:] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(
    ("tenants", "proven", "several", "opens"),
    [
        ("aaa", True, False, True),
        ("aaa", True, True, False),  # others are served: their calls would have failed too
        ("aaa", False, False, False),  # no worker answered these: perhaps they are to blame
        ("aab", False, True, True),
        ("ab", False, True, False),
    ],
)
def test_one_tenant_s_calls_open_a_circuit_only_if_another_worker_answered_them_and_nobody_else_is_served(
    tenants: str, proven: bool, several: bool, opens: bool
) -> None:
    breaker = Breaker()
    for call, tenant in enumerate(tenants):
        breaker.failed(f"call {call}", tenant, proven=proven)
        breaker.failed(f"call {call}", tenant, proven=proven)  # the same call again counts once
    assert breaker.opens(0.0, 3, several=several) is opens


def metrics(running: int, tokens: int | None) -> str:
    page = f'vllm:num_requests_running{{engine="0"}} {running}.0\n'
    return page if tokens is None else page + f'vllm:generation_tokens_total{{engine="0"}} {tokens}.0\n'


def test_an_engine_is_stuck_only_while_it_runs_something_and_makes_nothing() -> None:
    output = Output()
    for now, page in enumerate([metrics(1, 10), metrics(1, 10), metrics(1, 10)]):
        output.read(page, float(now))
    assert output.stuck_s(2.0) == 2.0
    for page in (metrics(1, 11), metrics(0, 11), metrics(1, None), ""):
        output.read(metrics(1, 11), 10.0)
        output.read(page, 20.0)
        assert output.stuck_s(20.0) == (0.0 if page != metrics(1, 11) else 10.0)


async def test_a_stream_is_moved_when_its_engine_runs_and_makes_nothing() -> None:
    async with over_crowd(SLOW, health={"stall_s": 0.2}) as crowd:
        body = chat(max_tokens=12, stream=True)
        whole = await crowd.gateway.ask(CHAT, body)
        crowd.strike(Faults(stall_after_tokens=5))
        wire = await crowd.gateway.send(request(CHAT, body))
        await eventually(lambda: any(engine.stalled for engine in crowd.engines))
        stuck = next(engine for engine in crowd.engines if engine.stalled)
        for engine in crowd.engines:
            engine.faults = HEALTHY
        reply = await wire.answer()
        assert reply.text == whole.text and reply.events[-1] == "[DONE]"
        assert not stuck.running, "it was told to stop before another one was asked"
        assert crowd.gateway.server.fleet.members
        stuck.heal()


class Ahead:
    """A clock that a test sets ahead. looks: how often it was looked at."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return monotonic() + self.ahead_s


async def looked_at(clock: Ahead, times: int = 6) -> None:
    """Returns when so many probes and what follows from them are over."""
    until = clock.looks + times
    await eventually(lambda: clock.looks > until, "the workers are looked at")


async def test_a_client_that_does_not_read_is_no_stall() -> None:
    """Two engines that say they run something and make nothing; the one that answers waits for the client to read."""
    stuck = plain(b"vllm:num_requests_running 1\nvllm:generation_tokens_total 7\n")
    event = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 32_000)
    enough = asyncio.Event()
    written, seen = 0, list[int]()

    async def much(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(streamed(event).removesuffix(b"0\r\n\r\n"))
        while not enough.is_set():
            written += 1
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()

    async with (
        ScriptedEngine([much], gets={"/metrics": stuck}).run() as one,
        ScriptedEngine([much], gets={"/metrics": stuck}).run() as other,
        serving(one.url, other.url, ready=False, probe_s=0.02, health={"stall_s": 60.0, "failures": 1000}) as gateway,
    ):
        fleet, clock = gateway.server.fleet, Ahead()
        await eventually(lambda: len(fleet.ready()) == 2)
        wire = await gateway.send(request(CHAT, chat(stream=True)))
        await wire.head()
        (leg,) = [leg for member in fleet.members.values() for leg in member.legs]

        def stands_still() -> bool:
            """Every buffer on the way is full; until then the stream is paused now and then."""
            seen.append(written)
            return leg.connection is not None and leg.connection.paused and seen[-40:] == [written] * 40

        await eventually(stands_still, "its client does not keep up")
        fleet.clock = clock
        clock.ahead_s = 600.0  # ten times the patience, nothing read
        await looked_at(clock)
        assert leg.speaks and [leg for member in fleet.members.values() for leg in member.legs] == [leg]
        assert not any(gateway.server.gateway.failover.outcomes.values())
        enough.set()
        wire.reset()


async def test_an_engine_that_fails_again_and_again_is_out_and_costs_nobody_an_answer() -> None:
    async with over_crowd(probe_s=0.05, health={"failures": 3}) as crowd:
        bad, good = crowd.engines
        now = monotonic()  # stands still: its pause ends when the test says so
        crowd.gateway.server.fleet.clock = lambda: now
        bad.faults = Faults(error_status=500)
        bad.crowd = None  # type: ignore[assignment]  # this fault stays
        bad._strike = lambda: None  # type: ignore[method-assign]
        member = next(member for member in crowd.gateway.server.fleet.members.values() if member.worker.url == bad.url)
        for _ in range(40):
            assert (await crowd.gateway.ask(CHAT, chat())).status == 200
        assert member.state is WorkerState.DOWN and len(bad.seen) == 3
        bad.faults = HEALTHY
        now += 1.5  # longer than its first pause
        await eventually(lambda: member.state is WorkerState.READY)
        assert member.breaker.failures == 3, "the next failure opens it again at once"
        while member.breaker.failures:
            await asyncio.gather(*(crowd.gateway.ask(CHAT, chat()) for _ in range(4)))


TRIALS = [
    (plain(b'{"choices":[{"text":" 2, 3, 5"}]}'), True),
    (plain(b"", status="404 Not Found"), True),  # an engine for embeddings
    (plain(b'{"choices":[{"text":" "}]}'), False),
    (plain(b'{"choices":[]}'), False),
    (plain(b"[]"), False),
    (plain(b"oops"), False),
    (plain(b"", status="500 Internal Server Error"), False),
]


@pytest.mark.parametrize(("answer", "joins"), TRIALS)
async def test_a_worker_joins_when_it_answers_a_trial_question(answer: bytes, joins: bool) -> None:
    async with ScriptedEngine([says(answer)]).run() as engine:
        fleet = Fleet(probe_s=0.01)
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: len(engine.asked) >= (1 if joins else 3))
        await eventually(lambda: (member.state is WorkerState.READY) == joins)
        await fleet.close()


async def test_a_worker_that_says_something_else_than_its_fellows_stays_out() -> None:
    async with FakeEngine(INSTANT) as one, FakeEngine(INSTANT, faults=Faults(wrong_answers=True)) as other:
        fleet = Fleet(probe_s=0.01, health=HealthSettings(canary="same"))
        first = fleet.add(Worker("one", one.url))
        await eventually(lambda: first.state is WorkerState.READY)
        second = fleet.add(Worker("other", other.url))
        await eventually(lambda: second.misses >= 2)
        assert second.state is WorkerState.STARTING and "as the other workers do" in second.note
        other.faults = HEALTHY
        await eventually(lambda: second.state is WorkerState.READY)
        await fleet.close()


async def test_after_its_time_a_drained_worker_s_streams_go_on_elsewhere_and_the_others_stay() -> None:
    async with over_crowd(SLOW, health={"drain_s": 0.05}) as crowd:
        fleet = crowd.gateway.server.fleet
        for fields, moves in (({}, True), ({"n": 2}, False)):
            body = chat(max_tokens=25, stream=True, ignore_eos=True, **fields)
            whole = await crowd.gateway.ask(CHAT, body)
            before = len(crowd.asked)
            wire = await crowd.gateway.send(request(CHAT, body))
            await eventually(lambda: any(member.legs for member in fleet.members.values()))
            member = next(member for member in fleet.members.values() if member.legs)
            head = await wire.head()
            first = [await wire.chunk() for _ in range(4)]
            fleet.drain(member.worker.id)
            rest = []
            while chunk := await wire.chunk():
                rest.append(chunk)
            head.body = b"".join(first + rest)
            assert sorted(map(str, said(head.events))) == sorted(map(str, said(whole.events)))
            assert len(crowd.asked) - before == 1 + moves
            assert member.state is WorkerState.DRAINING and not member.breaker.failures
            fleet.resume(member.worker.id)
            await crowd.mend()


def said(events: list[object]) -> list[object]:
    return [event.get("choices") if isinstance(event, dict) else event for event in events]


async def test_a_gateway_that_is_told_to_stop_says_so_before_it_closes() -> None:
    async with over_fake(lame_duck_s=3600.0) as (gateway, _):
        gateway.server.stop()
        ready = await gateway.ask("/ready", method="GET")
        assert ready.status == 503 and ready.json()["stopping"]
        assert (await gateway.ask("/health", method="GET")).status == 200
        answer = await gateway.ask(CHAT, chat())
        assert answer.status == 200
        assert answer.headers["connection"] == "close", "no connection is idle when it closes"
        assert not gateway.serving.done()
        gateway.server.stop()  # told again: at once
        await asyncio.wait_for(asyncio.shield(gateway.serving), LIMIT_S)


async def test_it_closes_when_it_has_said_so_for_long_enough() -> None:
    async with over_fake(lame_duck_s=0.5) as (gateway, _):
        gateway.server.stop()
        assert (await gateway.ask("/ready", method="GET")).json()["stopping"]
        await asyncio.wait_for(asyncio.shield(gateway.serving), LIMIT_S)


IDLE = plain(
    b'vllm:num_requests_running{model_name="fake"} 0.0\n'
    b'vllm:num_requests_waiting{model_name="fake"} 0.0\n'
    b'vllm:generation_tokens_total{model_name="fake"} 5.0\n'
)


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_to_an_engine_that_hung_while_it_was_idle_are_asked_elsewhere(stream: bool) -> None:
    """Its API server says that all is well and that nothing runs, and takes requests that nobody looks at."""
    never = asyncio.Event()

    async def hangs(writer: asyncio.StreamWriter) -> None:
        await never.wait()

    hung = ScriptedEngine([hangs], gets=VLLM | {"/metrics": IDLE})
    async with hung.run(), FakeEngine(INSTANT) as other:
        async with serving(hung.url, other.url, probe_s=0.05, health={"stall_s": 0.5}) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            replies = await asyncio.gather(
                *(gateway.ask("/v1/chat/completions", chat(stream=stream)) for _ in range(4))
            )
            assert [reply.status for reply in replies] == [200] * 4 and hung.asked
            never.set()
