"""Requests that are valid and mean no good: they hurt nobody else, and whoever sends them pays for them."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from loadtest.fake.engine import FakeEngine
from scheduler.workers import Worker
from server.fleet.fleet import Fleet, WorkerState
from server.request.errors import EngineGone
from tests.server.conftest import (
    INSTANT,
    VLLM,
    Reply,
    Running,
    ScriptedEngine,
    chat,
    completion,
    eventually,
    plain,
    request,
    serving,
    streamed,
)
from tests.server.test_tenants import KEY, OTHER

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
WORKERS = 3
TENANTS = f"""
tenants:
- name: honest
  keys: [{KEY}]
  budget: {{tokens_per_month: 1000000000}}
- name: hostile
  keys: [{OTHER}]
  budget: {{tokens_per_month: 1000000000}}
"""
USAGE = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
FINE = plain(
    json.dumps({"id": "x", "choices": [{"index": 0, "text": "ok", "finish_reason": "stop"}], "usage": USAGE}).encode()
)

Answer = Callable[[dict[str, object]], bytes | tuple[bytes, ...]]


class Reacting(ScriptedEngine):
    """An engine whose answer depends on the request. Bytes that end with `CUT` are cut off there."""

    def __init__(self, answer: Answer) -> None:
        super().__init__([self._play], gets=VLLM)
        self.answer = answer

    async def _play(self, writer: asyncio.StreamWriter) -> None:
        pieces = self.answer(json.loads(self.asked[-1].body))
        for piece in (pieces,) if isinstance(pieces, bytes) else pieces:
            writer.write(piece.removesuffix(CUT))
            await writer.drain()
            if piece.endswith(CUT):
                writer.close()
            await asyncio.sleep(0)


CUT = b"<cut>"


class Hall:
    """A gateway with two tenants over engines that answer as told."""

    def __init__(self, gateway: Running, engines: list[Reacting]) -> None:
        self.gateway = gateway
        self.engines = engines

    async def ask(self, path: str, body: dict[str, object], key: str = OTHER) -> Reply:
        return await self.gateway.ask(path, body, headers={"authorization": f"Bearer {key}"})

    async def bystander(self) -> None:
        reply = await self.ask(COMPLETIONS, completion(), KEY)
        assert reply.status == 200 and reply.json()["usage"] == USAGE

    def charged(self, tenant: str = "hostile") -> int:
        return max(self.gateway.server.shared.gate.usage(tenant).values())

    def all_ready(self) -> bool:
        return len(self.gateway.server.fleet.ready()) == len(self.engines)


@contextlib.asynccontextmanager
async def hall(folder: Path, answer: Answer, *, count: int = WORKERS, **settings: object) -> AsyncIterator[Hall]:
    tenants = folder / "tenants.yaml"
    tenants.write_text(TENANTS)
    engines = [Reacting(answer) for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.run())
        urls = [engine.url for engine in engines]
        gateway = await stack.enter_async_context(serving(*urls, tenants=tenants, ready=False, **settings))
        there = Hall(gateway, engines)
        await eventually(there.all_ready, "all workers are ready")
        yield there


def is_hostile(body: dict[str, object]) -> bool:
    return body.get("user") == "hostile"


@pytest.mark.parametrize("echoed", [{"finish_reason": "abort"}, {"finish_reason": "error"}, {"error": {"code": 500}}])
async def test_metadata_that_an_engine_echoes_decides_nothing(tmp_path: Path, echoed: dict[str, object]) -> None:
    def answers(body: dict[str, object]) -> bytes:
        if "metadata" not in body:
            return FINE
        usage = {"input_tokens": 70, "output_tokens": 7, "total_tokens": 77}
        content = {"id": "r", "status": "completed", "metadata": body["metadata"], "usage": usage}
        return plain(json.dumps(content, separators=(",", ":")).encode())

    async with hall(tmp_path, answers) as there:
        for _ in range(6):
            reply = await there.ask(RESPONSES, {"model": "fake", "input": "hi", "metadata": echoed})
            assert reply.status == 200 and reply.json()["metadata"] == echoed
        assert there.all_ready() and there.charged() == 6 * 77
        assert sum(len(engine.asked) for engine in there.engines) == 6, "nobody was asked twice"
        await there.bystander()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_engines_answer_with_500_costs_no_worker_and_is_paid_for(
    tmp_path: Path, stream: bool
) -> None:
    error = plain(b'{"error":{"message":"Cannot connect to host","code":500}}', status="500 Internal Server Error")

    async with hall(tmp_path, lambda body: error if is_hostile(body) else FINE, health={"failures": 2}) as there:
        for number in range(1, 9):
            reply = await there.ask(CHAT, chat(user="hostile", stream=stream))
            assert reply.status == 500 and reply.error["message"] == "Cannot connect to host"
            assert there.all_ready()
            assert sum(len(engine.asked) for engine in there.engines) == 2 * number, "a third was not asked"
        assert there.charged() >= 8 * 2, "both attempts of each"
        await there.bystander()
        assert there.gateway.server.gateway.failover.outcomes["blamed"] == 8


async def test_a_request_that_fails_at_one_worker_after_the_other_takes_out_nobody_while_others_are_served(
    tmp_path: Path,
) -> None:
    """Its picture's host refuses the first connection and serves the second: each worker in turn looks bad."""
    seen: set[object] = set()

    def answers(body: dict[str, object]) -> bytes:
        if not is_hostile(body) or body["seed"] in seen:
            return FINE
        seen.add(body["seed"])
        return plain(b"{}", status="500 Internal Server Error")

    async with hall(tmp_path, answers, health={"failures": 2}) as there:
        await there.bystander()
        for number in range(20):
            assert (await there.ask(CHAT, chat(user="hostile", seed=number))).status == 200
            assert there.all_ready()
        await there.bystander()


async def test_one_tenant_never_takes_out_the_last_worker(tmp_path: Path) -> None:
    error = plain(b"{}", status="500 Internal Server Error")
    async with hall(
        tmp_path, lambda body: error if is_hostile(body) else FINE, count=1, health={"failures": 1}
    ) as there:
        for _ in range(5):
            assert (await there.ask(CHAT, chat(user="hostile"))).status == 500
        await there.bystander()


async def test_a_stream_that_engines_cut_takes_out_nobody(tmp_path: Path) -> None:
    """vLLM 0.32 cuts a stream of /v1/responses with more than 20 `top_logprobs`, and is well."""
    created = b'event: response.created\ndata: {"type":"response.created","response":{"id":"r"}}\n\n'
    cut = streamed(created, created).removesuffix(b"0\r\n\r\n") + CUT

    async with hall(tmp_path, lambda body: cut if is_hostile(body) else FINE, health={"failures": 3}) as there:
        for _ in range(12):
            reply = await there.ask(
                RESPONSES, {"model": "fake", "input": "x", "stream": True, "user": "hostile", "top_logprobs": 30}
            )
            assert reply.status == 200 and b"engine_gone" in reply.body
            await there.bystander()
            assert there.all_ready()
        assert there.charged() >= 12


IN_BAND = {
    CHAT: (
        b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"fake","choices":[{"index":0,"delta":'
        b'{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[5,6,7]}\n\n'
    ),
    COMPLETIONS: (
        b'data: {"id":"c","object":"text_completion","created":1,"model":"fake","choices":[{"index":0,"text":"",'
        b'"finish_reason":null,"prompt_token_ids":[5],"token_ids":[]}]}\n\n'
    ),
}


@pytest.mark.parametrize("error", [b'"code": 500', b'"code": null', b'"type": "InternalServerError"', b'"param": null'])
@pytest.mark.parametrize("path", IN_BAND)
async def test_an_engine_that_dies_and_says_so_in_band_costs_nobody_an_answer(
    tmp_path: Path, path: str, error: bytes
) -> None:
    said = b'data: {"error": {"message": "EngineCore encountered an issue.", %b}}\n\n' % error
    dying = streamed(IN_BAND[path], said, b"data: [DONE]\n\n")
    first: list[object] = []

    def answers(body: dict[str, object]) -> bytes:
        first.append(body)
        return dying if len(first) == 1 else streamed(*ENDS[path])

    async with hall(tmp_path, answers, count=2) as there:
        reply = await there.ask(path, (chat if path == CHAT else completion)(stream=True))
        assert reply.status == 200 and reply.text == "Hi" and "error" not in str(reply.events)
        assert len(first) == 2


ENDS = {
    CHAT: (
        b'data: {"id":"d","object":"chat.completion.chunk","created":2,"model":"fake","choices":[{"index":0,"delta":'
        b'{"role":"assistant","content":""},"finish_reason":null}]}\n\n',
        b'data: {"id":"d","object":"chat.completion.chunk","created":2,"model":"fake","choices":[{"index":0,"delta":'
        b'{"content":"Hi"},"finish_reason":"stop","token_ids":[8]}]}\n\n',
        b"data: [DONE]\n\n",
    ),
    COMPLETIONS: (
        b'data: {"id":"d","object":"text_completion","created":2,"model":"fake","choices":[{"index":0,"text":"Hi",'
        b'"finish_reason":"stop","token_ids":[8]}]}\n\n',
        b"data: [DONE]\n\n",
    ),
}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_an_error_that_is_the_request_s_own_ends_the_stream_in_the_gateway_s_shape(
    tmp_path: Path, path: str
) -> None:
    errors = {
        CHAT: b'data: {"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}\n\n',
        RESPONSES: b'event: error\ndata: {"type":"error","code":"invalid_prompt","message":"no"}\n\n',
        MESSAGES: b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error","message":"no"}}\n\n',
    }
    begin = {
        CHAT: IN_BAND[CHAT],
        RESPONSES: b'event: response.created\ndata: {"type":"response.created","response":{}}\n\n',
        MESSAGES: b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n',
    }
    bodies = {
        CHAT: chat(stream=True),
        RESPONSES: {"model": "fake", "input": "x", "stream": True},
        MESSAGES: {"model": "fake", "messages": [], "max_tokens": 1, "stream": True},
    }
    async with hall(tmp_path, lambda _: streamed(begin[path], errors[path])) as there:
        reply = await there.ask(path, bodies[path])
        assert sum(len(engine.asked) for engine in there.engines) == 1 and there.all_ready()
        event = next(json.loads(line[6:]) for line in reply.body.split(b"\n") if b'"no"' in line)
        if path == RESPONSES:
            assert event == {"type": "error", "code": "invalid_prompt", "message": "no", "param": None}
            return
        error = event["error"]
        assert error["type"] == "invalid_request_error" and error["message"] == "no"
        assert "code" not in error if path == MESSAGES else error["code"] is None


@pytest.mark.parametrize(
    ("path", "body", "answer", "tokens"),
    [
        (
            RESPONSES,
            {"input": "hi", "user": "usage"},
            {"usage": {"input_tokens": 5000, "output_tokens": 20}, "user": "usage"},
            5020,
        ),
        (
            COMPLETIONS,
            {"prompt": "usage", "prompt_logprobs": 1},
            {
                "usage": {"prompt_tokens": 5000, "completion_tokens": 3},
                "prompt_logprobs": [{"1": {"decoded": "usage"}}],
            },
            5003,
        ),
    ],
)
async def test_the_engine_s_count_is_charged_whatever_else_its_answer_says(
    tmp_path: Path, path: str, body: dict[str, object], answer: dict[str, object], tokens: int
) -> None:
    async with hall(tmp_path, lambda _: plain(json.dumps(answer).encode())) as there:
        assert (await there.ask(path, {"model": "fake"} | body)).status == 200
        assert there.charged() == tokens


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_who_leaves_early_pays_for_every_token_of_every_event(tmp_path: Path, path: str) -> None:
    """`stream_interval` puts 50 tokens into an event."""
    never = asyncio.Event()
    ids = ",".join(["7"] * 50).encode()
    words = b'"delta":{"content":"x"}' if path == CHAT else b'"text":"x"'
    event = b'data: {"choices":[{"index":0,%b,"finish_reason":null,"token_ids":[%b]}]}\n\n' % (words, ids)
    body = (chat if path == CHAT else completion)(stream=True, stream_interval=50, max_tokens=2000)

    async with hall(tmp_path, lambda _: b"", count=1) as there:

        async def plays(writer: asyncio.StreamWriter) -> None:
            writer.write(streamed(*[event] * 16).removesuffix(b"0\r\n\r\n"))
            await never.wait()

        there.engines[0].scripts = [plays]
        wire = await there.gateway.send(request(path, body, headers={"authorization": f"Bearer {OTHER}"}))
        await wire.head()
        got = b""
        while got.count(b"data: ") < 16:
            got += await wire.chunk()
        wire.reset()
        await eventually(lambda: there.charged() > 0, "it is charged")
        assert there.charged() >= 800
        never.set()


@pytest.mark.parametrize("field", ["tools", "documents"])
async def test_who_leaves_before_the_first_token_pays_for_all_that_the_engine_read(tmp_path: Path, field: str) -> None:
    never = asyncio.Event()
    body = chat(stream=True, **{field: [{"description": "A" * 600_000}]})

    async with hall(tmp_path, lambda _: b"", count=1) as there:

        async def reads(writer: asyncio.StreamWriter) -> None:
            await never.wait()

        there.engines[0].scripts = [reads]
        wire = await there.gateway.send(request(CHAT, body, headers={"authorization": f"Bearer {OTHER}"}))
        await eventually(lambda: there.engines[0].asked, "the engine was asked")
        wire.reset()
        await eventually(lambda: there.charged() > 0, "it is charged")
        assert there.charged() >= 150_000
        never.set()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"ec_transfer_params": {"peer_host": "10.0.0.1"}}),
        (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}),
        (RESPONSES, {"input": "x", "background": True}),
        (RESPONSES, {"input": "x", "n": 128}),
        (COMPLETIONS, {"prompt": "x", "messages": ["x"]}),
    ],
)
async def test_fields_that_are_not_on_the_list_reach_no_engine(
    tmp_path: Path, path: str, fields: dict[str, object]
) -> None:
    async with hall(tmp_path, lambda _: FINE, count=1) as there:
        reply = await there.ask(path, {"model": "fake"} | fields)
        assert reply.status == 400 and reply.error["code"] == "field_not_allowed"
        assert not there.engines[0].asked


async def test_usage_in_every_chunk_is_only_for_those_who_ask_for_usage(tmp_path: Path) -> None:
    async with hall(tmp_path, lambda _: streamed(b"data: [DONE]\n\n"), count=1) as there:
        for asked, sent in (
            ({"continuous_usage_stats": True}, {"include_usage": True}),
            ({"continuous_usage_stats": True, "include_usage": True},) * 2,
        ):
            await there.ask(CHAT, chat(stream=True, stream_options=asked))
            assert json.loads(there.engines[0].asked[-1].body)["stream_options"] == sent


async def test_a_probe_outlives_whatever_a_stream_s_request_looks_like() -> None:
    """`movable` reads the client's body while a worker is drained."""

    def cannot_read(leg: object) -> bool:
        raise TypeError("a body that nobody thought of")

    class Silent:
        speaks = False

        def silent_s(self, now: float) -> float:
            return 0.0

        def lost(self, error: EngineGone) -> None:
            raise AssertionError("nothing is taken away")

    async with FakeEngine(INSTANT) as one, FakeEngine(INSTANT) as other:
        fleet = Fleet(probe_s=0.01, movable=cannot_read)
        members = [fleet.add(Worker(f"w{at}", engine.url)) for at, engine in enumerate((one, other))]
        await eventually(lambda: len(fleet.ready()) == 2)
        now = fleet.clock()
        fleet.clock = lambda: now + 1e6
        members[0].legs.add(Silent())
        fleet.drain("w0")
        await asyncio.sleep(0.05)  # several looks
        fleet.resume("w0")
        await eventually(lambda: members[0].state is WorkerState.READY)
        members[0].legs.clear()
        await fleet.close()


async def test_an_answer_taken_from_a_hung_worker_is_asked_for_at_another_however_old_its_connection(
    tmp_path: Path,
) -> None:
    hangs = asyncio.Event()
    never = asyncio.Event()

    async with hall(tmp_path, lambda _: FINE, count=2) as there:
        for _ in range(4):  # so that connections are there to be used again
            await there.bystander()

        async def hung(writer: asyncio.StreamWriter) -> None:
            if hangs.is_set():
                writer.write(FINE)
                return
            hangs.set()
            await never.wait()

        for engine in there.engines:
            engine.scripts = [hung]
            engine.asked.clear()
        asked = asyncio.create_task(there.ask(COMPLETIONS, completion(), KEY))
        await eventually(hangs.is_set, "one hangs")
        (member,) = [member for member in there.gateway.server.fleet.members.values() if member.legs]
        member.misses = 100
        there.gateway.server.fleet.health.probe_timeout_s = 0.0
        there.gateway.server.fleet._rescue(member)
        assert (await asked).status == 200
        assert [len(engine.asked) for engine in there.engines] == [1, 1], "not the hung one again"
        never.set()


async def test_names_in_a_request_forge_no_lines_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forged = "x\nWARNING evenhand: worker w0 is out"
    (tmp_path / "tenants.yaml").write_text(
        TENANTS.replace("- name: hostile", "- name: hostile\n  grants: [" + json.dumps(forged) + "]")
    )
    caplog.set_level(logging.INFO)
    cut = streamed(IN_BAND[CHAT], ENDS[CHAT][1].replace(b'"stop"', b"null")).removesuffix(b"0\r\n\r\n") + CUT
    async with contextlib.AsyncExitStack() as stack:
        engine = Reacting(lambda _: cut)
        await stack.enter_async_context(engine.run())
        gateway = await stack.enter_async_context(serving(engine.url, tenants=tmp_path / "tenants.yaml"))
        body = chat(stream=True) | {forged: 1}
        await gateway.ask(CHAT, body, headers={"authorization": f"Bearer {OTHER}"})
    assert "depends on the whole answer" in caplog.text
    assert not any("\n" in record.getMessage() for record in caplog.records)


EMPTY = {
    COMPLETIONS: streamed(
        b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":4,"completion_tokens":0,"total_tokens":4}}\n\n',
        b"data: [DONE]\n\n",
    ),
    RESPONSES: streamed(
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"r"}}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","sequence_number":1,"response":{"id":"r",'
        b'"status":"completed","output":[],"usage":{"input_tokens":4,"output_tokens":0}}}\n\n',
    ),
    MESSAGES: streamed(
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":4}}}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"input_tokens":4,"output_tokens":0}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}
ABORTED = {  # whole answers that say that nothing was made
    COMPLETIONS: b'{"id":"r","choices":[{"text":"","finish_reason":"abort"}],"usage":{"completion_tokens":0}}',
    RESPONSES: b'{"id":"r","status":"completed","output":[],"usage":{"input_tokens":4,"output_tokens":0}}',
    MESSAGES: b'{"id":"r","type":"message","content":[],"stop_reason":null,"usage":{"output_tokens":0}}',
}
SAID = {
    COMPLETIONS: streamed(*ENDS[COMPLETIONS]),
    RESPONSES: streamed(
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"s"}}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","sequence_number":1,"response":{"id":"s",'
        b'"status":"completed","output":["Hi"],"usage":{"input_tokens":4,"output_tokens":2}}}\n\n',
    ),
    MESSAGES: streamed(
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"s","usage":{"input_tokens":4}}}\n\n',
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text",'
        b'"text":""}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
        b'"text":"Hi"}}\n\n',
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"input_tokens":4,"output_tokens":2}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}
ASKED: dict[str, dict[str, object]] = {
    COMPLETIONS: completion(),
    RESPONSES: {"model": "fake", "input": "x"},
    MESSAGES: {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", EMPTY)
async def test_an_engine_that_is_ending_and_makes_nothing_has_not_answered(
    tmp_path: Path, path: str, stream: bool
) -> None:
    """vLLM 0.32 that was told to end calls the requests that it still takes, and aborts, complete."""
    answers = [EMPTY[path], SAID[path]] if stream else [plain(ABORTED[path]), FINE]
    async with hall(tmp_path, lambda _: answers.pop(0), count=2) as there:
        reply = await there.ask(path, ASKED[path] | {"stream": stream})
        assert reply.status == 200 and not answers
        assert (b'"Hi"' if stream else b'"ok"') in reply.body
        assert b"error" not in reply.body.replace(b'"error":null', b"")


async def test_a_large_event_in_pieces_is_put_together_once(tmp_path: Path) -> None:
    text = b"x" * (4 << 20)
    event = b'data: {"choices":[{"index":0,"text":"%b","finish_reason":null,"token_ids":[1]}]}\n\n' % text
    whole = streamed(event, b"data: [DONE]\n\n")
    pieces = tuple(whole[at : at + 16384] for at in range(0, len(whole), 16384))
    async with hall(tmp_path, lambda _: pieces, count=1) as there:
        reply = await there.ask(COMPLETIONS, completion(stream=True))
        assert reply.body == event + b"data: [DONE]\n\n"


async def test_a_request_wider_than_the_engine_waits_for_no_idle_worker_and_holds_up_nobody_behind_it() -> None:
    never = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        engine = Reacting(lambda _: FINE)
        await stack.enter_async_context(engine.run())
        gateway = await stack.enter_async_context(serving(engine.url, slots=2))

        async def long(writer: asyncio.StreamWriter) -> None:
            await never.wait()
            writer.write(FINE)

        engine.scripts = [long, engine._play]
        first = asyncio.create_task(gateway.ask(COMPLETIONS, completion()))
        await eventually(lambda: engine.asked, "a long request runs")
        wide = completion(prompt=[f"prompt {number}" for number in range(21)])
        replies = await asyncio.gather(gateway.ask(COMPLETIONS, wide), gateway.ask(COMPLETIONS, completion()))
        assert [reply.status for reply in replies] == [200, 200] and not first.done()
        never.set()
        assert (await first).status == 200


@pytest.mark.parametrize("spaces", [0, 1, 64, 4096])
async def test_prompts_are_bounded_however_they_are_written(tmp_path: Path, spaces: int) -> None:
    prompts = ",".join('"x"' for _ in range(2049))
    body = f'{{"model":"fake","prompt":[{" " * spaces}{prompts}]}}'.encode()
    async with hall(tmp_path, lambda _: FINE, count=1) as there:
        reply = await there.ask(COMPLETIONS, body)  # type: ignore[arg-type]
        assert reply.status == 400 and reply.error["code"] == "too_many_sequences"
        assert not there.engines[0].asked
