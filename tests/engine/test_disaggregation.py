"""Two real engines, one that reads prompts and one that answers, behind the gateway: the KV moves over NIXL.

The reference is what one engine answers that does both: the prefill worker, asked directly, for what the decode worker
remembers of a prompt is the very KV that is on trial.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl", reason="NIXL is not installed")

from deploy.engine_args import EnginePlan, Ports, engine_command, kv_transfer
from deploy.worker import usable_ports
from scheduler.workers import Role
from server.fleet import is_idle
from tests.engine.real import ENVIRONMENT, chaotic_model
from tests.server.conftest import Running, eventually, request, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCK = 32  # tokens; the engines' blocks on a CPU
CONTEXT = 1024
START_LIMIT_S = 240.0
LEASE_S = 6
GREEDY = {"model": "chaotic", "temperature": 0, "ignore_eos": True, "return_token_ids": True}


async def answer_of(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An engine compiles what it uses for the first time, log probabilities among that: it is given time."""
    async with httpx2.AsyncClient(trust_env=False, timeout=120.0) as client:
        answer = await client.post(url + path, json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


@dataclass
class RealEngine:
    """A vLLM server as `evenhand serve` would start it, and what it says of itself."""

    role: Role
    url: str
    process: asyncio.subprocess.Process
    log: Path

    async def metric(self, name: str) -> float:
        async with httpx2.AsyncClient(trust_env=False) as client:
            text = (await client.get(self.url + "/metrics")).text
        rows = [row for row in text.splitlines() if row.startswith((name + "{", name + " "))]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    async def holds_nothing(self) -> bool:
        async with httpx2.AsyncClient(trust_env=False) as client:
            return is_idle((await client.get(self.url + "/metrics")).text)

    async def answer(self, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
        return await answer_of(self.url, path, body)

    async def kill(self) -> None:
        """Its whole session at once, as when a machine goes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


def plan_of(model: Path, role: Role) -> EnginePlan:
    transfer = kv_transfer(role, "cpu") | {"kv_connector_extra_config": {"kv_lease_duration": LEASE_S}}
    return EnginePlan(
        model=str(model),
        served_name="chaotic",
        local=True,
        build="cpu",
        bf16=False,
        role=role,
        policy="vtc",
        user_args=(
            f"--max-model-len={CONTEXT}",
            "--generation-config=vllm",
            f"--kv-transfer-config={json.dumps(transfer)}",
        ),
    )


@contextlib.asynccontextmanager
async def started(model: Path, role: Role, folder: Path) -> AsyncIterator[RealEngine]:
    metrics = folder / role.value
    metrics.mkdir()
    ports: Ports = usable_ports(None)
    command = engine_command(plan_of(model, role), ports, sys.executable)
    env = os.environ | {"OMP_NUM_THREADS": ENVIRONMENT["OMP_NUM_THREADS"]} | dict(command.env)
    path = folder / f"{role.value}.log"
    with path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            env=env | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield RealEngine(role, command.url, process, path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@dataclass
class Pair:
    """The gateway and its two engines. reference: answers of one engine that does both."""

    gateway: Running
    prefill: RealEngine
    decode: RealEngine

    async def ask(self, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        return await answer_of(self.gateway.url, path, GREEDY | fields)

    async def reference(self, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
        return await self.prefill.answer(GREEDY | fields, path)

    async def count(self, name: str, **labels: str) -> float:
        return (await self.gateway.metrics()).get((name, tuple(sorted(labels.items()))), 0.0)

    async def settle(self) -> None:
        """Until neither engine holds anything by its own metrics, KV for others included."""
        for engine in (self.prefill, self.decode):
            end = asyncio.get_running_loop().time() + 6 * LEASE_S
            while not await engine.holds_nothing():
                assert asyncio.get_running_loop().time() < end, f"the {engine.role.value} engine still holds something"
                await asyncio.sleep(0.2)  # between two looks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield chaotic_model(tmp_path_factory.mktemp("chaotic"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    async with (
        started(model, Role.PREFILL, folder) as prefill,
        started(model, Role.DECODE, folder) as decode,
        serving(
            f"{prefill.url},role=prefill,id=p",
            f"{decode.url},role=decode,id=d",
            ready=False,
            disaggregation={"min_prompt_tokens": 1},
        ) as gateway,
    ):
        up = lambda: len(gateway.server.fleet.ready()) == 2  # noqa: E731
        ended = lambda: any(each.process.returncode is not None for each in (prefill, decode))  # noqa: E731
        await eventually(lambda: up() or ended(), "both engines are ready", START_LIMIT_S)
        assert not ended(), prefill.log.read_text()[-2000:] + decode.log.read_text()[-2000:]
        yield Pair(gateway, prefill, decode)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    source = random.Random(1000 * seed + tokens)
    return [source.randrange(100, 40_000) for _ in range(tokens)]


LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 255, 256, 257, CONTEXT - 8)


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_answers_are_those_of_one_engine_token_for_token(pair: Pair, tokens: int) -> None:
    asked = {"prompt": prompt(tokens), "max_tokens": 8}
    before = await pair.count("evenhand_prefills_total", outcome="read")
    told = (await pair.ask(**asked))["choices"][0]
    expected = (await pair.reference(**asked))["choices"][0]
    assert told["token_ids"] == expected["token_ids"] and len(set(told["token_ids"])) > 4
    assert await pair.count("evenhand_prefills_total", outcome="read") == before + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["e"], "max_tokens": 60, "ignore_eos": False},
        {"n": 2, "temperature": 1.0, "top_k": 1},
        {
            "max_tokens": 40,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"enum": ["one", "two", "three"]}},
            },
            "ignore_eos": False,
        },
    ],
    ids=["logprobs", "stop", "n", "json"],
)
async def test_chat_options_change_nothing_of_that(pair: Pair, fields: dict[str, Any]) -> None:
    words = " ".join(str(number) for number in prompt(120, seed=len(str(fields))))
    asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 12, **fields}
    told = await pair.ask("/v1/chat/completions", **asked)
    expected = await pair.reference("/v1/chat/completions", **asked)
    for ours, theirs in zip(told["choices"], expected["choices"], strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["message"]["content"] == theirs["message"]["content"]
        assert ours["finish_reason"] == theirs["finish_reason"]
        if ours["logprobs"] is not None:
            pairs = zip(ours["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
            assert all(abs(one["logprob"] - other["logprob"]) < 1e-3 for one, other in pairs)
    assert told["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


async def test_a_stream_says_the_same(pair: Pair) -> None:
    asked = {"prompt": prompt(300, seed=2), "max_tokens": 30}
    reply = await pair.gateway.ask("/v1/completions", GREEDY | asked | {"stream": True})
    ids = [token for event in reply.events[:-1] for choice in event["choices"] for token in choice["token_ids"]]
    assert ids == (await pair.reference(**asked))["choices"][0]["token_ids"]
    assert await pair.count("evenhand_kv_transfer_seconds_count") >= 1


async def test_many_at_once_get_each_their_own(pair: Pair) -> None:
    asked = [{"prompt": prompt(20 + 11 * seed, seed), "max_tokens": 10} for seed in range(24)]
    told = await asyncio.gather(*(pair.ask(**each) for each in asked))
    for each, answer in zip(asked, told, strict=True):
        assert answer["choices"][0]["token_ids"] == (await pair.reference(**each))["choices"][0]["token_ids"]
    assert await pair.decode.metric("vllm:nixl_bytes_transferred_sum") > 0
    assert await pair.decode.metric("vllm:nixl_num_failed_transfers_total") == 0


async def test_the_prompt_is_charged_where_it_is_computed(pair: Pair) -> None:
    """By the plug-ins' own counters: whole prompts at the one, answers at the other."""
    before = await services(pair)
    for seed in range(5):
        await pair.ask(prompt=prompt(200, seed=50 + seed), max_tokens=20)
    read, written = [now - was for now, was in zip(await services(pair), before, strict=True)]
    asking = 3  # one token in, one out
    assert read == 5 * (200 + 2 * 1) + asking
    assert written == 5 * 2 * 20 + asking


async def services(pair: Pair) -> list[float]:
    """All that each engine has charged."""
    await asyncio.sleep(1.2)  # a plug-in reports at most once a second, and when there is work
    for engine in (pair.prefill, pair.decode):
        await engine.answer(GREEDY | {"prompt": [5], "max_tokens": 1})
    return [await engine.metric("evenhand_engine_tenant_service_total") for engine in (pair.prefill, pair.decode)]


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(pair: Pair) -> None:
    moments = random.Random(3)
    for seed in range(20):
        fields = {"prompt": prompt(600, seed=100 + seed), "max_tokens": 200, "stream": True}
        wire = await pair.gateway.send(request("/v1/completions", GREEDY | fields))
        await asyncio.sleep(moments.uniform(0.0, 0.25))  # a moment of the prefill, the hand-over or the stream
        wire.reset()
    await eventually(pair.gateway.at_rest)
    await pair.settle()


async def test_kv_that_nobody_fetches_is_released_when_its_lease_ends(pair: Pair) -> None:
    keep = {"do_remote_decode": True, "do_remote_prefill": False}
    fields = {"prompt": prompt(500, seed=7), "max_tokens": 1, "kv_transfer_params": keep}
    kept = await pair.prefill.answer(GREEDY | fields)
    assert kept["kv_transfer_params"]["do_remote_prefill"] is True
    assert not await pair.prefill.holds_nothing()
    await pair.settle()


async def test_without_the_prefill_engine_every_answer_is_still_right(pair: Pair) -> None:
    """It is killed while requests are on their way through it. The last test: it does not come back."""
    asked = [{"prompt": prompt(400, seed=200 + seed), "max_tokens": 10} for seed in range(12)]
    expected = [(await pair.reference(**each))["choices"][0]["token_ids"] for each in asked]
    asks = [asyncio.create_task(pair.ask(**each)) for each in asked]
    await eventually(lambda: pair.gateway.in_flight > 0)
    await pair.prefill.kill()
    told = await asyncio.gather(*asks)
    assert [answer["choices"][0]["token_ids"] for answer in told] == expected
    again = await pair.ask(prompt=asked[0]["prompt"] + [7], max_tokens=5)
    assert len(again["choices"][0]["token_ids"]) == 5
    end = asyncio.get_running_loop().time() + 30
    while not await pair.decode.holds_nothing():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.2)  # between two looks
