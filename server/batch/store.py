"""Where files and batches are recorded, and the lines of running batches with their results.

All methods block; `Batches` calls them in a thread. Times are in seconds since 1970. Any method may raise
`StoreUnavailable`; calling it again is then right, for each may be done twice.

A gateway that runs lines has joined their batch, for as long as it renews that. A line that it has claimed is given to
nobody else until the gateway leaves or has not renewed in time: then it is out, its lines are open again, and what it
still wants to record raises `LeaseLost`. If nobody could renew, the store itself was away: everybody gets more time.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from server.batch.files import NoSpace
from server.batch.objects import RUNNING, Batch, BatchLine, Result, Status, StoredFile
from server.request.errors import ServiceError


class LeaseLost(Exception):
    """Other gateways have taken over: what this one was about to record does not count."""


class StoreUnavailable(ServiceError):
    """The store of batches does not answer."""

    status = 503
    code = "batch_store_unavailable"


class BatchStore(Protocol):
    """What a store must do; its contract is tests/server/batch/test_store.py."""

    def check(self, folder_id: str) -> None:
        """ValueError if gateways that share the store do not share the files with this identity."""

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

    def lease(self, batch_id: str, owner: str, lease_s: float) -> bool:
        """Takes or renews the right to check a batch's input and to end it; False while another owner has it, and once
        the batch is over."""

    def update(self, batch: Batch, before: Status, owner: str | None = None) -> bool:
        """Replaces a batch's record if its status still is `before`; with an owner, only if that one has the lease.
        The counts are the store's own: the record's are ignored, except that `total` is taken. The lines of a batch
        that is over are forgotten: they are in its files."""

    def add_lines(self, batch_id: str, owner: str, lines: Sequence[BatchLine]) -> None:
        """Lines that are to run. Adding one twice changes nothing. LeaseLost."""

    def join(self, batch_id: str, owner: str, lease_s: float) -> None:
        """Begins to run lines. LeaseLost if there is no such batch."""

    def renew(self, batch_id: str, owner: str, lease_s: float) -> None:
        """Keeps the lines that were claimed. LeaseLost."""

    def claim(self, batch_id: str, owner: str, most: int) -> list[BatchLine]:
        """All lines that the owner has claimed, in order. Claims further ones until there are `most`, but no more of
        the open ones than its share among those who have joined. LeaseLost."""

    def leave(self, batch_id: str, owner: str) -> None:
        """Gives up what was claimed, and the lease."""

    def unfinished(self, batch_id: str) -> int:
        """Lines without a result."""

    def record(self, batch_id: str, owner: str, results: Iterable[Result]) -> None:
        """Results and their counts, in one step. Only those of lines that the owner has claimed count. LeaseLost."""

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        """Results behind number `after`, in order."""

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
CREATE TABLE IF NOT EXISTS owners(batch TEXT, owner TEXT, until REAL, PRIMARY KEY(batch, owner)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims(batch TEXT, number INT, owner TEXT, PRIMARY KEY(batch, number)) WITHOUT ROWID;
"""
_encode = msgspec.json.encode
_read_file = msgspec.json.Decoder(StoredFile).decode
_read_batch = msgspec.json.Decoder(Batch).decode


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise NoSpace(
                "The gateway's disk is full: delete files that are no longer needed.", retry_after_s=60
            ) from None
        raise StoreUnavailable(f"The database of batches does not answer: {error}.", retry_after_s=5) from None


class SqliteBatchStore:
    """One SQLite file, for all gateway processes of a machine. Ids sort by age: see `Batches.new_id`.

    WAL with synchronous=NORMAL: a killed process loses nothing that was recorded; a power cut can lose the last
    moments, whose lines then run again.
    """

    def __init__(self, path: Path, wall: Callable[[], float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._wall = wall
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def check(self, folder_id: str) -> None:
        """It is in the folder itself."""

    def add_file(self, file: StoredFile) -> None:
        with _answering():
            row = (file.id, file.tenant, file.bytes, file.expires_at, _encode(file))
            self._db.execute("INSERT OR REPLACE INTO files VALUES(?, ?, ?, ?, ?)", row)

    def file(self, file_id: str) -> StoredFile | None:
        with _answering():
            row = self._db.execute("SELECT record FROM files WHERE id = ?", (file_id,)).fetchone()
            return None if row is None else _read_file(row[0])

    def files(self, tenant: str, after: str | None, limit: int) -> list[StoredFile]:
        with _answering():
            rows = self._db.execute(
                "SELECT record FROM files WHERE tenant = ? AND (? IS NULL OR id < ?) ORDER BY id DESC LIMIT ?",
                (tenant, after, after, limit),
            )
            return [_read_file(row[0]) for row in rows]

    def remove_file(self, file_id: str) -> None:
        with _answering():
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))

    def expired_files(self, now: float) -> list[StoredFile]:
        with _answering():
            marks = ", ".join("?" * len(RUNNING))
            rows = self._db.execute(
                f"SELECT record FROM files WHERE expires_at <= ? AND id NOT IN"
                f" (SELECT input FROM batches WHERE status IN ({marks}))",
                (now, *RUNNING),
            )
            return [_read_file(row[0]) for row in rows]

    def stored_bytes(self, tenant: str) -> int:
        with _answering():
            (total,) = self._db.execute(
                "SELECT COALESCE(SUM(bytes), 0) FROM files WHERE tenant = ?", (tenant,)
            ).fetchone()
            return int(total)

    def add_batch(self, batch: Batch) -> None:
        with _answering():
            self._db.execute(
                "INSERT OR IGNORE INTO batches(id, tenant, status, input, record) VALUES(?, ?, ?, ?, ?)",
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
        with _answering():
            rows = self._db.execute(f"SELECT record, total, completed, failed FROM batches {where}", values)
            return [
                msgspec.structs.replace(_read_batch(record), total=total, completed=completed, failed=failed)
                for record, total, completed, failed in rows
            ]

    def lease(self, batch_id: str, owner: str, lease_s: float) -> bool:
        now = self._wall()
        with self._transaction() as db:
            done = db.execute(
                "UPDATE batches SET owner = ?, lease_until = ? WHERE id = ? AND (owner = ? OR lease_until <= ?)"
                f" AND status IN ({', '.join('?' * len(RUNNING))})",
                (owner, now + lease_s, batch_id, owner, now, *(status.value for status in RUNNING)),
            )
        return done.rowcount == 1

    def update(self, batch: Batch, before: Status, owner: str | None = None) -> bool:
        with self._transaction() as db:
            done = db.execute(
                "UPDATE batches SET status = ?, total = ?, record = ?"
                " WHERE id = ? AND status = ? AND (? IS NULL OR owner = ?)",
                (batch.status.value, batch.total, _encode(batch), batch.id, before.value, owner, owner),
            )
            if done.rowcount and batch.status not in RUNNING:
                for table in ("lines", "claims", "owners"):
                    db.execute(f"DELETE FROM {table} WHERE batch = ?", (batch.id,))
        return done.rowcount == 1

    def add_lines(self, batch_id: str, owner: str, lines: Sequence[BatchLine]) -> None:
        rows = [(batch_id, line.number, line.custom_id, line.offset, line.length) for line in lines]
        with self._transaction() as db:
            row = db.execute("SELECT owner FROM batches WHERE id = ?", (batch_id,)).fetchone()
            if row is None or row[0] != owner:
                raise LeaseLost(batch_id)
            db.executemany(
                "INSERT OR IGNORE INTO lines(batch, number, custom_id, offset, length) VALUES(?, ?, ?, ?, ?)", rows
            )

    def join(self, batch_id: str, owner: str, lease_s: float) -> None:
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM batches WHERE id = ?", (batch_id,)).fetchone() is None:
                raise LeaseLost(batch_id)
            self._retire(batch_id, lease_s)
            db.execute("INSERT OR REPLACE INTO owners VALUES(?, ?, ?)", (batch_id, owner, self._wall() + lease_s))

    def renew(self, batch_id: str, owner: str, lease_s: float) -> None:
        with self._transaction() as db:
            self._retire(batch_id, lease_s)
            self._check(batch_id, owner)
            values = (self._wall() + lease_s, batch_id, owner)
            db.execute("UPDATE owners SET until = ? WHERE batch = ? AND owner = ?", values)

    def _retire(self, batch_id: str, lease_s: float) -> None:
        """Opens the lines of owners who have not renewed in time."""
        now = self._wall()
        (latest,) = self._db.execute("SELECT MAX(until) FROM owners WHERE batch = ?", (batch_id,)).fetchone()
        if latest is not None and latest <= now:  # nobody could renew
            self._db.execute("UPDATE owners SET until = ? WHERE batch = ?", (now + lease_s, batch_id))
        late = "SELECT owner FROM owners WHERE batch = ? AND until <= ?"
        self._db.execute(f"DELETE FROM claims WHERE batch = ? AND owner IN ({late})", (batch_id, batch_id, now))
        self._db.execute("DELETE FROM owners WHERE batch = ? AND until <= ?", (batch_id, now))

    def _check(self, batch_id: str, owner: str) -> None:
        if self._db.execute("SELECT 1 FROM owners WHERE batch = ? AND owner = ?", (batch_id, owner)).fetchone() is None:
            raise LeaseLost(batch_id)

    def claim(self, batch_id: str, owner: str, most: int) -> list[BatchLine]:
        with self._transaction() as db:
            self._check(batch_id, owner)
            (owners,) = db.execute("SELECT COUNT(*) FROM owners WHERE batch = ?", (batch_id,)).fetchone()
            (claimed,) = db.execute("SELECT COUNT(*) FROM claims WHERE batch = ?", (batch_id,)).fetchone()
            whose = (batch_id, owner)
            (held,) = db.execute("SELECT COUNT(*) FROM claims WHERE batch = ? AND owner = ?", whose).fetchone()
            share = -(-(self._unfinished(batch_id) - claimed) // owners)
            db.execute(
                "INSERT INTO claims SELECT batch, number, ? FROM lines WHERE batch = ? AND text IS NULL"
                " AND number NOT IN (SELECT number FROM claims WHERE batch = ?) ORDER BY number LIMIT ?",
                (owner, batch_id, batch_id, max(0, min(most - held, share))),
            )
            rows = db.execute(
                "SELECT number, custom_id, offset, length FROM claims JOIN lines USING(batch, number)"
                " WHERE batch = ? AND owner = ? ORDER BY number",
                whose,
            ).fetchall()
        return [BatchLine(*row) for row in rows]

    def leave(self, batch_id: str, owner: str) -> None:
        with self._transaction() as db:
            for table in ("claims", "owners"):
                db.execute(f"DELETE FROM {table} WHERE batch = ? AND owner = ?", (batch_id, owner))
            db.execute("UPDATE batches SET lease_until = 0 WHERE id = ? AND owner = ?", (batch_id, owner))

    def unfinished(self, batch_id: str) -> int:
        with _answering():
            return self._unfinished(batch_id)

    def _unfinished(self, batch_id: str) -> int:
        counted = "SELECT COUNT(*) FROM lines WHERE batch = ? AND text IS NULL"
        return int(self._db.execute(counted, (batch_id,)).fetchone()[0])

    def record(self, batch_id: str, owner: str, results: Iterable[Result]) -> None:
        completed = failed = 0
        with self._transaction() as db:
            self._check(batch_id, owner)
            for result in results:
                mine = db.execute(
                    "DELETE FROM claims WHERE batch = ? AND number = ? AND owner = ?", (batch_id, result.number, owner)
                )
                if not mine.rowcount:
                    continue
                db.execute(
                    "UPDATE lines SET ok = ?, text = ? WHERE batch = ? AND number = ?",
                    (int(result.ok), result.text, batch_id, result.number),
                )
                completed += result.ok
                failed += not result.ok
            db.execute(
                "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?",
                (completed, failed, batch_id),
            )

    def results(self, batch_id: str, *, ok: bool, after: int, limit: int) -> list[Result]:
        with _answering():
            rows = self._db.execute(
                "SELECT number, ok, text FROM lines"
                " WHERE batch = ? AND text IS NOT NULL AND ok = ? AND number > ? ORDER BY number LIMIT ?",
                (batch_id, int(ok), after, limit),
            )
            return [Result(number, bool(good), text) for number, good, text in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _answering(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def close(self) -> None:
        self._db.close()
