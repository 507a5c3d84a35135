"""A record: one request as it went, one JSON line each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    late: requests sent more than 10 ms after they were due. skipped: what of the trace was left out, in words.
    started_at: when the run began, ISO 8601. options: what was run under, for a reader.
    command, machine, versions: of the client; version numbers by package.
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
    late: int = 0
    skipped: str = ""
    command: str = ""
    machine: str = ""
    versions: dict[str, str] = {}


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server said of itself at one moment; None where it does not say.

    at_s: since the start of the run. waiting, running: requests. kv_usage: share of the KV cache, 0 to 1.
    preemptions: since the server's start.
    """

    at_s: float
    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    preemptions: float | None = None


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    run: Run


class _SampleLine(msgspec.Struct, frozen=True, omit_defaults=True):
    sample: Sample


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file of records: the run's own line if it has one, the requests, and the server's samples."""

    run: Run | None
    records: list[Record]
    samples: list[Sample]


_encoder = msgspec.json.Encoder()
_record = msgspec.json.Decoder(Record)
_line = msgspec.json.Decoder(_Line)
_sample = msgspec.json.Decoder(_SampleLine)


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

    def sample(self, sample: Sample) -> None:
        self._put(_encoder.encode(_SampleLine(sample)))

    def finish(self, run: Run) -> None:
        """The run's own line; readers find it wherever it stands."""
        self._put(_encoder.encode(_Line(run)))

    def _put(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError("A Writer writes only inside its `with` block.")
        self._file.write(line + b"\n")


def load(path: Path) -> Recorded:
    """All that a file holds. ValueError names the line that is none of it."""
    run, records, samples = None, list[Record](), list[Sample]()
    for number, line in _lines(path):
        try:
            if line.startswith(b'{"run":'):
                run = _line.decode(line).run
            elif line.startswith(b'{"sample":'):
                samples.append(_sample.decode(line).sample)
            else:
                records.append(_record.decode(line))
        except msgspec.DecodeError as error:
            raise ValueError(
                f"{path}:{number} is not a record: {error}. Give a file that `replay --out` wrote."
            ) from error
    return Recorded(run, records, samples)


def read(path: Path) -> tuple[Run | None, list[Record]]:
    """The run line of a file if it has one, and all records. ValueError as `load`."""
    loaded = load(path)
    return loaded.run, loaded.records


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
