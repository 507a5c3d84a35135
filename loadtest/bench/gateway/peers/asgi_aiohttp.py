"""A relay without any framework, and nothing else: raw ASGI in front, aiohttp behind. `run.sh` measures it."""

import os
from typing import Any

import aiohttp
import orjson

WORKERS = {"mock": os.environ.get("ENGINE", "") + "/v1/chat/completions"}
JSON = {"content-type": "application/json"}


class App:
    """The ASGI application; a worker is chosen by the request's model."""

    session: aiohttp.ClientSession

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        asked = orjson.loads(body)
        async with self.session.post(WORKERS[asked["model"]], data=body, headers=JSON) as answer:
            if asked.get("stream"):
                await self.stream(answer, send)
            else:
                await self.whole(answer, send)

    async def live(self, receive: Any, send: Any) -> None:
        await receive()
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        patient = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=patient, auto_decompress=False) as self.session:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def stream(self, answer: aiohttp.ClientResponse, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        async for data in answer.content.iter_any():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def whole(self, answer: aiohttp.ClientResponse, send: Any) -> None:
        data = await answer.read()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


app = App()
