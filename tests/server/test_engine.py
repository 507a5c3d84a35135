"""The client towards workers: connections that are kept, lost, shared by nobody at once."""

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.client import EngineClient, EngineConnection, content_at, contents
from server.request.errors import EngineGone, EngineUnreachable
from tests.server.conftest import LIMIT_S, ScriptedEngine, eventually, plain, says, streamed


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.status = 0
        self.content_type = b""
        self.length: int | None = None
        self.got = bytearray()
        self.chunks = 0
        self.ended = asyncio.Event()
        self.error: EngineGone | None = None

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        self.status, self.content_type, self.length = status, content_type, length

    def body(self, data: bytes) -> None:
        self.got += data

    def chunk(self, data: bytes, at: int) -> None:
        self.body(data[at:-2])
        self.chunks += 1

    def end(self) -> None:
        assert not self.ended.is_set()
        self.ended.set()

    def lost(self, error: EngineGone) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedEngine]:
    async with ScriptedEngine([says(plain(b'{"ok":1}'))]).run() as engine:
        yield engine


async def ask(engine: EngineClient, **how: bool) -> tuple[Recorder, EngineConnection]:
    sink = Recorder()
    connection = await engine.ask(b"/v1/x", b"{}", "id-1", sink, **how)
    async with asyncio.timeout(LIMIT_S):
        await sink.ended.wait()
    return sink, connection


async def test_one_connection_serves_many_requests(scripted: ScriptedEngine) -> None:
    engine = EngineClient(scripted.url)
    for _ in range(3):
        sink, connection = await ask(engine)
        assert (sink.status, sink.got, sink.length) == (200, b'{"ok":1}', 8)
    assert scripted.accepted == 1 and list(engine.idle) == [connection]
    assert scripted.asked[0].headers["x-request-id"] == "id-1"
    await engine.close()
    await eventually(lambda: scripted.open == 0)


async def test_a_head_that_was_read_before_is_read_alike() -> None:
    """Lengths, statuses and the pieces in which an answer comes may all change from one to the next."""
    answers = [(200, b'{"ok":1}'), (200, b'{"okay":12345}'), (404, b'{"ok":1}'), (200, b""), (200, b"x" * 5000)]
    rng = random.Random(3)
    order = [rng.choice(answers) for _ in range(40)]
    scripts = []
    for status, body in order:
        said = plain(body).replace(b"200 OK", b"%d Whatever" % status)
        cut = rng.choice([0, 0, 0, 5, len(said) - len(body), len(said) - 1])
        scripts.append(says(said[:cut], said[cut:]) if cut else says(said))
    async with ScriptedEngine(scripts).run() as scripted:
        engine = EngineClient(scripted.url)
        for status, body in order:
            sink, _ = await ask(engine)
            assert (sink.status, sink.got, sink.length) == (status, body, len(body))
        assert scripted.accepted == 1
        assert 0 < len(engine.heads) <= 2
        await engine.close()


EVENTS = [
    b"data: one\n\n",
    b"data: two, longer than it\n\n",
    b"data: \r\n\r\n1\r\nx\r\n\n\n",
    b"x" * 300,
    b"0",
    b"\r\n",
]


def trailed(upper: bool) -> bytes:
    """A stream with the same chunks over and over, as another server may frame it: trailers, sizes in capitals."""
    said = streamed(*EVENTS, *EVENTS).removesuffix(b"0\r\n\r\n")
    return (said.replace(b"12c\r\n", b"12C\r\n") if upper else said) + b"0\r\nx-trailer: 2\r\n\r\n"


@given(st.lists(st.integers(0, len(trailed(upper=True))), max_size=60), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_cut_of_a_chunked_answer_gives_the_same_body(places: list[int], upper: bool) -> None:
    said = trailed(upper)
    ends = sorted({place % len(said) for place in places} | {0, len(said)})
    sink, connection = received([said[start:end] for start, end in zip(ends, ends[1:], strict=False)])
    assert sink.got == b"".join(EVENTS + EVENTS) and sink.ended.is_set() and sink.error is None
    assert list(connection.engine.idle) == [connection], "the parser has seen the end, and stands before an answer"


def test_a_chunk_that_comes_alone_and_whole_is_handed_on_with_its_framing() -> None:
    head, _, rest = streamed(*EVENTS).partition(b"\r\n\r\n")
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS]
    sink, _ = received([head + b"\r\n\r\n" + chunks[0], *chunks[1:], b"0\r\n\r\n"])
    assert rest == b"".join(chunks) + b"0\r\n\r\n"
    assert sink.chunks == len(EVENTS) - 1 and sink.got == b"".join(EVENTS) and sink.ended.is_set()


@pytest.mark.parametrize(
    "size", [b"+5", b"-2", b"0x5", b"5;ext=1", b" 5", b"05", b"5_0", b"g", b"fffffffffffffffff", b""]
)
def test_a_size_that_is_not_plainly_one_is_the_parsers_business(size: bytes) -> None:
    assert content_at(size + b"\r\nhello\r\n") == 0
    assert content_at(size + b"\r\n") == 0
    assert contents(b"5\r\nhello\r\n" + size + b"\r\nhello\r\n") == b""


def test_several_chunks_in_one_read_are_joined_if_all_are_whole() -> None:
    whole = b"5\r\nhello\r\n" + b"1\r\n,\r\n" + b"a\r\n the world\r\n"
    assert contents(whole) == b"hello, the world"
    for cut in range(len(whole)):
        assert contents(whole[:cut]) == {0: b"", 10: b"hello", 16: b"hello,"}.get(cut, b"")
    assert contents(whole + b"0\r\n\r\n") == b"", "the end of an answer is the parser's business"


def test_a_chunk_is_one_only_if_it_ends_where_it_says() -> None:
    assert content_at(b"5\r\nhello\r\n") == 3
    for data in (b"5\r\nhello", b"5\r\nhello\r\n0", b"4\r\nhello\r\n", b"6\r\nhello\r\n", b"0\r\n\r\n", b"", b"\r\n"):
        assert content_at(data) == 0


class Wire(asyncio.Transport):
    """A transport that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert self.open

    def is_closing(self) -> bool:
        return not self.open

    def close(self) -> None:
        self.open = False

    def abort(self) -> None:
        self.open = False


def received(pieces: list[bytes]) -> tuple[Recorder, EngineConnection]:
    """What a connection makes of an answer that comes in these pieces."""
    connection, sink = EngineConnection(EngineClient("http://127.0.0.1:9")), Recorder()
    connection.connection_made(Wire())
    connection.ask(b"", sink)
    for piece in pieces:
        connection.data_received(piece)
    return sink, connection


async def test_a_client_that_was_closed_needs_no_garbage_collector(scripted: ScriptedEngine) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = EngineClient(scripted.url)
        assert (await engine.get("/health")).status_code == 200
        assert (await engine.post("/v1/x", {})).status_code == 200
        await engine.close()
        nobody = EngineClient("http://127.0.0.1:9")
        with pytest.raises(EngineGone):
            await nobody.get("/health")
        gone, unmet = weakref.ref(engine), weakref.ref(nobody)
        del engine, nobody
        await eventually(lambda: gone() is unmet() is None, "the clients have gone with their connections")
    finally:
        gc.enable()


async def test_a_prefix_in_the_workers_address_is_kept(scripted: ScriptedEngine) -> None:
    engine = EngineClient(scripted.url + "/engines/a/")
    await ask(engine)
    assert scripted.asked[0].path == "/engines/a/v1/x"
    await engine.close()


async def test_a_fresh_connection_can_be_demanded(scripted: ScriptedEngine) -> None:
    engine = EngineClient(scripted.url)
    _, first = await ask(engine)
    _, second = await ask(engine, fresh=True)
    assert first is not second and scripted.accepted == 2
    await engine.close()


async def test_giving_up_one_answer_never_touches_the_next_one_on_the_connection(scripted: ScriptedEngine) -> None:
    engine = EngineClient(scripted.url)
    first, connection = await ask(engine)
    later = Recorder()
    assert await engine.ask(b"/v1/x", b"{}", "id-2", later) is connection
    connection.abandon(first)  # the first one's owner comes to clean up when the connection is another's already
    await asyncio.wait_for(later.ended.wait(), LIMIT_S)
    assert later.error is None and later.got == b'{"ok":1}'
    await engine.close()


async def test_an_abandoned_answer_closes_its_connection_and_says_nothing_more(scripted: ScriptedEngine) -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await asyncio.Event().wait()

    scripted.scripts = [slow]
    engine, sink = EngineClient(scripted.url), Recorder()
    connection = await engine.ask(b"/v1/x", b"{}", "id", sink)
    await eventually(lambda: sink.got == b"half")
    connection.abandon(sink)
    await asyncio.sleep(0.05)
    assert not sink.ended.is_set() and not engine.idle
    await engine.close()


async def test_a_connection_is_not_paused_for_a_client_whose_answer_is_over(scripted: ScriptedEngine) -> None:
    engine = EngineClient(scripted.url)
    _, connection = await ask(engine)
    connection.pause()
    sink, again = await ask(engine)
    assert again is connection and sink.got == b'{"ok":1}'
    await engine.close()


class Pausing(Recorder):
    """A sink that takes one read of an answer's body and then no more."""

    connection: EngineConnection
    taken = 0

    def body(self, data: bytes) -> None:
        super().body(data)
        if not self.taken:
            self.taken = len(self.got)
            self.connection.pause()


async def test_what_is_paused_stops_and_what_is_resumed_goes_on(scripted: ScriptedEngine) -> None:
    """The engine says more until it has to wait: how much that is, is the kernel's business."""
    paused_by, enough = asyncio.Event(), asyncio.Event()
    piece, written, writers = b"x" * 60_000, 0, []

    async def on_and_on(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writers.append(writer)
        await paused_by.wait()
        writer.write(streamed().removesuffix(b"0\r\n\r\n"))
        while not enough.is_set():
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            written += len(piece)
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    scripted.scripts = [on_and_on]
    engine, sink = EngineClient(scripted.url), Pausing()
    sink.connection = await engine.ask(b"/v1/x", b"{}", "id", sink)
    paused_by.set()
    await eventually(lambda: sink.taken, "the first read of the body")
    async with asyncio.timeout(LIMIT_S):
        waits, before = 0, 0
        while waits < 20:
            before = written
            await asyncio.sleep(0.005)  # between two looks
            waits = waits + 1 if written == before and writers[0].transport.get_write_buffer_size() else 0
            assert len(sink.got) == sink.taken
    assert sink.taken < written and not sink.ended.is_set()
    enough.set()
    sink.connection.resume()
    await asyncio.wait_for(sink.ended.wait(), LIMIT_S)
    assert len(sink.got) == written and sink.error is None
    await engine.close()


async def test_bytes_that_nobody_asked_for_end_the_connection(scripted: ScriptedEngine) -> None:
    has_its_answer = asyncio.Event()

    async def says_more(writer: asyncio.StreamWriter) -> None:
        writer.write(plain(b"{}"))
        await has_its_answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\n")

    engine = EngineClient(scripted.url)
    scripted.scripts = [says_more]
    await ask(engine)
    has_its_answer.set()
    await eventually(lambda: not engine.idle, "the connection is not offered again")
    await engine.close()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-len",
        plain(b"{}") + plain(b"{}"),
    ],
)
async def test_an_answer_that_is_not_whole_is_lost(scripted: ScriptedEngine, said: bytes) -> None:
    async def say_and_close(writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.close()

    scripted.scripts = [say_and_close]
    engine = EngineClient(scripted.url)
    sink, _ = await ask(engine)
    assert isinstance(sink.error, EngineGone) and not engine.idle
    await engine.close()


async def test_a_worker_that_is_not_there_is_unreachable() -> None:
    engine = EngineClient("http://127.0.0.1:9")
    with pytest.raises(EngineUnreachable, match="cannot be reached"):
        await engine.ask(b"/v1/x", b"{}", "id", Recorder())
    with pytest.raises(EngineGone):
        await engine.get("/health")
    await engine.close()


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://", "https://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        EngineClient(url)
