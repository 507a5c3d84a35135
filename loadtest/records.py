"""A record: one request as it went, one JSON line each."""

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec


class Ending(Enum):
    """How a request ended, as its client saw it."""

    OK = "ok"
    LIMITED = "limited"  # 429: told to come back later
    REFUSED = "refused"  # another 4xx: the request itself was not accepted
    FAILED = "failed"  # 5xx, or no HTTP answer that could be read
    UNREACHABLE = "unreachable"  # no connection
    TRUNCATED = "truncated"  # the stream ended before its end
    ERROR_EVENT = "error_event"  # the stream said that it failed
    TIMEOUT = "timeout"  # the client gave up
    UNFINISHED = "unfinished"  # the run was over first


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. Times in seconds; `due_s` and `sent_s` since the start of the run, the others since it was sent.

    due_s: when the workload wanted it sent; sent_s: when it was.
    prompt_tokens, output_tokens: as the server counted them in `usage`, else as planned and as chunks were seen.
    ttft_s: to the first token, None if there was none. e2e_s: to the end of the answer.
    gaps_us: microseconds between the tokens that arrived (0 where two came in one packet).
    asked_tokens: output tokens asked for, 0 if open. status: HTTP status, 0 if there was none.
    """

    id: str
    tenant: str
    due_s: float
    sent_s: float
    e2e_s: float
    prompt_tokens: int
    output_tokens: int
    ending: Ending = Ending.OK
    status: int = 200
    ttft_s: float | None = None
    gaps_us: list[int] = []
    asked_tokens: int = 0
    kind: str = ""
    session: str = ""
    error: str = ""
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        return self.ending is Ending.OK

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first; None for answers of fewer than two."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first line of a file of records: what was run, and how well the client kept its own schedule.

    lag_p99_s, lag_max_s: sent after it was due. loop_p99_s, loop_max_s: how late the client's event loop woke.
    started_at: when the run began, ISO 8601.
    """

    target: str
    workload: str
    started_at: str
    duration_s: float = 0.0
    lag_p99_s: float = 0.0
    lag_max_s: float = 0.0
    loop_p99_s: float = 0.0
    loop_max_s: float = 0.0
    options: dict[str, str] = {}


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    run: Run


_encoder = msgspec.json.Encoder()
_record = msgspec.json.Decoder(Record)
_line = msgspec.json.Decoder(_Line)


class Writer:
    """Appends records to a file as they come, so that an interrupted run loses nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: Record) -> None:
        self._put(_encoder.encode(record))

    def finish(self, run: Run) -> None:
        """The run's own line; readers find it wherever it stands."""
        self._put(_encoder.encode(_Line(run)))

    def _put(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError("A Writer writes only inside its `with` block.")
        self._file.write(line + b"\n")


def read(path: Path) -> tuple[Run | None, list[Record]]:
    """All records of a file, and its run line if it has one. ValueError names the line that is neither."""
    run, records = None, []
    for number, line in _lines(path):
        try:
            if line.startswith(b'{"run":'):
                run = _line.decode(line).run
            else:
                records.append(_record.decode(line))
        except msgspec.DecodeError as error:
            raise ValueError(
                f"{path}:{number} is not a record: {error}. Give a file that `replay --out` wrote."
            ) from error
    return run, records


def write(path: Path, records: Iterable[Record], run: Run | None = None) -> None:
    with Writer(path) as writer:
        for record in records:
            writer.write(record)
        if run is not None:
            writer.finish(run)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
