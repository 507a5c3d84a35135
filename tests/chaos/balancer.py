"""A load balancer of connections, as Kubernetes' own is: each goes to a gateway that says it is ready."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence

from tests.chaos.site import Program

LOOK_S = 0.2
PIECE_BYTES = 1 << 16


class Balancer:
    """Asks each gateway for /ready every `LOOK_S`; new connections go to those that said 200, in turn."""

    def __init__(self, gateways: Sequence[Program]) -> None:
        self.gateways = gateways
        self.ready: list[Program] = []
        self.port = 0
        self._turn = itertools.count()
        self._pipes: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Balancer"]:
        await self.look()
        watch = asyncio.create_task(self._watch())
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in (watch, *self._pipes):
                task.cancel()
            await asyncio.gather(watch, *self._pipes, return_exceptions=True)

    async def look(self) -> None:
        there = await asyncio.gather(*(gateway.there() for gateway in self.gateways))
        self.ready = [gateway for gateway, ready in zip(self.gateways, there, strict=True) if ready]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)  # its rhythm
            await self.look()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        try:
            await self._carry(reader, writer)
        except asyncio.CancelledError:
            pass  # the balancer ends; a task that is cancelled would be a complaint of asyncio's streams
        finally:
            self._pipes.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gateway = self.ready[next(self._turn) % len(self.ready)]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        except OSError:
            writer.transport.abort()  # the client sees that nobody is there
            return
        try:
            await asyncio.gather(_pour(reader, far_writer), _pour(far_reader, writer))
        finally:
            writer.transport.abort()
            far_writer.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All bytes from one side to the other, and its end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(PIECE_BYTES):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
