"""Where files and batches are recorded, and the lines of running batches with their results.

All methods block; `Batches` calls them in a thread. Times are in seconds since 1970.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from server.batch.objects import RUNNING, Batch, BatchLine, Result, Status, StoredFile


class LeaseLost(Exception):
    """Another gateway has taken the batch over: what this one was about to record does not count."""


class BatchStore(Protocol):
    """What a store must do; its contract is tests/server/batch/test_store.py."""

    def add_file(self, file: StoredFile) -> None: ...
    def file(self, file_id: str) -> StoredFile | None: ...
    def files(self, tenant: str, after: str | None, limit: int) -> list[StoredFile]:
        """A tenant's files, the newest first, those behind `after` only."""

    def remove_file(self, file_id: str) -> None: ...
    def expired_files(self, now: float) -> list[StoredFile]:
        """Files past their expiry that no running batch reads."""

    def stored_bytes(self, tenant: str) -> int: ...
    def add_batch(self, batch: Batch) -> None: ...
    def batch(self, batch_id: str) -> Batch | None: ...
    def batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        """A tenant's batches, the newest first, those behind `after` only."""

    def running(self) -> list[Batch]:
        """Every tenant's batches that are not over, the oldest first."""

    def recent(self, limit: int) -> list[Batch]:
        """Every tenant's batches, the newest first."""

    def lease(self, batch_id: str, owner: str, now: float, lease_s: float) -> bool:
        """Takes or renews the right to run a batch; False while another owner holds it."""

    def update(self, batch: Batch, before: Status, owner: str | None = None) -> bool:
        """Replaces a batch's record if its status still is `before`; with an owner, only if that one has the lease.
        The counts are the store's own: the record's are ignored, except that `total` is taken."""

    def add_lines(self, batch_id: str, owner: str, lines: Sequence[BatchLine]) -> None:
        """Lines that are to run. Adding one twice changes nothing. LeaseLost."""

    def open_lines(self, batch_id: str, after: int, limit: int) -> list[BatchLine]:
        """Lines behind number `after` that have no result, in order."""

    def record(self, batch_id: str, owner: str, results: Iterable[Result]) -> None:
        """Results and their counts, in one step. A line's first result counts, a second changes nothing. LeaseLost."""

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        """Results behind number `after`, in order."""

    def forget_lines(self, batch_id: str) -> None:
        """A batch is over: its lines and results are in its files."""

    def close(self) -> None: ...


_SCHEMA = """
CREATE TABLE IF NOT EXISTS files(id TEXT PRIMARY KEY, tenant TEXT, bytes INT, expires_at INT, record BLOB);
CREATE INDEX IF NOT EXISTS files_of ON files(tenant);
CREATE TABLE IF NOT EXISTS batches(
  id TEXT PRIMARY KEY, tenant TEXT, status TEXT, input TEXT, owner TEXT DEFAULT '', lease_until REAL DEFAULT 0,
  total INT DEFAULT 0, completed INT DEFAULT 0, failed INT DEFAULT 0, record BLOB);
CREATE INDEX IF NOT EXISTS batches_of ON batches(tenant);
CREATE TABLE IF NOT EXISTS lines(
  batch TEXT, number INT, custom_id TEXT, offset INT, length INT, ok INT, text BLOB,
  PRIMARY KEY(batch, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS open_lines ON lines(batch, number) WHERE text IS NULL;
"""
_encode = msgspec.json.encode
_read_file = msgspec.json.Decoder(StoredFile).decode
_read_batch = msgspec.json.Decoder(Batch).decode


class SqliteBatchStore:
    """One SQLite file, for all gateway processes of a machine. Ids sort by age: see `Batches.new_id`.

    WAL with synchronous=NORMAL: a killed process loses nothing that was recorded; a power cut can lose the last
    moments, whose lines then run again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def add_file(self, file: StoredFile) -> None:
        row = (file.id, file.tenant, file.bytes, file.expires_at, _encode(file))
        self._db.execute("INSERT INTO files VALUES(?, ?, ?, ?, ?)", row)

    def file(self, file_id: str) -> StoredFile | None:
        row = self._db.execute("SELECT record FROM files WHERE id = ?", (file_id,)).fetchone()
        return None if row is None else _read_file(row[0])

    def files(self, tenant: str, after: str | None, limit: int) -> list[StoredFile]:
        rows = self._db.execute(
            "SELECT record FROM files WHERE tenant = ? AND (? IS NULL OR id < ?) ORDER BY id DESC LIMIT ?",
            (tenant, after, after, limit),
        )
        return [_read_file(row[0]) for row in rows]

    def remove_file(self, file_id: str) -> None:
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))

    def expired_files(self, now: float) -> list[StoredFile]:
        marks = ", ".join("?" * len(RUNNING))
        rows = self._db.execute(
            f"SELECT record FROM files WHERE expires_at <= ? AND id NOT IN"
            f" (SELECT input FROM batches WHERE status IN ({marks}))",
            (now, *RUNNING),
        )
        return [_read_file(row[0]) for row in rows]

    def stored_bytes(self, tenant: str) -> int:
        (total,) = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM files WHERE tenant = ?", (tenant,)).fetchone()
        return int(total)

    def add_batch(self, batch: Batch) -> None:
        self._db.execute(
            "INSERT INTO batches(id, tenant, status, input, record) VALUES(?, ?, ?, ?, ?)",
            (batch.id, batch.tenant, batch.status.value, batch.input_file_id, _encode(batch)),
        )

    def batch(self, batch_id: str) -> Batch | None:
        found = self._batches("WHERE id = ?", (batch_id,))
        return found[0] if found else None

    def batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        return self._batches(
            "WHERE tenant = ? AND (? IS NULL OR id < ?) ORDER BY id DESC LIMIT ?", (tenant, after, after, limit)
        )

    def running(self) -> list[Batch]:
        marks = ", ".join("?" * len(RUNNING))
        return self._batches(f"WHERE status IN ({marks}) ORDER BY id", tuple(status.value for status in RUNNING))

    def recent(self, limit: int) -> list[Batch]:
        return self._batches("ORDER BY id DESC LIMIT ?", (limit,))

    def _batches(self, where: str, values: tuple[object, ...]) -> list[Batch]:
        rows = self._db.execute(f"SELECT record, total, completed, failed FROM batches {where}", values)
        return [
            msgspec.structs.replace(_read_batch(record), total=total, completed=completed, failed=failed)
            for record, total, completed, failed in rows
        ]

    def lease(self, batch_id: str, owner: str, now: float, lease_s: float) -> bool:
        done = self._db.execute(
            "UPDATE batches SET owner = ?, lease_until = ? WHERE id = ? AND (owner = ? OR lease_until <= ?)",
            (owner, now + lease_s, batch_id, owner, now),
        )
        return done.rowcount == 1

    def update(self, batch: Batch, before: Status, owner: str | None = None) -> bool:
        done = self._db.execute(
            "UPDATE batches SET status = ?, total = ?, record = ?"
            " WHERE id = ? AND status = ? AND (? IS NULL OR owner = ?)",
            (batch.status.value, batch.total, _encode(batch), batch.id, before.value, owner, owner),
        )
        return done.rowcount == 1

    def add_lines(self, batch_id: str, owner: str, lines: Sequence[BatchLine]) -> None:
        rows = [(batch_id, line.number, line.custom_id, line.offset, line.length) for line in lines]
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._check(batch_id, owner)
            self._db.executemany(
                "INSERT OR IGNORE INTO lines(batch, number, custom_id, offset, length) VALUES(?, ?, ?, ?, ?)", rows
            )

    def open_lines(self, batch_id: str, after: int, limit: int) -> list[BatchLine]:
        rows = self._db.execute(
            "SELECT number, custom_id, offset, length FROM lines"
            " WHERE batch = ? AND text IS NULL AND number > ? ORDER BY number LIMIT ?",
            (batch_id, after, limit),
        )
        return [BatchLine(*row) for row in rows]

    def record(self, batch_id: str, owner: str, results: Iterable[Result]) -> None:
        completed = failed = 0
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._check(batch_id, owner)
            for result in results:
                done = self._db.execute(
                    "UPDATE lines SET ok = ?, text = ? WHERE batch = ? AND number = ? AND text IS NULL",
                    (int(result.ok), result.text, batch_id, result.number),
                )
                completed += done.rowcount if result.ok else 0
                failed += 0 if result.ok else done.rowcount
            self._db.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?",
                (completed, failed, batch_id),
            )

    def _check(self, batch_id: str, owner: str) -> None:
        row = self._db.execute("SELECT owner FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if row is None or row[0] != owner:
            raise LeaseLost(batch_id)

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        rows = self._db.execute(
            "SELECT number, ok, text FROM lines"
            " WHERE batch = ? AND text IS NOT NULL AND ok = ? AND number > ? ORDER BY number LIMIT ?",
            (batch_id, int(ok), after, limit),
        )
        return [Result(number, bool(good), text) for number, good, text in rows]

    def forget_lines(self, batch_id: str) -> None:
        self._db.execute("DELETE FROM lines WHERE batch = ?", (batch_id,))

    def close(self) -> None:
        self._db.close()
