"""The fake engine's answers, read back by vLLM's own response models: nothing unknown, nothing missing, same order."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import orjson
import pytest

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS

pytestmark = pytest.mark.engine

STORY = [{"role": "user", "content": "Tell me a story about a river."}]
EVERYTHING = {
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "return_token_ids": True,
    "max_tokens": 5,
}


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with (
        FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine,
        httpx2.AsyncClient(base_url=engine.url, timeout=30) as client,
    ):
        yield client


async def chunks(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[bytes]:
    answer = await client.post(path, json=body | {"stream": True})
    return [part.removeprefix("data: ").encode() for part in answer.text.split("\n\n") if part and "[DONE]" not in part]


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
async def test_chat_chunks_are_vllms_byte_for_byte(client: httpx2.AsyncClient, options: dict[str, Any]) -> None:
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol", reason="no vLLM installed")
    for chunk in await chunks(client, "/v1/chat/completions", {"messages": STORY} | options):
        model = protocol.ChatCompletionStreamResponse.model_validate_json(chunk)
        assert model.model_dump_json(exclude_unset=True).encode() == chunk


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
async def test_completion_chunks_are_vllms_byte_for_byte(client: httpx2.AsyncClient, options: dict[str, Any]) -> None:
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol", reason="no vLLM installed")
    for chunk in await chunks(client, "/v1/completions", {"prompt": "Once upon a time"} | options):
        model = protocol.CompletionStreamResponse.model_validate_json(chunk)
        assert model.model_dump_json(exclude_unset=True).encode() == chunk


@pytest.mark.parametrize(
    ("path", "body", "module", "name"),
    [
        ("/v1/chat/completions", {"messages": STORY}, "openai.chat_completion.protocol", "ChatCompletionResponse"),
        ("/v1/completions", {"prompt": "Once"}, "openai.completion.protocol", "CompletionResponse"),
        (
            "/v1/messages",
            {"model": "fake", "max_tokens": 5, "messages": STORY},
            "anthropic.protocol",
            "AnthropicMessagesResponse",
        ),
        ("/v1/responses", {"input": "Once"}, "openai.responses.protocol", "ResponsesResponse"),
        ("/tokenize", {"prompt": "Once"}, "serve.tokenize.protocol", "TokenizeResponse"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, "serve.engine.protocol", "ErrorResponse"),
    ],
)
async def test_whole_answers_have_vllms_fields_and_no_others(
    client: httpx2.AsyncClient, path: str, body: dict[str, Any], module: str, name: str
) -> None:
    protocol = pytest.importorskip(f"vllm.entrypoints.{module}", reason="no vLLM installed")
    answer = orjson.loads((await client.post(path, json=body)).content)
    model = getattr(protocol, name)
    model.model_validate(answer)
    assert set(answer) <= set(model.model_fields)
