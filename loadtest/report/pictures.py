"""The pictures of a report: runs → panels. One colour per run throughout; tenants have colours of their own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from loadtest.records import Record, Recorded, Sample
from loadtest.report import series
from loadtest.report.charts import ALONE, NAMED, Axis, Dot, Panel, Series, dot_plot, linear, logarithmic
from loadtest.report.comparison import MEASURES, Side, base_of, exact, ratio
from loadtest.report.fairness import Timeline, timeline
from loadtest.report.report import ATTAINMENT_GOAL, Objective, goodput

Floats = NDArray[np.float64]

_NINES = ((0.30103, "P50"), (1.0, "P90"), (2.0, "P99"), (3.0, "P99.9"), (4.0, "P99.99"))
_MOST_NINES = 4.0
_LEAST_S = 1e-4
_MOST_DOTS = 1200
_NAMED_TENANTS = 6
_WINDOWS = 16
_COLOURS = 8
_ALIKE = 0.01  # curves that are nowhere farther apart are drawn as one
_FARTHEST = 10.0  # times: what is farther away is told as a number, or all the rest would be one heap

# What decides for users, in the order of their waiting, then for operators.
OVERVIEW = (
    "TTFT, median", "TTFT, P99", "TPOT, median", "TPOT, P99", "longest gap, P99", "E2E, mean", "E2E, P99",
    "E2E per token, mean", "output tokens/s", "inside objective", "service difference, max",
)  # fmt: skip


def colour(at: int, of: int) -> str:
    """The class of a run's colour: the baseline is grey, a run alone blue."""
    return "s1" if of == 1 else f"s{at}" if at < _COLOURS else "s8"


def _margin(sides: Sequence[Side]) -> float:
    """To the right of a panel: room for names where there are any."""
    return ALONE if len(sides) == 1 else NAMED


def duration(seconds: float) -> str:
    """A time on an axis."""
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60 or seconds % 60:
        return f"{seconds:,.4g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


_STEPS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400)


def time_axis(end_s: float) -> Axis:
    """From 0 to the end, with ticks at times that people count in."""
    step = next((step for step in _STEPS_S if end_s / step <= 6), end_s / 5)
    return Axis(0.0, end_s, [(at * step, duration(at * step)) for at in range(int(end_s / step) + 1)])


def count(value: float) -> str:
    """A number on an axis: 1,200 or 12k."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 10_000 else f"{value:,g}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def better(value: float) -> str:
    """How many times, on an axis."""
    return f"{value:g}×"


def coinciding(lines: Sequence[Series]) -> Sequence[Series]:
    """The lines, or a single one where they coincide."""
    if len(lines) < 2:
        return lines
    first, *others = lines
    alike = all(
        line.y.shape == first.y.shape
        and np.allclose(line.x, first.x)
        and np.allclose(line.y, first.y, rtol=_ALIKE, atol=0.0, equal_nan=True)
        for line in others
    )
    return [Series("all alike", "s0", first.x, first.y)] if alike else lines


# In one look


def overview(sides: Sequence[Side]) -> str:
    """Every run's ratios to the first, a row per measure; empty for a run alone."""
    rows = []
    for measure in (one for one in MEASURES if one.name in OVERVIEW):
        dots = []
        for at, side in enumerate(sides):
            base = base_of(side, sides)
            found = ratio(measure, base, side) if side is not base else None
            if found is not None:
                dots.append(Dot(colour(at, len(sides)), found.value, found.low, found.high))
        if dots:
            rows.append((measure.name, dots))
    if not rows:
        return ""
    ends = [end for _, dots in rows for dot in dots for end in (dot.value, dot.low, dot.high) if end]
    ends = [min(max(end, 1 / _FARTHEST), _FARTHEST) for end in ends]
    axis = logarithmic([*ends, 0.8, 1.25], better, floor_at=1 / _FARTHEST)
    if not any(value == 1.0 for value, _ in axis.ticks):
        axis = Axis(axis.low, axis.high, [*axis.ticks, (1.0, "1×")], axis.scale)
    about = f"Right of the rule: better than {baseline(sides)}. {interval_words(sides)}"
    return dot_plot(rows, axis, "How many times better", about)


def baseline(sides: Sequence[Side]) -> str:
    """What ratios are to, in words."""
    name, _, load = sides[0].name.partition("@")
    return f"{name} at the same load" if load else name


def interval_words(sides: Sequence[Side]) -> str:
    """What the whiskers are."""
    if max(len(side.runs) for side in sides) > 1:
        return f"Dots: median of {len(sides[0].runs)} repetitions; lines: the smallest and the largest."
    return "Lines: 95 % interval, by resampling blocks of the run."


# Distributions


def distributions(sides: Sequence[Side]) -> Iterator[str]:
    """Percentile plots: across, the share that fared no worse, every further nine as far as the one before."""
    for title, about, of in _TIMES:
        panel = _quantiles(title, about, sides, of)
        if panel:
            yield panel


def _ok(records: Sequence[Record]) -> Iterator[Record]:
    return (record for record in records if record.ok)


_TIMES: Sequence[tuple[str, str, Callable[[Sequence[Record]], list[float]]]] = (
    ("Time to first token", "of requests", lambda all_: [one.ttft_s for one in all_ if one.ttft_s is not None]),
    (
        "Between tokens (ITL)",
        "of gaps between two tokens",
        lambda all_: [gap / 1e6 for one in _ok(all_) for gap in one.gaps_us],
    ),
    (
        "Longest gap of an answer",
        "of requests",
        lambda all_: [max(one.gaps_us) / 1e6 for one in _ok(all_) if one.gaps_us],
    ),
    ("Time per output token (TPOT)", "of requests", lambda all_: [one.tpot_s for one in _ok(all_) if one.tpot_s]),
    ("End to end (E2E)", "of requests", lambda all_: [one.e2e_s for one in _ok(all_)]),
    (
        "E2E per output token",
        "of requests; queueing included",
        lambda all_: [one.e2e_s / one.output_tokens for one in _ok(all_) if one.output_tokens],
    ),
)


def _quantiles(title: str, about: str, sides: Sequence[Side], of: Callable[[Sequence[Record]], list[float]]) -> str:
    lines = []
    for at, side in enumerate(sides):
        values = np.array(of(side.records), dtype=np.float64)
        if values.size > 1:
            nines = np.linspace(0.0, min(_MOST_NINES, np.log10(values.size)), 70)
            heights = np.maximum(np.quantile(values, 1.0 - 10.0**-nines), _LEAST_S)
            lines.append(Series(side.name if len(sides) > 1 else "", colour(at, len(sides)), nines, heights))
    if not lines:
        return ""
    most = max(2.0, *(float(line.x[-1]) for line in lines))
    x = Axis(0.0, most, [tick for tick in _NINES if tick[0] <= most])
    y = logarithmic((value for line in lines for value in line.y), duration, floor_at=_LEAST_S)
    panel = Panel(title, x, y, about, right=_margin(sides))
    for line in coinciding(lines):
        panel.line(line)
    if len(sides) == 1:
        _annotate(panel, lines[0])
    return panel.figure()


def _annotate(panel: Panel, line: Series) -> None:
    for nine, _ in _NINES[:3]:
        if nine <= line.x[-1]:
            height = float(np.interp(nine, line.x, line.y))
            panel.mark(nine, height, line.css, exact(height))


# Over time


def over_time(sides: Sequence[Side]) -> Iterator[str]:
    """Curves over the first run of each side."""
    first = [side.runs[0] for side in sides]
    end_s = max(record.sent_s + record.e2e_s for run in first for record in run.records)
    at_s = series.ticks(end_s)
    window_s = end_s / _WINDOWS
    yield _curves(
        "Requests in flight", "", sides, at_s, lambda run: series.in_flight(run.records, at_s) * run.every, count
    )
    yield _curves(
        "Output tokens per second", f"mean over {duration(round(window_s, 1))}", sides, at_s,
        lambda run: series.rate(series.token_times_s(run.records), at_s, window_s) * run.every, count,
    )  # fmt: skip
    yield _curves(
        "TTFT of the requests sent then", f"median over {duration(round(window_s, 1))}", sides, at_s,
        lambda run: series.windowed(run.records, at_s, window_s, _median_ttft), duration,
    )  # fmt: skip
    yield from _sampled(sides, at_s)


def _median_ttft(records: Sequence[Record]) -> float:
    seen = [record.ttft_s for record in records if record.ttft_s is not None]
    return median(seen) if seen else float("nan")


def _curves(
    title: str,
    about: str,
    sides: Sequence[Side],
    at_s: Floats,
    of: Callable[[Recorded], Floats],
    text: Callable[[float], str],
    top: float = 0.0,
    low: float = 0.0,
) -> str:
    lines = [
        Series(side.name if len(sides) > 1 else "", colour(at, len(sides)), at_s, of(side.runs[0]))
        for at, side in enumerate(sides)
    ]
    lines = [line for line in lines if np.isfinite(line.y).any()]
    y = linear((value for line in lines for value in line.y), text, low=low, high=top)
    panel = Panel(title, time_axis(float(at_s[-1])), y, about, right=_margin(sides))
    for line in coinciding(lines):
        panel.line(line)
    return panel.figure()


_SAMPLED: Sequence[tuple[str, str, Callable[[Sample], float | None], Callable[[float], str], float]] = (
    ("Requests waiting", "as the server says", lambda sample: sample.waiting, count, 0.0),
    ("Requests running", "as the server says", lambda sample: sample.running, count, 0.0),
    ("KV cache in use", "as the server says", lambda sample: sample.kv_usage, percent, 1.0),
    ("Preemptions so far", "as the server says", lambda sample: sample.preemptions, count, 0.0),
)


def _sampled(sides: Sequence[Side], at_s: Floats) -> Iterator[str]:
    for title, about, pick, text, top in _SAMPLED:
        if any(pick(sample) for side in sides for sample in side.runs[0].samples):  # neither unknown nor always 0
            yield _curves(title, about, sides, at_s, _interpolated(pick, at_s, title.startswith("Preempt")), text, top)


def _interpolated(pick: Callable[[Sample], float | None], at_s: Floats, grown: bool) -> Callable[[Recorded], Floats]:
    def curve(run: Recorded) -> Floats:
        seen = [(sample.at_s, value) for sample in run.samples if (value := pick(sample)) is not None]
        if len(seen) < 2:
            return np.full_like(at_s, np.nan)
        times, values = np.array([at for at, _ in seen]), np.array([value for _, value in seen])
        values = values - values[0] if grown else values
        heights: Floats = np.interp(at_s, times, values, right=np.nan)
        return heights

    return curve


# Objectives


def objectives(sides: Sequence[Side], objective: Objective) -> Iterator[str]:
    """Every request by its two times, and how many are inside as the objective is stretched, in time, and by rate."""
    seen = [_both(side.runs[0].records) for side in sides]
    x, y = (
        logarithmic([limit, *(pair[at] for pairs in seen for pair in pairs)], duration, floor_at=_LEAST_S)
        for at, limit in enumerate((objective.ttft_s, objective.tpot_s))
    )
    for at, (side, pairs) in enumerate(zip(sides, seen, strict=True)):
        yield _cloud(
            side,
            pairs,
            Panel("", x, y, "across TTFT, up TPOT; each dot a request", right=ALONE),
            objective,
            colour(at, len(sides)),
        )
    yield _scaled(sides, objective)
    end_s = max(record.sent_s for side in sides for record in side.runs[0].records)
    at_s = series.ticks(end_s)
    yield _curves(
        "Inside the objective, by when sent", f"of the requests in {duration(round(end_s / _WINDOWS, 1))}", sides, at_s,
        lambda run: series.windowed(run.records, at_s, end_s / _WINDOWS, lambda some: _share(some, objective)),
        percent, 1.0,
    )  # fmt: skip
    yield from _by_rate(sides)


def _share(records: Sequence[Record], objective: Objective) -> float:
    return sum(map(objective.met, records)) / len(records)


def _both(records: Sequence[Record]) -> list[tuple[float, float]]:
    """TTFT and TPOT of each request that has both."""
    return [(one.ttft_s, one.tpot_s) for one in records if one.ok and one.ttft_s and one.tpot_s]


def _cloud(side: Side, pairs: Sequence[tuple[float, float]], panel: Panel, objective: Objective, css: str) -> str:
    share = median(one.attainment.share for one in side.summaries if one.attainment)
    panel.title = f"{side.name}: {share:.1%} inside"
    panel.area(min(objective.ttft_s, panel.x.high), min(objective.tpot_s, panel.y.high))
    kept = pairs[:: max(1, len(pairs) // _MOST_DOTS)]
    if kept:
        ttft, tpot = np.array(kept).T
        panel.cloud(Series("", css, ttft, tpot))
    return panel.figure()


def _scaled(sides: Sequence[Side], objective: Objective) -> str:
    """DistServe's second figure: attainment over the scale of both objectives."""
    scales = np.geomspace(0.1, 10.0, 80)
    x = Axis(0.1, 10.0, [(value, better(value)) for value in (0.1, 0.2, 0.5, 1, 2, 5, 10)], np.log10)
    panel = Panel(
        "Inside, as both limits are stretched", x, linear([1.0], percent), "stricter to the left", right=_margin(sides)
    )
    panel.rule(x=1.0, text="as given")
    panel.rule(y=ATTAINMENT_GOAL)
    for at, side in enumerate(sides):
        records = side.records
        needed = np.sort([_stretch(record, objective) for record in records])
        shares = np.searchsorted(needed, scales, "right") / len(records)
        panel.line(Series(side.name if len(sides) > 1 else "", colour(at, len(sides)), scales, shares))
    return panel.figure()


def _stretch(record: Record, objective: Objective) -> float:
    """By how much both limits must be stretched for this request to be inside."""
    if not record.ok or record.ttft_s is None:
        return float("inf")
    return max(record.ttft_s / objective.ttft_s, (record.tpot_s or 0.0) / objective.tpot_s)


def _offered_per_s(records: Sequence[Record]) -> float:
    last_s = max((one.due_s for one in records), default=0.0)
    return len(records) / last_s if last_s else 0.0


def _by_rate(sides: Sequence[Side]) -> Iterator[str]:
    """The goodput curve, where runs NAME@LOAD were made at several rates."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for side in sides:
        attained = [one.attainment.share for one in side.summaries if one.attainment]
        offered = median(_offered_per_s(run.records) for run in side.runs)
        curves.setdefault(side.name.partition("@")[0], []).append((offered, median(attained)))
    if not any(len(points) > 1 for points in curves.values()):
        return
    x = linear((rate for points in curves.values() for rate, _ in points), count)
    panel = Panel("Inside, by offered rate", x, linear([1.0], percent), "requests per second; dotted: goodput's 90 %")
    panel.rule(y=ATTAINMENT_GOAL)
    for at, (name, points) in enumerate(curves.items()):
        rates, shares = np.array(sorted(points)).T
        panel.line(Series(f"{name} {goodput(points):.3g}/s", colour(at, len(curves)), rates, shares))
        for rate, share in points:
            panel.mark(rate, share, colour(at, len(curves)))
    yield panel.figure()


# Tenants


def tenants(sides: Sequence[Side]) -> Iterator[str]:
    """Service by tenant over time for each run, then how uneven it was."""
    lines = [whole(side.runs[0]) for side in sides]
    known = [(side, line) for side, line in zip(sides, lines, strict=True) if line is not None]
    top = max(float(line.served_per_s.max()) for _, line in known)
    named = _by_demand(known[0][1])
    for side, line in known:
        yield _served(side, line, named, top)
    end_s = max(float(line.ticks_s[-1]) for _, line in known)
    at_s = series.ticks(end_s)
    by_run = {id(side.runs[0]): line for side, line in known}
    evenest = min(float(line.jain().min()) for _, line in known)
    least = 0.9 if evenest > 0.9 else 0.5 if evenest > 0.5 else 0.0
    for title, about, low, top, curve, text in (
        ("Service difference", "weighted tokens/s; 0 is even", 0.0, 0.0, Timeline.difference, count),
        ("Jain's index", "of what share of its demand each got so far; 1 is even", least, 1.0, Timeline.jain, _two),
    ):

        def interpolated(run: Recorded, curve: Callable[[Timeline], Floats] = curve) -> Floats:
            line = by_run[id(run)]
            return np.interp(at_s, line.ticks_s, curve(line), right=np.nan)

        yield _curves(title, about, sides, at_s, interpolated, text, top, low)


def whole(run: Recorded) -> Timeline | None:
    """The service of all of a run of which every n-th request is known."""
    line = timeline(run.records)
    if line is None or run.every == 1:
        return line
    return replace(
        line,
        served=line.served * run.every,
        asked=line.asked * run.every,
        served_per_s=line.served_per_s * run.every,
        asked_per_s=line.asked_per_s * run.every,
    )


def _two(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _by_demand(line: Timeline) -> list[str]:
    order = np.argsort(-line.asked[:, -1])
    return [line.tenants[at] for at in order[:_NAMED_TENANTS]]


def _served(side: Side, line: Timeline, named: Sequence[str], top: float) -> str:
    about = f"weighted tokens/s, mean over {duration(round(2 * line.window_s, 1))}; dashed: asked for"
    panel = Panel(f"{side.name}: service by tenant", time_axis(float(line.ticks_s[-1])), linear([top], count), about)
    for at, tenant in enumerate(line.tenants):
        if tenant not in named:
            panel.line(Series("", "s8", line.ticks_s, line.served_per_s[at]), extra="thin")
    for place, tenant in enumerate(named):
        if tenant in line.tenants:
            at = list(line.tenants).index(tenant)
            panel.line(Series("", f"s{place + 1}", line.ticks_s, line.asked_per_s[at]), extra="dashed")
            panel.line(Series(tenant, f"s{place + 1}", line.ticks_s, line.served_per_s[at]))
    return panel.figure()
