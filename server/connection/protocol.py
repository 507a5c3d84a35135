"""HTTP from clients: relayed routes are handled here, below ASGI; everything else goes to FastAPI.

uvicorn's own protocol does the connection's housekeeping (keep-alive, pipelining, shutdown); a relayed request
takes the place of its ASGI cycle.
"""

import asyncio
import fcntl
import http
import logging
import os
import re
import termios
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from functools import lru_cache
from hashlib import blake2b
from ipaddress import ip_address
from itertools import count
from typing import Any, NamedTuple, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.connection.coding import DECODERS, BadCoding, BodyDecoder
from server.connection.forwarded import Network, client_of
from server.connection.intake import BodyBudget, Connections
from server.engine.client import MOST_HEADS, EngineConnection, keyed
from server.request.call import Route
from server.request.directory import credential
from server.request.errors import (
    BadRequest,
    HeadTooLarge,
    NotAllowed,
    Overloaded,
    ServiceError,
    Stopping,
    TooLarge,
    TooManyConnections,
    TooSlow,
    UnsupportedMediaType,
    WrongMethod,
    error_event,
    error_object,
    status_of,
)
from server.request.schemas import ROUTES
from server.request.tenants import Tenant

log = logging.getLogger("evenhand.edge")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_STATUS = {
    code: b"HTTP/1.1 %d %b\r\n" % (code, http.HTTPStatus(code).phrase.encode()) for code in map(int, http.HTTPStatus)
}
_UPLOADS = b"/v1/files"
# Heads with one of these are not cached: they differ for each request, or change how the body is read.
_ONE_OF_ITS_OWN = frozenset(
    (b"x-request-id", b"traceparent", b"transfer-encoding", b"upgrade", b"expect", b"content-encoding")
)
_LISTS = (b"forwarded", b"x-forwarded-for")  # every line of these counts: some proxies add their own
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b":\n\n"
_ANTHROPIC = b"/v1/messages"  # whose clients read the request's id from another header
_PROBES_S = (0.25, 1.0, 4.0, 16.0)  # pauses between writes that probe a half-closed connection
# How long a refused client may keep sending: closing at once would reset the connection, and the client could lose the
# refusal before it reads it (RFC 9112, 9.6).
_LINGER_S = 2.0
_MOST_HEADERS = 128  # as objects, headers of a few bytes each take much more memory than as bytes
_MOST_QUEUED = 16
_NO_MEMORY = "The gateway has no memory left for this request's body."
_SMALL_BODY_BYTES = 64 * 1024  # up to this size, a refused request's body is discarded and the connection kept


@dataclass(frozen=True, slots=True)
class ProtocolBounds:
    """What a client may send, and how long it may take.

    head_bytes: of request line and headers together. body_bytes: of a body. upload_bytes: of a batch's input file.
    head_s: seconds for a connection's first byte and for a head to be complete. body_s: for a body.
    stall_s: seconds for which a client may read nothing of its answer; then its connection is closed.
    local_names: without tenants, the Host header must hold a name that no web site can have; see `is_local_name`.
    """

    head_bytes: int = 32 * 1024
    body_bytes: int = 32 * 1024 * 1024
    upload_bytes: int = 200 * 1024 * 1024 + 64 * 1024  # the file, and the rest of its form
    head_s: float = 15.0
    body_s: float = 60.0
    stall_s: float = 120.0
    local_names: bool = False


class Head(NamedTuple):
    """A parsed head, cached because clients repeat it. Has the digest of the key, not the key."""

    route: Route
    headers: dict[bytes, bytes]
    credential: bytes


class Serves(Protocol):
    """The gateway, as the protocol uses it."""

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""

    def tenant_with(self, credential: bytes) -> Tenant: ...
    async def answer(self, exchange: "ClientExchange") -> None: ...
    def refused(self, path: str, error: ServiceError) -> None: ...


class Stage(IntEnum):
    """How far a relayed request and its answer are, in this order."""

    ARRIVING_IN_LINE = auto()  # pipelined behind a request that is being answered; its own body is incomplete
    ARRIVING = auto()  # its body is incomplete
    IN_LINE = auto()  # complete, behind a request that is being answered
    WAITING = auto()  # complete; its answer has not begun
    BEGUN = auto()  # the head of the answer is written, or held until the first piece of the body
    STREAMING = auto()  # the head and a first HTTP chunk are written
    OVER = auto()  # the answer is complete, or the request was dropped


_STREAMING = Stage.STREAMING  # looked up for every token


class ClientExchange:
    """One relayed request on its connection, and its answer. Takes the place of uvicorn's request-response cycle.

    headers: by lower-case name, without those that hold a key; of a repeated header, the first value.
    received: the body, until the gateway takes it. held_bytes: memory booked for it, until the answer is complete.
    credential: the digest of the request's key, empty without one. tenant: known when the head is complete.
    refusal: why the request is not served; its body is then discarded.
    chunked, events: the answer's body is chunked; it consists of server-sent events.
    """

    __slots__ = (
        "edge", "route", "headers", "credential", "received", "stage", "task", "chunked", "events", "keep_alive",
        "engine_side", "request_id", "http10", "extra_headers", "expects_continue", "transport", "tenant", "refusal",
        "held_bytes",
    )  # fmt: skip

    response_complete = False  # uvicorn asks the connection's cycle; an exchange that is over is not its cycle any more

    def __init__(self, edge: "GatewayProtocol", head: Head, *, keep_alive: bool, http10: bool) -> None:
        self.edge = edge
        self.transport = edge.transport
        self.route, self.headers, self.credential = head
        self.received: bytes | bytearray = b""
        self.stage = Stage.ARRIVING
        self.task: asyncio.Task[None] | None = None
        self.chunked = False
        self.events = False
        self.keep_alive = keep_alive
        self.http10 = http10
        self.expects_continue = edge.expect_100_continue
        self.engine_side: EngineConnection | None = None
        self.request_id = request_id_in(self.headers)
        self.extra_headers = b""
        self.tenant: Tenant | None = None
        self.refusal: ServiceError | None = None
        self.held_bytes = 0

    @property
    def client(self) -> str:
        """The client's address, from the headers of trusted proxies if there are any."""
        peer = self.edge.client
        return client_of(peer[0] if peer else "", self.headers, self.edge.trusted)

    @property
    def begun(self) -> bool:
        """Whether the answer has begun: from then on its status cannot change."""
        return self.stage >= Stage.BEGUN

    # the request
    def add(self, data: bytes) -> None:
        """A further piece of the body. Pieces become one buffer: a list of them could weigh ten times the body."""
        if isinstance(self.received, bytearray):
            self.received += data
        else:
            self.received = bytearray(self.received) + data

    def release(self) -> None:
        """Gives up the body and the memory booked for it."""
        self.received = b""
        if self.held_bytes and self.tenant is not None:
            self.edge.bodies.give_back(self.tenant.name, self.held_bytes)
            self.held_bytes = 0

    # the answer
    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        """Writes the head. Without a length the body is chunked (HTTP/1.0: ended by closing)."""
        self.stage = Stage.BEGUN
        self.events = content_type.startswith(b"text/event-stream")
        name = self.request_id.encode()
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self.http10:
            framing, self.keep_alive = b"", False
        else:
            framing, self.chunked = b"transfer-encoding: chunked\r\ncache-control: no-cache\r\n", True
        if self.edge.parting:
            self.keep_alive = False
        self.edge.hold = b"%bcontent-type: %b\r\nx-request-id: %b\r\n%b%b%b%b\r\n" % (
            _STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status,
            content_type,
            name,
            b"request-id: %b\r\n" % name if self.route.anthropic else b"",
            self.extra_headers,
            framing,
            b"" if self.keep_alive else b"connection: close\r\n",
        )

    def write(self, data: bytes) -> None:
        """A piece of the body, sent at once, together with the head if that still waits."""
        edge = self.edge
        if edge.transport.is_closing():  # the client is gone: `connection_lost` will cancel the task
            return
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if edge.hold:
            data = edge.hold + data
            edge.hold = b""
            if self.chunked:
                self.stage = _STREAMING
        edge.transport.write(data)

    def forward(self, chunk: bytes, at: int) -> None:
        """A piece of the body that is framed already: `chunk[at:-2]` in an HTTP chunk."""
        if self.stage is not _STREAMING:
            self.write(chunk[at:-2])
        elif not self.transport.is_closing():
            self.transport.write(chunk)

    def end(self) -> None:
        """The answer is complete."""
        edge = self.edge
        self.engine_side = None  # its connection may carry another answer from here on
        if edge.transport.is_closing():
            return
        last = edge.hold + (b"0\r\n\r\n" if self.chunked else b"")
        edge.hold = b""
        if last:
            edge.transport.write(last)
        self.stage = Stage.OVER
        if not self.keep_alive:
            edge.transport.close()
        edge.on_response_complete()

    def fail(self, error: ServiceError) -> None:
        """Says what went wrong: with its status, as the last event of a stream, or by closing once a body has begun."""
        if self.stage is Stage.OVER or self.edge.transport.is_closing():
            return
        if self.begun:
            self._break_off(error)
            return
        if error.retry_after is not None:
            self.extra_headers += b"retry-after: %d\r\n" % error.retry_after
        body = error_object(error, anthropic=self.route.anthropic)
        self.begin(status_of(error), b"application/json", len(body))
        self.write(body)
        self.end()

    def _break_off(self, error: ServiceError) -> None:
        if self.chunked and self.events:
            self.write(error_event(error, self.route.dialect))
            self.end()
            return
        self.edge.transport.abort()  # a body cut short must not look like a whole one

    def settled(self, task: asyncio.Task[None]) -> None:
        """The task has ended: whatever happened in it, a client that is still connected gets an answer."""
        self.edge.tasks.discard(task)
        self.task = None
        self.release()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("request %s failed inside the gateway", self.request_id, exc_info=error)
        if self.stage is Stage.OVER or self.edge.transport.is_closing():
            return
        if error is None:
            self.fail(Stopping("The gateway is shutting down: retry the request.", retry_after_s=5.0))
        else:
            self.fail(ServiceError("The gateway failed on this request; see its log for the reason."))

    def flows_from(self, connection: EngineConnection | None) -> None:
        """Sets the engine connection that feeds the answer: it is paused while the client does not keep up."""
        self.engine_side = connection
        if connection is not None and self.edge.flow.write_paused:
            connection.pause()


class Arriving(Enum):
    """Which part of a request is arriving on a connection."""

    NOTHING = auto()  # the last one is complete, or what comes is passed over
    HEAD = auto()
    BODY = auto()


class GatewayProtocol(HttpToolsProtocol):
    """One client connection.

    current: what is being answered. cycle (uvicorn's name): the newest request, which may still be arriving or wait
    behind it. Both are None as soon as their answer is complete.
    last_words: the refusal of bytes that are not a request, until the answers before it are sent.
    decoder: of the arriving body, None if it is not compressed.
    unread: bytes of its answer that a slow client had not read at the last look.
    idle_since: when the last answer was complete, on the loop's clock.
    Shared by all connections: bodies, open, heads (by their digest); exchange_type, the class of exchanges; trusted,
    proxies whose address headers count; parting: each connection closes with its next answer, because the gateway is
    about to stop.
    """

    gateway: Serves
    bounds: ProtocolBounds
    bodies: BodyBudget
    open: Connections
    heads: dict[bytes, Head]
    parting = False
    exchange_type: type[ClientExchange] = ClientExchange
    trusted: Sequence[Network] = ()
    cycle: Any  # uvicorn's RequestResponseCycle, or a ClientExchange in its place

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # uvicorn's own arguments, handed through
        super().__init__(*args, **kwargs)
        self.hold = b""
        self.arriving = Arriving.NOTHING
        self.head_size = 0
        self.unread_size = 0
        self.body_size = 0
        self.most_body = 0
        self.declared_size = 0
        self.hosts = 0
        self.host = b""
        self.chunked_body = False
        self.decoder: BodyDecoder | None = None
        self.current: Any = None
        self.last_words = b""
        self.deadline: asyncio.TimerHandle | None = None
        self.deadline_s = 0.0
        self.stall: asyncio.TimerHandle | None = None
        self.unread = 0
        self.idle_since = 0.0

    # the connection
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's protocol narrows it as well
        if self.open.opened(self):
            self._await_rest()
        else:
            error = TooManyConnections("All connections of this gateway are in use.", retry_after_s=1.0)
            self.gateway.refused("", error)
            self.transport.write(_refusal(error, request_id_in({}), anthropic=False))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the request in progress and breaks the reference cycles of the connection's objects, which would
        otherwise keep the client's data until the garbage collector runs."""
        self._no_deadline()
        if self.stall is not None:
            self.stall.cancel()
        self._unset_keepalive_if_required()
        self.open.closed(self)
        exchange, newest = self.current, self.cycle
        # uvicorn wakes its own application, if that is what runs; what came behind it has not been started.
        self.cycle = None if isinstance(exchange, ClientExchange) else exchange
        super().connection_lost(exc)
        if isinstance(exchange, ClientExchange) and exchange.task is not None:
            exchange.task.cancel()
        for cycle in (newest, *(waiting for waiting, _ in self.pipeline)):
            if isinstance(cycle, ClientExchange) and cycle.task is None:
                cycle.release()
        self.pipeline.clear()
        self.current = self.cycle = None
        self.headers = []
        del self.parser  # it holds this object's callbacks

    def give_way(self) -> None:
        """Closes this idle connection to make room for a new one."""
        self.transport.abort()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's own narrows asyncio's
        """The client sends no more. Some clients shut down their side and still want their answer, most are gone: only
        writing to them tells which (RFC 9110, 15.2: interim responses may precede any answer)."""
        cycle = self.cycle
        arriving = self.arriving is not Arriving.NOTHING
        if arriving or cycle is None or getattr(cycle, "http10", False) or self.scheme == "https":
            return None  # TLS has no half of a connection
        cycle.keep_alive = False
        self._probe_client(0)
        return True

    def _probe_client(self, count: int) -> None:
        """Writes bytes without meaning. A client that is gone answers with a reset, which the next write meets."""
        self.deadline = None
        exchange = self.current
        if not isinstance(exchange, ClientExchange) or self.transport.is_closing():
            return
        if not exchange.begun:
            self.transport.write(_CONTINUE)
        elif exchange.events:
            exchange.write(_COMMENT)
        if count < len(_PROBES_S):
            self.deadline = self.loop.call_later(_PROBES_S[count], self._probe_client, count + 1)

    def data_received(self, data: bytes) -> None:
        if self.last_words:
            self._pass_over(len(data))
            return
        before = self.arriving
        expects_head = self.cycle is None and before is Arriving.NOTHING
        key, length, at = keyed(data) if expects_head and not self.transport.is_closing() else (b"", 0, 0)
        if key and len(data) == at + length <= self.bounds.body_bytes:
            digest = blake2b(key, digest_size=16, key=_DIGEST_KEY).digest()
            head = self.heads.get(digest)
            if head is not None and self._start_known(head, data[at:]):
                return
            self._feed(data)
            self._remember(digest, length)
        else:
            self._feed(data)
        if self.arriving is not Arriving.NOTHING or self.cycle is None:
            if before is self.arriving is Arriving.HEAD:  # a header without an end shows only in the bytes that arrive
                self.unread_size += len(data)
                self._bound_head(self.unread_size)
            self._await_rest()
        elif self.deadline is not None:
            self._no_deadline()

    def _start_known(self, head: Head, body: bytes) -> bool:
        """Starts a whole request with a cached head; the parser stays between two messages. False if the request is
        refused: then the parser gets it."""
        try:
            tenant = self.gateway.tenant_with(head.credential)
        except ServiceError:  # the key is not valid any more
            return False
        if not self.bodies.take(tenant.name, len(body)):
            return False
        if self.deadline is not None:
            self._no_deadline()
        self.cycle = exchange = self.exchange_type(self, head, keep_alive=True, http10=False)
        exchange.tenant = tenant
        exchange.held_bytes = len(body)
        exchange.received = body
        self.open.spare.pop(self, None)
        self._start(exchange)
        return True

    def _remember(self, digest: bytes, length: int) -> None:
        """Caches this head, if the head alone determines how the request is read."""
        exchange = self.cycle
        if (
            not isinstance(exchange, ClientExchange)
            or not (exchange.stage is Stage.WAITING and exchange.keep_alive)
            or exchange.refusal is not None
            or exchange.expects_continue
            or not self.declared_size == self.body_size == length
            or not _ONE_OF_ITS_OWN.isdisjoint(exchange.headers)
        ):
            return
        if len(self.heads) >= MOST_HEADS:
            self.heads.clear()
        self.heads[digest] = Head(exchange.route, exchange.headers, exchange.credential)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._pass_over_upgrade(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP/1.1."))

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Ignores an offer of HTTP/2 or WebSocket, which some clients make with every request. The parser stops there
        and would lose the body, so it parses the head again without the offer."""
        method = self.parser.get_method()
        if method == b"CONNECT" or self.arriving is Arriving.NOTHING:
            self._refuse(WrongMethod("CONNECT is not supported."))
            return
        head = [b"%b %b HTTP/1.1\r\n" % (method, self.url)]
        head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join(head) + b"\r\n" + rest)

    # time
    def _await_rest(self) -> None:
        """Sets the deadline for the rest of a request. One limit for the head, one for the body."""
        if self.last_words:
            return
        if self.pipeline or self.transport.is_closing():  # behind a queued request, the gateway itself stops reading
            self._no_deadline()
            return
        limit_s = self.bounds.body_s if self.arriving is Arriving.BODY else self.bounds.head_s
        if self.deadline is not None:
            if self.deadline_s == limit_s and not self._uploads():
                return  # an upload may take long as long as it makes progress
            self.deadline.cancel()
        self.deadline_s = limit_s
        self.deadline = self.loop.call_later(limit_s, self._too_slow)

    def _uploads(self) -> bool:
        """Whether what arrives is a file, which goes to disk and not to memory."""
        return self.most_body > self.bounds.body_bytes

    def _no_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _too_slow(self) -> None:
        self.deadline = None
        if self.transport.is_closing():
            return
        if self.arriving is not Arriving.NOTHING:
            self._refuse(TooSlow("The request did not arrive in time."))
        else:
            self.transport.close()

    # bytes that are not a request
    def _refuse(self, error: ServiceError) -> None:
        """Answers bytes that do not become a request (not HTTP, too much, too slow) and closes."""
        if self.transport.is_closing() or self.last_words:
            return
        self.gateway.refused("", error)
        request_id = request_id_in(dict(reversed(self.headers or ())))
        if self.arriving is Arriving.BODY:
            request_id = getattr(self.cycle, "request_id", request_id)  # whose headers are not kept here
            self._forget_newest()
        self.arriving = Arriving.NOTHING
        self.last_words = _refusal(error, request_id, anthropic=self.url.startswith(_ANTHROPIC))
        self._no_deadline()
        if self.current is None:
            self._say_last()

    def _forget_newest(self) -> None:
        """Drops the request whose body cannot be received: removes it from the pipeline and wakes an application that
        waits for it."""
        cycle = self.cycle
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        if isinstance(cycle, ClientExchange):
            cycle.stage = Stage.OVER
            cycle.release()
        elif cycle is not None and cycle is self.current:
            if cycle.response_started:
                return
            cycle.disconnected = cycle.response_complete = True
            cycle.message_event.set()
            self.current = None
        self.cycle = self.current

    def _pass_over(self, size: int) -> None:
        """Discards what a refused client still sends, up to a body's length."""
        self.unread_size += size
        if self.unread_size > self.bounds.body_bytes:
            self.transport.abort()

    def _say_last(self) -> None:
        self.unread_size = 0
        self.transport.write(self.last_words)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # TLS cannot half-close
        self.flow.resume_reading()
        self.open.spare[self] = None
        self.deadline = self.loop.call_later(_LINGER_S, self.transport.close)

    # httptools callbacks
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.head_size = self.unread_size = self.body_size = self.declared_size = self.hosts = 0
        self.host = b""
        self.chunked_body = False
        ignored = self.last_words or self.transport.is_closing()
        self.arriving = Arriving.NOTHING if ignored else Arriving.HEAD

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > self.bounds.head_bytes:
            self._bound_head(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_size += len(name) + len(value) + 4
        if self.arriving is Arriving.HEAD:
            name = name.lower()
            if name == b"content-length":
                self.declared_size = int(value)
            elif name == b"host":
                self.hosts += 1
                self.host = value
            elif name == b"transfer-encoding":
                self.chunked_body = True
            elif name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            self.headers.append((name, value))
        # else it is a trailer, too late to authenticate or to change anything (RFC 9110, 6.5.1)
        if self.head_size > self.bounds.head_bytes:
            self._bound_head(self.head_size)
        elif len(self.headers) > _MOST_HEADERS:
            self._refuse(HeadTooLarge(f"The request has more than {_MOST_HEADERS} headers."))

    def _bound_head(self, size: int) -> None:
        if size > self.bounds.head_bytes and self.arriving is not Arriving.NOTHING:
            self._refuse(HeadTooLarge(f"Request line and headers exceed {self.bounds.head_bytes} bytes."))

    def on_headers_complete(self) -> None:
        if self.arriving is Arriving.NOTHING or self.parser.should_upgrade():
            return
        http10 = self.parser.get_http_version() == "1.0"
        upload = self.url == _UPLOADS and self.parser.get_method() == b"POST"
        self.most_body = self.bounds.upload_bytes if upload else self.bounds.body_bytes
        route = self._route()
        if error := self._wrong_head(http10=http10) or (self._wrong_coding() if route is None else None):
            self._refuse(error)
            return
        self.arriving = Arriving.BODY
        if route is None:
            self.open.spare.pop(self, None)
            self._hand_on()
        else:
            self._expect_body(route, http10=http10)

    def _expect_body(self, route: Route, *, http10: bool) -> None:
        """The head of a relayed request is complete: decides whether to accept its body."""
        headers = dict(reversed(self.headers))
        if self.trusted:
            headers |= self._joined(_LISTS)
        self.headers = []  # one may hold a key
        keep_alive = not http10 and self.parser.should_keep_alive()
        exchange = self.exchange_type(self, Head(route, headers, b""), keep_alive=keep_alive, http10=http10)
        pipelined = self.cycle is not None
        self.cycle = exchange
        if pipelined:  # its turn comes when the answer before it is complete
            exchange.stage = Stage.ARRIVING_IN_LINE
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]  # an exchange stands for a cycle
        exchange.refusal = self._objection(exchange)
        if exchange.refusal is not None:
            if self.declared_size > _SMALL_BODY_BYTES or exchange.expects_continue:
                self._refuse(exchange.refusal)
            return
        self.open.spare.pop(self, None)
        if exchange.expects_continue and not pipelined:
            self.transport.write(_CONTINUE)

    def _wrong_head(self, *, http10: bool) -> ServiceError | None:
        """The error in a head that the parser accepts (RFC 9112, 3.2 and 6.1), or in its position on the connection."""
        if self.hosts != 1 and not (http10 and self.hosts == 0):
            return BadRequest("The request must have exactly one Host header.")
        if self.bounds.local_names and not is_local_name(self.host) and self.gateway.is_open:
            return NotAllowed(
                "Without tenants this gateway accepts requests for localhost or an IP address only, not for the name "
                "in the request's Host header. Use one of those, set up tenants, or start the gateway with "
                "--allow-open."
            )
        if http10 and self.chunked_body:
            return BadRequest("HTTP/1.0 has no Transfer-Encoding.")
        if self.declared_size > self.most_body:
            return TooLarge(f"The body has {self.declared_size} bytes; at most {self.most_body} are allowed.")
        if len(self.pipeline) >= _MOST_QUEUED:
            return Overloaded(f"More than {_MOST_QUEUED} requests wait on this connection.")
        return None

    def _wrong_coding(self) -> ServiceError | None:
        """A body that is not relayed must not be compressed."""
        if all(name != b"content-encoding" or value == b"identity" for name, value in self.headers):
            return None
        return UnsupportedMediaType("Send this body uncompressed: only requests to a model may be compressed.")

    def _joined(self, names: Sequence[bytes]) -> dict[bytes, bytes]:
        """All lines of these headers, each header's in one."""
        lines = {name: [value for key, value in self.headers if key == name] for name in names}
        return {name: b", ".join(values) for name, values in lines.items() if values}

    def _objection(self, exchange: ClientExchange) -> ServiceError | None:
        """Why the head alone rules a request out: an unknown key, or a body that is not JSON.

        A web page can make a browser send any other content type to a gateway without keys on the reader's own machine;
        for JSON, the browser asks for permission first (the Fetch standard's CORS-safelisted types).
        """
        headers = exchange.headers
        exchange.credential = credential(headers.pop(b"authorization", None), headers.pop(b"x-api-key", None))
        try:
            exchange.tenant = self.gateway.tenant_with(exchange.credential)
        except ServiceError as error:
            return error
        coding = headers.get(b"content-encoding", b"identity").lower()
        self.decoder = None
        if coding != b"identity":
            if coding not in DECODERS:
                return UnsupportedMediaType("Send the body uncompressed, or with 'Content-Encoding: gzip' or 'zstd'.")
            self.decoder = DECODERS[coding]()
        kind = headers.get(b"content-type", b"")
        if kind == b"application/json" or kind.partition(b";")[0].strip().lower() == b"application/json":
            return None
        return UnsupportedMediaType("Send JSON, with the header 'Content-Type: application/json'.")

    def _route(self) -> Route | None:
        if self.parser.get_method() != b"POST":
            return None
        route = ROUTES.get(self.url)
        if (
            route is None
        ):  # a query, a whole URL, or a slash at its end: clients join a base URL and a path in many ways
            path = httptools.parse_url(self.url).path or b""
            route = ROUTES.get(path.removesuffix(b"/"))
        return route

    def _hand_on(self) -> None:
        """Hands a request to FastAPI. uvicorn builds the scope when a message begins; here that waits until it is
        needed."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()
        request_id = request_id_in(dict(reversed(headers))).encode()
        names = (b"x-request-id", b"request-id") if self.url.startswith(_ANTHROPIC) else (b"x-request-id",)
        self.cycle.default_headers = [*self.cycle.default_headers, *((name, request_id) for name in names)]

    def on_body(self, body: bytes) -> None:
        if self.arriving is not Arriving.BODY:
            return
        self.body_size += len(body)
        if self.body_size > self.most_body:
            self._refuse(TooLarge(f"The body exceeds {self.most_body} bytes."))
        elif isinstance(self.cycle, ClientExchange):
            self._take_in(self.cycle, body)
        elif self.cycle is not None:  # else it was answered before its body came
            super().on_body(body)

    def _take_in(self, exchange: ClientExchange, body: bytes) -> None:
        if exchange.refusal is not None or exchange.tenant is None:
            if self.body_size > _SMALL_BODY_BYTES and exchange.refusal is not None:
                self._refuse(exchange.refusal)
        elif self.decoder is not None:
            self._expand(self.decoder, exchange, exchange.tenant.name, body)
        elif not self._hold(exchange, exchange.tenant.name, body):
            self._refuse(Overloaded(_NO_MEMORY, retry_after_s=1.0))

    def _hold(self, exchange: ClientExchange, tenant: str, piece: bytes) -> bool:
        if not self.bodies.take(tenant, len(piece)):
            return False
        exchange.held_bytes += len(piece)
        if exchange.received:
            exchange.add(piece)
        else:
            exchange.received = piece
        return True

    def _expand(self, decoder: BodyDecoder, exchange: ClientExchange, tenant: str, body: bytes) -> None:
        """Decompresses a part of a body. The result is limited and booked piece by piece."""
        try:
            for piece in decoder.pieces(body):
                if exchange.held_bytes + len(piece) > self.bounds.body_bytes:
                    self._refuse(TooLarge(f"The body exceeds {self.bounds.body_bytes} bytes when decompressed."))
                    return
                if not self._hold(exchange, tenant, piece):
                    self._refuse(Overloaded(_NO_MEMORY, retry_after_s=1.0))
                    return
        except BadCoding as error:
            self._refuse(BadRequest(str(error)))

    def on_message_complete(self) -> None:
        if self.arriving is not Arriving.BODY:
            return
        if self.decoder is not None and not self.decoder.whole and self.cycle.refusal is None:
            self._refuse(BadRequest("The compressed body is truncated."))
            return
        self.decoder = None
        self.arriving = Arriving.NOTHING
        exchange = self.cycle
        if exchange is None:
            return
        if not isinstance(exchange, ClientExchange):
            super().on_message_complete()
        elif exchange.stage is Stage.ARRIVING:
            self._start(exchange)
        else:
            exchange.stage = Stage.IN_LINE

    # answers
    def _start(self, exchange: ClientExchange) -> None:
        self.current = exchange
        exchange.stage = Stage.WAITING
        if exchange.refusal is not None:
            self.gateway.refused(exchange.route.path, exchange.refusal)
            exchange.fail(exchange.refusal)
            return
        task = exchange.task = self.loop.create_task(self.gateway.answer(exchange))
        task.add_done_callback(exchange.settled)
        self.tasks.add(task)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """uvicorn calls this for the next one in a pipeline too: `app` is an ASGI application, or None."""
        if not isinstance(cycle, ClientExchange):
            self.current = cycle
            super()._start_asgi_task(cycle, app)
            return
        if cycle.stage is Stage.IN_LINE:
            self._start(cycle)
            return
        cycle.stage = Stage.ARRIVING
        if cycle.expects_continue and cycle.refusal is None:
            self.transport.write(_CONTINUE)

    def on_response_complete(self) -> None:
        """As uvicorn's own, except for its timer, which uvicorn sets again for every request."""
        self.current = None
        if not self.pipeline:
            self.cycle = None
        if self.last_words and not self.pipeline and not self.transport.is_closing():
            self._say_last()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.idle_since = self.loop.time()
            self.open.spare[self] = None
            if self.timeout_keep_alive_task is None:
                self._await_next(self.timeout_keep_alive)
        if self.arriving is not Arriving.NOTHING:
            self._await_rest()

    def _await_next(self, limit_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(limit_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that has been idle for long; restarts the timer of one that was used meanwhile."""
        self.timeout_keep_alive_task = None
        if self.arriving is not Arriving.NOTHING or self.cycle is not None:
            return  # set again when the answer is complete
        left_s = self.idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._await_next(left_s)
        else:
            super().timeout_keep_alive_handler()

    # clients that do not keep up
    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()
        if isinstance(self.current, ClientExchange) and self.current.engine_side is not None:
            self.current.engine_side.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None
        if isinstance(self.current, ClientExchange) and self.current.engine_side is not None:
            self.current.engine_side.resume()

    def _unread(self) -> int:
        """Bytes that the client's machine has not taken, here and in the kernel. The kernel reports room only once a
        third of its buffer is free, which is too seldom for a slow reader."""
        count = array("i", [0])
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, count)
        return self.transport.get_write_buffer_size() + count[0]

    def _watch_reader(self) -> None:
        self.unread = self._unread()
        self.stall = self.loop.call_later(self.bounds.stall_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Nothing is written while a client lags, so any decrease means that it has read."""
        if self._unread() < self.unread:
            self._watch_reader()
            return
        log.info("a client has not read its answer for %g s: its connection is closed", self.bounds.stall_s)
        self.transport.abort()


def _refusal(error: ServiceError, request_id: str, *, anthropic: bool) -> bytes:
    """A whole answer that says why, after which the connection closes."""
    body, name = error_object(error, anthropic=anthropic), request_id.encode()
    lines = [_STATUS[status_of(error)], b"content-type: application/json\r\nx-request-id: ", name, b"\r\n"]
    if anthropic:
        lines += [b"request-id: ", name, b"\r\n"]
    if error.retry_after is not None:
        lines.append(b"retry-after: %d\r\n" % error.retry_after)
    return b"".join([*lines, b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body), body])


_DIGEST_KEY = os.urandom(32)  # so that nobody can make two heads of one digest
_PROCESS = os.urandom(10).hex()  # so that the ids of two gateways differ
_serial = count()


def request_id_in(headers: Mapping[bytes, bytes]) -> str:
    """A request's id: its own x-request-id if that is safe to use, otherwise a unique one."""
    own = headers.get(b"x-request-id")
    if own is not None and _SAFE_ID.fullmatch(own):
        return own.decode()
    return f"{_PROCESS}{next(_serial):012x}"


@lru_cache(maxsize=256)
def is_local_name(host: bytes) -> bool:
    """Whether a Host header cannot be a web site's: an IP address, `localhost`, or another name without a dot.

    A page can have its own domain resolve to 127.0.0.1 once it is loaded, and the browser then takes a gateway there
    for a part of that site (DNS rebinding). The Host header still names the domain.
    """
    name = host.decode("latin-1").rpartition("@")[2].lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def protocol_for(
    gateway: Serves,
    bounds: ProtocolBounds,
    bodies: BodyBudget,
    connections: Connections,
    kind: type[GatewayProtocol] = GatewayProtocol,
    **more: object,
) -> type[GatewayProtocol]:
    """The protocol class for uvicorn, with the gateway it serves and what its connections share; `more` as named in the
    class."""
    shared = {"gateway": gateway, "bounds": bounds, "bodies": bodies, "open": connections, "heads": {}}
    return type("GatewayProtocol", (kind,), shared | more)
