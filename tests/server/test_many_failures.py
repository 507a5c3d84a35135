"""What fails for all at once: a thousand workers, a Redis that answers too late, tenant files that differ."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from loadtest.fake.engine import FakeEngine
from scheduler.workers import Worker
from server.cluster import agreement
from tests.server.conftest import INSTANT, LIMIT_S, chat, eventually, serving
from tests.server.test_admin import ADMIN_KEY, admin, ask
from tests.server.test_shared import OwnRedis, own_redis, replicas, store_of
from tests.server.test_tenants import KEY, OTHER

__all__ = ["own_redis"]  # a fixture


class LateRedis:
    """A way to a Redis on which every answer takes `late_s`."""

    def __init__(self, url: str) -> None:
        self.late_s = 0.0
        self._to = urlsplit(url)
        self._ways: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        server.close()
        for way in self._ways:
            way.cancel()
        if self._ways:
            await asyncio.wait(self._ways)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._to.hostname, self._to.port)
        there_and_back = (self._copy(reader, back, late=False), self._copy(there, writer, late=True))
        self._ways |= {asyncio.create_task(way) for way in there_and_back}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if late:
                    await asyncio.sleep(self.late_s)  # the answer's own time
                writer.write(data)
        writer.close()


async def test_a_redis_that_answers_too_late_is_told_once_and_holds_nobody_up(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    late = LateRedis(redis_url)
    async with late.run() as url, FakeEngine(INSTANT) as engine:
        async with serving(engine.url, redis_url=url, admin_key=ADMIN_KEY, sync_s=0.02) as gateway:
            store, shared = store_of(gateway), gateway.server.shared
            store._timeout_s = LIMIT_S
            await eventually(lambda: shared.replicas.up, "the store is known")
            late.late_s, store._timeout_s = 0.2, 0.1
            await eventually(lambda: not shared.replicas.up, "it answers too late")
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
            told = (await gateway.ask("/ready", method="GET")).json()
            assert told["status"] == "ready"
            assert told["store"]["problem"] == "Redis does not answer within 0.1 s"
            refused = await admin(gateway, "PUT", "/tenants/acme", {"keys": [KEY]})
            assert (refused.status, refused.error["code"]) == (503, "store_unreachable")
            before = shared.replicas.exchanges
            late.late_s, store._timeout_s = 0.0, LIMIT_S
            await eventually(lambda: shared.replicas.exchanges > before + 2, "it answers in time again")
            assert (await gateway.ask("/v1/chat/completions", chat())).status in (200, 401)  # 401: it was written
    said = [record.getMessage() for record in caplog.records if record.name == "evenhand.replicas"]
    assert sum("does not answer within 0.1 s. Serving from the last known state" in line for line in said) == 1


@pytest.mark.slow
async def test_gateways_with_different_tenant_files_go_on_and_say_so(
    own_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "PATIENCE_S", 0.1)
    files = [tmp_path / "one.json", tmp_path / "other.yaml"]
    files[0].write_text(json.dumps({"tenants": [{"name": "acme", "keys": [KEY]}]}))
    files[1].write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    async with FakeEngine(INSTANT) as engine, contextlib.AsyncExitStack() as stack:
        settings = {"redis_url": own_redis.url, "admin_key": ADMIN_KEY, "sync_s": 0.05}
        gateways = [await stack.enter_async_context(serving(engine.url, tenants=file, **settings)) for file in files]
        for gateway in gateways:
            store_of(gateway)._timeout_s = LIMIT_S
            gateway.server.shared.replicas._ttl_s = LIMIT_S
        await eventually(lambda: [replicas(gateway) for gateway in gateways] == [2, 2], "they know each other")
        assert not any("tenants" in gateway.server.shared.notes() for gateway in gateways), "the same, in other words"
        files[1].write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}, {{name: zenith, keys: [{OTHER}]}}]")
        for gateway in gateways:
            await eventually(lambda gateway=gateway: "tenants" in gateway.server.shared.notes(), "both say so")
            told = (await gateway.ask("/ready", method="GET")).json()
            assert told["status"] == "ready"
            assert told["tenants"]["problem"].startswith("1 other gateway has a different tenant file")
            assert await ask(gateway, KEY) == 200
        files[0].write_text(files[1].read_text().replace("tenants:", "# YAML as well\ntenants:"))
        for gateway in gateways:
            await eventually(lambda gateway=gateway: "tenants" not in gateway.server.shared.notes(), "they agree")


@pytest.mark.slow
async def test_a_thousand_workers_fail_at_once_clients_are_told_and_served_again_when_they_are_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    count, health = 1000, {"attempts": 3}
    async with FakeEngine(INSTANT) as engine, serving(engine.url, probe_s=0.05, health=health) as gateway:
        fleet = gateway.server.fleet
        for number in range(1, count):
            fleet.add(Worker(f"w{number}", engine.url, slots=4))
        await eventually(lambda: len(fleet.ready()) == count, "all are ready")
        engine.die()
        replies = [await gateway.ask("/v1/chat/completions", chat()) for _ in range(5)]
        await eventually(lambda: not fleet.ready(), "all are out")
        replies.append(await gateway.ask("/v1/chat/completions", chat()))
        assert {reply.status for reply in replies} <= {502, 503}
        assert replies[-1].status == 503 and "retry-after" in replies[-1].headers
        assert replies[-1].error["message"] == "No worker serves 'fake' right now."
        told = (await gateway.ask("/ready", method="GET")).json()
        assert told["status"] != "ready" and len(told["workers"]) == count
        await engine.listen()
        await eventually(lambda: len(fleet.ready()) == count, "all are back")
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
    said = [record.getMessage() for record in caplog.records]
    out = [text for text in said if " is down: " in text or " gets no requests until it answers again" in text]
    assert len(out) == count and not [record for record in caplog.records if record.exc_info]
