"""Embeddings without a model: a unit vector that follows from the text alone, in OpenAI's shape."""

import base64
import struct
import zlib
from array import array
from collections.abc import Sequence
from math import sqrt
from random import Random

import orjson

from loadtest.fake.vllm_wire import Ask, Json, usage

DIMENSIONS = 384


def vector(ids: Sequence[int], dimensions: int = DIMENSIONS) -> list[float]:
    """Equal tokens give equal vectors, others nearly orthogonal ones."""
    rng = Random(zlib.crc32(array("I", ids).tobytes()))
    values = [rng.gauss(0.0, 1.0) for _ in range(dimensions)]
    length = sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def embeddings(body: Json, ask: Ask, model: str, created: int) -> bytes:
    """The answer to a request for embeddings, as floats or base64 as it asks."""
    dimensions = body.get("dimensions") or DIMENSIONS
    vectors = [vector(prompt, dimensions) for prompt in ask.prompts]
    packed = body.get("encoding_format") == "base64"
    data = [
        {"index": at, "object": "embedding", "embedding": _base64(values) if packed else values}
        for at, values in enumerate(vectors)
    ]
    answer = {
        "id": f"embd-{created}",
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": usage(ask.prompt_tokens, 0) | {"prompt_tokens_details": None},
    }
    return orjson.dumps(answer)


def _base64(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
