"""Where clients' bytes come in: relayed routes are answered right here, below ASGI; all else goes on to FastAPI.

uvicorn's own protocol does the connection's housekeeping (keep-alive, pipelining, shutdown); a relayed request
takes the place of its ASGI cycle.
"""

import asyncio
import http
import logging
import os
import re
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.engine.client import MOST_HEADS, Connection, keyed
from server.request.call import Route
from server.request.errors import (
    BadRequest,
    HeadTooLarge,
    ServiceError,
    Stopping,
    TooLarge,
    TooSlow,
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
# Headers that make a head different every time, or say how its body comes: such a head is read anew.
_ONE_OF_ITS_OWN = frozenset((b"x-request-id", b"traceparent", b"transfer-encoding", b"upgrade", b"expect"))
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b":\n\n"
_KNOCKS_S = (0.25, 1.0, 4.0, 16.0)  # pauses between the signs of life that a half-closed connection gets


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may send, and how long it may take.

    head_bytes: of request line and headers together. body_bytes: of a body.
    head_s: seconds for a connection's first byte and for a head to be complete. body_s: for a body.
    stall_s: seconds that a client may leave its answer unread; after that its place goes to somebody else.
    """

    head_bytes: int = 32 * 1024
    body_bytes: int = 32 * 1024 * 1024
    head_s: float = 15.0
    body_s: float = 60.0
    stall_s: float = 120.0


class Head(NamedTuple):
    """A request's head that the parser has read once, and that a client sends again and again."""

    route: Route
    headers: list[tuple[bytes, bytes]]


class Serves(Protocol):
    """What the edge hands a complete request to."""

    async def answer(self, exchange: "Exchange") -> None: ...
    def refused(self, path: str, error: ServiceError) -> None: ...


class Exchange:
    """One relayed request on its connection: what came, and the way back. Stands where uvicorn keeps a cycle.

    flowing: the head and a first chunk of the body have been written.
    """

    __slots__ = (
        "edge", "route", "headers", "received", "complete", "task", "begun", "chunked", "events", "keep_alive",
        "engine_side", "disconnected", "response_complete", "message_event", "request_id", "http10", "extra_headers",
        "queued", "expects_continue", "transport", "flowing",
    )  # fmt: skip

    tenant: Tenant | None = None  # its headers say who asks
    _unused_event = asyncio.Event()  # uvicorn sets its cycle's event when a connection is lost; nobody waits on ours

    def __init__(self, edge: "Edge", route: Route, *, keep_alive: bool, http10: bool) -> None:
        self.edge = edge
        self.transport = edge.transport
        self.route = route
        self.headers = edge.headers
        self.received: bytes | bytearray = b""
        self.queued = False
        self.complete = False
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.chunked = False
        self.flowing = False
        self.events = False
        self.keep_alive = keep_alive
        self.http10 = http10
        self.expects_continue = edge.expect_100_continue
        self.engine_side: Connection | None = None
        self.disconnected = False
        self.response_complete = False
        self.message_event = self._unused_event
        self.request_id = ""
        self.extra_headers = b""

    # what came
    def header(self, name: bytes) -> bytes | None:
        """A header's value by its lower-case name, None if it is not there. The first one counts."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def receive(self, data: bytes) -> None:
        """A piece of the body. Many small pieces become one buffer: a list of them would weigh ten times the body."""
        if not self.received:
            self.received = data
        elif isinstance(self.received, bytearray):
            self.received += data
        else:
            self.received = bytearray(self.received) + data

    @property
    def body(self) -> bytes:
        return bytes(self.received)

    def name_it(self) -> str:
        """The request id: the client's own if it is harmless, else a fresh one."""
        if not self.request_id:
            self.request_id = request_id_in(self.headers)
        return self.request_id

    # the answer
    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        """Writes the head. Without a length the body is chunked (HTTP/1.0: ended by closing)."""
        self.begun = True
        self.events = content_type.startswith(b"text/event-stream")
        head = [
            _STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status,
            b"content-type: ", content_type,
            b"\r\nx-request-id: ", self.request_id.encode(), b"\r\n", self.extra_headers,
        ]  # fmt: skip
        if length is not None:
            head.append(b"content-length: %d\r\n" % length)
        elif self.http10:
            self.keep_alive = False
        else:
            self.chunked = True
            head.append(b"transfer-encoding: chunked\r\ncache-control: no-cache\r\n")
        if self.edge.parting:
            self.keep_alive = False
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        self.edge.hold = b"".join(head)

    def write(self, data: bytes) -> None:
        """A piece of the body, sent at once, together with the head if that still waits."""
        edge = self.edge
        if edge.transport.is_closing():  # the client is gone and `connection_lost` on its way: it will cancel the task
            return
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if edge.hold:
            data = edge.hold + data
            edge.hold = b""
            self.flowing = self.chunked
        edge.transport.write(data)

    def forward(self, chunk: bytes, at: int) -> None:
        """A piece of the body that is framed already: `chunk[at:-2]` in an HTTP chunk."""
        if not self.flowing:
            self.write(chunk[at:-2])
        elif not self.transport.is_closing():
            self.transport.write(chunk)

    def end(self) -> None:
        """The answer is complete."""
        edge = self.edge
        self.engine_side = None  # its connection may carry somebody else's answer from here on
        self.received = b""  # this object stays until the connection's next request
        if edge.transport.is_closing():
            return
        last = edge.hold + (b"0\r\n\r\n" if self.chunked else b"")
        edge.hold = b""
        if last:
            edge.transport.write(last)
        self.response_complete = True
        if not self.keep_alive:
            edge.transport.close()
        edge.on_response_complete()

    def fail(self, error: ServiceError) -> None:
        """Says what went wrong: with its status, as the last event of a stream, or by closing once a body has begun."""
        if self.disconnected or self.response_complete:
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
            self.write(error_event(error, anthropic=self.route.anthropic))
            self.end()
            return
        self.edge.transport.abort()  # a body cut short must not look like a whole one

    def settled(self, task: asyncio.Task[None]) -> None:
        """The task has ended. Whatever happened in it, a client that is still there has its answer."""
        self.edge.tasks.discard(task)
        self.task = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("request %s failed inside the gateway", self.request_id, exc_info=error)
        if self.disconnected or self.response_complete or self.edge.transport.is_closing():
            return
        if error is None:
            self.fail(Stopping("The gateway is stopping: ask again.", retry_after_s=5.0))
        else:
            self.fail(ServiceError("The gateway failed on this request; its log has the reason."))

    def flows_from(self, connection: Connection | None) -> None:
        """Which engine connection feeds the answer: it is paused while the client does not keep up."""
        self.engine_side = connection
        if connection is not None and self.edge.flow.write_paused:
            connection.pause()


class Edge(HttpToolsProtocol):
    """One client connection.

    in_message: a request has begun to arrive and is not complete; in_head: nor is its head.
    current: what is being answered; uvicorn's `cycle` is the newest, which may still be arriving or wait behind it.
    last_words: the refusal of bytes that made no request, while answers before it are on their way.
    heads: what the parser has said of heads, for all connections.
    parting: for all connections, too: each closes with its next answer, for the gateway is about to stop.
    idle_since: when the last answer was complete, on the loop's clock.
    """

    gateway: Serves
    bounds: Bounds
    heads: dict[bytes, Head]
    parting = False
    cycle: Any  # uvicorn's RequestResponseCycle, or an Exchange in its place

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # uvicorn's own arguments, handed through
        super().__init__(*args, **kwargs)
        self.hold = b""
        self.in_message = False
        self.in_head = False
        self.head_size = 0
        self.unread_size = 0
        self.body_size = 0
        self.declared_size = 0
        self.current: Any = None
        self.last_words = b""
        self.deadline: asyncio.TimerHandle | None = None
        self.deadline_s = 0.0
        self.stall: asyncio.TimerHandle | None = None
        self.idle_since = 0.0

    # the connection
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's protocol narrows it as well
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_deadline()
        if self.stall is not None:
            self.stall.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        exchange = self.current
        if isinstance(exchange, Exchange) and not exchange.response_complete:
            exchange.disconnected = True
            if exchange.task is not None:
                exchange.task.cancel()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's own narrows asyncio's
        """The client sends no more. Some shut down their side and still want their answer, most are gone: only what is
        written to them tells one from the other (RFC 9110, 15.2: any answer may have interim ones before it)."""
        cycle = self.cycle
        if self.in_message or self._idle() or getattr(cycle, "http10", False):
            return None
        cycle.keep_alive = False
        self._knock(0)
        return True

    def _knock(self, count: int) -> None:
        """Writes what means nothing. A client that is gone answers with a reset, which the next write meets."""
        self.deadline = None
        exchange = self.current
        if not isinstance(exchange, Exchange) or exchange.response_complete or self.transport.is_closing():
            return
        if not exchange.begun:
            self.transport.write(_CONTINUE)
        elif exchange.events:
            exchange.write(_COMMENT)
        if count < len(_KNOCKS_S):
            self.deadline = self.loop.call_later(_KNOCKS_S[count], self._knock, count + 1)

    def data_received(self, data: bytes) -> None:
        if self.last_words:
            return
        was_in_head = self.in_head
        if self.in_message or not self._idle() or self.transport.is_closing():
            self._feed(data)
        else:
            key, length, at = keyed(data)
            whole = bool(key) and len(data) == at + length <= self.bounds.body_bytes
            head = self.heads.get(key) if whole else None
            if head is not None:
                self._start_known(head, data[at:])
                return
            self._feed(data)
            if whole:
                self._remember(key, length)
        if self.in_message or self._idle():
            if was_in_head and self.in_head:  # a header without an end shows only in the bytes that arrive
                self.unread_size += len(data)
                self._bound_head(self.unread_size)
            self._await_rest()
        elif self.deadline is not None:
            self._no_deadline()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_known(self, head: Head, body: bytes) -> None:
        """A whole request whose head has been read before. The parser stands between two messages, and stays there."""
        if self.deadline is not None:
            self._no_deadline()
        self.headers = head.headers
        exchange = Exchange(self, head.route, keep_alive=True, http10=False)
        exchange.request_id = fresh_id()
        exchange.received = body
        exchange.complete = True
        self.cycle = exchange
        self._start(exchange)

    def _remember(self, key: bytes, length: int) -> None:
        """Keeps what the parser said of this head, if it said of it all that matters."""
        exchange = self.cycle
        if (
            not isinstance(exchange, Exchange)
            or not (exchange.complete and exchange.keep_alive)
            or exchange.expects_continue
            or not self.declared_size == self.body_size == length
            or not _ONE_OF_ITS_OWN.isdisjoint(name for name, _ in exchange.headers)
        ):
            return
        if len(self.heads) >= MOST_HEADS:
            self.heads.clear()
        self.heads[key] = Head(exchange.route, exchange.headers)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._pass_over_upgrade(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self._refuse(BadRequest("The request is not valid HTTP/1.1."))

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """An offer of HTTP/2 or WebSocket, which some clients make with every request. The parser stops at it, and with
        it the body would be lost: the head is read again without the offer."""
        method = self.parser.get_method()
        if method == b"CONNECT" or not self.in_message:
            self._refuse(WrongMethod("There is no CONNECT here."))
            return
        head = [b"%b %b HTTP/1.1\r\n" % (method, self.url)]
        head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join(head) + b"\r\n" + rest)

    # time
    def _await_rest(self) -> None:
        """Sees to it that what is missing of a request comes in time. One limit for the head, one for the body."""
        if self.pipeline or self.transport.is_closing():  # behind a queued request it is us who do not read
            self._no_deadline()
            return
        limit_s = self.bounds.body_s if self.in_message and not self.in_head else self.bounds.head_s
        if self.deadline is not None:
            if self.deadline_s == limit_s:
                return
            self.deadline.cancel()
        self.deadline_s = limit_s
        self.deadline = self.loop.call_later(limit_s, self._too_slow)

    def _no_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _too_slow(self) -> None:
        self.deadline = None
        if self.transport.is_closing():
            return
        if self.in_message:
            self._refuse(TooSlow("The request did not arrive in time."))
        else:
            self.transport.close()

    # what is no request
    def _refuse(self, error: ServiceError) -> None:
        """Answers bytes that do not become a request (not HTTP, too much, too slow) and closes."""
        if self.transport.is_closing() or self.last_words:
            return
        self.gateway.refused("", error)
        if self.in_message and not self.in_head:
            self._forget_newest()
        self.in_message = self.in_head = False
        body = error_object(error)
        words = (
            b"%bcontent-type: application/json\r\nx-request-id: %b\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        ) % (_STATUS[status_of(error)], request_id_in(self.headers or []).encode(), len(body), body)
        self.last_words = words
        if self.current is None or self.current.response_complete:
            self._say_last()

    def _forget_newest(self) -> None:
        """The request whose body cannot be had: its place in the pipeline goes, an application that waits is told."""
        cycle = self.cycle
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        if isinstance(cycle, Exchange):
            cycle.response_complete = True
            cycle.received = b""
        elif cycle is self.current:
            if cycle.response_started:
                return
            cycle.disconnected = cycle.response_complete = True
            cycle.message_event.set()

    def _say_last(self) -> None:
        self.transport.write(self.last_words)
        self.transport.close()

    # httptools callbacks
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.head_size = self.unread_size = self.body_size = self.declared_size = 0
        self.in_message = self.in_head = not (self.last_words or self.transport.is_closing())

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._bound_head(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self.declared_size = int(value)
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        self.headers.append((name, value))
        self.head_size += len(name) + len(value) + 4
        if self.head_size > self.bounds.head_bytes:
            self._bound_head(self.head_size)

    def _bound_head(self, size: int) -> None:
        if size > self.bounds.head_bytes and self.in_message:
            self._refuse(HeadTooLarge(f"Request line and headers exceed {self.bounds.head_bytes} bytes."))

    def on_headers_complete(self) -> None:
        if not self.in_message or self.parser.should_upgrade():
            return
        if self.declared_size > self.bounds.body_bytes:
            allowed = self.bounds.body_bytes
            self._refuse(TooLarge(f"The body has {self.declared_size} bytes; {allowed} are allowed."))
            return
        self.in_head = False
        route = self._route()
        if route is None:
            self._hand_on()
            return
        http10 = self.parser.get_http_version() == "1.0"
        exchange = Exchange(self, route, keep_alive=not http10 and self.parser.should_keep_alive(), http10=http10)
        exchange.queued = not self._idle()
        self.cycle = exchange
        if exchange.queued:  # pipelined: its turn comes when the answer before it is complete
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]  # an exchange stands for a cycle
        elif exchange.expects_continue:
            self.transport.write(_CONTINUE)

    def _route(self) -> Route | None:
        if self.parser.get_method() != b"POST":
            return None
        route = ROUTES.get(self.url)
        if route is None and (self.url.startswith(b"http") or b"?" in self.url):
            route = ROUTES.get(httptools.parse_url(self.url).path or b"")
        return route

    def _hand_on(self) -> None:
        """To FastAPI. uvicorn makes the scope when a message begins; only here it is known to be needed."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()
        self.cycle.default_headers = [
            *self.cycle.default_headers, (b"x-request-id", request_id_in(headers).encode())
        ]  # fmt: skip

    def on_body(self, body: bytes) -> None:
        if not self.in_message:
            return
        self.body_size += len(body)
        if self.body_size > self.bounds.body_bytes:
            self._refuse(TooLarge(f"The body exceeds {self.bounds.body_bytes} bytes."))
        elif isinstance(self.cycle, Exchange):
            self.cycle.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.in_message or self.in_head:
            return
        self.in_message = False
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
            return
        exchange.complete = True
        if not exchange.queued:
            self._start(exchange)

    # answers
    def _start(self, exchange: Exchange) -> None:
        self.current = exchange
        task = exchange.task = self.loop.create_task(self.gateway.answer(exchange))
        task.add_done_callback(exchange.settled)
        self.tasks.add(task)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """uvicorn calls this for the next one in a pipeline too: `app` is an ASGI application, or None."""
        if not isinstance(cycle, Exchange):
            self.current = cycle
            super()._start_asgi_task(cycle, app)
            return
        cycle.queued = False
        if cycle.complete:
            self._start(cycle)
        elif cycle.expects_continue:
            self.transport.write(_CONTINUE)

    def on_response_complete(self) -> None:
        """As uvicorn's own, but for its timer, which is set anew for every request there."""
        if self.last_words and not self.pipeline and not self.transport.is_closing():
            self._say_last()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._await_next(self.timeout_keep_alive)
        if self.in_message:
            self._await_rest()

    def _await_next(self, limit_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(limit_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that has been idle for long; the timer of one that was used meanwhile goes on."""
        self.timeout_keep_alive_task = None
        if self.in_message or not self._idle():
            return  # set again when the answer is complete
        left_s = self.idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._await_next(left_s)
        else:
            super().timeout_keep_alive_handler()

    # a client that does not keep up
    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall = self.loop.call_later(self.bounds.stall_s, self._stalled)
        if isinstance(self.current, Exchange) and self.current.engine_side is not None:
            self.current.engine_side.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None
        if isinstance(self.current, Exchange) and self.current.engine_side is not None:
            self.current.engine_side.resume()

    def _stalled(self) -> None:
        log.info("a client has not read its answer for %g s: its connection is closed", self.bounds.stall_s)
        self.transport.abort()


_PROCESS = os.urandom(10).hex()  # so that the ids of two gateways differ
_serial = count()


def fresh_id() -> str:
    """A request id that no other request has."""
    return f"{_PROCESS}{next(_serial):012x}"


def request_id_in(headers: list[tuple[bytes, bytes]]) -> str:
    """The id that a request goes by: its own x-request-id if that is harmless, else a fresh one."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode() if _SAFE_ID.fullmatch(value) else fresh_id()
    return fresh_id()


def edge_for(gateway: Serves, bounds: Bounds) -> type[Edge]:
    """The protocol class for uvicorn, with the gateway it serves."""
    return type("Edge", (Edge,), {"gateway": gateway, "bounds": bounds, "heads": {}})
