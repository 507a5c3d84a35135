"""The runner by itself: what must not be lost when something else fails or changes at the same time."""

import asyncio
import io
import time
from pathlib import Path

from server.batch.batches import Batches, BatchRequest
from server.batch.content import Reply
from server.batch.files import FileFolder
from server.batch.objects import Batch, Result, Status
from server.batch.runner import Runner
from server.batch.store import SqliteBatchStore
from server.request.tenants import Tenant
from server.settings import BatchSettings
from tests.server.batch.test_batches import OVER, jsonl
from tests.server.conftest import LIMIT_S


class Broken:
    """Engines whose every other request fails inside the gateway."""

    def __init__(self) -> None:
        self.asked = 0

    def served(self, tenant: str, model: str) -> bool:
        return True

    def room(self, model: str, running: int) -> int:
        return 4 - running

    async def ask(self, tenant: str, endpoint: str, body: bytes, request_id: str) -> Reply:
        self.asked += 1
        if self.asked % 2:
            raise RuntimeError("a defect")
        return Reply(200, b"{}", request_id)


def over_sqlite(folder: Path) -> Batches:
    store = SqliteBatchStore(folder / "batches.sqlite", time.monotonic)
    return Batches(FileFolder(folder / "files"), store, BatchSettings(), time.monotonic)


async def submitted(batches: Batches, lines: int) -> Batch:
    file = await batches.add_file("acme", "in.jsonl", "batch", io.BytesIO(jsonl(lines)))
    return await batches.create(Tenant("acme"), BatchRequest(file.id, "/v1/completions", "24h"))


async def test_a_line_that_fails_inside_the_gateway_is_in_the_error_file(tmp_path: Path) -> None:
    batches = over_sqlite(tmp_path)
    batch = await submitted(batches, 10)
    running = asyncio.create_task(Runner(batches, Broken(), "one", time.monotonic).run())
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = await batches.batch("acme", batch.id)
            if batch.status in OVER:
                break
            await asyncio.sleep(0.01)  # between two looks
    running.cancel()
    await asyncio.wait([running])
    assert (batch.status, batch.completed, batch.failed) == (Status.COMPLETED, 5, 5)
    assert batch.error_file_id is not None
    assert b"".join(batches.files.pieces(batch.error_file_id)).count(b"internal_error") == 5
    batches.close()


async def test_a_batch_that_is_cancelled_in_the_moment_it_expires_keeps_its_results(tmp_path: Path) -> None:
    batches = over_sqlite(tmp_path)
    runner = Runner(batches, Broken(), "one", time.monotonic)
    batch = await submitted(batches, 2)
    assert batches.store.lease(batch.id, "one", 60.0)
    await runner._validate(batch)
    begun = await batches.batch("acme", batch.id)
    batches.store.join(batch.id, "one", 60.0)
    batches.store.claim(batch.id, "one", 1)
    batches.store.record(batch.id, "one", [Result(1, True, b"{}")])
    await batches.cancel("acme", batch.id)
    await runner._close(begun, "batch_expired", "too late")  # it does not know yet
    cancelling = await batches.batch("acme", batch.id)
    assert cancelling.status is Status.CANCELLING
    await runner._close(cancelling, "batch_cancelled", "cancelled")
    over = await batches.batch("acme", batch.id)
    assert over.status is Status.CANCELLED and over.output_file_id is not None and over.error_file_id is not None
    batches.close()
