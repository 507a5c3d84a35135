"""A gateway on a loopback port over engines without a model, and a client that sees every byte."""

import asyncio
import contextlib
import gc
import json
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trustme
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from loadtest.virtual_loop import VirtualLoop
from server.app import GatewayServer
from server.settings import Settings

MODEL = "fake"
LIMIT_S = 60.0  # for a busy machine, or one that stands still; nothing here takes a second on an idle one
INSTANT = EngineSetup(cost=PRESETS["instant"])
SLOW = EngineSetup(cost=replace(PRESETS["quick"], iteration_s=0.02))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the gateway runs on in production; what depends on the loop on asyncio's own as well."""
    if item.path.name == "test_edge_on_asyncio.py":
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


async def eventually(condition: Callable[[], object], what: str = "", limit_s: float = LIMIT_S) -> None:
    """Returns once the condition holds; fails if it does not within the limit."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"still not after {limit_s} s: {what or condition}"
        await asyncio.sleep(0.005)  # between two looks


@dataclass
class Reply:
    """An answer as it stood on the wire. `chunks`: the pieces of a chunked body, None if it was not chunked."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunks: list[bytes] | None = None

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; fails if the answer is not shaped as OpenAI's."""
        answer = self.json()
        assert self.headers["content-type"] == "application/json"
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["message"]
        return answer["error"]

    @property
    def events(self) -> list[Any]:
        """The data of each event, parsed; the closing [DONE] as text."""
        assert self.body.endswith(b"\n\n")
        datas = [event.partition(b"data: ")[2] for event in self.body.split(b"\n\n") if event.strip(b":")]
        return ["[DONE]" if data == b"[DONE]" else json.loads(data) for data in datas]

    @property
    def text(self) -> str:
        """What a stream of chat or completions said."""
        choices = [event["choices"][0] for event in self.events[:-1] if event.get("choices")]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


class Wire:
    """A client's connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Reply:
        """Status line and headers. IncompleteReadError at the end of the connection."""
        async with asyncio.timeout(LIMIT_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        names = [line.partition(":")[0].lower() for line in lines]
        assert len(set(names)) == len(names), f"a header comes twice: {names}"
        return Reply(int(status), {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines})

    async def chunk(self) -> bytes:
        """A piece of a chunked body; empty at its end."""
        async with asyncio.timeout(LIMIT_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def answer(self) -> Reply:
        """A whole answer. It must be framed correctly."""
        reply = await self.head()
        while reply.status == 100:
            reply = await self.head()
        if reply.headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in reply.headers
            reply.chunks = []
            while chunk := await self.chunk():
                reply.chunks.append(chunk)
            reply.body = b"".join(reply.chunks)
        elif "content-length" in reply.headers:
            async with asyncio.timeout(LIMIT_S):
                reply.body = await self.reader.readexactly(int(reply.headers["content-length"]))
        else:
            reply.body = await self.rest()
        return reply

    async def rest(self) -> bytes:
        """All until the gateway closes the connection."""
        async with asyncio.timeout(LIMIT_S):
            return await self.reader.read()

    async def closed(self) -> bool:
        """Whether the gateway closes the connection without another word."""
        try:
            return await self.rest() == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def request(
    path: str, body: object = None, *, method: str = "POST", headers: dict[str, str] | None = None, version: str = "1.1"
) -> bytes:
    """A request's bytes; a body that is not bytes already goes as JSON."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "host: gateway", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body is not None:
        lines.append(f"content-length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def chat(**fields: object) -> dict[str, object]:
    """A small chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 8} | fields


def completion(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8} | fields


@dataclass
class Asked:
    """A request as a scripted engine received it."""

    path: str
    headers: dict[str, str]
    body: bytes


Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


def says(*pieces: bytes, pause_s: float = 0.0) -> Script:
    """Writes these bytes, each in a segment of its own."""

    async def play(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return play


def plain(body: bytes, *, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    """A whole answer of an engine."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.fixture
def no_sockets_left() -> Iterator[None]:
    """uvloop leaves the socket of a TLS handshake that failed to the collector: here and now, not in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def streamed(*events: bytes, content_type: str = "text/event-stream") -> bytes:
    """An engine's stream, an event a chunk."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


# What vLLM answers to GET: by `owned_by` the gateway takes a worker for one.
VLLM = {"/v1/models": plain(b'{"object":"list","data":[{"id":"fake","object":"model","owned_by":"vllm"}]}')}


@dataclass
class ScriptedEngine:
    """An engine that says word for word what a test wants: the last script again once they are used up."""

    scripts: list[Script]
    asked: list[Asked] = field(default_factory=list)
    gets: dict[str, bytes] = field(default_factory=dict)
    open: int = 0
    accepted: int = 0
    port: int = 0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator["ScriptedEngine"]:
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        self.accepted += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            listed = b'{"object":"list","data":[{"id":"fake","object":"model"}]}'
            defaults = {"/health": plain(b""), "/v1/models": plain(listed)}
            writer.write({**defaults, **self.gets}.get(path, plain(b"", status="404 Not Found")))
            return True
        self.asked.append(Asked(path, headers, body))
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        await script(writer)
        await writer.drain()
        return not writer.is_closing()


class Running:
    """A gateway that serves, and the clients that talk to it."""

    def __init__(self, server: GatewayServer, port: int) -> None:
        self.server = server
        self.port = port
        self.wires: list[Wire] = []
        self.serving: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        return wire

    async def send(self, data: bytes) -> Wire:
        wire = await self.connect()
        await wire.send(data)
        return wire

    async def ask(self, path: str, body: object = None, **how: Any) -> Reply:
        """One request on a connection of its own."""
        wire = await self.send(request(path, body, **how))
        return await wire.answer()

    async def ready(self) -> None:
        await eventually(lambda: self.server.fleet.ready(), "a worker is ready")

    @property
    def in_flight(self) -> int:
        return sum(member.load.in_flight for member in self.server.fleet.members.values())

    @property
    def waiting(self) -> int:
        return sum(count for _, count in self.server.lines.depth())

    def at_rest(self) -> bool:
        """Nothing waits, runs or is kept of requests that are over."""
        lines = self.server.lines.by_model.values()
        members = self.server.fleet.members.values()
        return (
            not self.in_flight
            and not self.waiting
            and not any(line._waiters or line._waiting_of or line.charge for line in lines)
            and not any(line.lanes.running() for line in lines)
            and not any(member.load.pending_tokens or member.load.arriving_tokens for member in members)
            and not self.server.uvicorn.server_state.tasks
        )

    async def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample by name and labels, read as Prometheus reads it."""
        text = (await self.ask("/metrics", method="GET")).body.decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Running]]


@contextlib.asynccontextmanager
async def serving(*urls: str, ready: bool = True, slots: int = 256, **settings: Any) -> AsyncIterator[Running]:
    """A gateway over workers at these addresses; at its end nothing may be left of any request."""
    workers = [f"{url},slots={slots}" for url in urls]
    # One port for all, as `admin_port` is that of the clients.
    options = {
        "host": "127.0.0.1",
        "port": 0,
        "admin_port": 0,
        "probe_s": 0.2,
        "shutdown_s": 20.0,
        "workers": workers,
    } | settings
    # What an engine is asked is for tests to say. One that is slow because all is slow is not dead.
    options["health"] = {"canary": "off", "probe_timeout_s": LIMIT_S} | settings.get("health", {})
    server = GatewayServer(Settings(**options))
    sock = server.listen()
    running = Running(server, sock.getsockname()[1])
    running.serving = asyncio.create_task(server.serve(sock))
    try:
        await eventually(lambda: server.uvicorn.started or running.serving.done(), "the gateway serves")
        if ready and urls:
            await running.ready()
        yield running
        for wire in running.wires:
            await wire.close()
        await eventually(running.at_rest, "nothing is left of any request")
        await eventually(lambda: not server.uvicorn.server_state.connections, "no connection is left")
    finally:
        for wire in running.wires:
            wire.reset()
        server.stop()
        await asyncio.wait_for(running.serving, LIMIT_S)
        await eventually(lambda: not server.uvicorn.server_state.connections, "no connection is left")


@contextlib.asynccontextmanager
async def over_fake(setup: EngineSetup = INSTANT, **settings: Any) -> AsyncIterator[tuple[Running, FakeEngine]]:
    """A gateway over one fake engine, which at the end runs nothing any more."""
    async with FakeEngine(setup) as engine, serving(engine.url, **settings) as gateway:
        yield gateway, engine
        for wire in gateway.wires:
            await wire.close()
        if not engine.stalled:
            await eventually(lambda: not engine.running and not engine.waiting, "the engine runs nothing")


@contextlib.asynccontextmanager
async def over_script(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[Running, ScriptedEngine]]:
    """A gateway over an engine that says what the scripts say."""
    async with ScriptedEngine(list(scripts)).run() as engine, serving(engine.url, **settings) as gateway:
        yield gateway, engine


@pytest.fixture
def virtual_loop() -> Iterator[asyncio.Runner]:
    """Runs coroutines in virtual time: when nobody has anything to do, the clock moves to the next timer."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        yield runner


def in_virtual_time(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(test)
