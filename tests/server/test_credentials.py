"""Workers that ask for a key or speak TLS: what travels, what is refused, and what nobody may read."""

import asyncio
import contextlib
import json
import logging
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from loadtest.fake.engine import FakeEngine
from scheduler.workers import Worker
from server.engine.access import Access, untrusted
from server.fleet.fleet import Fleet
from server.fleet.named import named_worker
from server.fleet.registry import Registry, registration_of
from server.settings import HealthSettings, Settings
from server.store.store import MemoryStore
from tests.server.conftest import (
    INSTANT,
    Reply,
    Running,
    chat,
    eventually,
    over_script,
    plain,
    says,
    serving,
)

KEY = "engine-key-0123456789"
LOCKED = replace(INSTANT, key=KEY)
ADMIN_KEY = "an-admin-key-of-some-length"
LONG_AGO, SOON = datetime(2020, 1, 1, tzinfo=UTC), timedelta(days=3)


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> str:
    return written(ca.cert_pem.bytes(), tmp_path / "ca.pem")


def written(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    path.chmod(stat.S_IRUSR)
    return str(path)


def tls_of(cert: trustme.LeafCert, client_ca: trustme.CA | None = None) -> ssl.SSLContext:
    """An engine's side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert.configure_cert(context)
    if client_ca is not None:
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def problem(gateway: Running, worker_id: str = "worker-0") -> str:
    return gateway.server.fleet.members[worker_id].problem


async def state(gateway: Running, worker_id: str = "worker-0") -> dict[str, Any]:
    workers = (await gateway.ask("/ready", method="GET")).json()["workers"]
    return next(worker for worker in workers if worker["id"] == worker_id)


# keys


async def test_a_worker_gets_the_key_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_ENGINE", KEY)
    async with FakeEngine(LOCKED) as engine, serving(f"{engine.url},key=FIRST_ENGINE") as gateway:
        reply = await gateway.ask("/v1/chat/completions", chat())
        assert reply.status == 200
        assert engine.seen[-1].headers["authorization"] == f"Bearer {KEY}"


async def test_a_clients_own_key_never_reaches_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", KEY)
    async with FakeEngine(LOCKED) as locked, FakeEngine(INSTANT) as open_one:
        for engine, worker in ((locked, f"{locked.url},key=ENGINE"), (open_one, open_one.url)):
            async with serving(worker) as gateway:
                reply = await gateway.ask("/v1/chat/completions", chat(), headers={"authorization": "Bearer tenant"})
                assert reply.status == 200
                assert "tenant" not in str(engine.seen[-1].headers)


@pytest.mark.parametrize(("named", "says_what"), [("", "requires a key"), (",key=WRONG", "refuses the gateway's key")])
async def test_a_worker_that_refuses_the_key_is_unauthorised_and_nothing_loops(
    named: str, says_what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WRONG", "some-other-key-123456")
    async with FakeEngine(LOCKED) as engine, serving(engine.url + named, ready=False) as gateway:
        await eventually(lambda: problem(gateway))
        shown = await state(gateway)
        assert shown["state"] == "unauthorised" and says_what in shown["problem"]
        refused = await gateway.ask("/v1/chat/completions", chat())
        assert refused.status in (404, 503)
        accepted = engine.accepted
        for _ in range(3):
            before = engine.unauthorised
            gateway.server.fleet.look_now(gateway.server.fleet.members["worker-0"])
            await eventually(lambda before=before: engine.unauthorised > before)
        await eventually(lambda: not gateway.server.fleet._rounds._looking)
        assert engine.accepted == accepted  # the same connection asked again
        told = [record for record in caplog.records if says_what in record.getMessage()]
        assert len(told) == 1 and told[0].levelno == logging.ERROR
        assert "some-other-key" not in caplog.text


async def test_it_is_ready_once_it_takes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", KEY)
    async with FakeEngine(replace(LOCKED, key="another-key-987654321")) as engine:
        async with serving(f"{engine.url},key=ENGINE", ready=False, probe_s=0.01) as gateway:
            await eventually(lambda: problem(gateway))
            engine.setup = LOCKED
            await gateway.ready()
            assert "problem" not in await state(gateway)
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200


async def test_a_key_that_is_changed_while_it_serves_costs_no_client_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's /health is open to all, so only a request shows that the key is another one."""
    monkeypatch.setenv("ENGINE", KEY)
    async with FakeEngine(LOCKED) as one, FakeEngine(LOCKED) as other:
        async with serving(f"{one.url},key=ENGINE", f"{other.url},key=ENGINE", probe_s=60) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            one.setup = replace(LOCKED, key="a-rotated-key-5555555")
            for stream in (False, True) * 3:
                assert (await gateway.ask("/v1/chat/completions", chat(stream=stream))).status == 200
            assert (await state(gateway))["state"] == "unauthorised"
            assert (await state(gateway, "worker-1"))["state"] == "ready"


async def test_a_client_is_not_told_that_its_key_is_wrong_when_the_gateways_is() -> None:
    async with over_script(says(plain(b'{"error":"Unauthorized"}', status="401 Unauthorized"))) as (gateway, _):
        reply = await gateway.ask("/v1/chat/completions", chat())
        assert reply.status == 502 and reply.error["code"] == "engine_gone"


async def test_no_answer_log_or_metric_shows_a_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("ENGINE", KEY)
    bearer = {"authorization": f"Bearer {ADMIN_KEY}"}
    async with FakeEngine(LOCKED) as engine, FakeEngine(LOCKED) as second:
        async with serving(f"{engine.url},key=ENGINE", admin_key=ADMIN_KEY) as gateway:
            body = {"url": second.url, "key": KEY}
            added: Reply = await gateway.ask("/admin/workers/second", body, method="PUT", headers=bearer)
            assert added.status == 201
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
            paths = ["/ready", "/metrics", "/v1/models", "/openapi.json"]
            paths += ["/admin/workers", "/admin/live", "/admin/targets", "/admin/policy"]
            for path in paths:
                reply = await gateway.ask(path, method="GET", headers=bearer)
                assert reply.status == 200, path
                assert KEY not in reply.body.decode(), path
            refused = await gateway.ask("/admin/workers/second", body, method="PUT", headers=bearer)
            assert refused.status == 400 and KEY not in refused.body.decode()
        assert KEY not in repr(gateway.server.fleet.members) + repr(gateway.server.workers) + caplog.text


async def test_a_key_travels_with_a_registration_and_a_new_one_takes_its_place() -> None:
    now = 0.0
    store, fleet = MemoryStore(lambda: now), Fleet(probe_s=0.01, health=HealthSettings(canary="off"))
    registry = Registry(store, fleet, lambda: now)
    async with FakeEngine(LOCKED) as engine:
        worker = Worker("w", engine.url)
        await store.register("w", registration_of(worker, Access("an-old-key-123456789")), ttl_s=1000.0)
        await registry.follow()
        await eventually(lambda: fleet.members["w"].problem)
        await store.register("w", registration_of(worker, Access(KEY)), ttl_s=1000.0)
        await registry.follow()
        await eventually(fleet.ready)
    await fleet.close()


@pytest.mark.parametrize(
    ("text", "says_what"),
    [
        ("http://h:1,key=NOT_SET", "there is none of that name"),
        ("http://h:1,key=sk-secret", "there is none of that name"),
        ("http://h:1,ca=/x.pem", "https://"),
        ("https://h:1,ca=/nowhere.pem", "/nowhere.pem holds no CA certificates"),
        ("https://h:1,cert=/nowhere.pem", "not a certificate with its key"),
        ("https://h:1,cert_key=/x.pem", "give cert too"),
        ("http://h:1,key=BAD", "no HTTP header can carry"),
        ("ftp://h:1", "write it as http"),
        ("http://h:1,keys=X", "unknown option 'keys'"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence_without_the_key(text: str, says_what: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        named_worker(text, 0, {"BAD": "two\r\nlines", "GOOD": KEY})
    assert says_what in str(caught.value) and "sk-secret" not in str(caught.value)


# TLS


@contextlib.asynccontextmanager
async def over_tls(
    cert: trustme.LeafCert, *options: str, client_ca: trustme.CA | None = None, ready: bool = True, **settings: Any
) -> AsyncIterator[tuple[Running, FakeEngine]]:
    async with FakeEngine(INSTANT, tls=tls_of(cert, client_ca)) as engine:
        async with serving(",".join([engine.url, *options]), ready=ready, **settings) as gateway:
            yield gateway, engine
        await all_handshakes_over(engine)


async def all_handshakes_over(engine: FakeEngine) -> None:
    """One more that fails: by its end those before it have ended, too, and uvloop has closed what they used."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(b"this is no TLS\r\n")
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()


@pytest.mark.usefixtures("no_sockets_left")
async def test_requests_and_streams_go_over_tls(ca: trustme.CA, ca_file: str) -> None:
    async with over_tls(ca.issue_cert("127.0.0.1"), f"ca={ca_file}") as (gateway, _):
        for stream in (False, True):
            reply = await gateway.ask("/v1/chat/completions", chat(stream=stream))
            assert reply.status == 200
        assert reply.events[-1] == "[DONE]" and reply.text


@pytest.mark.usefixtures("no_sockets_left")
async def test_the_fleets_own_ca_is_for_workers_that_name_none(ca: trustme.CA, ca_file: str) -> None:
    async with over_tls(ca.issue_cert("127.0.0.1"), worker_ca=ca_file) as (gateway, _):
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200


@pytest.mark.usefixtures("no_sockets_left")
@pytest.mark.parametrize(
    ("kind", "says_what"),
    [
        ("expired", "has expired"),
        ("other host", "for another host"),
        ("unknown", "signed by a CA that this gateway does not trust"),
    ],
)
async def test_a_certificate_that_is_wrong_is_said_in_one_sentence(
    kind: str, says_what: str, ca: trustme.CA, ca_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    cert = {
        "expired": lambda: ca.issue_cert("127.0.0.1", not_before=LONG_AGO, not_after=LONG_AGO + SOON),
        "other host": lambda: ca.issue_cert("engine.example"),
        "unknown": lambda: trustme.CA().issue_cert("127.0.0.1"),
    }[kind]()
    async with over_tls(cert, f"ca={ca_file}", ready=False, probe_s=0.01) as (gateway, engine):
        await eventually(lambda: problem(gateway))
        shown = await state(gateway)
        assert shown["state"] == "starting" and says_what in shown["problem"]
        assert str(engine.port) not in shown["problem"]  # /ready is for everybody
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 1 and says_what in told[0].getMessage()


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_worker_that_speaks_no_tls_is_named(ca_file: str) -> None:
    async with FakeEngine(INSTANT) as engine:
        url = engine.url.replace("http", "https")
        async with serving(f"{url},ca={ca_file}", ready=False) as gateway:
            await eventually(lambda: problem(gateway))
            assert "does not speak TLS" in problem(gateway)


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_worker_may_ask_for_the_gateways_certificate(ca: trustme.CA, ca_file: str, tmp_path: Path) -> None:
    own = ca.issue_cert("gateway.example")
    cert = written(own.cert_chain_pems[0].bytes(), tmp_path / "tls.crt")
    key = written(own.private_key_pem.bytes(), tmp_path / "tls.key")
    both = written(own.private_key_and_cert_chain_pem.bytes(), tmp_path / "both.pem")
    server = ca.issue_cert("127.0.0.1")
    for options in ((f"cert={cert}", f"cert_key={key}"), (f"cert={both}",)):
        async with over_tls(server, f"ca={ca_file}", *options, client_ca=ca) as (gateway, _):
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
    async with over_tls(server, f"ca={ca_file}", client_ca=ca, ready=False) as (gateway, _):
        await eventually(lambda: problem(gateway))
        assert "if it requires a client certificate" in problem(gateway)


def test_tls_alerts_are_told_in_words() -> None:
    def said(reason: str) -> str:
        error = ssl.SSLError(1, "")
        error.reason = reason
        wrapped = OSError("wrapped")
        wrapped.__cause__ = error
        found = untrusted(wrapped)
        assert found is not None
        return found.message

    assert "requires a client certificate" in said("TLSV13_ALERT_CERTIFICATE_REQUIRED")
    assert "does not accept the gateway's certificate (tlsv1 alert unknown ca)" in said("TLSV1_ALERT_UNKNOWN_CA")
    assert "does not speak TLS" in said("WRONG_VERSION_NUMBER")
    assert untrusted(OSError("refused")) is None


@pytest.mark.usefixtures("no_sockets_left")
async def test_a_renewed_ca_is_read_without_a_restart(ca: trustme.CA, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(trustme.CA().cert_pem.bytes())
    async with over_tls(ca.issue_cert("127.0.0.1"), f"ca={file}", ready=False, probe_s=0.01) as (gateway, _):
        await eventually(lambda: problem(gateway))
        file.write_bytes(ca.cert_pem.bytes())
        await gateway.ready()


@pytest.mark.usefixtures("no_sockets_left")
async def test_prometheus_is_told_which_workers_speak_tls(ca: trustme.CA, ca_file: str) -> None:
    async with over_tls(ca.issue_cert("127.0.0.1"), f"ca={ca_file}", admin_key=ADMIN_KEY) as (gateway, _):
        reply = await gateway.ask("/admin/targets", method="GET", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        assert json.loads(reply.body)[0]["labels"]["__scheme__"] == "https"


def test_settings_with_a_ca_that_is_none_are_refused(tmp_path: Path) -> None:
    from server.app import GatewayServer

    with pytest.raises(ValueError, match="worker_ca.*holds no CA certificates"):
        GatewayServer(Settings(worker_ca=tmp_path / "nothing.pem"))
