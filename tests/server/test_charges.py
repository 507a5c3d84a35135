"""What is charged is what the engine computed, whatever valid request it was and whenever its client left.

EVENHAND_SOAK multiplies how many requests are tried; `make soak` sets it.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.fake.engine import EngineSetup, FakeChoice, FakeEngine
from scheduler.jobs import Outcome
from server.observe.observer import Observer
from server.request.call import Ticket
from tests.server.conftest import INSTANT, Running, eventually, request, serving
from tests.server.test_hostile_requests import TENANTS
from tests.server.test_tenants import OTHER

EXAMPLES = 60 * int(os.environ.get("EVENHAND_SOAK", "1"))
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
MARKERS = (
    '"usage":{"prompt_tokens":1,"completion_tokens":1}',
    'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n',
    '"finish_reason":null,"token_ids":[1]}]}',
    "usage",
    "abort",
    "data:;base64,",
)


class Counting(FakeEngine):
    """An engine that knows what it computed: prompts once each, and every token of every choice."""

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        self.prompt_tokens = self.output_tokens = 0

    def _end(self, choice: FakeChoice, outcome: Outcome) -> None:
        there = choice.job in self._choices
        super()._end(choice, outcome)
        if there:
            self.output_tokens += len(choice.ids)
            if choice.index % choice.answer.ask.n == 0:
                self.prompt_tokens += len(choice.answer.ask.prompts[choice.prompt])


class Asked(NamedTuple):
    """A valid request. leave_after: events after which its client goes, None if it stays."""

    path: str
    body: dict[str, Any]
    leave_after: int | None


texts = st.text(max_size=20) | st.sampled_from(MARKERS) | st.builds("x".__mul__, st.integers(1, 3000))
metadata = st.dictionaries(
    st.sampled_from(["finish_reason", "usage", "error", "x"]), st.sampled_from(["abort", "usage", *MARKERS]), max_size=3
)


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    path = draw(st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]))
    text, most = draw(texts), draw(st.integers(1, 40))
    messages = [{"role": "user", "content": text or "x"}]
    body: dict[str, Any] = {"model": "fake", "stream": draw(st.booleans())}
    if path == CHAT:
        body |= {"messages": messages, "max_tokens": most, "n": draw(st.integers(1, 3))}
        body |= draw(st.sampled_from([{}, {"tools": [{"type": "function", "function": {"name": "f"}}]}]))
    elif path == COMPLETIONS:
        prompts: list[Any] = [text or "x", ["a", text or "b", "c"], [1, 2, 3], [[5, 6], [7]]]
        body |= {"prompt": draw(st.sampled_from(prompts)), "max_tokens": most, "n": draw(st.integers(1, 3))}
    elif path == RESPONSES:
        body |= {"input": text or "x", "max_output_tokens": most, "metadata": draw(metadata), "user": "usage"}
        body |= draw(st.sampled_from([{}, {"instructions": text or "x"}]))
    else:
        body |= {"messages": messages, "max_tokens": most, "system": text or "x"}
    if path in (CHAT, COMPLETIONS):
        body |= {"stream_interval": draw(st.integers(1, 12)), "ignore_eos": draw(st.booleans())}
        body |= draw(
            st.sampled_from([{}, {"return_token_ids": True}, {"logprobs": 1 if path == COMPLETIONS else True}])
        )
        if body["stream"]:
            options = [{}, {"include_usage": True}, {"continuous_usage_stats": True}]
            options.append({"include_usage": True, "continuous_usage_stats": True})
            body["stream_options"] = draw(st.sampled_from(options))
    leave = draw(st.integers(1, 30)) if body["stream"] and draw(st.booleans()) else None
    return Asked(path, body, leave)


class Ended(Observer):
    """Notes the tickets of calls that are over."""

    def __init__(self, tickets: list[Ticket]) -> None:
        self.tickets = tickets

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """A call is over."""
        self.tickets.append(ticket)


class Desk:
    """A gateway over an engine that counts, and what was charged for each request."""

    def __init__(self, gateway: Running, engine: Counting) -> None:
        self.gateway = gateway
        self.engine = engine
        self.ended: list[Ticket] = []
        gateway.server.gateway.observers.add(Ended(self.ended))

    def used(self) -> int:
        return max(self.gateway.server.shared.gate.usage("hostile").values())

    async def ask(self, one: Asked) -> None:
        engine, before = self.engine, self.used()
        engine.prompt_tokens = engine.output_tokens = 0
        self.ended.clear()
        wire = await self.gateway.send(request(one.path, one.body, headers={"authorization": f"Bearer {OTHER}"}))
        delivered, complete = await self._read(wire, one)
        await wire.close()
        self.gateway.wires.remove(wire)
        await eventually(lambda: self.ended and self.gateway.at_rest() and not engine.running, "it is over")
        (ticket,) = self.ended
        charged = self.used() - before
        assert charged == ticket.prompt_tokens + ticket.tokens
        assert ticket.job.output_tokens == ticket.tokens, "the policy was told the same"
        if complete:
            assert charged == engine.prompt_tokens + engine.output_tokens
            return
        assert delivered <= ticket.tokens <= engine.output_tokens
        if ticket.exact:
            assert ticket.prompt_tokens == engine.prompt_tokens

    async def _read(self, wire: Any, one: Asked) -> tuple[int, bool]:
        """(tokens that the client was sent, whether it stayed to the end)."""
        if one.leave_after is None:
            reply = await wire.answer()
            assert reply.status == 200, reply.body
            return 0, True
        await wire.head()
        data = b""
        while data.count(b"\n\n") < one.leave_after:
            chunk = await wire.chunk()
            if not chunk:
                return 0, True
            data += chunk
        return tokens_of(one.path, data), False


def tokens_of(path: str, stream: bytes) -> int:
    """Tokens in these events, as a client that can count them does."""
    datas = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    events = [json.loads(data) for data in datas]
    if path in (CHAT, COMPLETIONS):
        return sum(len(choice.get("token_ids") or ()) for event in events for choice in event["choices"])
    return sum(event["type"].endswith("delta") and event["type"] != "message_delta" for event in events)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Desk]]:
    folder: Path = tmp_path_factory.mktemp("charges")
    (folder / "tenants.yaml").write_text(TENANTS)
    stack = contextlib.AsyncExitStack()

    async def begin() -> Desk:
        engine = await stack.enter_async_context(Counting(INSTANT))
        gateway = await stack.enter_async_context(serving(engine.url, tenants=folder / "tenants.yaml"))
        return Desk(gateway, engine)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            yield runner, runner.run(begin())
        finally:
            runner.run(stack.aclose())


@given(one=asked())
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
def test_what_is_charged_is_what_the_engine_computed(desk: tuple[asyncio.Runner, Desk], one: Asked) -> None:
    runner, there = desk
    runner.run(there.ask(one))
