import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import Faults
from loadtest.records import Ending
from loadtest.simulator.costmodel import PRESETS, CostModel

SLOW = EngineSetup(cost=CostModel(iteration_s=0.005, max_seqs=64))


def calls(number: int, *, every_s: float = 0.0, output_tokens: int = 10) -> list[TraceCall]:
    return [TraceCall(f"c{at}", at * every_s, "t", [5, 6, 7, at], 4, output_tokens) for at in range(number)]


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine:
        yield engine


async def test_every_call_becomes_one_record_with_all_its_tokens(engine: FakeEngine) -> None:
    records = await Client(Target(engine.url)).open_loop(calls(50, output_tokens=20))
    assert sorted(record.id for record in records) == sorted(f"c{at}" for at in range(50))
    assert {(record.ending, record.output_tokens, record.prompt_tokens) for record in records} == {(Ending.OK, 20, 4)}
    assert {len(record.gaps_us) for record in records} == {19}


async def test_gaps_and_first_token_add_up_to_the_time_of_the_last_token() -> None:
    async with FakeEngine(SLOW) as engine:
        (record,) = await Client(Target(engine.url)).open_loop(calls(1, output_tokens=40))
    assert record.ttft_s is not None
    last_s = record.ttft_s + sum(record.gaps_us) / 1e6
    assert record.ttft_s >= 0.005
    assert 40 * 0.005 <= last_s <= record.e2e_s + 1e-5


async def test_open_loop_sends_on_time_though_the_server_answers_nothing() -> None:
    async with FakeEngine(SLOW, faults=Faults(stall_after_tokens=0)) as engine:
        client = Client(Target(engine.url))
        records = await client.open_loop(calls(20, every_s=0.01), drain_s=0.01)
    assert {record.ending for record in records} == {Ending.UNFINISHED}
    assert max(record.sent_s - record.due_s for record in records) < 0.15 + sum(client.progress.loop_s)
    assert len(client.progress.lag_s) == 20
    assert client.progress.loop_s


async def test_closed_loop_keeps_no_more_than_so_many_on_their_way() -> None:
    async with FakeEngine(SLOW) as engine:
        records = await Client(Target(engine.url)).closed_loop(calls(30), 5)
    changes = [(record.sent_s, 1) for record in records] + [(record.sent_s + record.e2e_s, -1) for record in records]
    at_once = [sum(change for at, change in changes if at < moment + 1e-6) for moment, _ in changes]
    assert len(records) == 30
    assert max(at_once) == 5


async def test_connections_are_used_again(engine: FakeEngine) -> None:
    await Client(Target(engine.url)).closed_loop(calls(30), 1)
    assert engine.accepted == 1


async def test_an_idle_connection_closed_by_the_server_costs_no_call(engine: FakeEngine) -> None:
    client = Client(Target(engine.url))
    slow = calls(2, every_s=2.0)  # by far long enough to cut the connection in between

    async def cut() -> None:
        await until(lambda: client.progress.done == 1)
        engine.close_idle()

    async with asyncio.TaskGroup() as group:
        group.create_task(cut())
        group.create_task(client.open_loop(slow))
    assert [record.ending for record in client.records] == [Ending.OK, Ending.OK]
    assert engine.accepted == 2


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing sets an event for us
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("faults", "ending"),
    [
        (Faults(error_status=500), Ending.FAILED),
        (Faults(error_status=429), Ending.LIMITED),
        (Faults(error_status=400), Ending.REFUSED),
        (Faults(cut_after_tokens=3), Ending.TRUNCATED),
        (Faults(die_after_tokens=3), Ending.TRUNCATED),
        (Faults(error_event_after_tokens=3), Ending.ERROR_EVENT),
    ],
)
async def test_every_failure_is_an_outcome_of_its_own(engine: FakeEngine, faults: Faults, ending: Ending) -> None:
    engine.faults = faults
    (record,) = await Client(Target(engine.url)).open_loop(calls(1))
    assert record.ending is ending
    assert record.error


async def test_no_server_is_an_outcome_too() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    records = await Client(Target(f"http://127.0.0.1:{port}")).open_loop(calls(3))
    assert {(record.ending, record.status) for record in records} == {(Ending.UNREACHABLE, 0)}


async def test_a_client_gives_up_after_its_patience_and_the_engine_hears_of_it() -> None:
    async with FakeEngine(SLOW) as engine:
        (record,) = await Client(Target(engine.url, timeout_s=0.05)).open_loop(calls(1, output_tokens=5000))
        assert record.ending is Ending.TIMEOUT
        await until(lambda: engine.running == 0)


async def test_each_tenant_sends_its_own_key_and_extras_reach_the_body(engine: FakeEngine) -> None:
    target = Target(engine.url, key="other", keys={"t": "secret"}, extra={"top_k": 3}, tenant_xargs=True)
    await Client(target).open_loop(calls(1))
    seen = engine.seen[-1]
    assert seen.headers["authorization"] == "Bearer secret"
    assert seen.body["top_k"] == 3
    assert seen.body["vllm_xargs"]["evenhand_tenant"] == "t"


async def test_text_prompts_go_to_chat_when_asked_and_the_role_chunk_is_no_token(engine: FakeEngine) -> None:
    call = TraceCall("c", 0.0, "t", "Tell me more.", 4, 12)
    (record,) = await Client(Target(engine.url, api="chat")).open_loop([call])
    assert engine.seen[-1].path == "/v1/chat/completions"
    assert (record.output_tokens, len(record.gaps_us)) == (12, 11)


HELLO = b'data: {"choices": [{"index": 0, "text": "Hello"}]}\n\n'
ENDED = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (HELLO + b'data: {"choices": [{"text": "", "finish_reason": "abort"}]}\n\n' + DONE, "abort"),
        (HELLO + b'data: {"choices": [{"text": "", "finish_reason": "error"}]}\n\n' + DONE, "error"),
        (HELLO + ENDED + b'data: {"error": {"message": "lost"}}\n\n' + DONE, "lost"),
        (HELLO + b'event: error\ndata: {"detail": "the engine died"}\n\n' + DONE, "the engine died"),
    ],
    ids=["abort", "error reason", "error after the end", "named event"],
)  # fmt: skip
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
async def test_a_stream_that_says_it_failed_is_no_success(stream: bytes, told: str, cut: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + f"{len(stream):x}\r\n".encode() + stream + b"\r\n" + (b"" if cut else b"0\r\n\r\n"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        (record,) = await Client(Target(url)).open_loop(calls(1))
    assert record.ending is Ending.ERROR_EVENT
    assert told in record.error


async def test_a_conversations_next_turn_waits_for_the_answer_before_it() -> None:
    turns = [replace(call, session="s", waits=True, at_s=0.0) for call in calls(3)]
    async with FakeEngine(SLOW) as engine:
        client = Client(Target(engine.url))
        records = await client.open_loop(turns)
    assert [record.id for record in records] == ["c0", "c1", "c2"]
    for earlier, later in pairwise(records):
        answered_s = earlier.sent_s + earlier.e2e_s
        assert answered_s <= later.sent_s + 1e-5
        assert later.due_s == 0.0, "the trace's time stays what it was"
        assert later.released_s is not None and answered_s <= later.released_s + 1e-5
        assert later.late_s < 0.05 + sum(client.progress.loop_s)


async def test_turns_whose_time_never_came_are_told_when_the_run_is_over() -> None:
    turns = [replace(call, session="s", waits=True, at_s=0.0) for call in calls(3)]
    async with FakeEngine(SLOW, faults=Faults(stall_after_tokens=0)) as engine:
        records = await Client(Target(engine.url)).open_loop(turns, drain_s=0.01)
    assert sorted(record.id for record in records) == ["c0", "c1", "c2"]
    assert {record.ending for record in records} == {Ending.UNFINISHED}
