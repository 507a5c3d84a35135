from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import orjson
import pytest

from loadtest.fake.embedding import vector
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import Faults
from loadtest.simulator.costmodel import PRESETS, CostModel

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine:
        yield engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def events(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with httpx2.AsyncClient(base_url=engine.url, timeout=60) as client:
        text = (await client.post(path, json=body | {"stream": True})).text
    parts = [part.partition("\ndata: ") for part in text.split("\n\n") if part]
    parsed = [(head.removeprefix("event: "), orjson.loads(data)) for head, _, data in parts]
    assert all(head == data["type"] for head, data in parsed)
    return [data for _, data in parsed]


async def test_openais_own_client_understands_chat(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": QUESTION}], stream=True
    )
    said = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(said) == ANSWER


async def test_openais_own_client_understands_completions_with_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="fake", prompt=QUESTION, max_tokens=4, logprobs=1, echo=True)
    assert answer.choices[0].text == QUESTION + "The capital of France"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["The", " capital", " of", " France"]


async def test_openais_own_client_understands_responses(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="fake", input=QUESTION)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    stream = await client.responses.create(model="fake", input=QUESTION, max_output_tokens=3, stream=True)
    seen = [event async for event in stream]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == "The capital of"
    assert (seen[-1].type, seen[-1].response.status) == ("response.completed", "incomplete")  # as vLLM has it


async def test_openais_own_client_understands_embeddings_and_equal_texts_are_equal(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model="fake", input=["one", "one", "two"], dimensions=16)
    first, second, third = (item.embedding for item in answer.data)
    assert first == second != third
    assert len(first) == 16


async def test_openais_own_client_sees_its_own_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])


async def test_messages_come_in_anthropics_shape(engine: FakeEngine) -> None:
    body = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": QUESTION}]}
    async with httpx2.AsyncClient(base_url=engine.url, timeout=60) as client:
        answer = (await client.post("/v1/messages", json=body)).json()
        refused = await client.post("/v1/messages", json=body | {"max_tokens": "x"})
    assert answer["content"] == [{"type": "text", "text": ANSWER}]
    assert answer["stop_reason"] == "end_turn"
    assert (refused.status_code, refused.json()["type"]) == (400, "error")


async def test_messages_stream_in_anthropics_events(engine: FakeEngine) -> None:
    body = {
        "model": "fake",
        "max_tokens": 3,
        "messages": [{"role": "user", "content": QUESTION}],
        "system": "Be brief.",
    }
    seen = await events(engine, "/v1/messages", body)
    assert [event["type"] for event in seen] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert seen[-2]["delta"]["stop_reason"] == "max_tokens"
    assert seen[-2]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize(("path", "kind"), [("/v1/messages", "error"), ("/v1/responses", "response.failed")])
async def test_a_failure_in_a_stream_has_the_apis_own_shape(engine: FakeEngine, path: str, kind: str) -> None:
    engine.faults = Faults(error_event_after_tokens=2)
    ask = [{"role": "user", "content": "Tell me a story."}]
    seen = await events(engine, path, {"max_tokens": 50, "messages": ask, "input": ask})
    assert seen[-1]["type"] == kind


def test_a_vector_has_length_one() -> None:
    assert sum(value * value for value in vector([1, 2, 3])) == pytest.approx(1.0)


async def test_a_prompt_that_was_seen_is_computed_no_second_time() -> None:
    setup = EngineSetup(cost=CostModel(iteration_s=0.001, prefill_s_per_token=10e-6))
    async with FakeEngine(setup) as engine, httpx2.AsyncClient(base_url=engine.url, timeout=60) as client:
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": [5] * 1000, "max_tokens": 1})
        assert engine.batch.counts.prefix_hits == 31 * 32
        assert engine.batch.counts.prompt_tokens == 2000
