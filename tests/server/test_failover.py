"""A worker fails in the middle of an answer, and its client cannot tell."""

import asyncio
import contextlib
import copy
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import HEALTHY, Faults
from loadtest.traces import hash_model
from tests.server.conftest import (
    INSTANT,
    VLLM,
    Reply,
    Running,
    Script,
    ScriptedEngine,
    chat,
    completion,
    eventually,
    plain,
    serving,
    streamed,
)
from tests.server.crowd import over_crowd

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = 12


def body_for(path: str, **fields: object) -> dict[str, object]:
    return (chat if path == CHAT else completion)(max_tokens=TOKENS, **fields)


def data_of(reply: Reply) -> list[Any]:
    """Events without what differs between two runs of one request: its id and time."""
    return [
        {name: value for name, value in event.items() if name not in ("id", "created")} if event != "[DONE]" else event
        for event in reply.events
    ]


def assert_one_stream(reply: Reply, path: str) -> None:
    """One role, one end, one id, and nothing of any failure."""
    *events, done = reply.events
    assert reply.status == 200 and done == "[DONE]"
    assert not any("error" in event for event in events)
    assert len({(event["id"], event["object"], event["model"], event["created"]) for event in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    roles = [choice for choice in choices if choice.get("delta", {}).get("role")]
    assert len(roles) == (1 if path == CHAT else 0)
    ends = [choice for choice in choices if choice["finish_reason"]]
    assert len(ends) == 1 and choices[-1] is ends[0]
    assert all(("delta" in choice) == (path == CHAT) for choice in choices)


USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_killed_after_any_token_the_stream_goes_on_as_if_nothing_had_happened(path: str) -> None:
    async with over_crowd() as crowd:
        whole = await crowd.gateway.ask(path, body_for(path, **USAGE))
        for tokens in range(TOKENS):
            crowd.strike(Faults(die_after_tokens=tokens))
            reply = await crowd.gateway.ask(path, body_for(path, **USAGE))
            assert crowd.strikes == 1
            assert_one_stream(reply, path)
            assert reply.text == whole.text, tokens
            assert data_of(reply)[-2] == data_of(whole)[-2], "the usage adds up"
            await crowd.mend()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_survives_the_death_of_one_worker_after_another(path: str) -> None:
    async with over_crowd(count=3) as crowd:
        whole = await crowd.gateway.ask(path, body_for(path, **USAGE))
        for first, second in ((3, 4), (1, 1), (5, 0)):
            crowd.strike(Faults(die_after_tokens=first), Faults(die_after_tokens=second))
            reply = await crowd.gateway.ask(path, body_for(path, **USAGE))
            assert crowd.strikes == 2
            assert_one_stream(reply, path)
            assert reply.text == whole.text
            assert data_of(reply)[-2] == data_of(whole)[-2]
            await crowd.mend()


BREAKS = [
    Faults(die_after_tokens=5),
    Faults(cut_after_tokens=5),
    Faults(error_event_after_tokens=5),
    Faults(error_event_after_tokens=0),
    Faults(error_status=500),
    Faults(error_status=503),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", BREAKS, ids=repr)
async def test_however_a_worker_fails_the_answer_is_the_same(fault: Faults, stream: bool) -> None:
    async with over_crowd() as crowd:
        body = chat(max_tokens=TOKENS, stream=stream)
        whole = await crowd.gateway.ask(CHAT, body)
        crowd.strike(fault)
        reply = await crowd.gateway.ask(CHAT, body)
        assert reply.status == 200
        if stream:
            assert_one_stream(reply, CHAT)
            assert data_of(reply) == data_of(whole)
        else:
            assert reply.json()["choices"] == whole.json()["choices"]
            assert reply.json()["usage"] == whole.json()["usage"]
        failovers = {
            labels[0][1]: count
            for (name, labels), count in (await crowd.gateway.metrics()).items()
            if name == "evenhand_failovers_total"
        }
        begun = stream and not fault.error_status
        assert failovers == {"retried": 1 - begun, "resumed": begun, "failed": 0, "blamed": 0}
        await crowd.mend()


async def test_a_worker_that_takes_no_connection_costs_nobody_an_answer() -> None:
    async with over_crowd(probe_s=60.0) as crowd:
        crowd.engines[0].die()
        replies = await asyncio.gather(*(crowd.gateway.ask(CHAT, chat()) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert len(crowd.gateway.server.fleet.ready()) == 1
        await crowd.engines[0].listen()


async def test_what_tokenizing_asks_is_asked_elsewhere_too() -> None:
    async with over_crowd(probe_s=60.0) as crowd:
        crowd.engines[0].die()
        for _ in range(2):
            assert (await crowd.gateway.ask("/tokenize", {"model": "fake", "prompt": "Hello"})).status == 200
        await crowd.engines[0].listen()


async def test_a_stream_with_a_client_that_did_not_ask_for_usage_shows_none_and_is_charged_once() -> None:
    async with over_crowd() as crowd:
        crowd.strike(Faults(die_after_tokens=5))
        reply = await crowd.gateway.ask(CHAT, chat(max_tokens=TOKENS, stream=True))
        assert_one_stream(reply, CHAT)
        assert not any("usage" in event for event in reply.events[:-1])
        metrics = await crowd.gateway.metrics()
        prompt = crowd.asked[0].body["messages"][0]["content"]
        assert metrics["evenhand_tokens_total", (("kind", "completion"),)] == TOKENS
        assert metrics["evenhand_tokens_total", (("kind", "prompt"),)] == len(
            hash_model.encode(hash_model.render_chat([("user", prompt)]))
        )
        await crowd.mend()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"n": 2},
        {"presence_penalty": 0.5},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
    ],
    ids=str,
)
async def test_what_cannot_be_continued_exactly_ends_with_an_error_event(fields: dict[str, object]) -> None:
    async with over_crowd() as crowd:
        crowd.strike(Faults(die_after_tokens=5))
        reply = await crowd.gateway.ask(CHAT, chat(max_tokens=TOKENS, stream=True, **fields))
        *_, error, done = reply.events
        assert done == "[DONE]" and error["error"]["code"] == "engine_gone"
        assert len(crowd.asked) == 1, "nobody else was asked"
        await crowd.mend()


async def test_a_stream_that_has_said_no_more_than_its_role_begins_anew_whatever_it_is() -> None:
    role = b'data: {"id":"chatcmpl-a","object":"chat.completion.chunk","created":1,"model":"fake","choices":[' + (
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    )

    async def dies(writer: asyncio.StreamWriter) -> None:
        writer.write(streamed(role).removesuffix(b"0\r\n\r\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with ScriptedEngine([dies]).run() as first, FakeEngine(INSTANT) as second:
        async with serving(first.url, second.url, probe_s=60.0) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            body = chat(stream=True, tools=[{"type": "function", "function": {"name": "f"}}])
            while not first.asked:
                reply = await gateway.ask(CHAT, body)
            assert_one_stream(reply, CHAT)
            assert reply.events[-2]["choices"][0]["finish_reason"]


async def test_what_closes_a_stream_is_said_even_if_the_worker_dies_before_it_says_it() -> None:
    events = [
        b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"fake","choices":[{"index":0,"delta":'
        b'{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[5,6,7]}\n\n',
        b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"fake","choices":[{"index":0,"delta":'
        b'{"content":"Hi"},"finish_reason":"stop","token_ids":[8,2]}]}\n\n',
    ]

    async def dies(writer: asyncio.StreamWriter) -> None:
        writer.write(streamed(*events).removesuffix(b"0\r\n\r\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with ScriptedEngine([dies]).run() as engine, serving(engine.url) as gateway:
        reply = await gateway.ask(CHAT, chat(**USAGE))
        assert_one_stream(reply, CHAT)
        assert reply.text == "Hi" and "prompt_token_ids" not in str(reply.events[0]["choices"])
        assert reply.events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert len(engine.asked) == 1


def dying(*events: bytes, done: bool = False) -> Script:
    """An engine that says these events and then drops the connection."""

    async def play(writer: asyncio.StreamWriter) -> None:
        said = streamed(*events)
        writer.write(said if done else said.removesuffix(b"0\r\n\r\n"))
        await writer.drain()
        if not done:
            await asyncio.sleep(0.05)  # so that what was said arrives before the reset
            writer.transport.abort()

    return play


class Cut:
    """A completion as a vLLM says it, of which the last events can be held back: what it says next is known."""

    body = completion(max_tokens=TOKENS, stream=True, stop=["@@@"])

    def __init__(self, whole: list[dict[str, Any]]) -> None:
        self.whole = [event for event in whole[:-1] if event["choices"]]
        self.text = "".join(event["choices"][0]["text"] for event in self.whole)

    @classmethod
    async def asked(cls, engine: FakeEngine) -> "Cut":
        async with httpx2.AsyncClient(base_url=engine.url, trust_env=False) as client:
            answer = await client.post(COMPLETIONS, json=cls.body | {"return_token_ids": True})
        datas = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        return cls([json.loads(data) for data in datas[:-1]] + ["[DONE]"])

    def events(self, count: int, *, held_back: int, per_event: int = 1) -> list[bytes]:
        """The first `count` tokens, so many to an event, without the last `held_back` characters of their text."""
        events = []
        text = self.text[: len("".join(event["choices"][0]["text"] for event in self.whole[:count])) - held_back]
        for at in range(0, count, per_event):
            group = self.whole[at : at + per_event]
            event = copy.deepcopy(group[0])
            choice = event["choices"][0]
            choice["token_ids"] = [token for one in group for token in one["choices"][0]["token_ids"]]
            said = "".join(one["choices"][0]["text"] for one in group)
            choice["text"], text = text[: len(said)], text[len(said) :]
            events.append(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
        return events


@contextlib.asynccontextmanager
async def over_script_and_fake(
    script: Script, faults: Faults = HEALTHY
) -> AsyncIterator[tuple[Running, ScriptedEngine, FakeEngine]]:
    """A worker that says what the script says, taken for a vLLM, and one to go on in its place."""
    async with ScriptedEngine([script], gets=VLLM).run() as first, FakeEngine(INSTANT) as second:
        async with serving(first.url, second.url, probe_s=60.0) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            second.faults = faults
            yield gateway, first, second


async def asked_of_the_first(gateway: Running, first: ScriptedEngine, body: dict[str, object]) -> Reply:
    reply = await gateway.ask(COMPLETIONS, body)
    while not first.asked:
        reply = await gateway.ask(COMPLETIONS, body)
    return reply


@pytest.mark.parametrize("per_event", [1, 3])
@pytest.mark.parametrize("held_back", [0, 1, 3, 7])
async def test_text_that_an_engine_held_back_is_neither_lost_nor_repeated(held_back: int, per_event: int) -> None:
    async with FakeEngine(INSTANT) as engine:
        cut = await Cut.asked(engine)
    script = dying(*cut.events(6, held_back=held_back, per_event=per_event))
    async with over_script_and_fake(script) as (gateway, first, _):
        reply = await asked_of_the_first(gateway, first, Cut.body)
        assert_one_stream(reply, COMPLETIONS)
        assert reply.text == cut.text


async def test_another_worker_that_says_something_else_ends_the_stream_with_an_error() -> None:
    async with FakeEngine(INSTANT) as engine:
        cut = await Cut.asked(engine)
    script = dying(*cut.events(6, held_back=2))
    async with over_script_and_fake(script, Faults(wrong_answers=True)) as (gateway, first, second):
        reply = await asked_of_the_first(gateway, first, Cut.body)
        *_, error, done = reply.events
        assert done == "[DONE]" and error["error"]["code"] == "engine_gone"
        assert cut.text.startswith(reply.text[:-1]), "nothing of the other answer was mixed in"


def piece(token: int, text: str, finish: str | None = None) -> bytes:
    """One token of a completion as vLLM says it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "token_ids": [token]}
    event = {"id": "c", "object": "text_completion", "created": 1, "model": "fake", "choices": [choice]}
    if token == HALF[0][0]:
        choice["prompt_token_ids"] = [5, 6, 7]
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


HALF = [(8, "a"), (9, ""), (10, ""), (11, "é"), (12, ""), (13, "!")]  # characters of three tokens and of two
ENDED = (
    piece(*HALF[-1], "length"),
    b'data: {"id":"c","object":"text_completion","created":1,"model":"fake","choices":[],"usage":'
    b'{"prompt_tokens":4,"completion_tokens":5,"total_tokens":9}}\n\n',
    b"data: [DONE]\n\n",
)


ABORTED = (
    b'data: {"id":"c","object":"text_completion","created":1,"model":"fake","choices":[{"index":0,"text":"",'
    b'"logprobs":null,"finish_reason":"abort","token_ids":[]}]}\n\n',
    b"data: [DONE]\n\n",
)


@pytest.mark.parametrize("had", [1, 2, 3])
@pytest.mark.parametrize("again", [0, 1, 2], ids="then fails after {}".format)
@pytest.mark.parametrize("aborts", [False, True])
async def test_token_ids_of_characters_in_parts_are_neither_lost_nor_repeated(
    had: int, again: int, aborts: bool
) -> None:
    """The second worker may die, or abort, before it has said again what the first one had said of a character."""
    rest = dying(*(piece(*one) for one in HALF[1:-1]), *ENDED, done=True)
    makes = [piece(*one) for one in HALF[1 : 1 + again]]
    second = [dying(*makes, *(ABORTED if aborts else ()), done=aborts)] if again else []
    scripts = [dying(*(piece(*one) for one in HALF[:had])), *second, rest]
    engines = [ScriptedEngine(scripts, gets=VLLM) for _ in range(3)]
    async with engines[0].run() as one, engines[1].run() as two, engines[2].run() as three:
        async with serving(one.url, two.url, three.url, probe_s=60.0) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 3)
            reply = await gateway.ask(COMPLETIONS, completion(max_tokens=len(HALF), **USAGE))
    assert_one_stream(reply, COMPLETIONS)
    choices = [choice for event in reply.events[:-1] for choice in event["choices"]]
    assert [token for choice in choices for token in choice["token_ids"]] == [token for token, _ in HALF]
    assert reply.text == "aé!"
    assert reply.events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


async def test_an_engine_that_aborts_what_it_runs_is_no_end_of_an_answer() -> None:
    async with FakeEngine(INSTANT) as engine:
        cut = await Cut.asked(engine)
    *events, last = cut.events(6, held_back=0)
    aborted = last.replace(b'"finish_reason":null', b'"finish_reason":"abort"')
    script = dying(*events, aborted, b"data: [DONE]\n\n", done=True)
    async with over_script_and_fake(script) as (gateway, first, _):
        reply = await asked_of_the_first(gateway, first, Cut.body)
        assert_one_stream(reply, COMPLETIONS)
        assert reply.text == cut.text and reply.events[-2]["choices"][0]["finish_reason"] == "length"


SPELLED = {8: "Hello", 9: " E", 10: "N", 11: "D", 12: " and much more"}  # a model that ends with END, if it is stopped


@pytest.mark.parametrize("had", [1, 2, 3])
async def test_a_stream_cut_inside_its_stop_text_still_ends_with_it(had: int) -> None:
    """With `include_stop_str_in_output` an engine streams the beginning of a stop text, and finds one only if it makes
    the whole of it."""
    engine = ScriptedEngine([], gets=VLLM)

    async def play(writer: asyncio.StreamWriter) -> None:
        asked = json.loads(engine.asked[-1].body)
        if engine.asked[-1].path == "/detokenize":
            text = "".join(SPELLED[token] for token in asked["tokens"])
            writer.write(plain(json.dumps({"prompt": text}).encode()))
        elif asked["prompt"] == "Once":
            await dying(*(piece(token, SPELLED[token]) for token in range(8, 8 + had)))(writer)
        else:
            made = asked["prompt"][3:]
            rest = list(range(8 + len(made), 12))
            stops = "".join(SPELLED[token] for token in rest).endswith("END")
            rest += [] if stops else [12]
            pieces = [piece(token, SPELLED[token], "stop" if token == rest[-1] else None) for token in rest]
            writer.write(streamed(*pieces, *ENDED[1:]))

    engine.scripts = [play]
    body = completion(prompt="Once", max_tokens=50, stop=["END"], include_stop_str_in_output=True, **USAGE)
    async with engine.run(), serving(engine.url, engine.url + "/", probe_s=60.0) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
        reply = await gateway.ask(COMPLETIONS, body)
    assert reply.text == "Hello END"
    assert [token for event in reply.events[:-2] for token in event["choices"][0]["token_ids"]] == [8, 9, 10, 11]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_whole_answer_that_an_engine_aborted_is_asked_for_again(path: str) -> None:
    """vLLM that is told to end says 200 and what it has made so far."""
    choice = {"index": 0, "text": "cut", "message": {"role": "assistant", "content": "cut"}, "finish_reason": "abort"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    answer = {"id": "c", "model": "fake", "choices": [choice], "usage": usage}

    async def aborts(writer: asyncio.StreamWriter) -> None:
        writer.write(plain(json.dumps(answer, separators=(",", ":")).encode()))

    async with over_script_and_fake(aborts) as (gateway, first, _):
        reply = await gateway.ask(path, body_for(path))
        while not first.asked:
            reply = await gateway.ask(path, body_for(path))
        (said,) = reply.json()["choices"]
        assert reply.status == 200 and said["finish_reason"] == "length"
        assert reply.json()["usage"]["completion_tokens"] == TOKENS
        assert gateway.server.gateway.failover.outcomes["retried"] == 1
