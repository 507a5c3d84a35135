"""An engine's key for all of its server: vLLM's own check leaves `/invocations`, `/tokenize` and more open.

vLLM loads this through its option `--middleware`. The key is in the environment, where vLLM's own check finds it, too.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

OPEN = frozenset(("/health", "/metrics", "/metrics/", "/ping"))  # for probes and Prometheus

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeyCheck:
    """ASGI: answers 401 to whoever does not send `Authorization: Bearer KEY`."""

    def __init__(self, app: App) -> None:
        """RuntimeError without a key: an engine that was to have one must not serve everybody."""
        key = os.environ.get("VLLM_API_KEY", "")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set, and this engine was to ask for a key")
        self._app = app
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN or self._may(scope["headers"]):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})

    def _may(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(given), self._digest)
        return False


def _digest(key: bytes) -> bytes:
    """So that not even the length of the key shows in the time that a comparison takes."""
    return hashlib.sha256(key).digest()
