"""Compares runs: named sides, each with one or more repetitions, and the ratios between them.

With repetitions a ratio is taken within each, and its range is told. With one run each, the interval comes from
resampling the run in blocks of neighbouring requests, for requests that queue together are not independent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from loadtest.records import Record, Recorded, load
from loadtest.report import report

Floats = NDArray[np.float64]

_BLOCKS = 20
_LEAST_PER_BLOCK = 3
_RESAMPLES = 300
LEAST_EFFECT = 0.01  # what is nearer to 1 is no finding, however sure it is
_SAME_LOAD = 0.02


@dataclass(frozen=True, slots=True)
class Side:
    """One name's runs, all under the same conditions. summaries: one per run, in the same order."""

    name: str
    runs: Sequence[Recorded]
    summaries: Sequence[report.Summary]

    @property
    def records(self) -> list[Record]:
        """Of all repetitions."""
        return [record for run in self.runs for record in run.records]


def sides(
    texts: Sequence[str],
    objective: report.Objective | None = None,
    from_s: float | None = None,
    to_s: float = float("inf"),
) -> list[Side]:
    """FILE or NAME=FILE, each; a name that comes again is a repetition. OSError and ValueError name the file."""
    runs: dict[str, list[Recorded]] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        path = Path(text) if Path(text).exists() or not equals else Path(file)
        loaded = load(path, from_s, to_s)
        if not loaded.records:
            raise ValueError(f"{path} has no request in the window asked for.")
        key = name if path != Path(text) else path.stem if path.stem not in runs else str(path)
        runs.setdefault(key, []).append(loaded)
    return [Side(name, of, [report.summarize_run(run, objective) for run in of]) for name, of in runs.items()]


def side_of(name: str, run: Recorded, objective: report.Objective | None) -> Side:
    """One run that is at hand."""
    return Side(name, [run], [report.summarize_run(run, objective)])


# One number of a run, and of one request where it is a mean or percentile of theirs.


@dataclass(frozen=True, slots=True)
class Measure:
    """of, statistic: the same from single requests, where it can be had from them. unit: "s", "/s", "%" or "".

    of_load: follows the load that was offered, so that it says nothing about runs that were offered different ones.
    shared: of tenants that share a server.
    """

    name: str
    pick: Callable[[report.Summary], float]
    unit: str
    higher_is_better: bool = False
    of: Callable[[Record], float | None] | None = None
    statistic: Callable[[Floats], float] = field(default=lambda values: float(values.mean()))
    of_load: bool = False
    shared: bool = False

    def value(self, side: Side) -> float:
        """The median over the repetitions."""
        return median(self.pick(summary) for summary in side.summaries)

    def better(self, base: float, other: float) -> float:
        """How many times better than the base; NaN where one of them is nothing."""
        return _better(base, other, higher_is_better=self.higher_is_better)


def _better(base: float, other: float, *, higher_is_better: bool) -> float:
    if min(base, other) <= 0:
        return float("nan")
    return other / base if higher_is_better else base / other


def _percentile(share: float) -> Callable[[Floats], float]:
    """Between two values by a straight line, as np.percentile, which for a short array takes twenty times as long."""

    def of(values: Floats) -> float:
        place = (values.size - 1) * share / 100
        low = int(place)
        high = min(low + 1, values.size - 1)
        ordered = np.partition(values, (low, high))
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return of


def _ttft(record: Record) -> float | None:
    return record.ttft_s if record.ok else None


def _ok(pick: Callable[[Record], float | None]) -> Callable[[Record], float | None]:
    return lambda record: pick(record) if record.ok else None


def _per_token(record: Record) -> float | None:
    return record.e2e_s / record.output_tokens if record.output_tokens else None


def _longest_gap(record: Record) -> float | None:
    return max(record.gaps_us) / 1e6 if record.gaps_us else None


def _share_inside(summary: report.Summary) -> float:
    return summary.attainment.share if summary.attainment else float("nan")


def _tpot(record: Record) -> float | None:
    return record.tpot_s


_E2E = _ok(lambda record: record.e2e_s)

MEASURES: Sequence[Measure] = (
    Measure("TTFT, median", lambda one: one.ttft.p50, "s", of=_ttft, statistic=_percentile(50)),
    Measure("TTFT, P90", lambda one: one.ttft.p90, "s", of=_ttft, statistic=_percentile(90)),
    Measure("TTFT, P95", lambda one: one.ttft.p95, "s", of=_ttft, statistic=_percentile(95)),
    Measure("TTFT, P99", lambda one: one.ttft.p99, "s", of=_ttft, statistic=_percentile(99)),
    Measure("ITL, median", lambda one: one.itl.p50, "s"),
    Measure("ITL, P99", lambda one: one.itl.p99, "s"),
    Measure("longest gap, P99", lambda one: one.longest_gap.p99, "s", of=_ok(_longest_gap), statistic=_percentile(99)),
    Measure("TPOT, median", lambda one: one.tpot.p50, "s", of=_ok(_tpot), statistic=_percentile(50)),
    Measure("TPOT, P99", lambda one: one.tpot.p99, "s", of=_ok(_tpot), statistic=_percentile(99)),
    Measure("E2E, mean", lambda one: one.e2e.mean, "s", of=_E2E),
    Measure("E2E, median", lambda one: one.e2e.p50, "s", of=_E2E, statistic=_percentile(50)),
    Measure("E2E, P95", lambda one: one.e2e.p95, "s", of=_E2E, statistic=_percentile(95)),
    Measure("E2E, P99", lambda one: one.e2e.p99, "s", of=_E2E, statistic=_percentile(99)),
    Measure("E2E per token, mean", lambda one: one.per_token.mean, "s", of=_ok(_per_token)),
    Measure("requests/s", lambda one: one.requests_per_s, "/s", higher_is_better=True, of_load=True),
    Measure("output tokens/s", lambda one: one.output_tokens_per_s, "/s", higher_is_better=True, of_load=True),
    Measure("inside objective", _share_inside, "%", higher_is_better=True),
    Measure(
        "service difference, max",
        lambda one: one.fairness.difference.maximum if one.fairness else 0.0,
        "/s",
        shared=True,
    ),
    Measure(
        "service difference, mean",
        lambda one: one.fairness.difference.average if one.fairness else 0.0,
        "/s",
        shared=True,
    ),
    Measure(
        "Jain's index, mean",
        lambda one: one.fairness.jain_mean if one.fairness else 1.0,
        "",
        higher_is_better=True,
        shared=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times better than the baseline: above 1 is better. low, high: its interval, None where not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the whole interval lies on one side of 1, and by enough to matter."""
        if self.low is None or self.high is None or abs(self.value - 1.0) < LEAST_EFFECT:
            return False
        return self.low > 1.0 or self.high < 1.0

    @property
    def interval(self) -> str:
        """In words, with a space before; empty where it is not known."""
        return f" ({self.low:.2f} to {self.high:.2f})" if self.low is not None and self.high is not None else ""


def base_of(side: Side, sides: Sequence[Side]) -> Side:
    """What a side is compared with: the first, of runs NAME@LOAD the first of the same load. It may be itself."""
    load = side.name.partition("@")[2]
    return next(one for one in sides if one.name.partition("@")[2] == load)


@dataclass(frozen=True, slots=True)
class Load:
    """What a run was offered. per_s: requests that came by themselves, 0 in a closed loop of `concurrency`."""

    per_s: float
    concurrency: int

    def like(self, other: "Load") -> bool:
        """Whether what two runs do under these loads can be compared."""
        if self.concurrency or other.concurrency:
            return self.concurrency == other.concurrency
        return abs(self.per_s - other.per_s) <= _SAME_LOAD * max(self.per_s, other.per_s)

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency else f"{self.per_s:.3g} requests/s"


def load_of(run: Recorded) -> Load:
    """The load that one run was offered."""
    concurrency = run.run.concurrency if run.run is not None else 0
    times_s = [record.due_s for record in run.records]
    span_s = max(times_s, default=0.0) - min(times_s, default=0.0)
    return Load((len(times_s) - 1) * run.every / span_s if span_s else 0.0, concurrency)


def same_load(base: Side, other: Side) -> bool:
    """Whether both were offered as much, in every repetition."""
    return all(load_of(one).like(load_of(two)) for one, two in zip(base.runs, other.runs, strict=False))


def load_warning(sides: Sequence[Side]) -> str:
    """Told where runs are compared that were offered different loads; empty where none are."""
    pairs = [(base, side) for side in sides if (base := base_of(side, sides)) is not side]
    for base, side in pairs:
        if not same_load(base, side):
            return (
                f"{base.name} was offered {load_of(base.runs[0])} and {side.name} {load_of(side.runs[0])}: throughput "
                "follows the load and is not compared, and other differences may come from it."
            )
    return ""


def ratio(measure: Measure, base: Side, other: Side) -> Ratio | None:
    """None where it makes no sense: a zero, nothing measured, or throughput under different loads."""
    if measure.of_load and not same_load(base, other):
        return None
    ones, twos = ([measure.pick(summary) for summary in side.summaries] for side in (base, other))
    within = repeated(ones, twos, higher_is_better=measure.higher_is_better)
    if within is None or within.low is not None:
        return within
    interval = _resampled(measure, base.runs[0].records, other.runs[0].records)
    return Ratio(within.value, *interval) if interval else within


def repeated(base: Sequence[float], other: Sequence[float], *, higher_is_better: bool = False) -> Ratio | None:
    """The same number of each repetition of two sides: the ratio within each, its median and range."""
    pairs = zip(base, other, strict=False)
    ratios = [_better(one, two, higher_is_better=higher_is_better) for one, two in pairs]
    known = [value for value in ratios if isfinite(value)]
    if not known:
        return None
    return Ratio(median(known), min(known), max(known)) if len(known) > 1 else Ratio(known[0])


def _resampled(measure: Measure, base: Sequence[Record], other: Sequence[Record]) -> tuple[float, float] | None:
    """The middle 95 % of the ratio over resamples of blocks; the same blocks of both, for they had the same calls."""
    if measure.of is None or min(len(base), len(other)) < _BLOCKS * _LEAST_PER_BLOCK:
        return None
    rng = np.random.default_rng(0)
    ones, twos = _blocks(measure.of, base), _blocks(measure.of, other)
    ratios = []
    for chosen in rng.integers(_BLOCKS, size=(_RESAMPLES, _BLOCKS)):
        one, two = np.concatenate([ones[at] for at in chosen]), np.concatenate([twos[at] for at in chosen])
        if one.size and two.size:
            ratios.append(measure.better(measure.statistic(one), measure.statistic(two)))
    known = [value for value in ratios if isfinite(value)]
    if len(known) < _RESAMPLES // 2:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _blocks(of: Callable[[Record], float | None], records: Sequence[Record]) -> list[Floats]:
    ordered = sorted(records, key=lambda record: record.due_s)
    values = np.array([value if (value := of(record)) is not None else np.nan for record in ordered])
    return [block[~np.isnan(block)] for block in np.array_split(values, _BLOCKS)]


# In words


def measure(name: str) -> Measure:
    """One of MEASURES."""
    return next(one for one in MEASURES if one.name == name)


def measured(sides: Sequence[Side]) -> list[Measure]:
    """Those of MEASURES that any side has."""
    shared = any(len(summary.by_tenant) > 1 for side in sides for summary in side.summaries)
    known = [one for one in MEASURES if any(isfinite(one.value(side)) for side in sides)]
    return [one for one in known if shared or not one.shared]


def not_ok(side: Side) -> int:
    """Requests that did not end well, of all repetitions."""
    return sum(one.requests - one.endings.get("ok", 0) for one in side.summaries)


def rows(sides: Sequence[Side]) -> report.Rows:
    """A column per side, a row per measure: its value and, after the first, how many times better that is."""
    table: report.Rows = [["", *(side.name for side in sides)]]
    for one in measured(sides):
        table.append([one.name, *(_cell(one, base_of(side, sides), side) for side in sides)])
    table.append(["did not end well", *(f"{not_ok(side)}" for side in sides)])
    return table


def _cell(of: Measure, base: Side, side: Side) -> str:
    value = amount(of.value(side), of.unit)
    made = ratio(of, base, side) if side is not base else None
    return f"{value}  {times(made.value)}{made.interval}" if made is not None else value


def exact(seconds: float) -> str:
    """A time with three digits that count."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def times(ratio: float) -> str:
    """How many times: 0.034×, 0.87×, 1.9×, 61×."""
    if ratio < 0.1:
        return f"{ratio:.2g}×"
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def amount(value: float, unit: str) -> str:
    """A number with its unit, as a table has it."""
    if not isfinite(value):
        return "–"
    if unit == "s":
        return exact(value)
    if unit == "%":
        return f"{value:.1%}"
    if unit == "/s":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.3f}"
