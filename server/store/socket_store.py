"""`Store` over a Unix socket: processes of one machine share what one of them holds in memory.

A message is four bytes of length and a MessagePack value: (space, method, arguments) one way, (worked, result) back,
one at a time on a connection. Who may open the socket's folder may do everything, so that folder is its owner's alone.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from server.store.store import News, Offer, Store, StoreAway

TIMEOUT_S = 1.0
MAX_BYTES = 64 * 1024 * 1024
SHARED, LOCAL = "shared", "local"  # what all gateways share; what concerns the processes of one gateway
_LENGTH = struct.Struct(">I")

# Method: the types of its arguments, and of what it returns.
METHODS: Mapping[str, tuple[Any, Any]] = {
    "exchange": (tuple[Offer], News),
    "forget": (tuple[str], None),
    "put": (tuple[str, str, str], None),
    "drop": (tuple[str, str], bool),
    "records": (tuple[str], dict[str, str]),
    "shelve": (tuple[str, str, str, float], None),
    "shelved": (tuple[str], dict[str, str]),
    "register": (tuple[str, str, float], None),
    "leave": (tuple[str], None),
    "workers": (tuple[()], dict[str, str]),
}
_BROKEN = (OSError, EOFError, TimeoutError, msgspec.MsgspecError)


class _Question(msgspec.Struct, array_like=True):
    space: str
    method: str
    arguments: msgspec.Raw


class _Answer(msgspec.Struct, array_like=True):
    worked: bool
    result: msgspec.Raw


async def _receive(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise OSError(f"a message of {length} bytes is too long")
    return await reader.readexactly(length)


async def _send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    writer.write(_LENGTH.pack(len(data)) + data)
    await writer.drain()


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


class SocketStore:
    """A space of the stores that another process serves at `path`."""

    def __init__(self, path: Path, space: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._space = space
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._one_at_a_time = asyncio.Lock()

    async def _ask(self, method: str, *arguments: object) -> Any:
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._exchange_messages(_Question(self._space, method, _raw(arguments)))
            except _BROKEN as error:
                self._hang_up()
                raise StoreAway(
                    f"the store at {self._path} does not answer: {str(error) or type(error).__name__}"
                ) from None
            except asyncio.CancelledError:
                self._hang_up()  # the answer to this question must not be taken for the next one's
                raise
        if not answer.worked:
            raise StoreAway(msgspec.msgpack.decode(answer.result, type=str))
        return msgspec.msgpack.decode(answer.result, type=METHODS[method][1])

    async def _exchange_messages(self, question: _Question) -> _Answer:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self._path)
        reader, writer = self._streams
        await _send(writer, question)
        return msgspec.msgpack.decode(await _receive(reader), type=_Answer)

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def exchange(self, offer: Offer) -> News:
        news: News = await self._ask("exchange", offer)
        return news

    async def forget(self, period: str) -> None:
        await self._ask("forget", period)

    async def put(self, kind: str, name: str, value: str) -> None:
        await self._ask("put", kind, name, value)

    async def drop(self, kind: str, name: str) -> bool:
        return bool(await self._ask("drop", kind, name))

    async def records(self, kind: str) -> dict[str, str]:
        found: dict[str, str] = await self._ask("records", kind)
        return found

    async def shelve(self, shelf: str, name: str, value: str, ttl_s: float) -> None:
        await self._ask("shelve", shelf, name, value, ttl_s)

    async def shelved(self, shelf: str) -> dict[str, str]:
        found: dict[str, str] = await self._ask("shelved", shelf)
        return found

    async def register(self, worker_id: str, value: str, ttl_s: float) -> None:
        await self._ask("register", worker_id, value, ttl_s)

    async def leave(self, worker_id: str) -> None:
        await self._ask("leave", worker_id)

    async def workers(self) -> dict[str, str]:
        found: dict[str, str] = await self._ask("workers")
        return found

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def listen_at(path: Path) -> socket.socket:
    """A socket for `serving_stores`: who connects before it is served waits. OSError if `path` cannot be had."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


@asynccontextmanager
async def serving_stores(listener: socket.socket, stores: Mapping[str, Store]) -> AsyncIterator[None]:
    """Serves these stores, by the names of their spaces, while the block runs; then closes the listener."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            while True:
                question = msgspec.msgpack.decode(await _receive(reader), type=_Question)
                await _send(writer, await _answered(question, stores))
        except (*_BROKEN, asyncio.CancelledError):  # it has left, or talks nonsense, or we end
            pass
        finally:
            connections.discard(task)
            writer.transport.abort()

    server = await asyncio.start_unix_server(connected, sock=listener)
    try:
        yield
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _answered(question: _Question, stores: Mapping[str, Store]) -> _Answer:
    if question.method not in METHODS or question.space not in stores:
        return _Answer(False, _raw(f"there is no {question.method!r} of {question.space!r} here"))
    arguments = msgspec.msgpack.decode(question.arguments, type=METHODS[question.method][0])
    try:
        result = await getattr(stores[question.space], question.method)(*arguments)
    except StoreAway as error:
        return _Answer(False, _raw(str(error)))
    return _Answer(True, _raw(result))
