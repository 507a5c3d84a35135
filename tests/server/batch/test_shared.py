"""Gateways that share batches through Redis and one folder."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from openai import InternalServerError

from loadtest.fake.engine import FakeEngine
from server.app import GatewayServer
from server.settings import Settings
from tests.chaos.site import redis
from tests.server.batch.bucket import Bucket
from tests.server.batch.test_batches import client_of, ended, jsonl, lines_of, once, part_done, submit
from tests.server.conftest import INSTANT, SLOW, eventually, serving

DATABASES = count(1)  # a Redis remembers its folder, so each test has a database of its own


@pytest.fixture
def database(redis_url: str) -> str:
    return f"{redis_url.removesuffix('/0')}/{next(DATABASES)}"


@pytest.mark.parametrize("place", ["folder", pytest.param("bucket", marks=pytest.mark.slow)])
async def test_two_gateways_run_one_batch_and_each_knows_it(
    tmp_path: Path, database: str, place: str, request: pytest.FixtureRequest
) -> None:
    files = {"folder": tmp_path} if place == "folder" else {"files_url": request.getfixturevalue("bucket").url}
    settings: dict[str, Any] = {"redis_url": database, "batch": files | {"shared": True}, "slots": 8}
    async with (
        FakeEngine(SLOW) as engine,
        serving(engine.url, **settings) as one,
        serving(engine.url, **settings) as two,
    ):
        for gateway in (one, two):
            assert gateway.server.batches is not None
            gateway.server.batches.read_ahead = 4
        async with client_of(one) as at_one, client_of(two) as at_two:
            batch = await submit(at_one, jsonl(80, max_tokens=2))
            batch = await ended(at_two, batch.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 80)
            for client in (at_one, at_two):
                output = await lines_of(client, batch.output_file_id)
                assert [line["custom_id"] for line in output] == [f"id-{number}" for number in range(80)]
        runs = [
            (await gateway.metrics())["evenhand_batch_lines_total", (("outcome", "answered"),)]
            for gateway in (one, two)
        ]
        assert min(runs) > 0 and sum(runs) == 80


async def test_a_batch_is_cancelled_at_a_gateway_that_does_not_run_it_alone(tmp_path: Path, database: str) -> None:
    settings: dict[str, Any] = {"redis_url": database, "batch": {"folder": tmp_path, "shared": True}, "slots": 4}
    async with (
        FakeEngine(SLOW) as engine,
        serving(engine.url, **settings) as one,
        serving(engine.url, **settings) as two,
    ):
        async with client_of(one) as at_one, client_of(two) as at_two:
            batch = await submit(at_one, jsonl(300))
            await part_done(at_one, batch.id, 3)
            await at_two.batches.cancel(batch.id)
            batch = await ended(at_one, batch.id)
            assert batch.status == "cancelled"
            done, missed = await lines_of(at_two, batch.output_file_id), await lines_of(at_two, batch.error_file_id)
            assert len(done) >= 3 and {line["error"]["code"] for line in missed} == {"batch_cancelled"}
            assert sorted(line["custom_id"] for line in [*done, *missed]) == sorted(f"id-{n}" for n in range(300))


async def test_a_gateway_without_a_worker_leaves_the_lines_to_the_other(tmp_path: Path, database: str) -> None:
    settings: dict[str, Any] = {"redis_url": database, "batch": {"folder": tmp_path, "shared": True}}
    async with FakeEngine(INSTANT) as engine, serving(engine.url, **settings) as one:
        (worker,) = one.server.fleet.members
        async with client_of(one) as client:
            one.server.fleet.drain(worker)
            batch = await submit(client, jsonl(20))
            begun = await once(client, batch.id, lambda batch: batch.status == "in_progress")
            assert begun.request_counts.completed == 0
            async with serving(engine.url, **settings):
                batch = await ended(client, batch.id)
            assert batch.request_counts.completed == 20
        assert (await one.metrics())["evenhand_batch_lines_total", (("outcome", "answered"),)] == 0


@pytest.mark.slow
async def test_redis_may_go_and_come_back(tmp_path: Path) -> None:
    store = redis(tmp_path, kept=True)
    await store.start()
    settings: dict[str, Any] = {
        "redis_url": f"redis://127.0.0.1:{store.port}/0",
        "batch": {"folder": tmp_path / "batch", "shared": True},
    }
    try:
        async with (
            FakeEngine(INSTANT) as engine,
            serving(engine.url, **settings) as gateway,
            client_of(gateway) as client,
        ):
            batch = await submit(client, jsonl(2000))
            await part_done(client, batch.id, 1)
            await store.kill()
            with pytest.raises(InternalServerError, match="The Redis of batches does not answer") as away:
                await once(client, batch.id, lambda batch: False)
            assert away.value.status_code == 503 and away.value.code == "batch_store_unavailable"
            with pytest.raises(InternalServerError):
                await submit(client, jsonl(1))
            await eventually(lambda: not engine.running and not engine.waiting, "lines in flight have ended")
            await store.start()
            batch = await ended(client.with_options(max_retries=20), batch.id)  # Redis still reads its file
            assert batch.request_counts.completed == 2000
            metrics = await gateway.metrics()
            assert metrics["evenhand_batch_lines_total", (("outcome", "answered"),)] == 2000
    finally:
        await store.kill()


async def test_a_folder_that_is_not_the_others_is_refused(tmp_path: Path, database: str) -> None:
    def gateway(folder: Path, **how: Any) -> GatewayServer:
        batch: Any = {"folder": folder, "shared": True}
        return GatewayServer(Settings(workers=["http://127.0.0.1:1"], batch=batch, **how))

    first: Any = {"redis_url": database}
    gateway(tmp_path / "one", **first)
    gateway(tmp_path / "one", **first)
    with pytest.raises(ValueError, match="not the one of the other gateways"):
        gateway(tmp_path / "two", **first)
    with pytest.raises(ValueError, match="needs a Redis"):
        gateway(tmp_path / "one")


async def test_a_bucket_that_is_not_the_others_is_refused_and_one_needs_a_place_for_the_rest(
    bucket: Bucket, database: str
) -> None:
    def gateway(url: str, **how: Any) -> GatewayServer:
        batch: Any = {"files_url": url} | how
        return GatewayServer(Settings(workers=["http://127.0.0.1:1"], batch=batch, redis_url=[database]))

    gateway(bucket.url, shared=True)
    gateway(bucket.url, shared=True)
    with pytest.raises(ValueError, match="not the one of the other gateways"):
        gateway(f"s3://{bucket.name}/elsewhere", shared=True)
    with pytest.raises(ValueError, match=r"batch\.folder, or Redis with batch\.shared"):
        gateway(bucket.url)


@pytest.mark.slow
async def test_a_bucket_may_go_and_come_back(bucket: Bucket, database: str) -> None:
    """Before lines run, and when their output is to be written."""
    settings: dict[str, Any] = {"redis_url": database, "batch": {"files_url": bucket.url, "shared": True}}
    async with FakeEngine(INSTANT) as engine:
        bucket.server.stop()
        try:
            async with serving(engine.url, **settings) as gateway, client_of(gateway) as client:
                assert (await gateway.ask("/v1/models", method="GET")).status == 200
                with pytest.raises(InternalServerError, match="does not answer") as away:
                    await submit(client, jsonl(1))
                assert away.value.status_code == 503 and away.value.code == "batch_files_unavailable"
                bucket.server.start()
                batch = await submit(client, jsonl(1500))
                await part_done(client, batch.id, 1)
                bucket.server.stop()
                with pytest.raises(InternalServerError, match="does not answer"):
                    await client.files.content(batch.input_file_id)
                paused = await client.batches.retrieve(batch.id)
                assert paused.status in ("in_progress", "finalizing")
                bucket.server.start()
                batch = await ended(client, batch.id)
                assert (batch.status, batch.request_counts.completed) == ("completed", 1500)
                output = await lines_of(client, batch.output_file_id)
                assert [line["custom_id"] for line in output] == [f"id-{number}" for number in range(1500)]
                answered = (await gateway.metrics())["evenhand_batch_lines_total", (("outcome", "answered"),)]
                assert answered == 1500  # none ran twice
        finally:
            bucket.server.start()
