"""HTTP to workers, all of it: a lean protocol for relayed answers, httpx2 for requests that may take longer.

A general client puts tasks, buffers and objects between a socket and its reader, for every chunk. Here the bytes of an
answer reach their `Sink` in the call that received them.
"""

import asyncio
import errno
import logging
import re
import ssl
from collections import deque
from collections.abc import Mapping
from enum import IntEnum, auto
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import httptools
import httpx2

from server.engine.access import Access, ClientTls, untrusted
from server.engine.question import Answer, Question
from server.request.errors import EngineGone, EngineHungUp, EngineUnreachable, EngineUntrusted, OutOfFiles

log = logging.getLogger("evenhand.engine")

CONNECT_TIMEOUT_S = 5.0
# Servers on Python's TLS do not say why they end a connection; with TLS 1.3 that is after the handshake.
NO_WORD = "The worker closes TLS connections without an answer: if it requires a client certificate, give cert=FILE."
MAX_ERROR_BODY_BYTES = 64 * 1024
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)

_REQUEST = (
    b"POST %b%b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\nx-request-id: %b\r\n%b"
    b"content-length: %d\r\n\r\n%b"
)

_QUESTION = b"GET %b%b HTTP/1.1\r\nhost: %b\r\naccept: */*\r\n\r\n"

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,12})\r\n", re.IGNORECASE)
_LONGEST_HEAD_BYTES = 2048
_LONGEST_SIZE_BYTES = 10  # of a chunk's size and the end of its line
MOST_HEADS = 256  # forgotten all at once when there are more


def keyed(data: bytes) -> tuple[bytes, int, int]:
    """(a message's head without its length, that length, where its body begins); an empty key for other messages.

    Peers repeat their heads: two heads with the same key differ in nothing but the length.
    """
    at = data.find(b"\r\n\r\n", 0, _LONGEST_HEAD_BYTES) + 4
    found = _LENGTH.search(data, 0, at) if at > 4 else None
    if found is None:
        return b"", 0, 0
    begin, end = found.span(1)
    return data[:begin] + data[end:at], int(data[begin:end]), at


def content_at(data: bytes) -> int:
    """Where the content of an HTTP chunk begins, if `data` is one whole chunk and no more; else 0."""
    at = data.find(b"\r\n", 1, _LONGEST_SIZE_BYTES) + 2
    size = len(data) - at - 2  # where no line ends, `at` is 1 and no size fits
    return at if size > 0 and data.startswith(b"%x\r\n" % size) and data.endswith(b"\r\n") else 0


def contents(data: bytes) -> bytes:
    """The contents of HTTP chunks, joined, if `data` is several whole chunks and no more; else nothing."""
    pieces: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        begin = data.find(b"\r\n", at, at + _LONGEST_SIZE_BYTES) + 2
        try:
            size = int(data[at:begin], 16)
        except ValueError:
            return b""
        stop = begin + size
        if size <= 0 or not data.startswith(b"%x\r\n" % size, at) or not data.startswith(b"\r\n", stop):
            return b""
        pieces.append(data[begin:stop])
        at = stop + 2
    return b"".join(pieces)


class Sink(Protocol):
    """Who receives an answer. Called from within the socket's callback: it must not block and must not raise.

    chunk: a piece of the body as `body` gets it, with its HTTP framing around it: its content is `data[at:-2]`.
    """

    def head(self, status: int, content_type: bytes, length: int | None) -> None: ...
    def body(self, data: bytes) -> None: ...
    def chunk(self, data: bytes, at: int) -> None: ...
    def end(self) -> None: ...
    def lost(self, error: EngineGone) -> None: ...


class Head(NamedTuple):
    """A parsed head of an answer, except its length."""

    status: int
    content_type: bytes


class Received(IntEnum):
    """How much of the current answer has arrived on a connection, in this order; the last two are ends."""

    NOTHING = auto()
    PART_OF_HEAD = auto()
    PART_OF_BODY = auto()
    WHOLE_CHUNKS = auto()  # the parser expects a chunk's size next: a whole chunk may bypass it
    ALL = auto()
    ALL_AND_CLOSE = auto()  # the connection carries no further answer


_NOTHING, _WHOLE_CHUNKS = Received.NOTHING, Received.WHOLE_CHUNKS  # looked up for every token


class EngineConnection(asyncio.Protocol):
    """One keep-alive connection to a worker; it carries one answer at a time.

    received: how much of the current answer has arrived. reused: the connection has carried an answer before.
    chunked: the current answer's body is chunked; `length` is its Content-Length, if it has one.
    paused: nothing is read, because the client does not keep up.
    """

    __slots__ = (
        "engine", "transport", "sink", "parser", "pieces", "length", "content_type", "received", "reused", "paused",
        "chunked",
    )  # fmt: skip

    def __init__(self, engine: "EngineClient") -> None:
        self.engine = engine
        self.sink: Sink | None = None
        self.received = Received.NOTHING
        self.reused = False
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport always is one
        self.parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes, sink: Sink) -> None:
        """Sends a whole request. The answer goes to `sink`."""
        self.sink = sink
        self.received = _NOTHING
        self.chunked = False
        self.pieces: list[bytes] = []
        self.length: int | None = None
        self.content_type = b"application/json"
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:  # unrequested bytes: the connection cannot be trusted any more
            self.transport.abort()
            return
        if self.received is _WHOLE_CHUNKS:
            if at := content_at(data):  # one more token of a stream, by far the most frequent case
                sink.chunk(data, at)
                return
            if content := contents(data):
                sink.body(content)
                return
        if self.received is _NOTHING and self._whole(data, sink):
            return
        self._parse(data, sink)

    def _parse(self, data: bytes, sink: Sink) -> None:
        first = self.received is _NOTHING
        if first:
            self.received = Received.PART_OF_HEAD
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._drop(EngineGone(f"The engine's answer is not HTTP: {error}."))
            return
        if self.received is _WHOLE_CHUNKS and not data.endswith(b"\r\n"):  # it has begun to read a size
            self.received = Received.PART_OF_BODY
        pieces = self.pieces
        if pieces:
            if len(pieces) == 1:
                sink.body(pieces[0])
            else:
                sink.body(b"".join(pieces))
            self.pieces = []
        if self.received >= Received.ALL and self.sink is not None:
            if first:
                self._remember(data)
            self._finish(sink)

    def _whole(self, data: bytes, sink: Sink) -> bool:
        """Handles an answer that arrived in one piece with a cached head: engines repeat their heads, except for the
        length (and uvicorn's `date`, which changes every second)."""
        key, length, at = keyed(data)
        head = self.engine.heads.get(key) if key else None
        if head is None or len(data) != at + length:
            return False
        self.received = Received.ALL
        sink.head(head.status, head.content_type, length)
        if length:
            sink.body(data[at:])
        self._finish(sink)
        return True

    def _remember(self, data: bytes) -> None:
        key, length, at = keyed(data)
        whole = len(data) == at + length and self.length == length and not self.chunked
        if key and whole and self.received is Received.ALL:
            heads = self.engine.heads
            if len(heads) >= MOST_HEADS:
                heads.clear()
            heads[key] = Head(self.parser.get_status_code(), self.content_type)

    def _finish(self, sink: Sink) -> None:
        self.sink = None
        if self.paused:
            self.resume()
        if self.received is Received.ALL and not self.transport.is_closing():
            self.reused = True
            self.engine.idle.append(self)
        else:
            self.transport.close()
        sink.end()

    # httptools callbacks
    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self.length = int(value)
        elif name == b"content-type":
            self.content_type = value
        elif name == b"transfer-encoding":
            self.chunked = True

    def on_headers_complete(self) -> None:
        if self.received >= Received.ALL or self.sink is None:
            raise ValueError("the engine sent more than one answer to one request")
        self.received = Received.PART_OF_BODY
        self.sink.head(self.parser.get_status_code(), self.content_type, self.length)

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_chunk_header(self) -> None:
        self.received = Received.PART_OF_BODY

    def on_chunk_complete(self) -> None:
        self.received = _WHOLE_CHUNKS

    def on_message_complete(self) -> None:
        self.received = Received.ALL if self.parser.should_keep_alive() else Received.ALL_AND_CLOSE

    def connection_lost(self, error: Exception | None) -> None:
        self.engine.forget(self)
        del self.parser  # the two hold each other, and the garbage collector looks rarely
        sink = self.sink
        if sink is None:
            return
        headed = self.received > Received.PART_OF_HEAD
        if error is None and headed and self.length is None and not self.chunked:
            self.sink = None
            sink.end()  # neither length nor chunks: such an answer ends by closing the connection
        elif not headed and (wrong := untrusted(error)) is not None:
            self._drop(wrong)  # TLS 1.3 refuses a client's certificate only after the client has sent its request
        else:
            self._drop(EngineHungUp("The engine closed the connection before its answer was complete."))

    def _drop(self, error: EngineGone) -> None:
        sink, self.sink = self.sink, None
        self.transport.abort()
        if sink is not None:
            sink.lost(error)

    def pause(self) -> None:
        """The client does not keep up: stop reading here, so that TCP makes the engine wait."""
        if self.sink is not None and not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def abandon(self, sink: Sink) -> None:
        """Gives up this sink's answer if it is not complete; vLLM aborts a generation whose connection is closed."""
        if self.sink is sink:  # else the connection carries another's by this time
            self.sink = None
            self.transport.abort()


def is_out_of_files(error: BaseException | None) -> bool:
    """Whether an error comes of this process, or the machine, having no file descriptor left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _out_of_files() -> OutOfFiles:
    log.error("no file descriptor left for a connection to an engine: raise `ulimit -n`")
    return OutOfFiles("The gateway has no file descriptor left for a connection.", retry_after_s=1.0)


class EngineClient:
    """A worker's HTTP server: a pool of connections for relayed answers, and small requests of the gateway itself."""

    def __init__(self, url: str, access: Access = Access()) -> None:  # noqa: B008 - frozen
        """ValueError with a sentence for an address or a certificate that cannot be used."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a worker's address: write it as http://HOST:PORT or https://HOST:PORT")
        self.url = url.rstrip("/")
        self.host = parts.hostname
        self.tls = ClientTls(access) if parts.scheme == "https" else None
        self.port = parts.port or (80 if self.tls is None else 443)
        self.prefix = parts.path.rstrip("/").encode()
        authorization = f"Bearer {access.key}" if access.key else ""
        # One piece of every head: a worker without a key costs no request anything.
        self._host_header = parts.netloc.rpartition("@")[2].encode() + (
            b"\r\nauthorization: %b" % authorization.encode() if authorization else b""
        )
        self._headers = {"authorization": authorization} if authorization else {}
        self._client_tls: ssl.SSLContext | bool = False
        self.idle: deque[EngineConnection] = deque()
        self.heads: dict[bytes, Head] = {}
        self._pool_tls: ssl.SSLContext | None = None
        self._client: httpx2.AsyncClient | None = None
        self._outdated: httpx2.AsyncClient | None = None  # with the certificates before these

    async def ask(
        self, path: bytes, body: bytes, request_id: str, sink: Sink, *, trace: bytes = b"", fresh: bool = False
    ) -> EngineConnection:
        """POSTs a JSON body; the answer goes to `sink`. `fresh` forbids a kept-alive connection.

        trace: header lines of the request's trace, if it has one. EngineUnreachable if no connection can be had,
        OutOfFiles if that is this process' own fault.
        """
        request = _REQUEST % (self.prefix, path, self._host_header, request_id.encode(), trace, len(body), body)
        try:
            return await self._send_on(request, sink, fresh=fresh)
        except EngineUnreachable as error:  # clients must not learn addresses behind the gateway
            log.warning("no connection to the engine at %s: %s", self.url, error.message)
            raise

    def ask_kept(
        self, path: bytes, body: bytes, request_id: str, sink: Sink, trace: bytes = b""
    ) -> EngineConnection | None:
        """As `ask`, on a connection that is open already; None, and nothing sent, if there is none."""
        connection = self._kept()
        if connection is not None:
            request = _REQUEST % (self.prefix, path, self._host_header, request_id.encode(), trace, len(body), body)
            connection.ask(request, sink)
        return connection

    def _kept(self) -> EngineConnection | None:
        while self.idle:
            connection = self.idle.pop()  # the most recently used: its path is warm, and the oldest can time out
            if not connection.transport.is_closing():
                return connection
        return None

    async def _send_on(self, request: bytes, sink: Sink, *, fresh: bool) -> EngineConnection:
        connection = (None if fresh else self._kept()) or await self._connect()
        connection.ask(request, sink)
        return connection

    async def _connect(self) -> EngineConnection:
        loop = asyncio.get_running_loop()
        tls = None if self.tls is None else self.tls.context()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(self), self.host, self.port, ssl=tls
                )
        except TimeoutError:
            raise EngineUnreachable("The engine did not accept a connection in time.") from None
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                raise _out_of_files() from None
            if (wrong := untrusted(error)) is not None:
                raise wrong from None
            raise EngineUnreachable("The engine cannot be reached.") from None
        return connection

    def forget(self, connection: EngineConnection) -> None:
        """A connection was closed: it must not be handed out again."""
        if connection in self.idle:
            self.idle.remove(connection)

    async def get(self, path: str, timeout_s: float = 5.0) -> Answer:
        """A small request of the gateway itself (health, metrics, models). EngineGone if there is no answer,
        OutOfFiles."""
        if self.tls is not None:
            self._drop_outdated(self.tls.context())
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await self._got(path, fresh=False)
                except EngineHungUp:  # it may have just closed a kept connection
                    return await self._got(path, fresh=True)
        except TimeoutError:
            raise EngineGone(f"The engine at {self.url} does not answer {path} within {timeout_s:g} s.") from None
        except EngineHungUp:
            if self.tls is not None:
                raise EngineUntrusted(NO_WORD) from None
            raise EngineGone(f"The engine at {self.url} closes the connection without answering {path}.") from None

    def _drop_outdated(self, context: ssl.SSLContext) -> None:
        """Kept connections were made with earlier certificates: closes them, so that new ones take their place."""
        if context is not self._pool_tls:
            self._pool_tls = context
            for connection in list(self.idle):
                connection.transport.close()

    async def _got(self, path: str, *, fresh: bool) -> Answer:
        question = Question()
        request = _QUESTION % (self.prefix, path.encode(), self._host_header)
        connection = await self._send_on(request, question, fresh=fresh)
        try:
            return await question.answer
        finally:
            connection.abandon(question)

    async def post(
        self, path: str, body: Any, timeout_s: float = 30.0, headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        """A small JSON request of the gateway itself. EngineGone if there is no answer, OutOfFiles."""
        return await self._send("POST", path, body, timeout_s, headers)

    async def _send(
        self, method: str, path: str, body: Any, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        client = await self._questions()
        try:
            return await client.request(method, path, json=body, timeout=timeout_s, headers=headers)
        except (httpx2.HTTPError, ssl.SSLError) as error:
            if is_out_of_files(error):
                raise _out_of_files() from None
            if (wrong := untrusted(error)) is not None:
                raise wrong from None
            if isinstance(error, httpx2.ReadError) and self.tls is not None:
                raise EngineUntrusted(NO_WORD) from None
            raise EngineGone(
                f"The engine at {self.url} does not answer {path}: {str(error) or type(error).__name__}."
            ) from None

    async def _questions(self) -> httpx2.AsyncClient:
        """The client for requests of the gateway itself, with the current certificates."""
        # Without `verify=False` for plain HTTP, 50 ms go into certificates that nobody will ask for.
        verify = False if self.tls is None else self.tls.context()
        if self._client is not None and self._client_tls is not verify:
            # Questions may be under way on it: it is closed one renewal later.
            outdated, self._outdated, self._client = self._outdated, self._client, None
            if outdated is not None:
                await outdated.aclose()
        if self._client is None:
            self._client_tls = verify
            self._client = httpx2.AsyncClient(base_url=self.url, trust_env=False, verify=verify, headers=self._headers)
        return self._client

    async def close(self) -> None:
        """Closes every idle connection."""
        while self.idle:
            self.idle.pop().transport.close()
        for client in (self._client, self._outdated):
            if client is not None:
                await client.aclose()
