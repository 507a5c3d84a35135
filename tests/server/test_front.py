"""The front as strangers and browsers meet it: TLS, CORS, addresses behind proxies."""

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from server.app import GatewayServer
from server.connection.address_limit import MOST_ADDRESSES, AddressLimit
from server.connection.forwarded import client_of, networks
from server.settings import Settings
from tests.server.conftest import LIMIT_S, Running, Wire, chat, eventually, over_fake, request

# TLS


@pytest.fixture
def files(ca: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    files = {"tls_cert": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key"}
    put(ca.issue_cert("localhost", "127.0.0.1"), files)
    return files


def put(cert: trustme.LeafCert, files: dict[str, Path]) -> None:
    files["tls_key"].write_bytes(cert.private_key_pem.bytes())
    files["tls_cert"].write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))


def client(ca: trustme.CA, **versions: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    for name, version in versions.items():
        setattr(context, name, version)
    return context


async def connect(gateway: Running, tls: ssl.SSLContext) -> Wire:
    wire = Wire(*await asyncio.open_connection("127.0.0.1", gateway.port, ssl=tls))
    gateway.wires.append(wire)
    return wire


def serial(wire: Wire) -> str:
    return str(wire.writer.get_extra_info("peercert")["serialNumber"])


@contextlib.asynccontextmanager
async def over_tls(files: dict[str, Path], **settings: Any) -> AsyncIterator[Running]:
    async with over_fake(**files, **settings) as (gateway, _):
        yield gateway


@pytest.mark.usefixtures("no_sockets_left")
async def test_requests_and_streams_are_served_over_tls(ca: trustme.CA, files: dict[str, Path]) -> None:
    async with over_tls(files) as gateway:
        wire = await connect(gateway, client(ca))
        assert wire.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        for body in (chat(), chat(stream=True), chat()):
            await wire.send(request("/v1/chat/completions", body))
            assert (await wire.answer()).status == 200
        await wire.send(request("/health", method="GET"))
        assert (await wire.answer()).json() == {"status": "ok"}
        await wire.send(request("/v1/chat/completions", b"{}" + b" " * 40_000_000))
        assert (await wire.answer()).status == 413


@pytest.mark.usefixtures("no_sockets_left")
async def test_tls_1_2_is_the_oldest_and_plain_http_is_refused(ca: trustme.CA, files: dict[str, Path]) -> None:
    async with over_tls(files) as gateway:
        wire = await connect(gateway, client(ca, maximum_version=ssl.TLSVersion.TLSv1_2))
        await wire.send(request("/v1/chat/completions", chat()))
        assert (await wire.answer()).status == 200
        with pytest.warns(DeprecationWarning):
            old = client(ca, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(gateway, old)
        plain = await gateway.send(request("/health", method="GET"))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await plain.head()


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_client_that_leaves_a_stream_over_tls_frees_its_place(ca: trustme.CA, files: dict[str, Path]) -> None:
    async with over_tls(files) as gateway:
        wire = await connect(gateway, client(ca))
        await wire.send(request("/v1/chat/completions", chat(stream=True, max_tokens=4000)))
        await wire.head()
        wire.reset()
        await eventually(gateway.at_rest)


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_renewed_certificate_is_served_without_a_restart(
    ca: trustme.CA, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with over_tls(files) as gateway:
        first = await connect(gateway, client(ca))
        certificate = gateway.server.certificate
        assert certificate is not None
        files["tls_key"].write_bytes(b"half writ")  # a renewal that is under way
        certificate.look()
        assert "stays in use" in caplog.text and "half writ" not in caplog.text
        assert serial(await connect(gateway, client(ca))) == serial(first)
        put(ca.issue_cert("127.0.0.1", not_after=datetime(2100, 1, 1, tzinfo=UTC)), files)
        async with asyncio.timeout(LIMIT_S):
            while True:
                if serial(await connect(gateway, client(ca))) != serial(first):
                    break
                await asyncio.sleep(0.05)
        await first.send(request("/v1/chat/completions", chat()))  # a connection from before goes on
        assert (await first.answer()).status == 200


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_handshake_that_does_not_come_is_ended(files: dict[str, Path]) -> None:
    async with over_tls(files, edge={"head_timeout_s": 0.05}) as gateway:
        wire = await gateway.connect()
        assert await asyncio.wait_for(wire.reader.read(), LIMIT_S) == b""


@pytest.mark.parametrize(
    ("given", "says_what"),
    [
        ({"tls_cert": "nowhere"}, "no certificate with its key.*No such file"),
        ({"tls_cert": "tls.crt"}, "tls.crt: no certificate with its key"),
        ({"tls_cert": "tls.crt", "tls_key": "other.key"}, "tls.crt and .*other.key: no certificate"),
        ({"tls_key": "tls.key"}, "set 'tls_cert' too"),
    ],
)
def test_a_certificate_that_cannot_be_is_one_sentence(
    given: dict[str, str], says_what: str, ca: trustme.CA, files: dict[str, Path]
) -> None:
    folder = files["tls_cert"].parent
    (folder / "other.key").write_bytes(trustme.CA().issue_cert("x").private_key_pem.bytes())
    with pytest.raises(ValueError, match=f"^[^\n]*{says_what}[^\n]*$"):
        GatewayServer(Settings(**{name: folder / file for name, file in given.items()}))


# CORS

PAGE = "https://chat.example"


async def test_pages_of_named_origins_may_ask() -> None:
    async with over_fake(cors_origins=[PAGE]) as (gateway, _):
        asked = {"origin": PAGE, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization,content-type"
        preflight = await gateway.ask("/v1/chat/completions", method="OPTIONS", headers=asked)
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for path, body, how in (
            ("/v1/chat/completions", chat(), "POST"),
            ("/v1/chat/completions", chat(stream=True), "POST"),
            ("/v1/chat/completions", b"not json", "POST"),
            ("/v1/models", None, "GET"),
        ):
            reply = await gateway.ask(path, body, method=how, headers={"origin": PAGE})
            assert reply.headers["access-control-allow-origin"] == PAGE, (path, reply.status)
            assert "rigin" in reply.headers["vary"] and "x-request-id" in reply.headers["access-control-expose-headers"]


async def test_pages_of_other_origins_may_not_and_programs_do_not_notice() -> None:
    async with over_fake(cors_origins=[PAGE]) as (gateway, _):
        other = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert (await gateway.ask("/v1/chat/completions", method="OPTIONS", headers=other)).status == 400
        for headers in ({"origin": "https://evil.example"}, {"origin": PAGE + ".evil.example"}, {}):
            reply = await gateway.ask("/v1/chat/completions", chat(), headers=headers)
            assert reply.status == 200 and "access-control-allow-origin" not in reply.headers
    async with over_fake() as (gateway, _):
        reply = await gateway.ask("/v1/chat/completions", chat(), headers={"origin": PAGE})
        assert "access-control-allow-origin" not in reply.headers


async def test_any_origin_and_compressed_answers_go_together() -> None:
    async with over_fake(cors_origins=["*"], edge={"gzip_from_bytes": 64}) as (gateway, _):
        headers = {"origin": PAGE, "accept-encoding": "gzip"}
        reply = await gateway.ask("/v1/chat/completions", chat(), headers=headers)
        assert reply.headers["access-control-allow-origin"] == "*" and reply.headers["content-encoding"] == "gzip"


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://a b", "ftp://x"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins.*is not an origin"):
        GatewayServer(Settings(cors_origins=[origin]))


# addresses

OURS = networks(["10.0.0.0/8", "2001:db8::/32", "127.0.0.1"])


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("203.0.113.9", {b"x-forwarded-for": b"1.2.3.4"}, "203.0.113.9"),
        ("10.0.0.1", {}, "10.0.0.1"),
        ("10.0.0.1", {b"x-forwarded-for": b"1.2.3.4"}, "1.2.3.4"),
        ("10.0.0.1", {b"x-forwarded-for": b"6.6.6.6, 1.2.3.4"}, "1.2.3.4"),
        ("10.0.0.1", {b"x-forwarded-for": b"6.6.6.6, 1.2.3.4, 10.3.3.3"}, "1.2.3.4"),
        ("10.0.0.1", {b"x-forwarded-for": b"10.9.9.9"}, "10.9.9.9"),
        ("10.0.0.1", {b"x-forwarded-for": b"nonsense"}, "10.0.0.1"),
        ("::ffff:10.0.0.1", {b"x-forwarded-for": b"1.2.3.4:5678"}, "1.2.3.4"),
        ("10.0.0.1", {b"forwarded": b"for=192.0.2.60;proto=http;by=203.0.113.43"}, "192.0.2.60"),
        ("10.0.0.1", {b"forwarded": b'for="[2001:db8:cafe::17]:4711"'}, "2001:db8:cafe::17"),
        ("10.0.0.1", {b"forwarded": b'for=6.6.6.6, For="[2a00::1]", for=10.1.1.1'}, "2a00::1"),
        ("10.0.0.1", {b"forwarded": b"for=unknown", b"x-forwarded-for": b"6.6.6.6"}, "10.0.0.1"),
        ("10.0.0.1", {b"forwarded": b"for=6.6.6.6", b"x-forwarded-for": b"203.0.113.9"}, "10.0.0.1"),
        ("10.0.0.1", {b"forwarded": b"for=_hidden, for=10.2.2.2"}, "10.2.2.2"),
        ("", {b"x-forwarded-for": b"6.6.6.6"}, ""),
    ],
)
def test_of_the_addresses_that_proxies_tell_the_last_that_is_no_proxys_counts(
    peer: str, headers: dict[bytes, bytes], client: str
) -> None:
    assert client_of(peer, headers, OURS) == client


@pytest.fixture
def request_log() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(getattr(record, "fields", {}))

    logger, handler = logging.getLogger("evenhand.request"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_the_log_has_the_clients_address_also_where_a_proxy_adds_a_line_of_its_own(
    request_log: list[dict[str, Any]],
) -> None:
    async with over_fake(log_format="json", trusted_proxies=["127.0.0.0/8"]) as (gateway, _):
        await gateway.ask("/v1/chat/completions", chat(), headers={"x-forwarded-for": "192.0.2.7"})
        body = json.dumps(chat()).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"
        head += "x-forwarded-for: 6.6.6.6\r\nx-forwarded-for: 192.0.2.8\r\n"
        wire = await gateway.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert (await wire.answer()).status == 200
        await eventually(lambda: len(request_log) == 2)
    assert [line["client"] for line in request_log] == ["192.0.2.7", "192.0.2.8"]
    request_log.clear()
    async with over_fake(log_format="json") as (gateway, _):
        await gateway.ask("/v1/chat/completions", chat(), headers={"x-forwarded-for": "192.0.2.7"})
        await eventually(lambda: len(request_log) == 1)
    assert request_log[0]["client"] == "127.0.0.1"


async def test_an_address_may_ask_so_often_a_minute_and_others_do_not_notice() -> None:
    async with over_fake(trusted_proxies=["127.0.0.1"], edge={"address_rpm": 3}) as (gateway, engine):
        wire = await gateway.connect()
        statuses = []
        for _ in range(5):
            await wire.send(request("/v1/chat/completions", chat(), headers={"x-forwarded-for": "192.0.2.7"}))
            reply = await wire.answer()
            statuses.append(reply.status)
        assert statuses == [200, 200, 200, 429, 429] and 1 <= int(reply.headers["retry-after"]) <= 20
        assert reply.error["code"] == "rate_limit_exceeded" and len(engine.seen) == 3
        await wire.send(request("/v1/chat/completions", chat(), headers={"x-forwarded-for": "192.0.2.8"}))
        assert (await wire.answer()).status == 200


async def test_an_address_is_bounded_before_its_bodies_are_taken_in_and_with_wrong_keys(tmp_path: Path) -> None:
    """And requests with a body too large to be taken in for nothing count like the others."""
    (tmp_path / "tenants.yaml").write_text("tenants: [{name: acme, keys: [sha256:" + "0" * 64 + "]}]")
    edge = {"address_rpm": 3}
    async with over_fake(tenants=tmp_path / "tenants.yaml", edge=edge) as (gateway, engine):
        large = chat(messages=[{"role": "user", "content": "x" * 70_000}])
        key = {"authorization": "Bearer wrong"}
        replies = [await gateway.ask("/v1/chat/completions", large, headers=key) for _ in range(5)]
        assert [reply.status for reply in replies] == [401, 401, 401, 429, 429] and not engine.seen


def test_an_address_gets_a_request_back_after_its_share_of_a_minute_and_memory_is_bounded() -> None:
    now = [0.0]
    limit = AddressLimit(6, lambda: now[0])
    assert [limit.wait_s("a") for _ in range(6)] == [0.0] * 6
    assert limit.wait_s("a") == pytest.approx(10.0)
    now[0] = 10.0
    assert limit.wait_s("a") == 0.0 and limit.wait_s("a") > 0
    assert [limit.wait_s(f"2001:db8::{host:x}") for host in range(6)] == [0.0] * 6
    assert limit.wait_s("2001:db8::ffff") > 0 and limit.wait_s("2001:db8:0:1::1") == 0.0
    for number in range(MOST_ADDRESSES + 10):
        limit.wait_s(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(limit._left) == MOST_ADDRESSES


def test_a_proxy_that_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="trusted_proxies.*'proxy.example' is neither"):
        GatewayServer(Settings(trusted_proxies=["proxy.example"]))
