"""The relay that one writes first, and nothing else: FastAPI in front, httpx behind. `run.sh` measures it."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

WORKERS = {"mock": os.environ.get("ENGINE", "") + "/v1/chat/completions"}
JSON = {"content-type": "application/json"}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000, keepalive_expiry=60)
    async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    body = await request.body()
    asked = orjson.loads(body)
    client = request.app.state.client
    answer = await client.send(
        client.build_request("POST", WORKERS[asked["model"]], content=body, headers=JSON), stream=True
    )
    if not asked.get("stream"):
        whole = await answer.aread()
        return Response(whole, answer.status_code, media_type=answer.headers.get("content-type"))
    return StreamingResponse(relayed(answer), answer.status_code, media_type="text/event-stream")


async def relayed(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The bytes of an answer as they come."""
    try:
        async for data in answer.aiter_raw():
            yield data
    finally:
        await answer.aclose()
