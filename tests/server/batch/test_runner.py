"""The runner by itself: what must not be lost when something else fails or changes at the same time."""

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO

import openai
import pytest

from server.batch.batches import Batches, BatchRequest
from server.batch.content import Reply
from server.batch.files import FileFolder, FilesUnavailable, reaching_disk
from server.batch.objects import Batch, Result, Status, StoredFile
from server.batch.runner import Runner
from server.batch.store import LeaseLost, SqliteBatchStore, StoreUnavailable
from server.request.tenants import Tenant
from server.settings import BatchSettings
from tests.server.batch.test_batches import OVER, client_of, jsonl
from tests.server.conftest import INSTANT, LIMIT_S, eventually, over_fake


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


@asynccontextmanager
async def running(runner: Runner) -> AsyncIterator[None]:
    runner.pause_s = runner.tick_s = 0.02
    task = asyncio.create_task(runner.run())
    yield
    task.cancel()
    await asyncio.wait([task])


async def ended(batches: Batches, batch_id: str) -> Batch:
    async with asyncio.timeout(LIMIT_S):
        while True:
            batch = await batches.batch("acme", batch_id)
            if batch.status in OVER:
                return batch
            await asyncio.sleep(0.01)  # between two looks


def answers(batches: Batches, batch: Batch) -> list[str]:
    """The ids of the requests in a batch's output file, in its order."""
    assert batch.output_file_id is not None
    lines = b"".join(batches.files.pieces(batch.output_file_id)).splitlines()
    return [json.loads(line)["custom_id"] for line in lines]


class Good(Broken):
    """Engines that answer."""

    async def ask(self, tenant: str, endpoint: str, body: bytes, request_id: str) -> Reply:
        self.asked += 1
        return Reply(200, b'{"text": "%s"}' % (b"x" * 500), request_id)


class FullFolder(FileFolder):
    """A folder on a disk without room, until there is some."""

    full = True

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        if not self.full:
            with super().writing(file_id) as file:
                yield file
            return
        with reaching_disk(), open("/dev/full", "wb") as file:  # noqa: PTH123 - it is no file of the folder
            yield file
            file.flush()


class SlowFolder(FileFolder):
    """A folder on a disk that hangs in one of the things that a batch does with it, until it is told to go on."""

    def __init__(self, folder: Path, hangs: str) -> None:
        super().__init__(folder)
        self.hangs = hangs
        self.opened = 0
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def _hang(self, at: str) -> None:
        if self.hangs == at:
            self.reached.set()
            assert self.goes_on.wait(LIMIT_S)

    def open(self, file_id: str) -> BinaryIO:
        self.opened += 1
        self._hang("checking" if self.opened == 1 else "reading lines")
        return super().open(file_id)

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        with super().writing(file_id) as file:
            self._hang("writing" if file_id.endswith("output") else "uploading")
            yield file


class AwayFolder(FileFolder):
    """A folder that is away from the moment in which a batch does one of the things that it does with it."""

    def __init__(self, folder: Path, leaves: str) -> None:
        super().__init__(folder)
        self.leaves = leaves
        self.away = False
        self.refused = 0
        self.opened = 0

    def _at(self, what: str) -> None:
        self.away = self.away or what == self.leaves
        if self.away:
            self.refused += 1
            raise FilesUnavailable("it is away", retry_after_s=1e6)  # what clients are told: a batch looks again sooner

    def back(self) -> None:
        self.away, self.leaves = False, ""

    def open(self, file_id: str) -> BinaryIO:
        self.opened += 1
        self._at("checking" if self.opened == 1 else "reading lines")
        return super().open(file_id)

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        with super().writing(file_id) as file:
            yield file
            if file_id.endswith("output"):
                self._at("writing")  # all was sent, and nobody says that it has arrived


async def submitted(batches: Batches, lines: int) -> Batch:
    file = await batches.add_file("acme", "in.jsonl", "batch", io.BytesIO(jsonl(lines)))
    return await batches.create(Tenant("acme"), BatchRequest(file.id, "/v1/completions", "24h"))


class Silent(SqliteBatchStore):
    """It writes what it is told, and does not say so once."""

    silent = False

    def add_file(self, file: StoredFile) -> None:
        super().add_file(file)
        if self.silent:
            raise StoreUnavailable("it does not answer")


async def test_an_upload_that_failed_leaves_neither_a_record_nor_a_content(tmp_path: Path) -> None:
    store = Silent(tmp_path / "batches.sqlite", time.monotonic)
    batches = Batches(FileFolder(tmp_path / "files"), store, BatchSettings(), time.monotonic)
    store.silent = True
    with pytest.raises(StoreUnavailable):
        await batches.add_file("acme", "in.jsonl", "batch", io.BytesIO(b"{}\n"))
    assert await batches.list_files("acme", None, 10) == [] and store.stored_bytes("acme") == 0
    assert not [path for path in (tmp_path / "files").iterdir() if path.name.startswith("file-")]
    batches.close()


async def test_an_upload_that_is_cancelled_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    files = SlowFolder(tmp_path / "files", "uploading")
    batches = Batches(files, SqliteBatchStore(tmp_path / "b.sqlite", time.monotonic), BatchSettings(), time.monotonic)
    task = asyncio.create_task(batches.add_file("acme", "in.jsonl", "batch", io.BytesIO(b"{}\n")))
    assert await asyncio.to_thread(files.reached.wait, LIMIT_S)
    task.cancel()
    await asyncio.sleep(0)  # it is told
    files.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((tmp_path / "files").iterdir()) and await batches.list_files("acme", None, 10) == []
    batches.close()


async def test_a_line_that_fails_inside_the_gateway_is_in_the_error_file(tmp_path: Path) -> None:
    batches = over_sqlite(tmp_path)
    batch = await submitted(batches, 10)
    async with running(Runner(batches, Broken(), "one", time.monotonic)):
        batch = await ended(batches, batch.id)
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


async def test_a_batch_pauses_while_the_disk_is_full_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteBatchStore(tmp_path / "batches.sqlite", time.monotonic)
    files = FullFolder(tmp_path / "files")
    batches, engines = Batches(files, store, BatchSettings(), time.monotonic), Good()
    files.full = False
    batch = await submitted(batches, 300)
    files.full = True
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 25}")  # room for the lines, and not for all results
    async with running(Runner(batches, engines, "one", time.monotonic)), asyncio.timeout(LIMIT_S):
        await eventually(lambda: any("disk is full" in each.message for each in caplog.records), "it pauses")
        now = await batches.batch("acme", batch.id)
        assert now.status is Status.IN_PROGRESS and now.completed < 300
        store._db.execute("PRAGMA max_page_count = 100000")  # somebody has made room for results, not yet for files
        while now.status is not Status.FINALIZING:
            now = await batches.batch("acme", batch.id)
            await asyncio.sleep(0.01)  # between two looks
        files.full = False
        batch = await ended(batches, batch.id)
    assert (batch.status, batch.completed) == (Status.COMPLETED, 300)
    assert answers(batches, batch) == [f"id-{number}" for number in range(300)]
    assert engines.asked == 300
    batches.close()


@pytest.mark.parametrize("leaves", ["checking", "reading lines", "writing"])
async def test_a_batch_pauses_while_its_files_are_away_and_loses_nothing(tmp_path: Path, leaves: str) -> None:
    files, engines = AwayFolder(tmp_path / "files", leaves), Good()
    store = SqliteBatchStore(tmp_path / "batches.sqlite", time.monotonic)
    batches = Batches(files, store, BatchSettings(), time.monotonic)
    batch = await submitted(batches, 30)
    async with running(Runner(batches, engines, "one", time.monotonic)), asyncio.timeout(LIMIT_S):
        await eventually(lambda: files.refused >= 3, "it was tried again")
        now = await batches.batch("acme", batch.id)
        expected = {"checking": Status.VALIDATING, "reading lines": Status.IN_PROGRESS, "writing": Status.FINALIZING}
        assert now.status is expected[leaves] and now.completed == (30 if leaves == "writing" else 0)
        files.back()
        batch = await ended(batches, batch.id)
    assert (batch.status, batch.completed, engines.asked) == (Status.COMPLETED, 30, 30)
    assert answers(batches, batch) == [f"id-{number}" for number in range(30)]
    batches.close()


async def test_requests_of_an_input_that_is_gone_fail_and_say_so(tmp_path: Path) -> None:
    batches, engines = over_sqlite(tmp_path), Good()
    runner, batch = Runner(batches, engines, "one", time.monotonic), await submitted(batches, 20)
    assert batches.store.lease(batch.id, "one", 60.0)
    await runner._validate(batch)
    batches.files.identity()
    batches.files.remove(batch.input_file_id)
    async with running(runner):
        batch = await ended(batches, batch.id)
    assert (batch.status, batch.completed, batch.failed, engines.asked) == (Status.COMPLETED, 0, 20, 0)
    assert batch.error_file_id is not None
    errors = [json.loads(line)["error"] for line in b"".join(batches.files.pieces(batch.error_file_id)).splitlines()]
    assert {error["code"] for error in errors} == {"file_not_found"} and len(errors) == 20
    batches.close()


class Nameless(FileFolder):
    """A folder that does not say whose it is until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def identity(self) -> str:
        self.asked.set()
        assert self.goes_on.wait(LIMIT_S)
        return super().identity()


async def test_files_that_do_not_answer_hold_up_neither_the_start_nor_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.batch.batches.START_S", 0.01)
    files, store = Nameless(tmp_path / "files"), SqliteBatchStore(tmp_path / "b.sqlite", time.monotonic)
    batches = Batches(files, store, BatchSettings(), time.monotonic)
    with pytest.raises(FilesUnavailable, match="do not answer"):
        batches.check_at_start()
    assert files.asked.is_set() and not files.goes_on.is_set()
    files.asked.clear()
    async with running(Runner(batches, Good(), "one", time.monotonic)), asyncio.timeout(LIMIT_S):
        assert await asyncio.to_thread(files.asked.wait, LIMIT_S)
        batch = await submitted(batches, 3)
        assert not files.goes_on.is_set() and await batches.list_batches("acme", None, 10) == [batch]
        files.goes_on.set()
        assert (await ended(batches, batch.id)).completed == 3
    batches.close()


class StuckSweep(FileFolder):
    """A folder whose old parts cannot be listed until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def remove_parts(self, before: float) -> None:
        self.reached.set()
        assert self.goes_on.wait(LIMIT_S)


async def test_batches_begin_while_old_files_are_removed(tmp_path: Path) -> None:
    files, store = StuckSweep(tmp_path / "files"), SqliteBatchStore(tmp_path / "b.sqlite", time.monotonic)
    batches = Batches(files, store, BatchSettings(), time.monotonic)
    runner = Runner(batches, Good(), "one", time.monotonic)
    async with running(runner), asyncio.timeout(LIMIT_S):
        sweep = asyncio.create_task(runner.sweep())
        assert await asyncio.to_thread(files.reached.wait, LIMIT_S)
        batch = await submitted(batches, 3)
        assert (await ended(batches, batch.id)).completed == 3 and not files.goes_on.is_set()
        files.goes_on.set()
        sweep.cancel()
    batches.close()


async def test_why_a_batch_waits_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = AwayFolder(tmp_path / "files", "writing")
    store = SqliteBatchStore(tmp_path / "batches.sqlite", time.monotonic)
    batches = Batches(files, store, BatchSettings(), time.monotonic)
    caplog.set_level("INFO", logger="evenhand.batch")
    batch = await submitted(batches, 3)
    async with running(Runner(batches, Good(), "one", time.monotonic)), asyncio.timeout(LIMIT_S):
        await eventually(lambda: files.refused >= 3, "it was tried again")
        files.back()
        await ended(batches, batch.id)
    said = [each.getMessage() for each in caplog.records]
    assert [line for line in said if "paused" in line] == [f"batch {batch.id} paused: it is away"]
    assert f"batch {batch.id} resumed" in said
    batches.close()


async def test_an_upload_to_a_full_disk_is_refused_and_counts_nothing(tmp_path: Path) -> None:
    async with over_fake(INSTANT, batch={"folder": tmp_path}) as (gateway, _), client_of(gateway) as client:
        assert gateway.server.batches is not None
        gateway.server.batches.batches.files = FullFolder(tmp_path / "files")
        with pytest.raises(openai.InternalServerError, match="disk is full") as full:
            await client.files.create(file=("in.jsonl", jsonl(3)), purpose="batch")
        assert full.value.status_code == 507 and full.value.code == "insufficient_storage"
        assert full.value.response.headers["retry-after"] == "60"
        assert not (await client.files.list()).data


@pytest.mark.parametrize("written", [False, True], ids=["while it writes", "before it says so"])
async def test_a_gateway_that_is_killed_in_finalizing_leaves_it_to_the_next(tmp_path: Path, written: bool) -> None:
    batches = over_sqlite(tmp_path)
    batch = await submitted(batches, 5)
    dead = Runner(batches, Good(), "dead", time.monotonic)
    assert batches.store.lease(batch.id, "dead", 0.0)
    await dead._validate(batch)
    await dead._work(await batches.batch("acme", batch.id))
    finalizing = await batches.batch("acme", batch.id)
    assert finalizing.status is Status.FINALIZING and batches.store.lease(batch.id, "dead", 0.0)
    if written:
        await dead._write_results(finalizing, ok=True)
        assert batches.store.lease(batch.id, "dead", 0.0)
    else:
        (tmp_path / "files" / f"file-{batch.id[6:]}-output.12345678.part").write_bytes(b'{"id": "half')
    async with running(Runner(batches, Broken(), "next", time.monotonic)):
        batch = await ended(batches, batch.id)
    assert (batch.status, batch.completed, batch.failed) == (Status.COMPLETED, 5, 0)
    assert answers(batches, batch) == [f"id-{number}" for number in range(5)]
    outputs = [file for file in await batches.list_files("acme", None, 9) if file.purpose == "batch_output"]
    assert [file.id for file in outputs] == [batch.output_file_id]
    batches.files.remove_parts(2.0**33)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted([batch.input_file_id, outputs[0].id])
    batches.close()


class Overtaken(SqliteBatchStore):
    """Another gateway ends the batch while this one writes its files: the results are gone then."""

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        found = super().results(batch_id, ok=ok, after=after, limit=1)
        if found and (batch := self.batch(batch_id)) is not None:
            super().update(batch.moved(Status.COMPLETED, 1), batch.status)
        return found


async def test_a_file_that_another_gateway_has_written_is_not_replaced_by_a_part_of_it(tmp_path: Path) -> None:
    store = Overtaken(tmp_path / "batches.sqlite", time.monotonic)
    batches = Batches(FileFolder(tmp_path / "files"), store, BatchSettings(), time.monotonic)
    runner = Runner(batches, Broken(), "one", time.monotonic)
    batch = await submitted(batches, 3)
    assert store.lease(batch.id, "one", 60.0)
    await runner._validate(batch)
    store.join(batch.id, "one", 60.0)
    store.claim(batch.id, "one", 3)
    store.record(batch.id, "one", [Result(number, True, b"{}") for number in (1, 2, 3)])
    finalizing = (await batches.batch("acme", batch.id)).moved(Status.FINALIZING, 1)
    assert store.update(finalizing, Status.IN_PROGRESS)
    with pytest.raises(LeaseLost):
        await runner._write_results(await batches.batch("acme", batch.id), ok=True)
    assert not [file.name for file in (tmp_path / "files").rglob("*") if "output" in file.name]
    batches.close()


class Wall:
    """A clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("hangs", ["checking", "reading lines", "writing"])
async def test_a_disk_that_hangs_loses_no_lease(tmp_path: Path, hangs: str) -> None:
    wall, files, engines = Wall(), SlowFolder(tmp_path / "files", hangs), Good()
    store, others = (SqliteBatchStore(tmp_path / "batches.sqlite", wall) for _ in range(2))
    batches = Batches(files, store, BatchSettings(), wall)
    batch = await submitted(batches, 20)
    until = "MAX(until) FROM owners" if hangs == "reading lines" else "lease_until FROM batches"
    async with running(Runner(batches, engines, "one", time.monotonic)), asyncio.timeout(LIMIT_S):
        assert await asyncio.to_thread(files.reached.wait, LIMIT_S)
        for _ in range(4):
            wall.now += 2.0
            due = wall.now + 4.0
            await eventually(lambda due=due: others._db.execute(f"SELECT {until}").fetchone()[0] > due, "it is renewed")
        assert not others.lease(batch.id, "two", 5.0) or hangs == "reading lines"
        if hangs == "reading lines":
            others.join(batch.id, "two", 5.0)
            assert others.claim(batch.id, "two", 100) == []
            others.leave(batch.id, "two")
        files.goes_on.set()
        batch = await ended(batches, batch.id)
    assert (batch.status, batch.completed, engines.asked) == (Status.COMPLETED, 20, 20)
    batches.close()
    others.close()


async def test_a_gateway_that_has_lost_its_lines_starts_no_more_of_them(tmp_path: Path) -> None:
    wall, files, engines = Wall(), SlowFolder(tmp_path / "files", "reading lines"), Good()
    store, others = (SqliteBatchStore(tmp_path / "batches.sqlite", wall) for _ in range(2))
    batches = Batches(files, store, BatchSettings(), wall)
    batch = await submitted(batches, 20)
    runner = Runner(batches, engines, "one", time.monotonic)
    async with running(runner), asyncio.timeout(LIMIT_S):
        assert await asyncio.to_thread(files.reached.wait, LIMIT_S)
        others._db.execute("DELETE FROM owners")  # it stood still for so long that the others gave its lines away
        others._db.execute("DELETE FROM claims")
        others.join(batch.id, "two", 60.0)
        assert len(others.claim(batch.id, "two", 100)) == 20
        await eventually(lambda: not renews(), "it knows")
        files.goes_on.set()
        await eventually(lambda: batch.id not in runner._works, "it has given up")
        assert engines.asked == 0
    batches.close()
    others.close()


def renews() -> bool:
    """Whether a lease is renewed in this loop."""
    return any(task.get_name() == "renew a lease" for task in asyncio.all_tasks())
