"""KV between fake engines: kept for one fetch, and not for ever."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import pytest

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import Faults
from loadtest.simulator.costmodel import PRESETS
from tests.server.conftest import eventually

PROMPT = [5] * 300
KEEP = {"do_remote_decode": True, "do_remote_prefill": False}
Ask = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
async def prefill() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(EngineSetup(cost=PRESETS["quick"])) as engine:
        yield engine


@pytest.fixture
async def decode() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(EngineSetup(cost=PRESETS["quick"])) as engine:
        yield engine


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:

        async def post(engine: FakeEngine, **more: Any) -> dict[str, Any]:
            body = {"prompt": PROMPT, "max_tokens": 1} | more
            answer = await client.post(f"{engine.url}/v1/completions", json=body)
            read: dict[str, Any] = answer.json()
            return read

        yield post


async def test_kv_is_kept_until_it_is_fetched(prefill: FakeEngine, decode: FakeEngine, ask: Ask) -> None:
    first = await ask(prefill, kv_transfer_params=KEEP)
    assert len(prefill.kept) == 1 and prefill.batch.kv_used_tokens == 320
    second = await ask(decode, kv_transfer_params=first["kv_transfer_params"])
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert (decode.fetched, decode.not_fetched) == (1, 0)
    assert len(prefill.kept) == 0 and prefill.batch.kv_used_tokens == 0
    assert decode.batch.counts.prompt_tokens == 0, "it computed a prompt whose KV it had fetched"


async def test_kv_can_be_fetched_once(prefill: FakeEngine, decode: FakeEngine, ask: Ask) -> None:
    kv = (await ask(prefill, kv_transfer_params=KEEP))["kv_transfer_params"]
    first, second = [await ask(decode, kv_transfer_params=kv) for _ in range(2)]
    assert (decode.fetched, decode.not_fetched) == (1, 1)
    assert decode.batch.counts.prompt_tokens == 300
    assert first["choices"] == second["choices"]


async def test_kv_that_nobody_fetches_is_given_up_when_its_lease_ends(ask: Ask) -> None:
    async with FakeEngine(EngineSetup(kv_lease_s=0.05)) as engine:
        await ask(engine, kv_transfer_params=KEEP)
        await eventually(lambda: not len(engine.kept), "the lease ends")
        assert engine.kept.expired == 1 and engine.batch.kv_used_tokens == 0


@pytest.mark.parametrize("how", ["dead", "refused"])
async def test_what_cannot_be_fetched_is_computed(how: str, prefill: FakeEngine, decode: FakeEngine, ask: Ask) -> None:
    first = await ask(prefill, kv_transfer_params=KEEP)
    if how == "dead":
        prefill.die()
    else:
        decode.faults = Faults(no_transfer=True)
    second = await ask(decode, kv_transfer_params=first["kv_transfer_params"])
    assert second["choices"] == first["choices"]
    assert (decode.fetched, decode.not_fetched) == (0, 1)


async def test_who_leaves_before_the_kv_is_there_is_not_admitted(
    prefill: FakeEngine, decode: FakeEngine, ask: Ask
) -> None:
    kv = (await ask(prefill, kv_transfer_params=KEEP))["kv_transfer_params"]

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await enough.wait()
        writer.close()

    asked, enough = asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(never_answers, "127.0.0.1", 0)
    kv["remote_port"] = server.sockets[0].getsockname()[1]
    waiting = asyncio.create_task(ask(decode, kv_transfer_params=kv))
    await asked.wait()
    waiting.cancel()
    await asyncio.wait([waiting])
    await eventually(lambda: not decode._connections, "the engine knows that it is alone")
    enough.set()
    server.close()
    await server.wait_closed()
    await eventually(lambda: not decode._fetches, "the fetch is over")
    assert not decode.running and not decode.waiting
