"""A record: one request as it went, one JSON line each."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from loadtest.thinned import MOST, Thinned

LATE_S = 0.010  # a request that is sent later than this is counted as late


class Ending(Enum):
    """How a request ended, as its client saw it."""

    OK = "ok"
    LIMITED = "limited"  # 429: told to come back later
    REFUSED = "refused"  # another 4xx: the request itself was not accepted
    FAILED = "failed"  # 5xx, or no HTTP answer that could be read
    UNREACHABLE = "unreachable"  # no connection
    TRUNCATED = "truncated"  # the stream ended before its end
    ERROR_EVENT = "error_event"  # the stream said that it failed
    TIMEOUT = "timeout"  # the request timed out at the client
    UNFINISHED = "unfinished"  # the run was over first


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. Times in seconds; `due_s` and `sent_s` since the start of the run, the others since it was sent.

    due_s: when the workload wanted it sent; sent_s: when it was. released_s: when the answer that it waited for, and
    the time to think after it, let it go; None if it waited for none.
    prompt_tokens, output_tokens: as the server counted them in `usage`; without it (`counted` is False) as planned and
    as many as events with content came. ttft_s: to the first content, None if there was none. e2e_s: to the end of the
    answer. gaps_us: microseconds between events with content (0 where two came in one packet); an event may hold
    several tokens. planned_tokens: of the prompt, as it was made. asked_tokens: output tokens asked for, 0 if open.
    status: HTTP status, 0 if there was none. warmup: sent to warm the server up, and not to be reported.
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
    gaps_us: Sequence[int] = ()
    asked_tokens: int = 0
    kind: str = ""
    session: str = ""
    error: str = ""
    retry_after_s: float | None = None
    released_s: float | None = None
    planned_tokens: int = 0
    counted: bool = True
    warmup: bool = False

    @property
    def ok(self) -> bool:
        return self.ending is Ending.OK

    @property
    def late_s(self) -> float:
        """How late the client itself sent it: after it was due and, where it waited for an answer, let go."""
        return self.sent_s - max(self.due_s, self.released_s or 0.0)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token from the first content to the last; None where all came at once."""
        if self.ttft_s is None or self.output_tokens < 2 or not self.gaps_us:
            return None
        return sum(self.gaps_us) / 1e6 / (self.output_tokens - 1)


class Fidelity(msgspec.Struct, omit_defaults=True):
    """The difference between the trace and what was sent. Lengths are those after --length-scale.

    requests: of the trace. prompt_tokens, output_tokens: that they have in it; sent_…: in what was sent.
    prompts_cut, answers_cut: shortened to fit the context. dropped: not sent, for their text does not fit it.
    made_up: prompts of the right length whose text is not the trace's. lengths_estimated: from the text.
    answers_open: whose length the trace does not say. out_of_order: rows that came too late in the file to go in time.
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    sent_prompt_tokens: int = 0
    sent_output_tokens: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    dropped: int = 0
    made_up: int = 0
    lengths_estimated: int = 0
    answers_open: int = 0
    out_of_order: int = 0


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first line of a file of records: what was run, and how well the client kept its own schedule.

    lag_p99_s, lag_max_s: sent after it was due. loop_p99_s, loop_max_s: how late the client's event loop woke.
    late: requests sent more than 10 ms after they were due. skipped: what of the trace was left out, in words.
    started_at: when the run began, ISO 8601. options: what was run under, for a reader.
    command, machine, versions: of the client; version numbers by package.
    interrupted: it ended before everything was sent and answered; stopped: why. requests: how many it made.
    fidelity: how what was sent differs from the trace, None where it was not made from one.
    warmup_s: requests due before are not reported. resumed: how many times it was continued. concurrency: of a closed
    loop, 0 for an open one.
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
    interrupted: bool = False
    stopped: str = ""
    requests: int = 0
    fidelity: Fidelity | None = None
    warmup_s: float = 0.0
    resumed: int = 0
    concurrency: int = 0


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the server said of itself at one moment; None where it does not say.

    at_s: since the start of the run. waiting, running: requests. kv_usage: share of the KV cache, 0 to 1.
    preemptions: since the server's start. slots: sequences that the engines run at once. joules: that each device has
    drawn since a moment of its own. gpu_use: share of time in which GPUs computed. compression: 16 bits over the bits
    that a parameter of the model takes.
    """

    at_s: float
    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    preemptions: float | None = None
    slots: float | None = None
    joules: dict[str, float] = {}
    gpu_use: float | None = None
    compression: float | None = None


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    run: Run


class _SampleLine(msgspec.Struct, frozen=True, omit_defaults=True):
    sample: Sample


_PACKED_FROM = 32  # gaps: a list of fewer takes hardly more room than an array
_BUFFER_BYTES = 1 << 16


@dataclass(slots=True)
class Totals:
    """Of all requests. begin_s, end_s: the first sent and the last ended. Other counts are of those that ended well.

    planned_tokens: of prompts, as they were made. asked_tokens, answered_tokens: of answers whose length was asked for.
    events: that brought content. uncounted: answers whose tokens the server did not count.
    """

    requests: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    planned_tokens: int = 0
    asked_tokens: int = 0
    answered_tokens: int = 0
    events: int = 0
    uncounted: int = 0
    begin_s: float = float("inf")
    end_s: float = 0.0

    def add(self, record: Record) -> None:
        self.requests += 1
        self.endings[record.ending.value] += 1
        self.begin_s = min(self.begin_s, record.sent_s)
        self.end_s = max(self.end_s, record.sent_s + record.e2e_s)
        if record.ok:
            self.prompt_tokens += record.prompt_tokens
            self.planned_tokens += record.planned_tokens or record.prompt_tokens
            self.output_tokens += record.output_tokens
            if record.asked_tokens:
                self.asked_tokens += record.asked_tokens
                self.answered_tokens += record.output_tokens
            self.events += len(record.gaps_us) + (record.ttft_s is not None)
            self.uncounted += not record.counted

    @property
    def duration_s(self) -> float:
        return max(0.0, self.end_s - self.begin_s) if self.requests else 0.0


class Kept:
    """The records of a run of any length. records: in the order in which they ended, every n-th of very many."""

    def __init__(self, most: int = MOST) -> None:
        self._thinned: Thinned[Record] = Thinned(most)
        self.totals = Totals()

    @property
    def records(self) -> list[Record]:
        return self._thinned.kept

    @property
    def every(self) -> int:
        """One in so many is in `records`; totals are of all."""
        return self._thinned.every

    def add(self, record: Record) -> None:
        self._thinned.add(_packed(record) if self._thinned.wanted else record)
        self.totals.add(record)


def _packed(record: Record) -> Record:
    if len(record.gaps_us) < _PACKED_FROM:
        return record
    return msgspec.structs.replace(record, gaps_us=array("l", record.gaps_us))


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file of records: the run's own line if it has one, the requests, and the server's samples.

    totals: of all requests, None if they are those of `records`; every: one in so many is there. cut_off: the file
    ends inside a line.
    """

    run: Run | None
    records: Sequence[Record]
    samples: Sequence[Sample]
    totals: Totals | None = None
    every: int = 1
    cut_off: bool = False

    @classmethod
    def of(cls, run: Run | None, kept: Kept, samples: Sequence[Sample], *, cut_off: bool = False) -> Self:
        return cls(run, kept.records, samples, kept.totals, kept.every, cut_off)

    def total(self) -> Totals:
        """Of all requests."""
        if self.totals is not None:
            return self.totals
        totals = Totals()
        for record in self.records:
            totals.add(record)
        return totals


_encoder = msgspec.json.Encoder(enc_hook=list)
_record = msgspec.json.Decoder(Record)
_line = msgspec.json.Decoder(_Line)
_sample = msgspec.json.Decoder(_SampleLine)


class Writer:
    """Appends records to a file as they come, so that an interrupted run loses nothing.

    failed: why nothing more is written, None while all is well; the file then ends with its last whole line.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self._path = path
        self._mode: Literal["ab", "wb"] = "ab" if append else "wb"
        self._file: FileIO | None = None
        self._lines: list[bytes] = []
        self._held_bytes = 0
        self.failed: OSError | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open(self._mode, buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()

    def write(self, record: Record) -> None:
        self._put(_encoder.encode(record))

    def sample(self, sample: Sample) -> None:
        self._put(_encoder.encode(_SampleLine(sample)))
        self.flush()

    def finish(self, run: Run) -> None:
        """The run's own line; readers find it wherever it stands."""
        self._put(_encoder.encode(_Line(run)))
        self.flush()

    def _put(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError("A Writer writes only inside its `with` block.")
        self._lines.append(line + b"\n")
        self._held_bytes += len(line) + 1
        if self._held_bytes > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Puts on the disk what is held back."""
        data, self._lines, self._held_bytes = b"".join(self._lines), [], 0
        if self._file is None or self.failed is not None or not data:
            return
        begin, written = self._file.tell(), 0
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self.failed = error
            if self._path.is_file():  # a pipe keeps what it got
                self._file.truncate(begin + data.rfind(b"\n", 0, written) + 1)


def load(path: Path, from_s: float | None = None, to_s: float = float("inf")) -> Recorded:
    """All that a file holds of requests due in a window (None: all but those that warmed the server up), in bounded
    memory. ValueError names the line that is none of it; a last line that is cut off is left out."""
    runs, kept, samples, cut_off = list[Run](), Kept(), Thinned[Sample](), False
    for number, line in _lines(path):
        try:
            if line.startswith(b'{"run":'):
                runs.append(_line.decode(line).run)
            elif line.startswith(b'{"sample":'):
                samples.add(_sample.decode(line).sample)
            elif _inside(record := _record.decode(line), from_s, to_s):
                kept.add(record)
        except msgspec.DecodeError as error:
            if not line.endswith(b"\n") and number > 1:
                cut_off = True
                continue
            raise ValueError(
                f"{path}:{number} is not a record: {error}. Give a file that `replay --out` wrote."
            ) from error
    return Recorded.of(_whole(runs), kept, samples.kept, cut_off=cut_off)


def _inside(record: Record, from_s: float | None, to_s: float) -> bool:
    return (not record.warmup if from_s is None else record.due_s >= from_s) and record.due_s < to_s


def _whole(runs: Sequence[Run]) -> Run | None:
    """One line for a run that was interrupted and gone on with."""
    if len(runs) < 2:
        return runs[0] if runs else None
    return msgspec.structs.replace(
        runs[-1],
        duration_s=max(run.duration_s for run in runs),
        lag_p99_s=max(run.lag_p99_s for run in runs),
        lag_max_s=max(run.lag_max_s for run in runs),
        loop_p99_s=max(run.loop_p99_s for run in runs),
        loop_max_s=max(run.loop_max_s for run in runs),
        late=sum(run.late for run in runs),
        requests=sum(run.requests for run in runs),
        resumed=len(runs) - 1,
    )


def read(path: Path) -> tuple[Run | None, Sequence[Record]]:
    """The run line of a file if it has one, and the records. ValueError as `load`."""
    loaded = load(path, from_s=float("-inf"))
    return loaded.run, loaded.records


def write(path: Path, records: Iterable[Record], run: Run | None = None) -> None:
    with Writer(path) as writer:
        for record in records:
            writer.write(record)
        if run is not None:
            writer.finish(run)


def ended(path: Path) -> tuple[set[str], float]:
    """Of a run that is to be gone on with: the ids of the requests that ended, and when the run did, seconds.

    The file is written anew without those that did not end, and without a line that was cut off.
    """
    ids, end_s = set[str](), 0.0
    new = path.with_name(path.name + ".resumed")
    with new.open("wb") as file:
        for _, line in _lines(path):
            if not line.endswith(b"\n"):
                continue
            if not line.startswith((b'{"run":', b'{"sample":')):
                record = _record.decode(line)
                end_s = max(end_s, record.sent_s + record.e2e_s)
                if record.ending is Ending.UNFINISHED:
                    continue
                ids.add(record.id)
            file.write(line)
    new.replace(path)
    return ids, end_s


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
