"""Service tiers as clients meet them: asked, granted, echoed, in order, charged, and travelling to the engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from scheduler.jobs import Tier
from server.request.schemas import CHAT, MESSAGES
from server.request.tenants import read_record
from server.request.tiers import TierCosts, tier_for
from tests.server.conftest import MODEL, SLOW, Reply, chat, completion, eventually, over_fake, request

KEYS = {name: f"key-of-{name}-0123456789" for name in ("usual", "vip", "batch")}
TENANTS = f"""
tenants:
  - {{name: usual, keys: [{KEYS["usual"]}], tokens_per_minute: 1000}}
  - {{name: vip, keys: [{KEYS["vip"]}], tiers: [default, priority, flex]}}
  - {{name: batch, keys: [{KEYS["batch"]}], tiers: [flex]}}
"""
PLUGIN = EngineSetup(cost=PRESETS["instant"], plugin=True)
RESPONSE = {"model": MODEL, "input": "Hello", "max_output_tokens": 4}
MESSAGE = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}


def as_(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def tiers_told(engine: FakeEngine) -> list[str | None]:
    """What the engine was told with each request."""
    words = [seen.body["vllm_xargs"] for seen in engine.seen]
    return [each.get("evenhand_tier") for each in words if "evenhand_tenant" in each]


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS)
    return file


def events(reply: Reply) -> list[Any]:
    lines = reply.body.decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


async def test_answers_tell_the_tier_to_those_who_asked_for_one() -> None:
    async with over_fake(PLUGIN) as (gateway, engine):
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", completion())):
            whole = await gateway.ask(path, body | {"service_tier": "flex"})
            assert whole.json()["service_tier"] == "flex"
            streamed = await gateway.ask(path, body | {"service_tier": "priority", "stream": True})
            assert {event["service_tier"] for event in events(streamed)} == {"priority"}
            silent = await gateway.ask(path, body | {"stream": True})
            assert not any("service_tier" in event for event in events(silent))
            assert (await gateway.ask(path, body)).json()["service_tier"] is None  # the engine's own bytes
        assert tiers_told(engine) == ["flex", "priority", None, None] * 2


async def test_responses_and_messages_tell_the_tier_where_their_apis_have_it() -> None:
    async with over_fake(PLUGIN) as (gateway, engine):
        whole = await gateway.ask("/v1/responses", RESPONSE | {"service_tier": "flex"})
        assert whole.json()["service_tier"] == "flex"
        streamed = await gateway.ask("/v1/responses", RESPONSE | {"service_tier": "flex", "stream": True})
        told = [event["response"]["service_tier"] for event in events(streamed) if "response" in event]
        assert len(told) >= 2 and set(told) == {"flex"}
        message = await gateway.ask("/v1/messages", MESSAGE | {"service_tier": "auto"})
        assert message.json()["usage"]["service_tier"] == "priority"
        streamed = await gateway.ask("/v1/messages", MESSAGE | {"service_tier": "standard_only", "stream": True})
        start = next(event for event in events(streamed) if event["type"] == "message_start")
        assert start["message"]["usage"]["service_tier"] == "standard"
        assert tiers_told(engine) == ["flex", "flex", "priority", None]


async def test_a_tier_that_is_not_granted_or_that_there_is_not_is_refused(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, engine):
        refused = await gateway.ask("/v1/chat/completions", chat(service_tier="priority"), headers=as_("usual"))
        assert (refused.status, refused.error["code"], refused.error["param"]) == (
            403, "service_tier_not_granted", "service_tier",
        )  # fmt: skip
        for nonsense in ("scale", "", "FLEX"):
            wrong = await gateway.ask("/v1/chat/completions", chat(service_tier=nonsense), headers=as_("usual"))
            assert (wrong.status, wrong.error["param"]) == (400, "service_tier")
        strange = await gateway.ask("/v1/chat/completions", chat(service_tier=["flex"]), headers=as_("usual"))
        assert strange.status == 400
        assert not engine.seen
        for tier in (None, "auto", "default"):
            reply = await gateway.ask("/v1/chat/completions", chat(service_tier=tier), headers=as_("usual"))
            assert reply.status == 200
        reply = await gateway.ask("/v1/chat/completions", chat(service_tier="auto"), headers=as_("batch"))
        assert reply.json()["service_tier"] == "flex"


@pytest.mark.parametrize(
    ("tiers", "told", "path", "served"),
    [
        (["default", "flex"], "auto", CHAT, Tier.DEFAULT),
        (["default", "flex", "priority"], "auto", CHAT, Tier.DEFAULT),
        (["flex"], "auto", CHAT, Tier.FLEX),
        (["priority"], "auto", CHAT, Tier.PRIORITY),
        (["default", "priority"], "auto", MESSAGES, Tier.PRIORITY),
        (["default"], "auto", MESSAGES, Tier.DEFAULT),
        (["default"], "standard_only", MESSAGES, Tier.DEFAULT),
        (["default", "flex"], "flex", MESSAGES, Tier.FLEX),
    ],
)
def test_what_is_asked_becomes_a_tier(tiers: list[str], told: str, path: Any, served: Tier) -> None:
    tenant = read_record({"name": "t", "tiers": tiers}).tenant()
    assert tier_for(told, path, tenant) is served


def test_a_tenant_has_default_and_flex_unless_its_record_says_otherwise() -> None:
    assert read_record({"name": "t"}).tenant().tiers == {Tier.DEFAULT, Tier.FLEX}
    assert read_record({"name": "t", "tiers": ["flex", "priority"]}).tenant().usual_tier is Tier.FLEX
    for wrong in ([], ["gold"], "flex"):
        with pytest.raises(ValueError, match="tiers"):
            read_record({"name": "t", "tiers": wrong})


async def test_higher_tiers_go_first_and_flex_fills_a_stock_engine_to_its_share() -> None:
    cost = replace(PRESETS["quick"], iteration_s=0.02, max_seqs=8)
    async with over_fake(EngineSetup(cost=cost), slots=8, admission={"ahead": 0}) as (gateway, engine):
        flex = [await gateway.send(request("/v1/chat/completions", chat(service_tier="flex"))) for _ in range(5)]
        await eventually(lambda: gateway.in_flight == 2, "flex takes a quarter of the slots")
        long = [await gateway.send(request("/v1/chat/completions", chat(max_tokens=30))) for _ in range(6)]
        await eventually(lambda: gateway.in_flight == 8)
        late = [
            await gateway.send(request("/v1/chat/completions", chat(service_tier=tier, user=tier)))
            for tier in ("default", "priority")
        ]
        await eventually(lambda: gateway.waiting == 5)
        for wire in (*flex, *long, *late):
            assert (await wire.answer()).status == 200
        order = [seen.body.get("user") for seen in engine.seen if seen.body.get("user")]
        assert order == ["priority", "default"]


async def test_with_the_plug_in_flex_takes_all_free_slots_and_others_find_theirs_all_the_same() -> None:
    cost = replace(PRESETS["quick"], iteration_s=0.02, max_seqs=4)
    async with over_fake(EngineSetup(cost=cost, plugin=True), slots=4, admission={"ahead": 0}) as (gateway, engine):
        flex = [
            await gateway.send(request("/v1/chat/completions", chat(service_tier="flex", max_tokens=200, user="flex")))
            for _ in range(5)
        ]
        await eventually(lambda: gateway.in_flight == 4, "flex takes all slots")
        for _ in range(3):
            assert (await gateway.ask("/v1/chat/completions", chat(max_tokens=2))).status == 200
        assert sum(seen.body.get("user") == "flex" for seen in engine.seen) == 4
        assert engine.batch.counts.displaced >= 1
        for wire in flex:
            wire.reset()


async def test_flex_that_finds_no_slack_in_its_time_is_told_when_to_come_back() -> None:
    cost = replace(PRESETS["quick"], iteration_s=0.01, max_seqs=1)
    tiers = {"flex_timeout_s": 0.05, "flex_reserve": 0.0}
    async with over_fake(EngineSetup(cost=cost), slots=1, tiers=tiers, admission={"ahead": 0}) as (gateway, engine):
        busy = await gateway.send(request("/v1/chat/completions", chat(max_tokens=500, stream=True)))
        await eventually(lambda: gateway.in_flight == 1)
        refused = await gateway.ask("/v1/chat/completions", chat(service_tier="flex"))
        assert (refused.status, refused.error["code"]) == (429, "resource_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(engine.seen) == 1
        busy.reset()


async def test_a_token_of_flex_counts_half_and_one_of_priority_twice(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, _):
        used = {}
        for tier, name in (("default", "usual"), ("flex", "usual"), ("priority", "vip")):
            gate = gateway.server.shared.gate
            before = next(iter(gate.usage(name).values()))
            reply = await gateway.ask("/v1/chat/completions", chat(service_tier=tier), headers=as_(name))
            used[tier] = next(iter(gate.usage(name).values())) - before
            total = reply.json()["usage"]["total_tokens"]
            assert used[tier] == round(total * {"default": 1, "flex": 0.5, "priority": 2}[tier])
        assert used["flex"] < used["default"] < used["priority"]
        metrics = (await gateway.ask("/metrics", method="GET")).body.decode()
        assert 'evenhand_tier_requests_total{outcome="ok",tier="flex"} 1.0' in metrics
        assert 'evenhand_tier_tokens_total{kind="completion",tier="priority"}' in metrics
        assert "evenhand_request_e2e_seconds_count 2.0" in metrics  # what may wait for minutes is not in there


@settings(max_examples=50)
@given(tokens=st.integers(0, 10**7), flex=st.floats(0.0, 1.0), priority=st.floats(1.0, 10.0))
def test_costs_order_as_tiers_do(tokens: int, flex: float, priority: float) -> None:
    costs = TierCosts(flex, priority)
    assert costs.of(tokens, Tier.FLEX) <= costs.of(tokens, Tier.DEFAULT) == tokens <= costs.of(tokens, Tier.PRIORITY)


async def test_a_client_that_leaves_while_its_flex_request_waits_leaves_nothing() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, _):
        busy = await gateway.send(request("/v1/chat/completions", chat(max_tokens=20)))
        await eventually(lambda: gateway.in_flight == 1)
        waiting = await gateway.send(request("/v1/chat/completions", chat(service_tier="flex")))
        await eventually(lambda: gateway.waiting == 1)
        waiting.reset()
        await eventually(lambda: gateway.waiting == 0)
        assert (await busy.answer()).status == 200
