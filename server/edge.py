"""Where clients' bytes come in: relayed routes are answered right here, below ASGI; all else goes on to FastAPI.

uvicorn's own protocol does the connection's housekeeping (keep-alive, pipelining, shutdown); a relayed request
takes the place of its ASGI cycle.
"""

import asyncio
import http
import os
import re
from dataclasses import dataclass
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.call import Route
from server.engine import Connection
from server.errors import (
    BadRequest,
    HeadTooLarge,
    ServiceError,
    TooLarge,
    TooSlow,
    error_event,
    error_object,
    status_of,
)
from server.schemas import ROUTES

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_STATUS = {
    code: b"HTTP/1.1 %d %b\r\n" % (code, http.HTTPStatus(code).phrase.encode()) for code in map(int, http.HTTPStatus)
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may send.

    head_bytes: of request line and headers together. body_bytes: of a body.
    head_s: seconds for a connection's first byte and for a head to be complete. body_s: for a body.
    """

    head_bytes: int = 32 * 1024
    body_bytes: int = 32 * 1024 * 1024
    head_s: float = 15.0
    body_s: float = 60.0


class Serves(Protocol):
    """What the edge hands a complete request to."""

    async def answer(self, exchange: "Exchange") -> None: ...
    def refused(self, path: str, code: str) -> None: ...


class Exchange:
    """One relayed request on its connection: what came, and the way back. Stands where uvicorn keeps a cycle."""

    __slots__ = (
        "edge", "route", "headers", "pieces", "size", "complete", "task", "begun", "chunked", "keep_alive",
        "engine_side", "disconnected", "response_complete", "message_event", "request_id", "http10", "extra_headers", "queued",
    )  # fmt: skip

    _unused_event = asyncio.Event()  # uvicorn sets its cycle's event when a connection is lost; nobody waits on ours

    def __init__(self, edge: "Edge", route: Route, *, keep_alive: bool, http10: bool) -> None:
        self.edge = edge
        self.route = route
        self.headers = edge.headers
        self.pieces: list[bytes] = []
        self.size = 0
        self.queued = False
        self.complete = False
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.chunked = False
        self.keep_alive = keep_alive
        self.http10 = http10
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

    @property
    def body(self) -> bytes:
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    def name_it(self) -> str:
        """The request id: the client's own if it is harmless, else a fresh one."""
        given = self.header(b"x-request-id")
        self.request_id = given.decode() if given and _SAFE_ID.fullmatch(given) else os.urandom(16).hex()
        return self.request_id

    # the answer
    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        """Writes the head. Without a length the body is chunked (HTTP/1.0: ended by closing)."""
        self.begun = True
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
        edge.transport.write(data)

    def end(self) -> None:
        """The answer is complete."""
        edge = self.edge
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
            if self.chunked:
                self.write(error_event(error, anthropic=self.route.anthropic))
                self.end()
            else:
                self.response_complete = True
                self.edge.transport.abort()
            return
        if error.retry_after_s is not None:
            self.extra_headers += b"retry-after: %d\r\n" % max(1, round(error.retry_after_s))
        body = error_object(error, anthropic=self.route.anthropic)
        self.begin(status_of(error), b"application/json", len(body))
        self.write(body)
        self.end()

    def flows_from(self, connection: Connection | None) -> None:
        """Which engine connection feeds the answer: it is paused while the client does not keep up."""
        self.engine_side = connection
        if connection is not None and self.edge.flow.write_paused:
            connection.pause()


class Edge(HttpToolsProtocol):
    """One client connection."""

    gateway: Serves
    bounds: Bounds
    cycle: Any  # uvicorn's RequestResponseCycle, or an Exchange in its place

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # uvicorn's own arguments, handed through
        super().__init__(*args, **kwargs)
        self.hold = b""
        self.head_size = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.in_message = False
        self.active: Exchange | None = None  # the one that is being answered; `cycle` is the newest

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's protocol narrows it as well
        self.deadline = self.loop.call_later(self.bounds.head_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_deadline()
        super().connection_lost(exc)
        exchange = self.active
        if exchange is not None and not exchange.response_complete:
            exchange.disconnected = True
            if exchange.task is not None:
                exchange.task.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_message:
            if self.deadline is None:
                self.deadline = self.loop.call_later(self.bounds.body_s, self._too_slow)
        elif self.deadline is not None:
            self._no_deadline()

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

    def _refuse(self, error: ServiceError) -> None:
        """Answers bytes that do not become a request (not HTTP, too much, too slow) and closes."""
        self.in_message = False
        self.gateway.refused("", error.code or "")
        if self.active is not None and not self.active.response_complete:
            self.transport.abort()  # an earlier answer is on its way: nothing may be written into it
            return
        body = error_object(error)
        self.transport.write(
            _STATUS[status_of(error)]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for bytes that are not HTTP."""
        if not self.transport.is_closing():
            self._refuse(BadRequest("The request is not valid HTTP/1.1."))

    # httptools callbacks
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_size = 0
        self.in_message = True

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._grown(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._grown(len(name) + len(value) + 4)

    def _grown(self, size: int) -> None:
        self.head_size += size
        if self.head_size > self.bounds.head_bytes and self.in_message:
            self._refuse(HeadTooLarge(f"Request line and headers exceed {self.bounds.head_bytes} bytes."))

    def on_headers_complete(self) -> None:
        if not self.in_message:
            return
        route = ROUTES.get(self.url) if self.parser.get_method() == b"POST" else None
        if route is None and b"?" in self.url and self.parser.get_method() == b"POST":
            route = ROUTES.get(self.url.partition(b"?")[0])
        if route is None:
            super().on_headers_complete()
            return
        size = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        if size > self.bounds.body_bytes:
            self._refuse(TooLarge(f"The body has {size} bytes; {self.bounds.body_bytes} are allowed."))
            return
        http10 = self.parser.get_http_version() == "1.0"
        exchange = Exchange(self, route, keep_alive=not http10 and self.parser.should_keep_alive(), http10=http10)
        exchange.queued = self.cycle is not None and not self.cycle.response_complete
        if exchange.queued:  # pipelined: its turn comes when the answer before it is complete
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, None))  # type: ignore[arg-type]  # an exchange stands for a cycle
        self.cycle = exchange
        if self.expect_100_continue and not exchange.queued:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if not self.in_message:
            return
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
            return
        exchange.size += len(body)
        if exchange.size > self.bounds.body_bytes:
            exchange.pieces.clear()
            self._refuse(TooLarge(f"The body exceeds {self.bounds.body_bytes} bytes."))
            return
        exchange.pieces.append(body)

    def on_message_complete(self) -> None:
        if not self.in_message:
            return
        self.in_message = False
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
            return
        exchange.complete = True
        if not exchange.queued:
            self._start(exchange)

    def _start(self, exchange: Exchange) -> None:
        self.active = exchange
        task = self.loop.create_task(self.gateway.answer(exchange))
        exchange.task = task
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """uvicorn calls this for the next one in a pipeline too: `app` is an ASGI application, or None."""
        if not isinstance(cycle, Exchange):
            super()._start_asgi_task(cycle, app)
            return
        cycle.queued = False
        if cycle.complete:
            self._start(cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.active is not None and self.active.engine_side is not None:
            self.active.engine_side.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.active is not None and self.active.engine_side is not None:
            self.active.engine_side.resume()


def edge_for(gateway: Serves, bounds: Bounds) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn, with the gateway it serves."""
    return type("Edge", (Edge,), {"gateway": gateway, "bounds": bounds})
