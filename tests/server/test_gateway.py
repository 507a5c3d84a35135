"""The story of a request as clients live it: each relayed route, each way to fail, and what the engine is asked."""

import asyncio
import json

import httpx2
import orjson
import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from server.request.schemas import estimate_tokens
from tests.server.conftest import (
    LIMIT_S,
    SLOW,
    ScriptedEngine,
    Wire,
    chat,
    completion,
    eventually,
    over_fake,
    over_script,
    plain,
    request,
    says,
    serving,
    streamed,
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"max_tokens": 2000, "ignore_eos": True}


async def direct(engine: FakeEngine, path: str, body: object) -> bytes:
    """What the engine itself answers."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", engine.port))
    await wire.send(request(path, body, headers={"x-request-id": "same"}))
    reply = await wire.answer()
    await wire.close()
    return reply.body


@pytest.mark.parametrize(
    "path, body", [(CHAT, chat()), (TEXT, completion()), (TEXT, completion(prompt=[1, 2, 3], n=2))]
)
async def test_an_answer_is_the_engines_own_byte_for_byte(path: str, body: object) -> None:
    async with over_fake() as (gateway, engine):
        reply = await gateway.ask(path, body, headers={"x-request-id": "same"})
        assert reply.status == 200 and reply.headers["content-type"] == "application/json"
        own = await direct(engine, path, body)
        assert reply.json() | {"created": 0} == json.loads(own) | {"created": 0}
        assert len(reply.body) == len(own)


@pytest.mark.parametrize("path, body", [(CHAT, chat()), (CHAT, chat(n=2)), (TEXT, completion())])
async def test_usage_is_always_asked_for_and_shown_only_to_whom_asked(path: str, body: dict[str, object]) -> None:
    async with over_fake() as (gateway, engine):
        quiet = await gateway.ask(path, body | {"stream": True})
        assert engine.seen[-1].body["stream_options"]["include_usage"] is True
        assert not any("usage" in event for event in quiet.events)
        never = await gateway.ask(path, body | {"stream": True, "stream_options": {"include_usage": False}})
        assert engine.seen[-1].body["stream_options"]["include_usage"] is True
        assert not any("usage" in event for event in never.events)
        told = await gateway.ask(path, body | {"stream": True, "stream_options": {"include_usage": True}})
        assert told.events[-2]["usage"]["completion_tokens"] > 0 and told.events[-2]["choices"] == []
        assert len(told.events) == len(quiet.events) + 1 == len(never.events) + 1
        assert told.text == quiet.text == never.text != ""


async def test_fields_that_are_not_read_reach_the_engine_byte_for_byte() -> None:
    body = (
        b'{ "model":"fake","messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}], "temperature":0.70,'
        b'"seed":123456789012345678901234567890, "min_p":1E-7,"metadata":{"stream_options":1,"b":[ 1 ]}, "n" :1}\n'
    )
    async with over_script(says(plain(b'{"ok":1}'))) as (gateway, engine):
        assert (await gateway.ask(CHAT, body)).status == 200
        assert engine.asked[-1].body == body
        assert engine.asked[-1].headers["content-type"] == "application/json"


TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


async def test_a_stream_keeps_the_bytes_of_its_other_fields() -> None:
    async with over_script(says(streamed(TOKEN, b"data: [DONE]\n\n"))) as (gateway, engine):
        for options in (b"", b'"stream_options":{"include_usage":false,"x":[ 1 ]}, ', b'"stream_options":null, '):
            body = b'{"seed":123456789012345678901234567890, ' + options + b'"model":"fake","top_p":1.0, "stream":true}'
            assert (await gateway.ask(CHAT, body)).status == 200
            got = engine.asked[-1].body
            assert json.loads(got)["stream_options"]["include_usage"] is True
            assert b"123456789012345678901234567890" in got and b"1.0" in got
            assert got.count(b'"stream_options"') == 1
            if b"[ 1 ]" in options:
                assert b"[ 1 ]" in got


RESPONSES_EVENTS = [
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","usage":null}}\n\n',
    *[
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"%d"}\n\n' % number
        for number in range(3)
    ],
    b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":7,'
    b'"input_tokens_details":{"cached_tokens":2},"output_tokens":4}}}\n\n',
]
MESSAGES_EVENTS = [
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":9}}}\n\n',
    b'event: content_block_start\ndata: {"type":"content_block_start"}\n\n',
    *[b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n' for _ in range(3)],
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":5}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]


@pytest.mark.parametrize(
    "path, body, events, tokens",
    [
        ("/v1/responses", {"model": "fake", "input": "hi"}, RESPONSES_EVENTS, (7, 4)),
        ("/v1/messages", {"model": "fake", "messages": [], "max_tokens": 9}, MESSAGES_EVENTS, (9, 5)),
    ],
)
async def test_other_dialects_stream_untouched_and_are_counted(
    path: str, body: dict[str, object], events: list[bytes], tokens: tuple[int, int]
) -> None:
    async with over_script(says(streamed(*events))) as (gateway, engine):
        reply = await gateway.ask(path, body | {"stream": True})
        shown = reply.body.split(b"\n\n")[:-1]
        assert len(shown) == len(events)
        for event, sent in zip(shown, events, strict=True):
            if b'"response":{' not in sent:
                assert event + b"\n\n" == sent
                continue
            # A response gets the members that OpenAI's specification wants and vLLM leaves out.
            (name, got), (own_name, own) = (lines.strip().split(b"\ndata: ") for lines in (event, sent))
            said, told = orjson.loads(got), orjson.loads(own)
            assert name == own_name and said | {"response": 0} == told | {"response": 0}
            assert said["response"].items() >= told["response"].items()
        assert json.loads(engine.asked[-1].body) == body | {"stream": True}
        metrics = await gateway.metrics()
        assert metrics["evenhand_tokens_total", (("kind", "prompt"),)] == tokens[0]
        assert metrics["evenhand_tokens_total", (("kind", "completion"),)] == tokens[1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_has_all_members_of_the_specification_and_keeps_its_own(stream: bool) -> None:
    told: dict[str, object] = {"id": "r", "status": "completed", "top_logprobs": None}
    told |= {"text": {"format": {"type": "json_object"}}}
    told |= {"output": [{"type": "message", "content": '"é'}], "usage": {"input_tokens": 7, "output_tokens": 4}}
    event = b'event: response.completed\ndata: {"type":"response.completed","response":%b}\n\n' % orjson.dumps(told)
    engine_says = streamed(event) if stream else plain(orjson.dumps(told))
    async with over_script(says(engine_says)) as (gateway, _):
        reply = await gateway.ask("/v1/responses", {"model": "fake", "input": "hi", "stream": stream})
    if stream:
        assert reply.body.startswith(b"event: response.completed\ndata: {")
        said = orjson.loads(reply.body.split(b"data: ")[1])["response"]
    else:
        said = reply.json()
    none = ("completed_at", "error", "incomplete_details", "instructions", "max_output_tokens", "max_tool_calls")
    none += ("metadata", "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier")
    added = dict.fromkeys(none) | {"store": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0}
    assert said == told | added


async def test_embeddings_and_tokenize_are_relayed_even_if_they_ask_to_stream() -> None:
    answer = b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}'
    async with over_script(says(plain(answer))) as (gateway, _):
        for stream in (False, True):
            reply = await gateway.ask("/v1/embeddings", {"model": "fake", "input": ["a", "b"], "stream": stream})
            assert reply.status == 200 and reply.body == answer
    async with over_fake() as (gateway, _):
        for stream in (False, True):
            reply = await gateway.ask("/tokenize", {"model": "fake", "prompt": "Hello there", "stream": stream})
            assert reply.json()["count"] > 0


async def test_tokenize_waits_for_no_place() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0, "max_waiting": 0}) as (gateway, engine):
        await gateway.send(request(CHAT, chat(**LONG)))
        await eventually(lambda: engine.running)
        assert (await gateway.ask("/tokenize", {"model": "fake", "prompt": "x"})).status == 200


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"\x00", "invalid_json"),
    (b'{"model":"fake"}{}', "invalid_json"),
    (b'{"model":"a\x00b"}', "invalid_json"),
    (b'{"model":"\\ud800"}', "invalid_json"),
    (b'{"model":"\xff"}', "invalid_json"),
    (b'{"model":"fake","x":NaN}', "invalid_json"),
    (b'{"model":"fake","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "invalid_json"),
    (b'{"model":"fake","\xff":1,"stream":true,"stream_options":{}}', "invalid_json"),
    (b"[]", ""),
    (b"null", ""),
    (b"{}", ""),
    (b'{"model":""}', ""),
    (b'{"model":7}', ""),
    (b'{"model":"fake","stream":"yes"}', ""),
    (b'{"model":"fake","n":0}', ""),
    (b'{"model":"fake","n":1000000}', ""),
    (b'{"model":"fake","n":true}', ""),
    (b'{"model":"fake","max_tokens":-1}', ""),
    (b'{"model":"fake","max_tokens":1e999}', ""),
    (b'{"model":"fake","max_tokens":' + b"9" * 10_000 + b"}", ""),
    (b'{"model":"fake","max_completion_tokens":99999999999999999999999}', ""),
    (b'{"model":"fake","stream_options":[]}', ""),
]


async def test_a_wrong_body_is_400_and_says_what_is_wrong() -> None:
    async with over_fake() as (gateway, engine):
        wire = await gateway.connect()
        for body, code in BAD_BODIES:
            await wire.send(request(CHAT, body))
            reply = await wire.answer()
            assert reply.status == 400, body[:80]
            assert reply.error["type"] == "invalid_request_error"
            assert not code or reply.error["code"] == code, body[:80]
        assert not engine.seen


async def test_steering_fields_are_refused_however_they_are_spelt() -> None:
    async with over_fake() as (gateway, engine):
        for field in ("kv_transfer_params", "priority", "cache_salt", "vllm_xargs", "request_id"):
            for path, body in ((CHAT, chat()), (TEXT, completion())):
                reply = await gateway.ask(path, body | {field: {"a": 1}})
                assert reply.status == 400
                assert reply.error["code"] == "field_not_allowed" and reply.error["param"] == field
        reply = await gateway.ask(CHAT, b'{"model":"fake","messages":[],"priorit\\u0079":1}')
        assert reply.status == 400 and reply.error["param"] == "priority"
        assert not engine.seen
        assert (await gateway.ask(CHAT, chat(priority=None))).status == 200


async def test_an_unknown_model_is_404_and_the_answer_stays_short() -> None:
    async with over_fake() as (gateway, _):
        reply = await gateway.ask(CHAT, chat(model="no" * 100_000))
        assert reply.status == 404 and reply.error["code"] == "model_not_found" and reply.error["param"] == "model"
        assert "fake" in reply.error["message"] and len(reply.body) < 1000


async def test_a_prompt_too_long_is_the_engines_400_with_openais_code() -> None:
    async with over_fake() as (gateway, _):
        reply = await gateway.ask(CHAT, chat(messages=[{"role": "user", "content": "word " * 20_000}]))
        assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"


async def test_anthropics_dialect_has_its_own_error_shape() -> None:
    async with over_fake() as (gateway, _):
        reply = await gateway.ask("/v1/messages", {"model": "other", "messages": []})
        assert reply.status == 404
        assert reply.json()["type"] == "error" and reply.json()["error"]["type"] == "not_found_error"


async def test_an_engine_that_refuses_connections_is_502_and_then_nobody_is_there() -> None:
    async with over_fake(probe_s=30.0) as (gateway, engine):
        engine.die()
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 502 and reply.error["code"] == "engine_gone"
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 503 and reply.error["code"] == "no_worker"
        assert int(reply.headers["retry-after"]) >= 1
        await engine.listen()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_its_first_byte_is_502(stream: bool) -> None:
    async with over_fake() as (gateway, engine):
        engine.faults = Faults(die_after_tokens=0)
        reply = await gateway.ask(CHAT, chat(stream=stream))
        assert reply.status == 502 and reply.error["code"] == "engine_gone"


@pytest.mark.parametrize("fault", [Faults(die_after_tokens=3), Faults(cut_after_tokens=3)])
async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(fault: Faults) -> None:
    async with over_fake(SLOW) as (gateway, engine):
        engine.faults = fault
        reply = await gateway.ask(CHAT, chat(stream=True, ignore_eos=True))
        assert reply.status == 200
        *said, error, done = reply.events
        assert done == "[DONE]" and error["error"]["code"] == "engine_gone"
        assert len(said) == 4


@pytest.mark.parametrize("framing", [b"content-length: 100", b"transfer-encoding: chunked"])
async def test_half_of_a_whole_answer_is_no_answer(framing: bytes) -> None:
    half = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + framing + b"\r\n\r\n"
    half += b'{"id":' if b"length" in framing else b'6\r\n{"id":\r\n'

    async def cut(writer: asyncio.StreamWriter) -> None:
        writer.write(half)
        await writer.drain()
        writer.close()

    async with over_script(cut) as (gateway, _):
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 502 and reply.error["code"] == "engine_gone"


FAILURES = [
    (plain(b'{"error":{"message":"no","type":"X","code":500}}', status="500 Internal Server Error"), 500),
    (plain(b"<html>sorry</html>", status="500 Internal Server Error"), 500),
    (plain(b'{"detail":"busy"}', status="503 Service Unavailable"), 503),
    (plain(b"", status="302 Found"), 502),
    (b"garbage that is no HTTP at all\r\n\r\n", 502),
    (b"\x00\x01\x02", 502),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx", 502),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 502),
]


async def test_an_engines_failure_becomes_an_error_object() -> None:
    async with over_script(says(b""), health={"failures": 1000}) as (gateway, engine):
        for said, status in FAILURES:

            async def say_and_close(writer: asyncio.StreamWriter, said: bytes = said) -> None:
                writer.write(said)
                await writer.drain()
                writer.close()

            engine.scripts = [say_and_close]
            for stream in (False, True):
                reply = await gateway.ask(CHAT, chat(stream=stream))
                assert reply.status == status, said
                assert reply.error["type"]


async def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    async def until_close(writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n{"usage":{"prompt_tokens":3}}')
        await writer.drain()
        writer.close()

    async with over_script(until_close) as (gateway, _):
        assert (await gateway.ask(CHAT, chat())).json() == {"usage": {"prompt_tokens": 3}}


async def test_no_worker_at_all_is_503_with_retry_after() -> None:
    async with serving() as gateway:
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 503 and reply.error["code"] == "no_worker"
        assert 1 <= int(reply.headers["retry-after"]) <= 60


async def test_a_full_line_is_429_with_a_plausible_retry_after() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0, "max_waiting": 2}) as (gateway, engine):
        for _ in range(10):
            assert (await gateway.ask(CHAT, chat())).status == 200  # about 0.2 s each: the line learns its pace
        wires = [await gateway.send(request(CHAT, chat(stream=True, **LONG)))]
        await eventually(lambda: engine.running == 1)
        wires += [await gateway.send(request(CHAT, chat())) for _ in range(2)]
        await eventually(lambda: gateway.waiting == 2)
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 429 and reply.error["code"] == "overloaded"
        assert 1 <= int(reply.headers["retry-after"]) <= 10
        await wires[0].close()
        for wire in wires[1:]:
            assert (await wire.answer()).status == 200


async def test_an_answer_that_cannot_begin_by_its_deadline_is_not_started() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, engine):
        assert (await gateway.ask(CHAT, chat(), headers={"x-deadline-s": "30"})).status == 200
        first = await gateway.send(request(CHAT, chat(stream=True, **LONG)))
        await first.head()
        assert (await gateway.ask(CHAT, chat(), headers={"x-deadline-s": "0.3"})).status == 429
        assert gateway.waiting == 0 and len(engine.seen) == 2
        for wrong in ("0", "-1", "soon", "nan", "inf", ""):
            refused = await gateway.ask(CHAT, chat(), headers={"x-deadline-s": wrong})
            assert (refused.status, refused.error["param"]) == (400, "x-deadline-s")


async def test_who_waits_too_long_is_told() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0, "queue_timeout_s": 0.3}) as (gateway, engine):
        first = await gateway.send(request(CHAT, chat(stream=True, **LONG)))
        await first.head()
        reply = await gateway.ask(CHAT, chat())
        assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
        assert gateway.waiting == 0 and len(engine.seen) == 1


async def test_a_stalled_engine_does_not_keep_the_client_from_leaving() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        engine.faults = Faults(stall_after_tokens=2)
        for stream in (True, False):
            wire = await gateway.send(request(CHAT, chat(stream=stream)))
            await eventually(lambda: gateway.in_flight == 1)
            await asyncio.sleep(0.1)
            wire.reset()
            await eventually(gateway.at_rest)
        engine.heal()


async def test_a_client_that_leaves_a_whole_answer_is_charged_for_what_was_made_for_it() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        learned = (gateway.ask(CHAT, chat(max_tokens=10, ignore_eos=True)) for _ in range(30))
        await asyncio.gather(*learned)  # 50 tokens a second each
        before = (await gateway.metrics())["evenhand_tokens_total", (("kind", "completion"),)]
        made_so_far = engine.batch.counts.generation_tokens
        wire = await gateway.send(request(CHAT, chat(max_tokens=30, ignore_eos=True)))
        await eventually(lambda: engine.batch.counts.generation_tokens >= made_so_far + 12)
        wire.reset()
        await eventually(gateway.at_rest)
        made = (await gateway.metrics())["evenhand_tokens_total", (("kind", "completion"),)] - before
        assert 3 <= made <= 30


async def test_a_stale_kept_alive_connection_costs_nobody_an_answer() -> None:
    async with ScriptedEngine([]).run() as engine:
        good = says(plain(b'{"ok":1}'))
        engine.scripts = [good]
        async with serving(engine.url, probe_s=60.0) as gateway:
            assert (await gateway.ask(CHAT, chat())).status == 200
            asked = len(engine.asked)

            async def hang_up(writer: asyncio.StreamWriter) -> None:
                writer.transport.abort()  # as an engine does whose idle timeout ends just now

            engine.scripts = [hang_up, good]
            assert (await gateway.ask(CHAT, chat())).status == 200
            assert len(engine.asked) == asked + 2

            engine.scripts = [hang_up]
            assert (await gateway.ask(CHAT, chat())).status == 502
            assert len(engine.asked) == asked + 4  # tried once more, and no further


async def test_after_a_stale_connection_only_a_fresh_one_will_do() -> None:
    good = says(plain(b'{"ok":1}'), pause_s=0.05)
    async with over_script(good, probe_s=60.0) as (gateway, engine):
        await asyncio.gather(*(gateway.ask(CHAT, chat()) for _ in range(3)))
        accepted = engine.accepted

        async def hang_up(writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        engine.scripts = [hang_up, good]
        assert (await gateway.ask(CHAT, chat())).status == 200
        assert engine.accepted == accepted + 1


async def test_a_fresh_connection_that_fails_is_not_tried_again() -> None:
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with over_script(hang_up, probe_s=60.0) as (gateway, engine):
        (member,) = gateway.server.fleet.members.values()
        while member.engine.idle:  # those of probes
            member.engine.idle.pop().transport.close()
        assert (await gateway.ask(CHAT, chat())).status == 502
        assert len(engine.asked) == 1


async def test_a_client_gets_each_token_as_soon_as_it_is_made() -> None:
    """The engine makes a token only when the client has the one before."""
    got = [asyncio.Event() for _ in range(4)]

    async def one_after_the_other(writer: asyncio.StreamWriter) -> None:
        head, body = streamed().split(b"\r\n\r\n", 1)
        writer.write(head + b"\r\n\r\n")
        for number, before in enumerate([None, *got[:-1]]):
            if before is not None:
                await before.wait()
            event = b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await got[-1].wait()
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n" + body)

    async with over_script(one_after_the_other) as (gateway, _), httpx2.AsyncClient(trust_env=False) as client:
        seen = 0
        async with (
            asyncio.timeout(LIMIT_S),
            client.stream("POST", gateway.url + CHAT, json=chat(stream=True)) as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    got[seen].set()
                    seen += 1
        assert seen == 4


async def test_an_engine_with_crlf_events_is_understood() -> None:
    events = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\r\n\r\n' % number for number in range(3)]
    last = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3}}\r\n\r\n'
    async with over_script(says(streamed(*events, last, b"data: [DONE]\r\n\r\n"))) as (gateway, _):
        reply = await gateway.ask(CHAT, chat(stream=True))
        assert reply.text == "012" and len(reply.events) == 4
        assert (await gateway.metrics())["evenhand_tokens_total", (("kind", "completion"),)] == 3


async def test_an_engine_that_does_not_stream_is_passed_on() -> None:
    async with over_script(says(plain(b'{"choices":[],"usage":{"completion_tokens":2}}'))) as (gateway, _):
        reply = await gateway.ask(CHAT, chat(stream=True))
        assert reply.status == 200 and reply.json()["usage"] == {"completion_tokens": 2}


async def test_two_models_have_two_lines() -> None:
    async with ScriptedEngine([says(plain(b'{"from":"a"}'))]).run() as one:
        async with ScriptedEngine([says(plain(b'{"from":"b"}'))]).run() as two:
            two.gets["/v1/models"] = plain(b'{"data":[{"id":"other","object":"model","root":"/secret/path"}]}')
            async with serving(one.url, two.url) as gateway:
                await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
                assert (await gateway.ask(CHAT, chat())).json() == {"from": "a"}
                assert (await gateway.ask(CHAT, chat(model="other"))).json() == {"from": "b"}
                listed = (await gateway.ask("/v1/models", method="GET")).json()["data"]
                assert [entry["id"] for entry in listed] == ["fake", "other"]
                assert "secret" not in json.dumps(listed)


async def test_the_estimate_of_a_prompt_is_learned_from_what_the_engine_counts() -> None:
    async with over_fake() as (gateway, _):
        body = completion(prompt="wordy " * 300, max_tokens=1)
        content = json.dumps(body["prompt"]).encode()
        wrong = []
        for _ in range(40):
            counted = (await gateway.ask(TEXT, body)).json()["usage"]["prompt_tokens"]
            ratio = gateway.server.gateway.bytes_per_token["open"]
            wrong.append(abs(1 - estimate_tokens(content, ratio) / counted))
        assert wrong[-1] < 0.1 < wrong[0]


async def test_too_many_prompts_or_answers_are_refused_with_what_to_do() -> None:
    async with over_fake(admission={"max_sequences": 4}) as (gateway, engine):
        for fields in ({"prompt": ["a"] * 5}, {"prompt": ["a"] * 3, "n": 2}, {"n": 5}, {"prompt": ["a"] * 3000}):
            reply = await gateway.ask("/v1/completions", completion(**fields))
            assert reply.status == 400 and reply.error["code"] == "too_many_sequences"
            assert "split the request" in reply.error["message"]
        assert (await gateway.ask("/v1/completions", completion(prompt=["a"] * 4))).status == 200
        assert len(engine.seen) == 1
