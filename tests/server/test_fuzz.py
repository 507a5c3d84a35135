"""Bytes from anywhere against a gateway that serves: no input makes it fail, or leaves anything behind.

EVENHAND_SOAK multiplies how much is tried; `make soak` sets it.
"""

import asyncio
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.request.schemas import ROUTES
from tests.server.conftest import INSTANT, LIMIT_S, Running, chat, completion, over_fake, request

TIMES = int(os.environ.get("EVENHAND_SOAK", "1"))
REQUESTS_AT_ONCE = 10
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)

OTHER_PATHS = ["/v1/models", "/health", "/admin/policy", "/metrics", "/", "*", "//", "/v1/%00"]
PATHS = [path.decode() for path in ROUTES] + OTHER_PATHS
VERSIONS = ["1.1", "1.1", "1.1", "1.0", "2.0", "9"]
METHODS = ["POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "CONNECT", "PRI", "post", ""]
FIELDS = [
    "model", "messages", "prompt", "input", "stream", "n", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "stream_options", "tools", "response_format", "vllm_xargs", "priority", "stop", "temperature", "return_token_ids",
]  # fmt: skip
HEADERS = [
    "content-length", "Content-Length", "transfer-encoding", "connection", "expect", "upgrade", "authorization",
    "x-request-id", "x-api-key", "host", "content-type", "te", "trailer", "", "\x00",
]  # fmt: skip
VALUES = ["0", "5", "-1", "99999999999999999999", "chunked", "identity, chunked", "close", "keep-alive", "100-continue",
          "h2c", "websocket", "Bearer x", "Bearer \udcff", "a" * 200, "\t", "é", "\x00", "0x10"]  # fmt: skip
BASES = [
    request("/v1/chat/completions", chat()),
    request("/v1/chat/completions", chat(stream=True)),
    request("/v1/completions", completion(stream=True, stream_options={"include_usage": True})),
    request("/health", method="GET") + request("/v1/completions", completion()),
    request("/v1/completions", headers={"transfer-encoding": "chunked"}) + b'5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n',
]
ODD_JSON = [
    b"[" * 100_000, b'{"a":' * 100_000, b'{"model":"\\ud800"}', b'{"model":"fake","n":1e400}', b"\xff\xfe{}", b"",
    b'{"model":"fake","messages":[{"role":"user","content":"\\u0000"}],"max_tokens":1}', b"nul", b'{"model":"fake"',
    b'{"model":"fake","model":"fake","prompt":"a","prompt":"b","max_tokens":1}', b"9" * 5000, b'"' + b"\x00" * 9 + b'"',
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["fake", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), inner),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return ODD_JSON[draw(st.integers(0, len(ODD_JSON) - 1))]
    fields: dict[str, Any] = dict(draw(st.sampled_from([chat(), completion()])))
    fields |= draw(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
    return json.dumps(fields).encode()


@st.composite
def built(draw: st.DrawFn) -> bytes:
    """A request with a plausible shape and anything in it."""
    body = draw(bodies())
    method, path, version = (draw(st.sampled_from(kind)) for kind in (METHODS, PATHS, VERSIONS))
    lines = [f"{method} {path} HTTP/{version}"]
    if draw(st.integers(0, 7)):
        lines += ["host: gateway", "content-type: application/json"]
    for _ in range(draw(st.integers(0, 4))):
        lines.append(f"{draw(st.sampled_from(HEADERS))}: {draw(st.sampled_from(VALUES))}")
    if draw(st.integers(0, 4)):
        lines.append(f"content-length: {len(body) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 1000]))}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request that is right, but for a few bytes."""
    data = BASES[draw(st.integers(0, len(BASES) - 1))]
    for _ in range(draw(st.integers(1, 4))):
        at, gone = draw(st.integers(0, len(data))), draw(st.integers(0, 6))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + gone :]
    return data


class Sent:
    """Bytes to be sent, shown by their beginning."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"Sent({self.data[:1000]!r}, {len(self.data)} bytes)"


def tell(port: int, data: bytes) -> bytes:
    """Sends these bytes and no more; returns all that is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
        answer = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(65536):
                answer += piece
        except TimeoutError:
            raise
        except OSError:
            pass  # refused in the middle of what we sent
        return answer


class Live:
    """A gateway with a loop of its own, in a thread."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.gateway: Running
        self.errors: list[str] = []

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(str(context)))
        self.over = asyncio.Event()
        async with over_fake(INSTANT, edge={"head_timeout_s": 20.0, "body_timeout_s": 20.0}) as (self.gateway, _):
            self.ready.set()
            await self.over.wait()

    def __enter__(self) -> "Live":
        self.thread.start()
        assert self.ready.wait(LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(2 * LIMIT_S)
        assert not self.thread.is_alive(), "it stops, and nothing is left of any request"

    def tell(self, data: bytes) -> bytes:
        return tell(self.gateway.port, data)


class Complaints(logging.Handler):
    """What is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    try:
        with Live() as gateway:
            yield gateway
        assert not complaints.said and not gateway.errors
    finally:
        logging.getLogger().removeHandler(complaints)


@settings(
    max_examples=60 * TIMES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(st.lists((built() | mutated() | st.binary(max_size=200)).map(Sent), min_size=1, max_size=REQUESTS_AT_ONCE))
def test_no_bytes_make_the_gateway_fail(live: Live, requests: list[Sent]) -> None:
    for sent in requests:
        statuses = [int(status) for status in STATUS.findall(live.tell(sent.data))]
        assert all(status < 500 for status in statuses), sent
    assert STATUS.findall(live.tell(request("/health", method="GET"))) == [b"200"]


@settings(max_examples=20 * TIMES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), base=st.sampled_from(BASES))
def test_a_client_may_vanish_at_any_byte(live: Live, data: st.DataObject, base: bytes) -> None:
    cut = data.draw(st.integers(0, len(base)))
    client = socket.create_connection(("127.0.0.1", live.gateway.port), timeout=LIMIT_S)
    client.sendall(base[:cut])
    if data.draw(st.booleans()):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
    client.close()
    assert STATUS.findall(live.tell(request("/health", method="GET"))) == [b"200"]
