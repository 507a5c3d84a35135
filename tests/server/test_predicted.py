"""Placement by prediction through sockets: engines that all do both, and objectives."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from loadtest.simulator.costmodel import PRESETS, CostModel
from tests.server.conftest import eventually, request, serving
from tests.server.test_handover import CHAT, QUICK, TEXT, Pools, alone, body

SLO = {"ttft_s": 2.0, "tpot_s": 0.0025}


@contextlib.asynccontextmanager
async def engines(
    *, faults: Faults | None = None, cost: CostModel = QUICK.cost, **settings: Any
) -> AsyncIterator[Pools]:
    """Two engines that do both, behind a gateway with objectives. At their end neither they nor the forecasts hold
    anything."""
    settings = {"slo": SLO, "disaggregation": {"min_prompt_tokens": 32}, **settings}
    setup = replace(QUICK, kv_lease_s=0.5, cost=cost)
    second = replace(setup, faults=faults) if faults is not None else setup
    async with FakeEngine(setup) as one, FakeEngine(second) as other:
        workers = f"{one.url},id=a,kv=yes", f"{other.url},id=b,kv=yes"
        async with serving(*workers, ready=False, **settings) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2, "both are ready")
            both = Pools(gateway, one, other)
            yield both
            for wire in gateway.wires:
                await wire.close()
            await eventually(both.nothing_held, "no engine holds anything")
            await eventually(lambda: nothing_forecast(both), "no forecast has anything")


def nothing_forecast(both: Pools) -> bool:
    loads = (member.load for member in both.gateway.server.fleet.members.values())
    forecasts = [load.forecast for load in loads if load.forecast is not None]
    return not any(one.answers or one.unread(1e9).tokens for one in forecasts)


async def busy(both: Pools, requests: int) -> list[asyncio.Task[Any]]:
    """So many answers that run, all begun."""
    tasks = [asyncio.create_task(both.ask(stream=True, ignore_eos=True, max_tokens=200)) for _ in range(requests)]
    await eventually(lambda: sum(e.running for e in (both.prefill, both.decode)) == requests, "they run")
    return tasks


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_is_that_of_one_engine(path: str, stream: bool) -> None:
    fields = {"stream": stream, "ignore_eos": True}
    expected = await alone(path, fields)
    async with engines() as both:
        for _ in range(3):
            reply = await both.ask(path, **fields)
            assert reply.status == 200
            if stream:
                assert reply.text == expected.text != ""
            else:
                assert reply.json()["choices"] == expected.json()["choices"]


async def test_an_idle_engine_takes_a_request_whole_and_a_busy_one_gets_its_prompts_from_the_other() -> None:
    # As slow as is assumed of engines of which nothing was seen, so that all is known from the start.
    async with engines(cost=PRESETS["gpu-7b"], slo={"ttft_s": 3.0, "tpot_s": 0.0135}) as both:
        await both.ask(stream=True)
        assert await both.placements("together") == 1
        tasks = await busy(both, 12)
        long = {"messages": [{"role": "user", "content": "word " * 3_000}]}
        replies = await asyncio.gather(*(both.ask(stream=True, **long) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert await both.placements("apart") >= 1 and await both.prefills("read") >= 1
        await asyncio.gather(*tasks)
        assert await both.count("evenhand_predicted_ttft_ratio_count") >= 20


async def test_without_objectives_engines_that_do_both_take_requests_whole() -> None:
    async with engines(slo={}) as both:
        await asyncio.gather(*(both.ask(stream=True) for _ in range(8)))
        assert not await both.placements("apart") and not await both.placements("together")


@pytest.mark.parametrize("seed", range(2))
async def test_clients_that_leave_and_answers_in_one_piece_leave_nothing_in_the_forecasts(seed: int) -> None:
    rng = random.Random(seed)
    async with engines() as both:

        async def one() -> None:
            fields = {"stream": rng.random() < 0.6, "n": rng.choice((1, 1, 3)), "max_tokens": rng.randint(1, 60)}
            if rng.random() < 0.5:
                await both.ask(**fields, ignore_eos=True)
                return
            wire = await both.gateway.send(request(CHAT, body(**fields, ignore_eos=True)))
            await asyncio.sleep(rng.random() * 0.05)
            await wire.close()

        await asyncio.gather(*(one() for _ in range(40)))


@pytest.mark.slow
async def test_an_engine_that_dies_costs_no_answer() -> None:
    async with engines() as both:
        tasks = await busy(both, 8)
        both.decode.die()
        replies = await asyncio.gather(*tasks)
        assert [reply.status for reply in replies] == [200] * 8
        assert (await both.ask(stream=True)).status == 200
