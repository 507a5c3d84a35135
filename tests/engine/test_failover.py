"""A real vLLM behind two addresses, one of which breaks off: the other goes on, token for token."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from deploy.engine.engine_args import EXECUTOR
from deploy.model.model import cache_folder, prepare_tiny
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.iterations.in_process_engine import chaotic_model
from tests.chaos.engines import in_other_dialects, told_in_any_dialect
from tests.chaos.greedy import TIE, Judge, Verdict
from tests.chaos.load import Question, told_by_a_model
from tests.chaos.site import ask
from tests.server.conftest import Reply, Running, eventually, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = 40
CUTS = (1, 2, 5, 13, 29, 39)  # after so many events


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """vLLM's API server on a tiny model that says anything, half characters too."""
    model = chaotic_model(tmp_path_factory.mktemp("model"))
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "fake", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4", "--block-size", "32"]
    command += ["--distributed-executor-backend", EXECUTOR]  # one process less to start
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with running(command, os.environ | env, f"http://127.0.0.1:{port}/health"):
        yield port


class Address:
    """One more address of an engine. While `cuts` has a number, the next stream breaks off after so many events."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._engine_port = port
        self._cuts = cuts
        self.port = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", self._engine_port)
        said = bytearray()  # of the present answer
        up = asyncio.create_task(self._ask(reader, engine_writer, said))
        try:
            await self._answer(engine_reader, writer, said)
        except ConnectionError:
            pass  # the gateway hung up
        finally:
            up.cancel()
            writer.transport.abort()
            engine_writer.transport.abort()

    @staticmethod
    async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytearray) -> None:
        while data := await reader.read(65536):
            said.clear()
            writer.write(data)
        writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytearray) -> None:
        while data := await reader.read(65536):
            said += data
            more = said.count(b"\n\n") - self._cuts[0] if self._cuts and b"text/event-stream" in said else -1
            if more < 0:
                writer.write(data)
                continue
            self._cuts.clear()
            writer.write(data.rsplit(b"\n\n", more + 1)[0] + b"\n\n")
            await writer.drain()
            await asyncio.sleep(0.02)  # so that what was said arrives before the reset
            return


@asynccontextmanager
async def over_two_addresses(port: int) -> AsyncIterator[tuple[Running, list[int]]]:
    cuts: list[int] = []
    async with Address(port, cuts).listening() as first, Address(port, cuts).listening() as second:
        async with serving(first, second, probe_s=0.05, health={"failures": 1000}) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            yield gateway, cuts


def body_for(path: str, number: int, **fields: Any) -> dict[str, Any]:
    text = f"Tell me story number {number}."
    asked = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    options = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    return {"model": "fake", **asked, **options, **fields}


def said(reply: Reply) -> tuple[str, list[int], list[str], Any]:
    """Text, token ids, ends and usage of a stream."""
    *events, usage, done = reply.events
    assert reply.status == 200 and done == "[DONE]", reply.body[-500:]
    choices = [choice for event in events for choice in event["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    return reply.text, ids, [end for choice in choices if (end := choice["finish_reason"])], usage["usage"]


@pytest.mark.parametrize("fields", [{}, {"stop": ["zzzzzz", "qqqqqqqqq"]}], ids=["plain", "with a stop text"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_cut_anywhere_goes_on_exactly(port: int, path: str, fields: dict[str, Any]) -> None:
    async with over_two_addresses(port) as (gateway, cuts):
        for number, after in enumerate(CUTS):
            body = body_for(path, number, **fields)
            whole = said(await gateway.ask(path, body))
            cuts.append(after)
            reply = await gateway.ask(path, body)
            while cuts:  # a busy engine says several tokens in one event, so that there may be too few
                reply = await gateway.ask(path, body)
            text, ids, ends, usage = said(reply)
            assert (text, ids, ends) == whole[:3], (number, after)
            assert json.dumps(usage, sort_keys=True) == json.dumps(whole[3], sort_keys=True)
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
        failovers = gateway.server.gateway.failover.outcomes
        assert failovers["failed"] == 0 and failovers["resumed"] + failovers["retried"] == len(CUTS)


@pytest.mark.parametrize("question", in_other_dialects()[:2], ids=lambda one: one.path)
async def test_a_typed_stream_cut_anywhere_goes_on_from_its_text(port: int, question: Question) -> None:
    """This model says anything, so its text has other token ids, too: what follows may differ, but it is one stream of
    as many tokens, or the tokens that a text is read as are not as many as were made for it."""
    async with over_two_addresses(port) as (gateway, cuts):
        (whole, _, end), usage = told_in_any_dialect(question, await gateway.ask(question.path, question.body))
        for after in (1, 2, 4, 9, 30):
            cuts.append(after)
            reply = await gateway.ask(question.path, question.body)
            assert not cuts
            (text, _, ended), counted = told_in_any_dialect(question, reply)
            assert ended == end and counted["prompt_tokens"] == usage["prompt_tokens"]
            assert counted["completion_tokens"] == usage["completion_tokens"]
            assert text.startswith(whole[: len(whole) // 20]) or after < 5
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
        failovers = gateway.server.gateway.failover.outcomes
        assert failovers["failed"] == 0 and failovers["resumed"] + failovers["retried"] == 5


async def test_the_judge_of_greedy_answers_finds_what_was_lost_repeated_or_swapped(port: int) -> None:
    judge = Judge(prepare_tiny(cache_folder(), lambda _: None))

    async def verdict(text: str, ids: list[int]) -> Verdict:
        usage = {"prompt_tokens": prompt, "completion_tokens": TOKENS}
        return await judge.verdict(port, question, [[text, ids, "length"], usage])

    body = body_for(COMPLETIONS, 1, stream=False, stream_options=None, return_token_ids=True)
    longer, question = body | {"max_tokens": TOKENS + 1}, Question(COMPLETIONS, body)
    (_, ids, _), usage = told_by_a_model(question, await ask(port, COMPLETIONS, longer))
    prompt, right = usage["prompt_tokens"], ids[:TOKENS]
    text = judge.plain(right)
    whole = await verdict(text, right)
    assert not whole.problem and whole.gap <= TIE / 10
    for at in (0, 1, 17, TOKENS - 2):
        lost = ids[:at] + ids[at + 1 :]
        repeated = ids[: at + 1] + ids[at : TOKENS - 1]
        swapped = ids[:at] + [(ids[at] + 1) % 1000] + ids[at + 1 : TOKENS]
        for changed in (lost, repeated, swapped):
            assert "below the best" in (await verdict(judge.plain(changed), changed)).problem, (at, changed)
    assert "text" in (await verdict(text[:-1], right)).problem
    assert "tokens" in (await verdict(judge.plain(right[:-1]), right[:-1])).problem
