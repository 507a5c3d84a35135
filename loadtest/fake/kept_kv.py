"""KV that fake engines hand to each other as vLLM's NIXL connector does: kept until it is fetched or its lease ends.

The KV itself is a count of tokens; that it was fetched is told over HTTP, for the engine that kept it may be dead.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import orjson

FETCH_PATH = "/fake/kv"
FETCH_TIMEOUT_S = 10.0
BLOCK_TOKENS = 128


class KeptKv:
    """What one engine keeps for others.

    hold: called with tokens that are kept from here on, or, below zero, no longer. lease_s: unfetched KV is kept so
    long.
    """

    def __init__(self, hold: Callable[[int], None], lease_s: float) -> None:
        self._hold = hold
        self._lease_s = lease_s
        self._kept: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self.expired = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: int, port: int) -> dict[str, Any]:
        """Keeps so many tokens; returns the `kv_transfer_params` with which they can be fetched at this port."""
        name = uuid.uuid4().hex
        timer = asyncio.get_running_loop().call_later(self._lease_s, self._expire, name)
        self._kept[name] = (tokens, timer)
        self._hold(tokens)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(-(-tokens // BLOCK_TOKENS)))],
            "remote_engine_id": f"fake-{port}",
            "remote_request_id": name,
            "remote_host": "127.0.0.1",
            "remote_port": port,
            "tp_size": 1,
        }

    def release(self, name: str) -> bool:
        """It has been fetched; whether it was still there."""
        tokens, timer = self._kept.pop(name, (0, None))
        if timer is None:
            return False
        timer.cancel()
        self._hold(-tokens)
        return True

    def drop_all(self) -> None:
        """The engine is dead."""
        for name in list(self._kept):
            self.release(name)

    def _expire(self, name: str) -> None:
        self.expired += self.release(name)


async def fetch(params: Mapping[str, Any]) -> bool:
    """Tells the engine that keeps it that this KV is fetched; False if it is not there any more."""
    body = orjson.dumps({"remote_request_id": params.get("remote_request_id")})
    head = f"POST {FETCH_PATH} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            host, port = str(params.get("remote_host")), int(params.get("remote_port", 0))
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(head.encode() + body)
            return b" 200 " in await reader.readline()
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
