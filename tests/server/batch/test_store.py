"""What every batch store must do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.batch.objects import Batch, BatchLine, Result, Status, StoredFile
from server.batch.store import BatchStore, LeaseLost, SqliteBatchStore

NOW = 1_000_000


@pytest.fixture(params=["sqlite"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], BatchStore]]:
    """Opens the same store once more, as another process would."""
    opened: list[BatchStore] = []

    def one() -> BatchStore:
        opened.append(SqliteBatchStore(tmp_path / "batches.sqlite"))
        return opened[-1]

    yield one
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen: Callable[[], BatchStore]) -> BatchStore:
    return reopen()


def a_file(number: int, tenant: str = "acme", expires_at: int = NOW + 10) -> StoredFile:
    return StoredFile(f"file-{number:08}", tenant, "in.jsonl", "batch", 10 * number, NOW, expires_at)


def a_batch(number: int = 1, tenant: str = "acme", file: str = "file-00000001") -> Batch:
    return Batch(f"batch_{number:08}", tenant, "/v1/completions", file, "24h", NOW, NOW + 86400)


def lines(*numbers: int) -> list[BatchLine]:
    return [BatchLine(number, f"id-{number}", number * 100, 100) for number in numbers]


def begun(store: BatchStore, *numbers: int) -> Batch:
    batch = a_batch()
    store.add_batch(batch)
    assert store.lease(batch.id, "one", NOW, 10)
    store.add_lines(batch.id, "one", lines(*numbers))
    return batch


def test_files_are_listed_by_tenant_newest_first_page_by_page(store: BatchStore) -> None:
    for number in (1, 2, 3):
        store.add_file(a_file(number))
    store.add_file(a_file(4, tenant="other"))
    assert [file.bytes for file in store.files("acme", None, 2)] == [30, 20]
    assert [file.bytes for file in store.files("acme", "file-00000002", 2)] == [10]
    assert store.stored_bytes("acme") == 60 and store.stored_bytes("nobody") == 0
    store.remove_file("file-00000003")
    assert store.file("file-00000003") is None and store.stored_bytes("acme") == 30


def test_a_file_that_a_running_batch_reads_does_not_expire(store: BatchStore) -> None:
    store.add_file(a_file(1, expires_at=NOW))
    store.add_file(a_file(2, expires_at=NOW))
    batch = a_batch()
    store.add_batch(batch)
    assert [file.id for file in store.expired_files(NOW)] == ["file-00000002"]
    assert store.update(batch.moved(Status.FAILED, NOW), Status.VALIDATING)
    assert [file.id for file in store.expired_files(NOW)] == ["file-00000001", "file-00000002"]
    assert store.expired_files(NOW - 1) == []


def test_one_owner_at_a_time_has_the_lease(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    one.add_batch(a_batch())
    assert one.lease("batch_00000001", "one", NOW, 10)
    assert not two.lease("batch_00000001", "two", NOW + 5, 10)
    assert one.lease("batch_00000001", "one", NOW + 5, 10)
    assert not two.lease("batch_00000001", "two", NOW + 14, 10)
    assert two.lease("batch_00000001", "two", NOW + 15, 10)
    assert not one.lease("batch_00000001", "one", NOW + 16, 10)


def test_who_has_lost_the_lease_records_nothing(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, 1, 2)
    assert two.lease(batch.id, "two", NOW + 20, 10)
    with pytest.raises(LeaseLost):
        one.record(batch.id, "one", [Result(1, True, b"{}")])
    with pytest.raises(LeaseLost):
        one.add_lines(batch.id, "one", lines(3))
    assert not one.update(batch.moved(Status.IN_PROGRESS, NOW, total=2), Status.VALIDATING, "one")
    assert [line.number for line in two.open_lines(batch.id, 0, 10)] == [1, 2]
    assert one.batch(batch.id) == batch


def test_a_line_counts_once_and_its_first_result_stays(store: BatchStore) -> None:
    batch = begun(store, 1, 2, 3)
    store.record(batch.id, "one", [Result(2, True, b'"a"'), Result(3, False, b'"b"')])
    store.record(batch.id, "one", [Result(2, False, b'"again"'), Result(2, True, b'"again"')])
    now = store.batch(batch.id)
    assert now is not None and (now.completed, now.failed) == (1, 1)
    assert [line.number for line in store.open_lines(batch.id, 0, 10)] == [1]
    assert store.results(batch.id, ok=True, after=0, limit=10) == [Result(2, True, b'"a"')]
    assert store.results(batch.id, ok=False, after=0, limit=10) == [Result(3, False, b'"b"')]
    store.forget_lines(batch.id)
    assert not store.open_lines(batch.id, 0, 10) and not store.results(batch.id, ok=True, after=0, limit=10)


def test_adding_a_line_twice_keeps_its_result(store: BatchStore) -> None:
    batch = begun(store, 1)
    store.record(batch.id, "one", [Result(1, True, b"{}")])
    store.add_lines(batch.id, "one", lines(1, 2))
    assert [line.number for line in store.open_lines(batch.id, 0, 10)] == [2]


def test_a_status_changes_only_from_what_it_was_thought_to_be(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, 1)
    cancelling = batch.moved(Status.CANCELLING, NOW)
    assert two.update(cancelling, Status.VALIDATING)
    assert not one.update(batch.moved(Status.IN_PROGRESS, NOW), Status.VALIDATING, "one")
    assert one.running() == [cancelling]
    assert one.update(cancelling.moved(Status.CANCELLED, NOW), Status.CANCELLING, "one")
    assert one.running() == []


def test_what_was_recorded_is_there_after_a_restart(reopen: Callable[[], BatchStore]) -> None:
    first = reopen()
    batch = begun(first, 1, 2)
    first.record(batch.id, "one", [Result(1, True, b"{}")])
    again = reopen()  # the first is not closed: it was killed
    assert [line.number for line in again.open_lines(batch.id, 0, 10)] == [2]
    assert [found.id for found in again.running()] == [batch.id]


def test_a_batch_cannot_skip_a_status() -> None:
    with pytest.raises(ValueError, match="cannot go from validating to completed"):
        a_batch().moved(Status.COMPLETED, NOW)
