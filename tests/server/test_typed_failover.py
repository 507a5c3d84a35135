"""A worker fails in the middle of a stream of /v1/responses or /v1/messages, and its client cannot tell."""

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from server.engine.answers import as_published
from server.failover.resume import CannotResume
from server.failover.typed_answers import typed_answer
from server.failover.typed_prompt import chat_of
from server.failover.typed_resume import Continued, TypedContinuation
from server.request import schemas
from server.request.transcript import Transcript
from tests.server.calls import call_of, ticket_of
from tests.server.conftest import (
    INSTANT,
    VLLM,
    Reply,
    ScriptedEngine,
    eventually,
    plain,
    serving,
    streamed,
)
from tests.server.crowd import over_crowd
from tests.server.test_failover import dying, over_script_and_fake

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TEXT = "Tell me of the sea, please."
TOKENS = 8


def body_for(path: str, tokens: int = TOKENS, **fields: object) -> dict[str, object]:
    if path == RESPONSES:
        return {"model": "fake", "input": TEXT, "max_output_tokens": tokens, "stream": True} | fields
    turns = [{"role": "user", "content": TEXT}]
    return {"model": "fake", "messages": turns, "max_tokens": tokens, "stream": True} | fields


async def undisturbed(path: str, body: dict[str, object]) -> list[bytes]:
    """An engine's events, as bytes."""
    async with FakeEngine(INSTANT) as engine, httpx2.AsyncClient(base_url=engine.url, trust_env=False) as client:
        answer = await client.post(path, json=body)
    return [event + b"\n\n" for event in answer.content.split(b"\n\n")[:-1]]


def data(event: bytes) -> Any:
    """An event as the gateway shows it: a response has all members, and its end the right name."""
    told = json.loads(event.partition(b"data: ")[2])
    return json.loads(as_published(event.rstrip()).partition(b"data: ")[2]) if "response" in told else told


def without_ids(events: list[Any]) -> str:
    """Events as text, without the ids that a worker may choose, but with which of them are the same."""
    names = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    text = json.dumps(events, sort_keys=True)
    for number, name in enumerate(names):
        text = text.replace(name, f"item {number}")
    return text


async def cut_after(count: int, path: str, body: dict[str, object], events: list[bytes]) -> tuple[Reply, list[Any]]:
    """What a client gets whose first worker dies after so many events, and what the second worker was asked."""
    async with over_script_and_fake(dying(*events[:count])) as (gateway, first, second):
        while not first.asked:
            second.seen.clear()
            reply = await gateway.ask(path, body)
        return reply, list(second.seen)


@pytest.mark.parametrize("tokens", [TOKENS, 4000], ids=["cut at its length", "ends by itself"])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_cut_after_any_event_the_stream_goes_on_as_if_nothing_had_happened(path: str, tokens: int) -> None:
    body = body_for(path, tokens)
    events = await undisturbed(path, body)
    whole = [data(event) for event in events]
    cuts = range(1, len(events)) if tokens == TOKENS else [1, 3, 7, len(events) - 4, len(events) - 1]
    for count in cuts:
        reply, asked = await cut_after(count, path, body, events)
        assert reply.status == 200
        assert without_ids(reply.events) == without_ids(whole), f"after {count} events"
        assert len(asked) <= 1


def test_a_comment_in_the_rest_of_a_stream_is_nothing() -> None:
    """Proxies and some engines send them to keep a connection open."""
    answer = typed_answer("responses", Transcript())
    rest = Continued(ticket_of(lambda: 0.0), answer, TypedContinuation(b"x", 3, 2))
    assert rest.told(b": ping", rest.read(b": ping")) == b""


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_the_whole_events_line_is_that_of_the_api(path: str) -> None:
    """Names of events are told twice, and both agree."""
    body = body_for(path)
    events = await undisturbed(path, body)
    reply, _ = await cut_after(5, path, body, events)
    for event in reply.body.split(b"\n\n")[:-1]:
        name, _, rest = event.partition(b"\n")
        assert name == f"event: {json.loads(rest.removeprefix(b'data: '))['type']}".encode()


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_one_worker_after_the_other_dies_or_says_that_it_failed(path: str) -> None:
    whole = [data(event) for event in await undisturbed(path, body_for(path))]
    faults = [Faults(die_after_tokens=3), Faults(error_event_after_tokens=2), Faults(cut_after_tokens=1)]
    async with over_crowd(count=4, health={"failures": 1000, "attempts": 4}) as crowd:
        for strikes in (faults[:1], faults[1:2], faults[2:], faults):
            crowd.strike(*strikes)
            reply = await crowd.gateway.ask(path, body_for(path))
            assert crowd.strikes == len(strikes)
            assert _told(reply.events) == _told(whole)
            metrics = await crowd.gateway.metrics()
            await crowd.mend()
        assert metrics["evenhand_failovers_total", (("outcome", "failed"),)] == 0
        tokens = metrics["evenhand_tokens_total", (("kind", "completion"),)]
        assert tokens == 4 * TOKENS, "each answer is charged once"


def _told(events: list[Any]) -> tuple[str, list[str], Any]:
    """Text, kinds of events, and the last usage."""
    deltas = [event["delta"] for event in events if event["type"].endswith("delta") and "delta" in event]
    text = "".join(delta if isinstance(delta, str) else delta.get("text", "") for delta in deltas)
    usage = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    return text, [event["type"] for event in events], [one for one in usage if one][-1]


async def test_openai_s_own_client_gets_one_response() -> None:
    async with over_crowd() as crowd:
        client = openai.AsyncOpenAI(base_url=f"{crowd.gateway.url}/v1", api_key="none", max_retries=0)
        answers = []
        for strikes in ((), (Faults(die_after_tokens=3),)):
            crowd.strike(*strikes)
            async with client.responses.stream(model="fake", input=TEXT, max_output_tokens=4000) as stream:
                numbers = [event.sequence_number async for event in stream]
                answer = await stream.get_final_response()
            assert numbers == list(range(len(numbers)))
            answers.append((answer.output_text, answer.status, answer.usage))
            await crowd.mend()
        assert answers[0] == answers[1] and crowd.gateway.server.gateway.failover.outcomes["resumed"] == 1
        await client.close()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": {}}]}),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}),
        (RESPONSES, {"presence_penalty": 0.5}),
        (RESPONSES, {"include_reasoning": False}),
        (RESPONSES, {"reasoning": {"effort": "high"}}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}]}),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
    ],
    ids=str,
)
async def test_what_cannot_be_continued_ends_with_an_error_of_the_api(path: str, fields: dict[str, object]) -> None:
    async with over_crowd() as crowd:
        crowd.strike(Faults(die_after_tokens=3))
        reply = await crowd.gateway.ask(path, body_for(path, **fields))
        *before, error = reply.events
        assert error["type"] == "error" and len(crowd.asked) == 1, "nobody else was asked"
        if path == RESPONSES:
            assert error["sequence_number"] == before[-1]["sequence_number"] + 1
            assert error["code"] == "engine_gone" and error["message"]
        else:
            assert error["error"]["type"] == "api_error"
        await crowd.mend()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"instructions": "Be brief.", "reasoning": None, "text": {"format": {"type": "text"}}}),
        (RESPONSES, {"prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]}),
        (MESSAGES, {"system": [{"type": "text", "text": "Be brief."}], "metadata": {"user_id": "u"}}),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}),
        (MESSAGES, {"system": "Be brief.", "thinking": {"type": "disabled"}, "stop_sequences": ["@@@"]}),
    ],
    ids=str,
)
async def test_what_shapes_only_the_prompt_is_no_hindrance(path: str, fields: dict[str, object]) -> None:
    async with over_crowd() as crowd:
        whole = await crowd.gateway.ask(path, body_for(path, **fields))
        crowd.strike(Faults(die_after_tokens=3))
        reply = await crowd.gateway.ask(path, body_for(path, **fields))
        assert crowd.strikes == 1 and _told(reply.events) == _told(whole.events)
        await crowd.mend()


STARTED = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":3}}}\n\n'
BLOCK = b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":%b}\n\n'


@pytest.mark.parametrize(
    "events",
    [
        (STARTED, BLOCK % b'{"type":"thinking","thinking":""}'),
        (STARTED, BLOCK % b'{"type":"tool_use","id":"t","name":"f","input":{}}'),
        (STARTED, BLOCK % b'"text"'),
        (STARTED, BLOCK % b'{"type":"text","text":""}', b'event: x\ndata: {"type":"content_block_delta"}\n\n'),
    ],
)
async def test_a_block_that_is_no_text_ends_with_an_error(events: tuple[bytes, ...]) -> None:
    reply, asked = await cut_after(len(events), MESSAGES, body_for(MESSAGES), list(events))
    assert reply.events[-1]["error"]["message"] and not asked


async def test_a_stop_sequence_ends_the_rest_as_it_would_have_ended_the_whole() -> None:
    """The other engine's completion says which stop text it met."""
    rest = (
        b'data: {"id":"c","object":"text_completion","choices":[{"index":0,"text":" sea","finish_reason":"stop",'
        b'"stop_reason":"@@@","token_ids":[8]}]}\n\n',
        b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6}}\n\n',
        b"data: [DONE]\n\n",
    )
    text = (
        BLOCK % b'{"type":"text","text":""}',
        (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            b'{"type":"text_delta","text":"The"}}\n\n'
        ),
    )
    by_path = {
        "/detokenize": plain(b'{"prompt":"The"}'),
        "/v1/completions": streamed(*rest),
    }
    asked: list[dict[str, Any]] = []
    engine = ScriptedEngine([], gets=VLLM)

    async def play(writer: asyncio.StreamWriter) -> None:
        seen = engine.asked[-1]
        if seen.path == MESSAGES:
            await dying(STARTED, *text)(writer)
            return
        asked.append(json.loads(seen.body))
        if seen.path == "/tokenize":
            writer.write(plain(b'{"tokens":[1,2,3]}' if "messages" in asked[-1] else b'{"tokens":[9]}'))
        else:
            writer.write(by_path[seen.path])

    engine.scripts = [play]
    async with engine.run(), serving(engine.url, engine.url + "/", probe_s=60.0) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
        reply = await gateway.ask(MESSAGES, body_for(MESSAGES, 20, stop_sequences=["@@@"]))
    delta = reply.events[-2]
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "@@@"}
    assert delta["usage"] == {"input_tokens": 3, "output_tokens": 3}
    assert asked[-1]["prompt"] == [1, 2, 3, 9] and asked[-1]["stop"] == ["@@@"] and asked[-1]["max_tokens"] == 19
    assert reply.events[-1] == {"type": "message_stop"}


PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
CALL = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (MESSAGES, {"messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]}]}),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": "go on"}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]}),
        (MESSAGES, {"messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hi"}]}),
        (RESPONSES, {"input": [{"type": "reasoning", "summary": []}, {"role": "user", "content": "Hi"}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}]}]}),
        (RESPONSES, {"input": []}),
    ],
    ids=str,
)
def test_only_a_prompt_of_plain_messages_is_read_again(path: str, fields: dict[str, object]) -> None:
    route = {RESPONSES: schemas.RESPONSES, MESSAGES: schemas.MESSAGES}[path]
    with pytest.raises(CannotResume):
        chat_of(call_of(json.dumps(body_for(path) | fields).encode(), route))


def test_a_prompt_becomes_the_messages_that_vllm_makes_of_it() -> None:
    blocks = [{"type": "text", "text": text} for text in ("x-anthropic-billing-header: 1", "Be", " brief.")]
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    call = call_of(json.dumps(body_for(MESSAGES, system=blocks, messages=turns)).encode(), schemas.MESSAGES)
    assert chat_of(call)["messages"] == [{"role": "system", "content": "Be brief."}, *turns]


async def test_a_worker_that_reads_the_prompt_in_another_way_does_not_go_on() -> None:
    """Another chat template, for one: the first worker has told how long the prompt is."""
    events = await undisturbed(MESSAGES, body_for(MESSAGES))
    events[0] = events[0].replace(b'"input_tokens":', b'"input_tokens":1')
    reply, asked = await cut_after(4, MESSAGES, body_for(MESSAGES), events)
    assert reply.events[-1]["type"] == "error" and not asked
