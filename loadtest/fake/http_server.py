"""The least HTTP/1.1 server that streams: one asyncio.Protocol on httptools, nothing between token and socket.

Starlette costs more per chunk than the engine that is imitated on top of it may spend.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import httptools

log = logging.getLogger("loadtest.fake.http_server")

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MAX_BODY_BYTES = 64 << 20


class ServedExchange(asyncio.Protocol):
    """One connection: reads a request, hands itself to `serve`, and carries the answer; then reads the next.

    While a request is answered: `method`, `path`, `headers` (names in lower case) and `body` are its own, and `gone`
    is set to what must happen when the client leaves before the end.
    """

    def __init__(self, serve: Callable[["ServedExchange"], None], connections: set["ServedExchange"]) -> None:
        self._serve = serve
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self.busy = False
        self._reset()

    def _reset(self) -> None:
        self.method = ""
        self.path = ""
        self.headers: dict[str, str] = {}
        self.body = b""
        self.gone: Callable[[], None] | None = None
        self._url = b""
        self._parts: list[bytes] = []
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by duck typing only
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        gone, self.gone = self.gone, None
        if gone is not None:
            gone()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            log.exception("A request broke the server that answers it")
            self.fail(HTTPStatus.INTERNAL_SERVER_ERROR)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self.fail(HTTPStatus.BAD_REQUEST)

    # httptools callbacks

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.headers.get("expect", "").lower() == "100-continue":
            self.write(_CONTINUE)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > _MAX_BODY_BYTES:
            self.fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self.busy:  # a second request before the first is answered: nobody we know sends one
            self.fail(HTTPStatus.BAD_REQUEST)
            return
        self.busy = True
        self.method = self._parser.get_method().decode()
        self.path = httptools.parse_url(self._url).path.decode()
        self.body = b"".join(self._parts)
        self._serve(self)

    # the answer

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def respond(self, status: int, body: bytes, content_type: str, extra: str = "") -> None:
        """A whole answer at once."""
        self.write(_head(status, content_type, f"content-length: {len(body)}\r\n{extra}") + body)
        self._answered()

    def begin_stream(self, content_type: str) -> None:
        """Status 200 and the head of a chunked answer."""
        self.write(_head(HTTPStatus.OK, content_type, "transfer-encoding: chunked\r\n"))

    def send(self, data: bytes) -> None:
        """One chunk."""
        if self._transport is not None:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.write(b"0\r\n\r\n")
        self._answered()

    def cut(self, partial: bytes = b"") -> None:
        """Close in the middle of a chunk, after the first half of it."""
        if self._transport is not None:
            if partial:
                self._transport.write(b"%x\r\n" % len(partial) + partial[: len(partial) // 2])
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection as a dying process does: nothing buffered is sent."""
        if self._transport is not None:
            self._transport.abort()

    def fail(self, status: HTTPStatus) -> None:
        """Answers a request that cannot be parsed, and closes the connection."""
        self.write(_head(status, "text/plain", "content-length: 0\r\nconnection: close\r\n"))
        if self._transport is not None:
            self._transport.close()

    def _answered(self) -> None:
        keep = self._parser.should_keep_alive()
        self._reset()
        self.busy = False
        if not keep and self._transport is not None:
            self._transport.close()


def _head(status: int, content_type: str, more: str) -> bytes:
    phrase = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {phrase}\r\nserver: uvicorn\r\ncontent-type: {content_type}\r\n{more}\r\n".encode()
