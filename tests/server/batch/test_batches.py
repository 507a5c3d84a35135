"""The Batch API through the official client, over engines without a model."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from loadtest.fake.engine import FakeEngine
from tests.server.batch.conftest import Place
from tests.server.conftest import INSTANT, LIMIT_S, MODEL, SLOW, Running, eventually, over_fake, request, serving

OVER = ("completed", "failed", "expired", "cancelled")
KEYS = {"acme": "sk-acme-0123456789abcdef", "other": "sk-other-0123456789abcdef"}


def jsonl(count: int, url: str = "/v1/completions", **body: Any) -> bytes:
    base = {"model": MODEL} | ({"prompt": "Once upon a time", "max_tokens": 4} if url == "/v1/completions" else {})
    lines = [
        {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": base | body} for number in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@contextlib.asynccontextmanager
async def client_of(gateway: Running, key: str = "any") -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def submit(client: AsyncOpenAI, content: bytes, endpoint: Any = "/v1/completions", **fields: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = fields.pop("completion_window", "24h")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **fields)


async def once(client: AsyncOpenAI, batch_id: str, reached: Callable[[Any], bool]) -> Any:
    """The batch as soon as it has got there."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if reached(batch):
                return batch
            await asyncio.sleep(0.02)  # between two questions


async def ended(client: AsyncOpenAI, batch_id: str) -> Any:
    return await once(client, batch_id, lambda batch: batch.status in OVER)


async def part_done(client: AsyncOpenAI, batch_id: str, lines: int) -> Any:
    return await once(client, batch_id, lambda batch: batch.request_counts.completed >= lines)


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


async def test_a_batch_runs_from_upload_to_download(place: Place) -> None:
    async with over_fake(INSTANT, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        batch = await submit(client, jsonl(1001), metadata={"job": "nightly"})
        assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"job": "nightly"})
        batch = await ended(client, batch.id)
        assert batch.status == "completed", batch
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (1001, 1001, 0)
        assert batch.in_progress_at and batch.finalizing_at and batch.completed_at and batch.error_file_id is None
        output = await lines_of(client, batch.output_file_id)
        assert [line["custom_id"] for line in output] == [f"id-{number}" for number in range(1001)]
        assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in output)
        assert all(line["response"]["body"]["usage"]["completion_tokens"] == 4 for line in output)
        with pytest.raises(openai.BadRequestError, match="completed cannot be cancelled"):
            await client.batches.cancel(batch.id)
        assert len({line["id"] for line in output}) == 1001
        metrics = await gateway.metrics()
        assert metrics["evenhand_batch_lines_total", (("outcome", "answered"),)] == 1001
        assert metrics["evenhand_batch_lines_in_flight", ()] == 0
        listed = await client.batches.list(limit=10)
        assert [found.id for found in listed.data] == [batch.id]


async def test_every_generating_route_is_an_endpoint(place: Place) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    async with over_fake(INSTANT, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        for endpoint, body in (("/v1/chat/completions", chat), ("/v1/embeddings", {"input": "x"})):
            batch = await ended(client, (await submit(client, jsonl(2, endpoint, **body), endpoint)).id)
            assert batch.request_counts.completed == 2, await lines_of(client, batch.error_file_id)


async def test_wrong_lines_fail_the_batch_with_their_numbers(place: Place) -> None:
    content = jsonl(2) + b"{oops\n" + jsonl(1)
    async with over_fake(INSTANT, batch=place.settings) as (gateway, engine), client_of(gateway) as client:
        batch = await ended(client, (await submit(client, content)).id)
        assert batch.status == "failed" and batch.output_file_id is None
        assert [(error.line, error.code) for error in batch.errors.data] == [
            (3, "invalid_json_line"),
            (4, "duplicate_custom_id"),
        ]


async def test_requests_that_the_engine_refuses_are_in_the_error_file(place: Place) -> None:
    content = jsonl(1) + jsonl(1, max_tokens=-5).replace(b"id-0", b"bad")
    async with over_fake(INSTANT, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        batch = await ended(client, (await submit(client, content)).id)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
        (error,) = await lines_of(client, batch.error_file_id)
        assert error["custom_id"] == "bad" and error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["message"]


async def test_a_cancelled_batch_keeps_what_has_run(place: Place) -> None:
    async with over_fake(SLOW, slots=4, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        batch = await submit(client, jsonl(200))
        await part_done(client, batch.id, 2)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling" and cancelling.cancelling_at
        batch = await ended(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at
        done, missed = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
        assert len(done) >= 2 and {line["error"]["code"] for line in missed} == {"batch_cancelled"}
        assert sorted(line["custom_id"] for line in [*done, *missed]) == sorted(f"id-{n}" for n in range(200))
        with (
            pytest.raises(openai.BadRequestError, match="finalizing|completed")
            if batch.status == "completed"
            else (contextlib.nullcontext())
        ):
            await client.batches.cancel(batch.id)


async def test_a_window_that_ends_leaves_partial_results(place: Place) -> None:
    async with over_fake(SLOW, slots=4, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        batch = await submit(client, jsonl(200), completion_window="1m")
        await part_done(client, batch.id, 2)
        runner = gateway.server.batches
        assert runner is not None
        wall = runner.batches.wall
        runner.batches.wall = lambda: wall() + 61.0  # a minute passes
        batch = await ended(client, batch.id)
        assert batch.status == "expired" and batch.expired_at
        done, missed = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
        assert len(done) >= 2 and {line["error"]["code"] for line in missed} == {"batch_expired"}
        assert len(done) + len(missed) == 200


async def test_lines_are_flex_and_leave_room_on_a_stock_engine(place: Place) -> None:
    given: dict[str, Any] = {"batch": place.settings, "tiers": {"flex_share": 0.5}}
    async with over_fake(SLOW, slots=8, **given) as (gateway, engine), client_of(gateway) as client:
        batch = await submit(client, jsonl(60, max_tokens=8))
        most = 0
        while (await client.batches.retrieve(batch.id)).status not in OVER:
            most = max(most, gateway.in_flight)
            await asyncio.sleep(0.005)  # between two looks
        assert 1 < most <= 4
        answers = (await client.files.content((await client.batches.retrieve(batch.id)).output_file_id)).text
        assert {json.loads(line)["response"]["body"]["service_tier"] for line in answers.splitlines()} == {"flex"}


async def test_files_and_batches_are_their_tenants_own(tmp_path: Path, place: Place) -> None:
    tenants = tmp_path / "tenants.yaml"
    records = [{"name": name, "keys": [key]} for name, key in KEYS.items()]
    tenants.write_text(json.dumps({"tenants": records}))
    settings: dict[str, Any] = {"batch": place.settings, "tenants": tenants}
    async with over_fake(INSTANT, **settings) as (gateway, _):
        async with client_of(gateway, KEYS["acme"]) as acme, client_of(gateway, KEYS["other"]) as other:
            batch = await ended(acme, (await submit(acme, jsonl(3))).id)
            assert batch.request_counts.completed == 3
            for refused in (
                other.batches.retrieve(batch.id),
                other.batches.cancel(batch.id),
                other.files.retrieve(batch.input_file_id),
                other.files.content(batch.output_file_id),
                other.files.delete(batch.input_file_id),
                other.batches.create(
                    input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    await refused
            assert not (await other.files.list()).data and not (await other.batches.list()).data
            async with client_of(gateway, "sk-nobody-0123456789") as nobody:
                with pytest.raises(openai.AuthenticationError):
                    await nobody.files.list()
            assert (await acme.files.delete(batch.output_file_id)).deleted
            assert len((await acme.files.list()).data) == 1


async def test_a_tenant_without_the_grants_is_refused_before_anything_runs(tmp_path: Path, place: Place) -> None:
    tenants = tmp_path / "tenants.yaml"
    grants: dict[str, Any] = {"acme": {"tiers": ["default", "priority"]}, "other": {"models": ["small"]}}
    records = [{"name": name, "keys": [key], **grants[name]} for name, key in KEYS.items()]
    tenants.write_text(json.dumps({"tenants": records}))
    settings: dict[str, Any] = {"batch": place.settings, "tenants": tenants}
    async with over_fake(INSTANT, **settings) as (gateway, engine):
        async with client_of(gateway, KEYS["acme"]) as acme, client_of(gateway, KEYS["other"]) as other:
            with pytest.raises(openai.PermissionDeniedError, match="service tier 'flex'") as tier:
                await submit(acme, jsonl(3))
            assert tier.value.code == "service_tier_not_granted"
            with pytest.raises(openai.NotFoundError, match=f"may not use the model '{MODEL}'") as model:
                await submit(other, b"\n" + jsonl(3))
            assert (model.value.code, model.value.param) == ("model_not_found", "input_file_id")
            assert not (await acme.batches.list()).data and not (await other.batches.list()).data
            batch = await ended(other, (await submit(other, b"oops\n")).id)
            assert batch.errors.data[0].line == 1
        assert not engine.seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "30s"}, "completion_window"),
        ({"completion_window": "99d"}, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"x" * 65: ""}}, "metadata"),
        ({"input_file_id": "file-nothing0"}, "file_id"),
        ({"input_file_id": "../../etc/passwd"}, "file_id"),
    ],
)
async def test_a_wrong_batch_is_refused_with_the_field(place: Place, fields: Any, param: str) -> None:
    async with over_fake(INSTANT, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        file = await client.files.create(file=("in.jsonl", jsonl(1)), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | fields
        reply = await gateway.ask("/v1/batches", body)
        assert reply.status in (400, 404) and reply.error["param"] == param


async def test_wrong_uploads_are_refused(place: Place) -> None:
    limits = place.settings | {"tenant_bytes": 5000}
    async with over_fake(INSTANT, batch=limits) as (gateway, _), client_of(gateway) as client:
        assert (await gateway.ask("/v1/files", {"purpose": "batch"})).status == 400
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("in.jsonl", jsonl(1)), purpose="assistants")
        with pytest.raises(openai.RateLimitError, match="5000 bytes"):
            await client.files.create(file=("in.jsonl", jsonl(100)), purpose="batch")
        broken = request("/v1/files", b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"})
        wire = await gateway.send(broken.replace(b"content-type: application/json\r\n", b"", 1))
        assert (await wire.answer()).status == 400
        assert not place.contents()


async def test_a_file_may_be_larger_than_a_body_and_has_a_bound_of_its_own(place: Place) -> None:
    content = jsonl(1) + b"\n" * 100_000
    settings: dict[str, Any] = {"batch": place.settings, "edge": {"max_body_bytes": 50_000}}
    async with over_fake(INSTANT, **settings) as (gateway, _), client_of(gateway) as client:
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        assert file.bytes == len(content)
        assert (await client.files.content(file.id)).content == content
        assert (await gateway.ask("/v1/batches", {"input_file_id": "x" * 60_000})).status == 413
        head = b"POST /v1/files HTTP/1.1\r\nhost: g\r\ncontent-length: 300000000\r\n\r\n"
        wire = await gateway.send(head)
        assert (await wire.answer()).status == 413


async def test_a_gateway_that_was_stopped_goes_on_where_it_was(place: Place) -> None:
    async with FakeEngine(SLOW) as engine:
        settings: dict[str, Any] = {"batch": place.settings, "slots": 4}
        async with serving(engine.url, **settings) as gateway, client_of(gateway) as client:
            batch = await submit(client, jsonl(60))
            await part_done(client, batch.id, 5)
        async with serving(engine.url, **settings) as gateway, client_of(gateway) as client:
            runner = gateway.server.batches
            assert runner is not None
            wall = runner.batches.wall
            runner.batches.wall = lambda: wall() + 11.0  # the first gateway's lease has ended
            runner.batches.changed.set()
            batch = await ended(client, batch.id)
            assert batch.status == "completed" and batch.request_counts.completed == 60
            output = await lines_of(client, batch.output_file_id)
            assert [line["custom_id"] for line in output] == [f"id-{number}" for number in range(60)]


async def test_expired_files_are_swept(place: Place) -> None:
    async with over_fake(INSTANT, batch=place.settings) as (gateway, _), client_of(gateway) as client:
        file = await client.files.create(file=("in.jsonl", jsonl(1)), purpose="batch")
        runner = gateway.server.batches
        assert runner is not None and await runner.batches.sweep() == 0
        assert "remove old batch files" in {task.get_name() for task in asyncio.all_tasks()}
        wall = runner.batches.wall
        runner.batches.wall = lambda: wall() + 31 * 86400.0
        assert await runner.batches.sweep() == 1
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        assert not place.contents()


async def test_a_content_that_is_gone_is_not_found(tmp_path: Path) -> None:
    async with over_fake(INSTANT, batch={"folder": tmp_path}) as (gateway, _), client_of(gateway) as client:
        file = await client.files.create(file=("in.jsonl", jsonl(1)), purpose="batch")
        (tmp_path / "files" / file.id).unlink()
        with pytest.raises(openai.NotFoundError, match="is gone") as gone:
            await client.files.content(file.id)
        assert gone.value.code == "file_not_found"
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        assert [error.code for error in (await ended(client, batch.id)).errors.data] == ["file_not_found"]


async def test_uploads_that_wait_fill_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batch.batches.ARRIVING_BYTES", 100_000)
    content = b"\n" * 60_000
    async with over_fake(INSTANT, batch={"folder": tmp_path}) as (gateway, _), client_of(gateway) as client:
        assert gateway.server.batches is not None
        batches = gateway.server.batches.batches
        async with asyncio.timeout(LIMIT_S), batches._one_upload:
            waiting = asyncio.create_task(client.files.create(file=("in.jsonl", content), purpose="batch"))
            await eventually(lambda: batches.arriving.held > 60_000, "it has arrived")
            with pytest.raises(openai.InternalServerError, match="Too many uploads") as many:
                await client.files.create(file=("in.jsonl", content), purpose="batch")
            assert many.value.status_code == 503 and many.value.response.headers["retry-after"] == "5"
        await waiting
        assert batches.arriving.held == 0
        await client.files.create(file=("in.jsonl", content), purpose="batch")
        assert len((await client.files.list()).data) == 2 and batches.arriving.held == 0


async def test_an_upload_beyond_the_quota_is_refused_before_it_is_read(tmp_path: Path) -> None:
    settings = {"folder": tmp_path, "tenant_bytes": 5000}
    async with over_fake(INSTANT, batch=settings) as (gateway, _):
        head = b"POST /v1/files HTTP/1.1\r\nhost: g\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        wire = await gateway.send(head + b"content-length: 100000\r\n\r\n")
        answer = await wire.answer()
        assert answer.status == 429 and b"storage_quota_exceeded" in answer.body


async def test_an_upload_that_finds_no_temporary_folder_is_told_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with over_fake(INSTANT, batch={"folder": tmp_path}) as (gateway, _), client_of(gateway) as client:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
        with pytest.raises(openai.InternalServerError, match="temporary folder") as away:
            await client.files.create(file=("in.jsonl", b"\n" * 2_000_000), purpose="batch")
        assert away.value.status_code == 503 and away.value.code == "batch_files_unavailable"
        assert not (await client.files.list()).data


async def test_without_a_folder_there_is_no_batch_api() -> None:
    async with over_fake(INSTANT) as (gateway, _):
        assert (await gateway.ask("/v1/batches", {})).status == 404
