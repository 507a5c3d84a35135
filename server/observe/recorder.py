"""The traffic as a trace without content: when, whose (a pseudonym), how long, which prompts begin alike, how it ended.

What is kept of a prompt are hashes of its beginnings under a key that never leaves the folder, so that who has only the
trace cannot even test a guess. A thread of its own hashes and writes; the event loop only hands over. What comes faster
than the disk takes it is counted and left out; a disk that takes no more ends the recording, not the service.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO

import msgspec

from server.observe.observer import Observer
from server.request.call import Phase, Ticket

log = logging.getLogger("evenhand.recorder")

BLOCK_TOKENS = 64
BLOCK_BYTES = 256  # about so many tokens of English text; an engine's own count of each prompt is kept beside
MOST_HASHED_BYTES = 128 * 1024
MOST_PENDING_BYTES = 16 * 1024 * 1024
_ROW_BYTES = 512  # what a row without its content weighs while it waits
_STOP_S = 5.0

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class RecordedRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a trace, as `evenhand replay` reads it.

    at_s: arrival, seconds since this recording began; lines come in the order of ends. prefix_hashes: of every
    `block_tokens` or so of the prompt, each with all before it. outcome, ttft_s, e2e_s, queue_s: how it went.
    """

    at_s: float
    tenant: str
    prompt_tokens: int
    output_tokens: int
    outcome: str
    route: str
    max_tokens: int = 0
    cached_tokens: int = 0
    kind: str = ""
    block_tokens: int = 0
    prefix_hashes: tuple[int, ...] = ()
    queue_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True)
class RecordingBounds:
    """max_bytes: of all files together; the oldest goes. file_bytes: of one file."""

    max_bytes: int
    file_bytes: int


def _nobody(said: str) -> None:
    return


class Recorder(Observer):
    """Records calls as they end. `note` is for the event loop; everything else happens on the recorder's thread."""

    def __init__(
        self, folder: Path, bounds: RecordingBounds, clock: Callable[[], float], failed: Callable[[str], None] = _nobody
    ) -> None:
        """ValueError if the folder cannot be written. failed: called with the reason why a request, or everything from
        now on, is not recorded."""
        self._failed = failed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._key = _key(folder / "key")
        except OSError as error:
            raise ValueError(f"cannot record into {folder}: {error.strerror}. Choose another folder.") from error
        self._files = _Files(folder, bounds)
        self._began = clock()
        self._queue: SimpleQueue[tuple[RecordedRow, str, bytes, str] | None] = SimpleQueue()
        self._handed_bytes = 0  # each of the two is written by one thread only
        self._written_bytes = 0
        self._thread: Thread | None = None
        self._on = True
        self.left_out = 0

    def start(self) -> None:
        self._thread = Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Writes what is queued, and waits a few seconds for it at most."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """A call is over. Costs a few microseconds, whatever its size."""
        call = ticket.call
        if not self._on or not call.route.generates:
            return
        body = call.body if len(call.body) <= 2 * MOST_HASHED_BYTES else b""
        if self._handed_bytes - self._written_bytes + len(body) > MOST_PENDING_BYTES:
            self.left_out += 1
            return
        self._handed_bytes += len(body) + _ROW_BYTES
        row = RecordedRow(
            at_s=round(ticket.job.arrived_at - self._began, 4),
            tenant=call.tenant.name,
            prompt_tokens=ticket.prompt_tokens,
            output_tokens=ticket.tokens,
            outcome=outcome,
            route=call.route.path,
            max_tokens=call.max_tokens,
            cached_tokens=ticket.cached_tokens,
            kind=call.kind,
            queue_s=_rounded(ticket.since(Phase.WAITING, Phase.PREFILLING)),
            ttft_s=_rounded(ticket.since(Phase.WAITING, Phase.DECODING)),
            e2e_s=_rounded(ticket.since(Phase.WAITING, Phase.DONE)),
        )
        self._queue.put((row, call.tenant.name, body, call.route.content_field))

    # the thread's

    def _write_all(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                self._write(*entry)
                if self._queue.empty():
                    self._files.flush()
            self._files.close()
        except OSError as error:
            self._on = False
            log.error("recording stopped, serving continues: %s", error.strerror)
            self._failed(f"recording has stopped: {error.strerror}")
            self._files.abandon()
            while not self._queue.empty():
                self._queue.get()
        if self.left_out:
            log.warning(
                "%d requests are missing from the trace: they arrived faster than it could be written", self.left_out
            )

    def _write(self, row: RecordedRow, tenant: str, body: bytes, field: str) -> None:
        """OSError if the disk takes no more. One request that cannot be written does not end the recording."""
        try:
            self._files.write(self._line(row, tenant, _content(body, field)))
        except OSError:
            raise
        except Exception as error:  # whatever a client sent, the next one's request is to be recorded
            log.exception("a request could not be recorded")
            self._failed(f"a request could not be recorded: {type(error).__name__}")
        finally:
            self._written_bytes += len(body) + _ROW_BYTES

    def _line(self, row: RecordedRow, tenant: str, content: bytes) -> bytes:
        hashes = prefix_hashes(content, self._key)
        name = hashlib.blake2b(tenant.encode(), key=self._key, digest_size=5).hexdigest()
        told = msgspec.structs.replace(
            row, tenant=f"t-{name}", prefix_hashes=hashes, block_tokens=BLOCK_TOKENS if hashes else 0
        )
        return msgspec.json.encode(told) + b"\n"


def prefix_hashes(content: bytes, key: bytes) -> tuple[int, ...]:
    """One hash per full block of `BLOCK_BYTES`, each of everything up to that block's end."""
    hasher, hashes = hashlib.blake2b(key=key, digest_size=6), []
    for start in range(0, min(len(content), MOST_HASHED_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        hasher.update(content[start : start + BLOCK_BYTES])
        hashes.append(int.from_bytes(hasher.digest(), "big"))
    return tuple(hashes)


def _content(body: bytes, field: str) -> bytes:
    """The prompt's own bytes. A turn of a conversation begins with those of the turn before, up to its last `]`."""
    try:
        return bytes(_members(body).get(field, b"")) if body else b""
    except (msgspec.DecodeError, UnicodeDecodeError):  # what an engine refused as well
        return b""


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _key(path: Path) -> bytes:
    """The folder's key, made when it is not there: pseudonyms stay the same over restarts."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(file, "wb") as out:
        key = secrets.token_bytes(32)
        out.write(key)
    return key


class _Files:
    """Numbered files in one folder, the newest written, the oldest removed when all together are too large."""

    def __init__(self, folder: Path, bounds: RecordingBounds) -> None:
        self._folder = folder
        self._most_bytes = bounds.max_bytes
        self._file_bytes = min(bounds.file_bytes, bounds.max_bytes // 2)
        self._file: IO[bytes] | None = None
        self._bytes = 0

    def write(self, line: bytes) -> None:
        if self._file is None or (self._bytes and self._bytes + len(line) > self._file_bytes):
            self.close()
            self._make_room()
            self._file = self._next()
            self._bytes = 0
        self._file.write(line)
        self._bytes += len(line)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def abandon(self) -> None:
        """What the disk did not take is given up."""
        with suppress(OSError):  # closing tries once more to write it
            self.close()

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("trace-*.jsonl"))

    def _next(self) -> IO[bytes]:
        """A new file; another gateway's, in the same folder, is never written into."""
        numbers = [int(path.stem.partition("-")[2]) for path in self._all() if path.stem.partition("-")[2].isdigit()]
        number = max(numbers, default=0) + 1
        while True:
            try:
                return (self._folder / f"trace-{number:06}.jsonl").open("xb")
            except FileExistsError:
                number += 1

    def _make_room(self) -> None:
        """For one more full file."""
        sizes = [(path, path.stat().st_size) for path in self._all()]
        over = sum(size for _, size in sizes) + self._file_bytes - self._most_bytes
        for path, size in sizes:
            if over <= 0:
                return
            path.unlink()
            over -= size
