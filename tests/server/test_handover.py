"""A prompt read by one worker and answered by another: what clients get, what engines are asked, and every way to fail.

The engines here are without a model; they keep, fetch and lose KV as vLLM's NIXL connector does.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import Faults
from loadtest.simulator.costmodel import PRESETS
from loadtest.traces import hash_model
from scheduler.forecast import EngineForecast
from server.relay.engine_body import _ONE_TOKEN
from tests.server.conftest import (
    Reply,
    Running,
    ScriptedEngine,
    chat,
    completion,
    eventually,
    plain,
    request,
    says,
    serving,
    streamed,
)

KEY = "sk-test-0123456789abcdef"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUICK = EngineSetup(cost=PRESETS["quick"], kv_lease_s=60.0)
STORY = {"messages": [{"role": "user", "content": "Tell me a story. " * 40}]}


@dataclass
class Pools:
    """A gateway over one worker that reads prompts and one that answers."""

    gateway: Running
    prefill: FakeEngine
    decode: FakeEngine

    async def ask(self, path: str = CHAT, **fields: Any) -> Reply:
        return await self.gateway.ask(path, body(path, **fields))

    async def count(self, name: str, **labels: str) -> float:
        return (await self.gateway.metrics()).get((name, tuple(sorted(labels.items()))), 0.0)

    async def prefills(self, outcome: str) -> float:
        return await self.count("evenhand_prefills_total", outcome=outcome)

    async def placements(self, placement: str) -> float:
        return await self.count("evenhand_placements_total", placement=placement)

    def nothing_held(self) -> bool:
        """By the engines' own account."""
        engines = (self.prefill, self.decode)
        return not any(e.running or e.waiting or len(e.kept) or e.batch.kv_used_tokens for e in engines)


def body(path: str = CHAT, **fields: Any) -> dict[str, Any]:
    if path == TEXT:
        return completion(**{"prompt": [7] * 300, "max_tokens": 20, **fields})
    return chat(**{**STORY, "max_tokens": 20, **fields})


def roles(prefill: str, decode: str) -> tuple[str, str]:
    return f"{prefill},role=prefill,id=p0", f"{decode},role=decode,id=d0"


@contextlib.asynccontextmanager
async def pools(setup: EngineSetup = QUICK, **settings: Any) -> AsyncIterator[Pools]:
    """At their end the engines hold nothing, as they count themselves."""
    settings = {"disaggregation": {"min_prompt_tokens": 32, "prefill_timeout_s": 20.0}, **settings}
    async with FakeEngine(setup) as prefill, FakeEngine(setup) as decode:
        async with serving(*roles(prefill.url, decode.url), ready=False, **settings) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2, "both are ready")
            both = Pools(gateway, prefill, decode)
            yield both
            for wire in gateway.wires:
                await wire.close()
            await eventually(both.nothing_held, "no engine holds anything")


async def alone(path: str, fields: dict[str, Any]) -> Reply:
    """What one engine answers that does both."""
    async with FakeEngine(QUICK) as engine, serving(engine.url) as gateway:
        return await gateway.ask(path, body(path, **fields))


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_is_that_of_one_engine(path: str, stream: bool) -> None:
    fields = {"stream": stream, "ignore_eos": True}
    expected = await alone(path, fields)
    async with pools() as both:
        reply = await both.ask(path, **fields)
        assert reply.status == 200
        if stream:
            assert reply.text == expected.text != ""
        else:
            assert reply.json()["choices"] == expected.json()["choices"]
            assert reply.json()["usage"] == expected.json()["usage"]
        assert both.decode.fetched == 1 and both.decode.batch.counts.prompt_tokens == 0
        assert await both.placements("apart") == 1 and await both.prefills("read") == 1
        assert await both.count("evenhand_kv_transfer_seconds_count") == stream
        assert await both.count("evenhand_prefill_seconds_count") == 1


async def test_the_prefill_worker_is_asked_for_one_token_of_the_very_same_prompt() -> None:
    async with pools() as both:
        fields = {"temperature": 0.5, "stop": ["x"], "tools": [{"a": 1}], "min_tokens": 3, "stream": True, "seed": 12}
        await both.ask(**fields)
        asked, answered = both.prefill.seen[-1].body, both.decode.seen[-1].body
        ours = json.loads(b"{" + _ONE_TOKEN + b"}")
        assert {name: asked[name] for name in ours} == ours
        assert asked["max_tokens"] == asked["max_completion_tokens"] == 1 and asked["min_tokens"] == 0
        same = ("messages", "temperature", "tools", "model", "seed")
        assert {name: asked[name] for name in same} == {name: answered[name] for name in same}
        assert answered["kv_transfer_params"]["do_remote_prefill"] is True
        assert answered["kv_transfer_params"]["remote_port"] == both.prefill.port
        assert answered["max_tokens"] == 20 and answered["stop"] == ["x"] and answered["min_tokens"] == 3
        assert both.prefill.seen[-1].headers["x-request-id"] == both.decode.seen[-1].headers["x-request-id"]


async def test_short_prompts_go_straight_to_the_worker_that_answers() -> None:
    async with pools() as both:
        reply = await both.ask(messages=[{"role": "user", "content": "Hi"}])
        assert reply.status == 200 and not both.prefill.seen
        assert await both.placements("short_prompt") == 1


async def test_the_next_turn_goes_where_the_conversation_is_remembered() -> None:
    async with pools(disaggregation={"min_prompt_tokens": 100}) as both:
        await both.ask()
        await both.ask(messages=[*STORY["messages"], {"role": "assistant", "content": "Once"}])
        assert len(both.prefill.seen) == 1 and len(both.decode.seen) == 2
        assert await both.placements("cached_prefix") == 1


@pytest.mark.parametrize(
    "path, fields",
    [
        (CHAT, {"n": 2}),
        (TEXT, {"prompt": [[7] * 300, [8] * 300]}),
        ("/v1/responses", {"input": "Tell me a story. " * 40}),
        ("/v1/messages", {**STORY, "max_tokens": 5}),
        ("/v1/embeddings", {"input": "Tell me a story. " * 40}),
    ],
)
async def test_what_cannot_be_handed_over_is_one_workers_business(path: str, fields: dict[str, Any]) -> None:
    async with pools() as both:
        whole = body(path, **fields) if path in (CHAT, TEXT) else {"model": "fake", **fields}
        reply = await both.gateway.ask(path, whole)
        assert reply.status == 200 and not both.prefill.seen
        assert await both.placements("unfit") == 1


async def test_a_tenants_own_transfer_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants: [{{name: acme, keys: [{KEY}], grants: [kv_transfer_params]}}]")
    async with pools(tenants=file) as both:
        fields = body(kv_transfer_params={"do_remote_decode": False})
        reply = await both.gateway.ask(CHAT, fields, headers={"authorization": f"Bearer {KEY}"})
        assert reply.status == 200
        assert not both.prefill.seen
        assert both.decode.seen[-1].body["kv_transfer_params"] == {"do_remote_decode": False}


# Failures of the worker that reads


@pytest.mark.parametrize(
    "faults, outcome",
    [
        (Faults(die_after_tokens=0), "gone"),
        (Faults(cut_after_tokens=0), "gone"),
        (Faults(error_status=500), "refused"),
        (Faults(error_event_after_tokens=0), "refused"),
    ],
    ids=["dies", "cut", "500", "fails inside"],
)
async def test_a_prompt_that_was_not_read_is_read_where_it_is_answered(faults: Faults, outcome: str) -> None:
    expected = await alone(CHAT, {})
    async with pools() as both:
        both.prefill.faults = faults
        reply = await both.ask()
        assert reply.json()["choices"] == expected.json()["choices"]
        assert "kv_transfer_params" not in both.decode.seen[-1].body
        assert await both.prefills(outcome) == 1 and await both.prefills("read") == 0


async def test_a_dead_prefill_worker_is_found_out_by_the_first_and_spared_the_rest() -> None:
    async with pools(probe_s=5.0) as both:
        both.prefill.die()
        replies = [await both.ask() for _ in range(3)]
        assert [reply.status for reply in replies] == [200] * 3
        assert await both.prefills("gone") == 1
        assert await both.placements("apart") == 1
        await both.prefill.listen()


async def test_a_slow_prefill_worker_is_not_waited_for_for_ever() -> None:
    async with pools(disaggregation={"min_prompt_tokens": 32, "prefill_timeout_s": 0.2}) as both:
        both.prefill.faults = Faults(stall_after_tokens=0)
        assert (await both.ask()).status == 200
        assert await both.prefills("slow") == 1
        both.prefill.heal()


NO_CONNECTOR = plain(b'{"usage":{"prompt_tokens":3},"kv_transfer_params":null}')


@pytest.mark.parametrize("said", [NO_CONNECTOR, plain(b"{}"), plain(b"no JSON"), plain(b'{"kv_transfer_params":7}')])
async def test_a_worker_that_keeps_no_kv_costs_time_and_no_answer(said: bytes) -> None:
    async with ScriptedEngine([says(said)]).run() as prefill, FakeEngine(QUICK) as decode:
        async with serving(*roles(prefill.url, decode.url), disaggregation={"min_prompt_tokens": 32}) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            reply = await gateway.ask(CHAT, body())
            assert reply.status == 200 and "kv_transfer_params" not in decode.seen[-1].body
            assert gateway.server.gateway.handover.outcomes == {"no_kv": 1}


async def test_how_much_the_prefill_worker_had_cached_travels_with_the_kv() -> None:
    said = b'{"usage":{"prompt_tokens":300,"prompt_tokens_details":{"cached_tokens":64}},"kv_transfer_params":%b}'
    kv = b'{"do_remote_prefill":true,"remote_port":1}'
    async with ScriptedEngine([says(plain(said % kv))]).run() as prefill, FakeEngine(QUICK) as decode:
        async with serving(*roles(prefill.url, decode.url), disaggregation={"min_prompt_tokens": 32}) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            assert (await gateway.ask(CHAT, body())).status == 200
            assert decode.seen[-1].body["kv_transfer_params"] == {
                **json.loads(kv),
                "remote_prefill_cached_tokens": 64,
            }
            assert decode.not_fetched == 1, "there was nobody at that port: the prompt is computed where it is answered"


@pytest.mark.parametrize(("tokens", "arriving"), [(1, True), (2, False)])
async def test_a_stream_counts_as_arrived_with_its_second_token_also_if_that_comes_with_its_first(
    tokens: int, arriving: bool
) -> None:
    text = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    begun, rest = streamed(text * tokens), asyncio.Event()

    async def answers(writer: asyncio.StreamWriter) -> None:
        writer.write(begun.removesuffix(b"0\r\n\r\n"))
        await rest.wait()
        writer.write(b"0\r\n\r\n")

    read = says(plain(b'{"usage":{"prompt_tokens":300},"kv_transfer_params":{"do_remote_prefill":true}}'))
    async with ScriptedEngine([read]).run() as prefill, ScriptedEngine([answers]).run() as decode:
        async with serving(
            *roles(prefill.url, decode.url), disaggregation={"min_prompt_tokens": 32}, health={"canary": "off"}
        ) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            wire = await gateway.send(request(CHAT, body(stream=True)))
            await wire.head()
            assert (await wire.chunk()).count(b"content") == tokens
            assert (gateway.server.fleet.members["d0"].load.arriving_tokens > 0) is arriving
            rest.set()
            await wire.close()


@pytest.mark.parametrize(("metrics", "token"), [(b"evenhand_engine_policy_info 1\n", 7), (b"", None)])
async def test_a_first_token_is_passed_on_only_to_an_engine_that_gives_it_out(
    metrics: bytes, token: int | None
) -> None:
    """With objectives, prediction decides; and it counts on the token only where our scheduler is inside."""
    kv = b'{"do_remote_prefill":true,"evenhand_first_token":7}'
    read = says(plain(b'{"usage":{"prompt_tokens":300},"kv_transfer_params":%b}' % kv))
    text = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    decode = ScriptedEngine([says(streamed(text, b"data: [DONE]\n\n"))], gets={"/metrics": plain(metrics)})
    asked = {"disaggregation": {"min_prompt_tokens": 32}, "slo": {"ttft_s": 2.0}, "health": {"canary": "off"}}
    ours = {"/metrics": plain(b"evenhand_engine_policy_info 1\n")}
    async with ScriptedEngine([read], gets=ours).run() as prefill, decode.run():
        async with serving(*roles(prefill.url, decode.url), **asked) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            forecast = gateway.server.fleet.members["d0"].load.forecast = EngineForecast()
            # An answer that a prompt would make late: so that is read elsewhere.
            forecast.expects(1000.0, tpot_limit_s=0.0105)
            assert (await gateway.ask(CHAT, body(stream=True))).status == 200
            sent = json.loads(decode.asked[-1].body)["kv_transfer_params"]
            assert sent["do_remote_prefill"] and sent["evenhand_first_token"] == token


async def test_a_stale_connection_to_a_prefill_worker_is_no_failure() -> None:
    async with pools() as both:
        await both.ask()
        both.prefill.close_idle()
        await both.ask(messages=[{"role": "user", "content": "Something else. " * 40}])
        assert await both.prefills("read") == 2


# Failures of the worker that answers, and of the way between


async def test_what_cannot_be_fetched_is_computed_where_it_is_answered() -> None:
    expected = await alone(CHAT, {"stream": True})
    async with pools(replace(QUICK, kv_lease_s=0.2)) as both:
        both.decode.faults = Faults(no_transfer=True)
        assert (await both.ask(stream=True)).text == expected.text
        assert both.decode.not_fetched == 1
        await eventually(lambda: both.prefill.kept.expired == 1, "KV that nobody fetched is released")


async def test_a_prefill_worker_that_dies_behind_the_handover_costs_no_answer() -> None:
    expected = await alone(CHAT, {"stream": True, "max_tokens": 100, "ignore_eos": True})
    async with pools() as both:
        wire = await both.gateway.send(request(CHAT, body(stream=True, max_tokens=100, ignore_eos=True)))
        await eventually(lambda: both.decode.running, "it is being answered")
        both.prefill.die()
        assert (await wire.answer()).text == expected.text
        await both.prefill.listen()


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_decode_worker_dies_the_prefill_worker_answers(stream: bool, tokens: int) -> None:
    fields = {"stream": stream, "ignore_eos": True}
    expected = await alone(CHAT, fields)
    async with pools(replace(QUICK, kv_lease_s=0.2)) as both:
        both.decode.faults = Faults(die_after_tokens=tokens)
        reply = await both.ask(**fields)
        assert reply.status == 200
        if stream:
            assert reply.text == expected.text
        else:
            assert reply.json()["choices"] == expected.json()["choices"]
        await eventually(both.nothing_held)
        both.decode.heal()
        await both.decode.listen()


async def test_kv_for_a_decode_worker_that_died_before_it_fetched_is_released() -> None:
    async with pools(replace(QUICK, kv_lease_s=0.2)) as both:
        both.prefill.faults = Faults(stall_after_tokens=0)
        wire = await both.gateway.send(request(CHAT, body()))
        await eventually(lambda: both.prefill.running, "the prompt is being read")
        both.decode.die()
        both.prefill.heal()
        assert (await wire.answer()).status == 200, "the prefill worker is still there"
        await eventually(lambda: both.prefill.kept.expired == 1)
        await both.decode.listen()


# Clients that leave


async def test_a_client_that_leaves_while_its_prompt_is_read_frees_the_prefill_worker() -> None:
    async with pools() as both:
        both.prefill.faults = Faults(stall_after_tokens=0)
        wire = await both.gateway.send(request(CHAT, body()))
        await eventually(lambda: both.prefill.running, "the prompt is being read")
        wire.reset()
        await eventually(lambda: not both.prefill.running, "the prefill worker was told")
        assert not both.decode.seen
        both.prefill.heal()


async def test_a_client_that_leaves_before_the_first_token_frees_the_decode_worker() -> None:
    async with pools() as both:
        both.decode.faults = Faults(stall_after_tokens=0)
        wire = await both.gateway.send(request(CHAT, body(stream=True)))
        await eventually(lambda: both.decode.running, "it has arrived")
        wire.reset()
        await eventually(both.nothing_held)
        both.decode.heal()


async def test_a_client_that_leaves_in_mid_stream_frees_both() -> None:
    async with pools() as both:
        wire = await both.gateway.send(request(CHAT, body(stream=True, max_tokens=4000, ignore_eos=True)))
        await wire.head()
        await wire.chunk()
        wire.reset()
        await eventually(both.nothing_held)


# Who waits for what


async def test_the_prefill_worker_is_free_for_others_as_soon_as_it_has_read() -> None:
    async with pools() as both:
        wire = await both.gateway.send(request(CHAT, body(stream=True, max_tokens=4000, ignore_eos=True)))
        await wire.head()
        members = both.gateway.server.fleet.members
        assert members["p0"].load.in_flight == members["p0"].load.pending_tokens == 0
        assert members["d0"].load.in_flight == 1
        await eventually(lambda: not members["d0"].load.arriving_tokens, "its second token came")
        wire.reset()


@pytest.mark.parametrize("tokens", [0, 1])  # the first says nothing: it may have come with the request
async def test_prompts_wait_while_too_much_kv_is_on_its_way(tokens: int) -> None:
    limits = {"min_prompt_tokens": 32, "max_arriving_tokens": 200}
    async with pools(disaggregation=limits) as both:
        both.decode.faults = Faults(stall_after_tokens=tokens)
        first = await both.gateway.send(request(CHAT, body(stream=True)))
        await eventually(lambda: both.decode.running, "the first is there, and makes no more tokens")
        other = body(stream=True, messages=[{"role": "user", "content": "Something else. " * 40}])
        second = await both.gateway.send(request(CHAT, other))
        await eventually(lambda: both.gateway.waiting == 1, "the second waits in line")
        assert len(both.prefill.seen) == 1
        both.decode.heal()
        assert [(await wire.answer()).status for wire in (first, second)] == [200, 200]
        assert await both.placements("apart") == 2


async def test_one_account_pays_for_the_prompt_once_and_for_each_token() -> None:
    async with pools(policy="vtc") as both:
        prompt = [7] * 300
        await both.ask(TEXT, prompt=prompt, max_tokens=20, ignore_eos=True)
        line = both.gateway.server.lines.by_model["fake"]
        (account,) = (account for _, account, _ in line.lanes.standings())
        assert account.counter == 300 + 2 * 20


async def test_many_at_once_all_are_answered_once_and_nothing_is_left() -> None:
    async with pools() as both:
        prompts = [[number + 3] * (20 + 9 * number) for number in range(40)]
        replies = await asyncio.gather(
            *(both.ask(TEXT, prompt=prompt, max_tokens=5, ignore_eos=True) for prompt in prompts)
        )
        assert all(reply.json()["usage"]["completion_tokens"] == 5 for reply in replies)
        assert await both.placements("apart") == sum(len(prompt) >= 32 for prompt in prompts)


@pytest.mark.parametrize("requests", [300, pytest.param(2000, marks=pytest.mark.slow)])
async def test_clients_that_leave_and_engines_that_die_leave_nothing_behind(requests: int) -> None:
    """Short requests; whoever stays gets the one right answer, whatever happens to the engines."""
    moments = random.Random(11)
    setup = EngineSetup(cost=replace(PRESETS["quick"], iteration_s=0.0005), kv_lease_s=0.2)
    async with pools(setup, probe_s=0.05, health={"attempts": 4}) as both:
        served = 0

        async def client(number: int) -> None:
            nonlocal served
            prompt = [3 + number % 997] * moments.randint(1, 200)
            stream = bool(number % 2)
            fields = {"prompt": prompt, "max_tokens": moments.randint(1, 20), "ignore_eos": True, "stream": stream}
            wire = await both.gateway.send(request(TEXT, body(TEXT, **fields)))
            if number % 10 == 0:
                await asyncio.sleep(moments.uniform(0.0, 0.05))  # somewhere between its first and its last step
                wire.reset()
                return
            reply = await wire.answer()
            assert reply.status == 200, reply.body
            text = reply.text if stream else reply.json()["choices"][0]["text"]
            ids = hash_model.continuation(prompt, mean_tokens=setup.mean_answer_tokens, salt=0)
            assert text == hash_model.decode(ids.next(may_end=False) for _ in range(fields["max_tokens"]))
            served += 1
            await wire.close()

        async def crash(engine: FakeEngine) -> None:
            await asyncio.sleep(0.01)  # somewhere in what is going on
            engine.die()
            await asyncio.sleep(0.05)  # a short time without it
            await engine.listen()

        crashes = {requests // 3: both.prefill, requests * 2 // 3: both.decode}
        for start in range(0, requests, 50):
            clients = [client(number) for number in range(start, start + 50)]
            await asyncio.gather(*clients, *(crash(crashes[at]) for at in crashes if start <= at < start + 50))
        assert served == requests * 9 // 10
        assert await both.placements("apart") > requests // 4
        await eventually(both.nothing_held)
