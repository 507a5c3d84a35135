"""What the gateway holds for clients that send much and are never served: its memory at the worst moment.

The three cases: bodies that are dropped half-way, bodies without a valid key, and large requests that wait.
"""

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.chaos.figures import Figure
from tests.chaos.site import Program, all_ready, engine, gateway, metrics, running, summed, tenant_file, until
from tests.server.conftest import Wire, request

MIB = 1024 * 1024
KEY = "memory-key-0123456789"
CHAT = "/v1/chat/completions"
BUDGET_MIB = 160  # one tenant may hold four fifths of it: 8 bodies of 15 MiB and nothing more
SLACK_MIB = 64
BODY_BYTES = 15 * MIB
HELD_BYTES = 8 * MIB  # of each body that is dropped half-way
PIECE = b" " * MIB


class Memory:
    """One run. drops: connections that are dropped half-way, one after the other. keyless: connections without a key,
    at once."""

    def __init__(self, drops: int, keyless: int, waiting: int) -> None:
        self.drops, self.keyless, self.waiting = drops, keyless, waiting

    async def run(self) -> Sequence[Figure]:
        with tempfile.TemporaryDirectory(prefix="evenhand-memory-") as name:
            folder = Path(name)
            # It is so slow that what it begins is not over before the run is.
            worker = engine(folder, 0, "--cost", "gpu-7b", "--max-model-len", "200000")
            settings = {
                "edge": {"max_held_bytes": BUDGET_MIB * MIB},
                "tenants": str(tenant_file(folder, [{"name": "acme", "keys": [KEY]}])),
                "admission": {"ahead": 0},
            }
            front = gateway(folder, 0, [f"{worker.url},slots=1"], settings)
            async with running(worker, front):
                await all_ready([front], 1)
                dropped = f"{self.drops:,} connections dropped after 8 of 15 MiB, one after the other"
                return [
                    await self._case(front, dropped, self._drop),
                    await self._case(front, f"{self.keyless} bodies of 15 MiB, no valid key, at once", self._keyless),
                    await self._case(front, f"{self.waiting} requests of 15 MiB that wait at once", self._wait),
                ]

    async def _case(self, front: Program, what: str, act: Callable[[Program], Awaitable[None]]) -> Figure:
        """The most memory while `act` ran, above what there was before."""
        before = front.rss_bytes()
        front.forget_peak()
        await act(front)
        grown = (front.peak_bytes() - before) / MIB
        most = BUDGET_MIB + SLACK_MIB
        told = f"{grown:.0f} MiB above {before / MIB:.0f}"
        return Figure(what, told, f"≤ {BUDGET_MIB} MiB, the budget, + {SLACK_MIB}", grown <= most)

    async def _drop(self, front: Program) -> None:
        for _ in range(self.drops):
            wire = await _connect(front)
            await wire.send(_head(KEY))
            for _ in range(HELD_BYTES // MIB):
                await wire.send(PIECE)
            wire.reset()

    async def _keyless(self, front: Program) -> None:
        async def one() -> None:
            wire = await _connect(front)
            with suppress(ConnectionError):
                await wire.send(_head("unknown-key-0123456789"))
                for _ in range(BODY_BYTES // MIB - 1):
                    await wire.send(PIECE)
            wire.reset()

        await asyncio.gather(*(one() for _ in range(self.keyless)))

    async def _wait(self, front: Program) -> None:
        turn = {"role": "user", "content": "a"}
        small = {"model": "fake", "messages": [turn], "max_tokens": 100_000, "ignore_eos": True}
        first = await _connect(front)
        headers = {"authorization": f"Bearer {KEY}"}
        await first.send(request(CHAT, small | {"stream": True}, headers=headers))
        await first.head()
        long = turn | {"content": "a" * (BODY_BYTES - 200)}
        large = json.dumps(small | {"messages": [long]}).encode()
        wires = [await _connect(front) for _ in range(self.waiting)]
        await asyncio.gather(*(wire.send(request(CHAT, large, headers=headers)) for wire in wires))

        async def all_wait() -> bool:
            return summed(await metrics(front.port), "evenhand_queue_depth") == self.waiting

        await until(all_wait, "all wait")
        for wire in (first, *wires):
            wire.reset()


def _head(key: str) -> bytes:
    headers = {"authorization": f"Bearer {key}", "content-length": str(BODY_BYTES)}
    return request(CHAT, headers=headers)


async def _connect(front: Program) -> Wire:
    return Wire(*await asyncio.open_connection("127.0.0.1", front.port))
