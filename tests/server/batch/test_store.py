"""What every batch store must do."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from server.batch.objects import Batch, BatchLine, Result, Status, StoredFile
from server.batch.redis_store import RedisBatchStore
from server.batch.store import BatchStore, LeaseLost, SqliteBatchStore, StoreUnavailable
from tests.server.conftest import LIMIT_S

NOW = 1_000_000
LONG_S, SHORT_S = 600.0, 0.02  # a lease that lasts as long as a test, and one whose end a test waits for
NAMES = count()


@pytest.fixture(params=["sqlite", "redis"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], BatchStore]]:
    """Opens the same store once more, as another process would."""
    opened: list[BatchStore] = []
    prefix = f"batches-{next(NAMES)}"
    redis_url = request.getfixturevalue("redis_url") if request.param == "redis" else None

    def one() -> BatchStore:
        if redis_url is None:
            opened.append(SqliteBatchStore(tmp_path / "batches.sqlite", time.monotonic))
        else:
            opened.append(RedisBatchStore(redis_url, prefix=prefix, timeout_s=LIMIT_S))
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
    """A batch with these lines, which owner "one" may run."""
    batch = a_batch()
    store.add_batch(batch)
    assert store.lease(batch.id, "one", LONG_S)
    store.add_lines(batch.id, "one", lines(*numbers))
    store.join(batch.id, "one", LONG_S)
    return batch


def claimed(store: BatchStore, batch: Batch, owner: str, most: int = 100) -> list[int]:
    return [line.number for line in store.claim(batch.id, owner, most)]


def at_last(happens: Callable[[], bool]) -> None:
    """Returns once a lease that was short has ended."""
    end = time.monotonic() + LIMIT_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(SHORT_S)  # between two looks


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
    assert one.lease("batch_00000001", "one", LONG_S)
    assert not two.lease("batch_00000001", "two", LONG_S)
    assert one.lease("batch_00000001", "one", SHORT_S)
    at_last(lambda: two.lease("batch_00000001", "two", LONG_S))
    assert not one.lease("batch_00000001", "one", LONG_S)
    assert not one.lease("batch_nothing0", "one", LONG_S)
    two.leave("batch_00000001", "two")
    assert one.lease("batch_00000001", "one", LONG_S)


def test_who_has_lost_the_lease_changes_nothing(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, 1, 2)
    one.lease(batch.id, "one", SHORT_S)
    at_last(lambda: two.lease(batch.id, "two", LONG_S))
    with pytest.raises(LeaseLost):
        one.add_lines(batch.id, "one", lines(3))
    assert not one.update(batch.moved(Status.IN_PROGRESS, NOW, total=2), Status.VALIDATING, "one")
    assert two.unfinished(batch.id) == 2
    assert one.batch(batch.id) == batch


def test_a_line_is_given_to_one_owner(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, *range(1, 9))
    assert claimed(one, batch, "one", 3) == [1, 2, 3]
    two.join(batch.id, "two", LONG_S)
    assert claimed(two, batch, "two", 2) == [4, 5]
    assert claimed(two, batch, "two") == [4, 5, 6, 7]  # half of what is open
    assert claimed(one, batch, "one") == [1, 2, 3, 8]
    assert one.claim(batch.id, "one", 0) == lines(1, 2, 3, 8)  # a claim whose answer got lost is told again
    two.leave(batch.id, "two")
    assert claimed(one, batch, "one") == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(LeaseLost):
        two.claim(batch.id, "two", 1)
    with pytest.raises(LeaseLost):
        two.join("batch_nothing0", "two", LONG_S)


def test_the_lines_of_who_does_not_renew_are_open_again(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, 1, 2)
    assert claimed(one, batch, "one", 1) == [1]
    two.join(batch.id, "two", LONG_S)
    one.renew(batch.id, "one", SHORT_S)

    def both_are_here() -> bool:
        two.renew(batch.id, "two", LONG_S)
        return claimed(two, batch, "two") == [1, 2]

    at_last(both_are_here)
    for late in (
        lambda: one.record(batch.id, "one", [Result(1, True, b'"late"')]),
        lambda: one.renew(batch.id, "one", LONG_S),
        lambda: one.claim(batch.id, "one", 1),
    ):
        with pytest.raises(LeaseLost):
            late()
    two.record(batch.id, "two", [Result(1, True, b'"in time"')])
    assert two.results(batch.id, ok=True, after=0, limit=9) == [Result(1, True, b'"in time"')]


def test_nobody_loses_lines_when_nobody_could_renew(reopen: Callable[[], BatchStore]) -> None:
    one, two = reopen(), reopen()
    batch = begun(one, 1, 2)
    assert claimed(one, batch, "one", 1) == [1]
    two.join(batch.id, "two", SHORT_S)
    one.renew(batch.id, "one", SHORT_S)
    time.sleep(3 * SHORT_S)  # the store was away for so long
    two.renew(batch.id, "two", LONG_S)
    assert claimed(two, batch, "two") == [2]
    one.record(batch.id, "one", [Result(1, True, b"{}")])
    assert one.unfinished(batch.id) == 1


def test_a_line_counts_once_and_its_first_result_stays(store: BatchStore) -> None:
    batch = begun(store, 1, 2, 3)
    claimed(store, batch, "one")
    store.record(batch.id, "one", [Result(2, True, b'"a"'), Result(3, False, b'"b"')])
    store.record(batch.id, "one", [Result(2, False, b'"again"'), Result(2, True, b'"again"')])
    now = store.batch(batch.id)
    assert now is not None and (now.completed, now.failed) == (1, 1)
    assert claimed(store, batch, "one") == [1] and store.unfinished(batch.id) == 1
    assert store.results(batch.id, ok=True, after=0, limit=10) == [Result(2, True, b'"a"')]
    assert store.results(batch.id, ok=False, after=0, limit=10) == [Result(3, False, b'"b"')]
    assert store.results(batch.id, ok=True, after=2, limit=10) == []


def test_a_batch_that_is_over_has_no_lines(store: BatchStore) -> None:
    batch = begun(store, 1, 2)
    claimed(store, batch, "one", 1)
    store.record(batch.id, "one", [Result(1, True, b"{}")])
    failed = batch.moved(Status.FAILED, NOW)
    assert store.update(failed, Status.VALIDATING, "one")
    assert not store.unfinished(batch.id) and not store.results(batch.id, ok=True, after=0, limit=10)
    assert store.running() == [] and [each.status for each in store.recent(5)] == [Status.FAILED]
    assert not store.lease(batch.id, "one", 60.0), "there is nothing left to do"


def test_adding_a_line_twice_keeps_its_result(store: BatchStore) -> None:
    batch = begun(store, 1, 3)
    claimed(store, batch, "one")
    store.record(batch.id, "one", [Result(1, True, b"{}")])
    store.add_lines(batch.id, "one", lines(1, 2, 3))
    assert claimed(store, batch, "one") == [2, 3]


def test_adding_a_file_or_a_batch_twice_changes_nothing(store: BatchStore) -> None:
    batch = begun(store, 1)
    store.add_file(a_file(1))
    store.add_file(a_file(1))
    assert store.stored_bytes("acme") == 10 and store.files("acme", None, 9) == [a_file(1)]
    store.remove_file("file-00000001")
    store.remove_file("file-00000001")
    assert store.stored_bytes("acme") == 0
    claimed(store, batch, "one")
    store.record(batch.id, "one", [Result(1, True, b"{}")])
    store.add_batch(batch)
    now = store.batch(batch.id)
    assert now is not None and now.completed == 1
    assert [found.id for found in store.batches("acme", None, 9)] == [batch.id]


def test_batches_are_listed_by_tenant_newest_first_page_by_page(store: BatchStore) -> None:
    for number in (1, 2, 3):
        store.add_batch(a_batch(number))
    store.add_batch(a_batch(4, tenant="other"))
    assert [batch.id for batch in store.batches("acme", None, 2)] == ["batch_00000003", "batch_00000002"]
    assert [batch.id for batch in store.batches("acme", "batch_00000002", 2)] == ["batch_00000001"]
    assert [batch.id for batch in store.recent(2)] == ["batch_00000004", "batch_00000003"]
    assert [batch.id for batch in store.running()] == [f"batch_{number:08}" for number in (1, 2, 3, 4)]
    assert store.batch("batch_nothing0") is None


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
    claimed(first, batch, "one", 1)
    first.record(batch.id, "one", [Result(1, True, b"{}")])
    again = reopen()  # the first is not closed: it was killed
    again.join(batch.id, "two", LONG_S)
    assert claimed(again, batch, "two") == [2]
    assert [found.id for found in again.running()] == [batch.id]


def test_a_store_that_is_away_says_so() -> None:
    away = RedisBatchStore("redis://127.0.0.1:1/0")
    for asked in (
        lambda: away.running(),
        lambda: away.add_batch(a_batch()),
        lambda: away.claim("batch_00000001", "one", 1),
    ):
        with pytest.raises(StoreUnavailable, match="Redis of batches does not answer"):
            asked()
    away.close()


def test_a_batch_cannot_skip_a_status() -> None:
    with pytest.raises(ValueError, match="cannot go from validating to completed"):
        a_batch().moved(Status.COMPLETED, NOW)
