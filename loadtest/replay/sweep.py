"""`evenhand replay --sweep`: finds the highest rate at which a server meets its objectives, with a confidence interval.

A run at each rate, doubled until 90 % of the requests are no longer inside the objective, then halved between. At each
rate the share has an interval from resampling blocks of neighbouring requests; the knee's interval reaches from the
highest rate that surely holds to the lowest that surely does not.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from html import escape
from math import sqrt
from pathlib import Path

import numpy as np
from rich.console import Console

from loadtest import provenance
from loadtest.records import Record
from loadtest.replay.measure import STOPPED, Done, measured
from loadtest.replay.prepare import CannotReplay, prepare
from loadtest.report import report
from loadtest.report.charts import Panel, Series, linear
from loadtest.report.comparison import Side, side_of
from loadtest.report.page import page
from loadtest.report.pictures import count, percent
from loadtest.report.report import ATTAINMENT_GOAL

_REQUESTS = 200
_CLOSE = 1.1  # two rates are no farther apart than this in the end
_MOST_RUNS = 16
_BLOCKS, _RESAMPLES = 20, 1000


@dataclass(frozen=True, slots=True)
class Point:
    """What one rate came to. share: inside the objective; low, high: its 95 % interval."""

    rate: float
    share: float
    low: float
    high: float
    side: Side

    @property
    def holds(self) -> bool:
        return self.share >= ATTAINMENT_GOAL


@dataclass(slots=True)
class Knee:
    """The points that were measured, and what follows from them."""

    points: list[Point] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Where the share crosses the goal, by a straight line between two rates; 0 if it holds at none."""
        return report.goodput([(point.rate, point.share) for point in self.points])

    @property
    def low(self) -> float:
        """The highest rate at which the goal is surely kept, and at all below it; 0 if there is none."""
        surely = 0.0
        for point in sorted(self.points, key=lambda one: one.rate):
            if point.low < ATTAINMENT_GOAL:
                break
            surely = point.rate
        return surely

    @property
    def high(self) -> float:
        """The lowest rate at which the goal is surely missed; infinite if there is none."""
        return min((point.rate for point in self.points if point.high < ATTAINMENT_GOAL), default=float("inf"))

    def __str__(self) -> str:
        goal = f"{ATTAINMENT_GOAL:.0%} of the requests are inside the objective"
        if not self.rate:
            return f"At no rate down to {min(one.rate for one in self.points):.3g} requests/s {goal}."
        if all(point.holds for point in self.points):
            return f"{goal[0].upper()}{goal[1:]} up to the highest rate tried, {self.rate:.3g} requests/s."
        above = f"{self.high:.3g}" if self.high != float("inf") else "not found"
        return f"Knee: {self.rate:.3g} requests/s (95 % interval {self.low:.3g} to {above}); up to there {goal}."


def search(measure: Callable[[float], Point], low: float, high: float, start: float) -> Knee:
    """Rates from `low` to `high` (0: as far as is needed), beginning at `start`."""
    knee, below, above = Knee(), 0.0, 0.0
    rate = start
    while len(knee.points) < _MOST_RUNS:
        point = measure(rate)
        knee.points.append(point)
        below, above = (rate, above) if point.holds else (below, rate)
        if below and above:
            if above / below <= _CLOSE:
                break
            rate = sqrt(below * above)
        elif (below and rate == high) or (above and rate == low):
            break
        else:
            rate = min(2 * rate, high or float("inf")) if below else max(rate / 2, low)
    return knee


def interval(records: Sequence[Record], objective: report.Objective) -> tuple[float, float]:
    """The middle 95 % of the share inside an objective, over resamples of blocks of neighbouring requests."""
    ordered = sorted(records, key=lambda record: record.due_s)
    met = np.array([objective.met(record) for record in ordered], dtype=np.float64)
    blocks = np.array_split(met, min(_BLOCKS, len(met)))
    sums, sizes = np.array([block.sum() for block in blocks]), np.array([block.size for block in blocks])
    chosen = np.random.default_rng(0).integers(len(blocks), size=(_RESAMPLES, len(blocks)))
    low, high = np.percentile(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


class Stopped(Exception):
    """A run ended before its time; the status is the command's."""

    def __init__(self, status: int) -> None:
        self.status = status


def run(args: argparse.Namespace, screen: Console) -> int:
    """0, 2 when it cannot begin, 1 when the objective holds at no rate, and what a run says that was stopped."""
    objective = report.Objective.of(args.ttft, args.tpot)
    if objective is None:
        raise CannotReplay("--sweep needs an objective: give --ttft SECONDS, --tpot SECONDS or both.")
    if args.concurrency or args.stages or args.resume:
        raise CannotReplay("--sweep sets the rate itself: leave out --concurrency, --stages and --resume.")
    low, high = args.sweep

    def measure(rate: float) -> Point:
        done = _at(args, rate, screen)
        if done.status >= STOPPED:
            raise Stopped(done.status)
        side = side_of(f"{Path(args.trace).stem}@{rate:.4g}", done.recorded, objective)
        attained = side.summaries[0].attainment
        point = Point(rate, attained.share if attained else 0.0, *interval(done.recorded.records, objective), side)
        screen.print(f"{rate:.4g} requests/s: {point.share:.1%} inside ({point.low:.1%} to {point.high:.1%})")
        return point

    try:
        knee = search(measure, low, high, args.rate or low or 1.0)
    except Stopped as stopped:
        return stopped.status
    knee.points.sort(key=lambda point: point.rate)
    sys.stdout.write(f"{report.text(rows(knee))}\n\n{knee}\n")
    if args.html:
        shown = [point.side for point in knee.points]
        args.html.write_text(page(shown, objective, lead=_lead(knee), command=provenance.command()), "utf-8")
        sys.stdout.write(f"Page: {args.html}\n")
    return 0 if knee.rate else 1


def _at(args: argparse.Namespace, rate: float, screen: Console) -> Done:
    """One run at a rate, its records beside those of the others."""
    one = copy(args)
    one.rate, one.rate_scale = rate, 1.0
    if not (args.limit or args.duration):
        one.limit = _REQUESTS
    if args.out:
        one.out = args.out.with_name(f"{args.out.stem}@{rate:.4g}{args.out.suffix}")
    return measured(prepare(one), screen)


def rows(knee: Knee) -> report.Rows:
    """A row per rate."""
    table: report.Rows = [["requests/s", "requests", "inside", "interval", "TTFT P99", "TPOT P99", "output tokens/s"]]
    for point in knee.points:
        one = point.side.summaries[0]
        table.append(
            [
                f"{point.rate:.4g}", f"{one.requests:,}", f"{point.share:.1%}", f"{point.low:.1%}–{point.high:.1%}",
                report.seconds(one.ttft.p99), report.seconds(one.tpot.p99), f"{one.output_tokens_per_s:,.0f}",
            ]
        )  # fmt: skip
    return table


def _lead(knee: Knee) -> str:
    """The knee in a sentence and a picture."""
    rates = np.array([point.rate for point in knee.points])
    panel = Panel(
        "Inside the objective, by rate", linear(rates, count), linear([1.0], percent), "dotted: 90 %, the knee"
    )
    panel.rule(y=ATTAINMENT_GOAL)
    if knee.rate:
        panel.rule(x=knee.rate, text=f"{knee.rate:.3g}/s")
    for css, values in (
        ("s8", [point.low for point in knee.points]),
        ("s8", [point.high for point in knee.points]),
        ("s1", [point.share for point in knee.points]),
    ):
        panel.line(Series("", css, rates, np.array(values)), extra="thin" if css == "s8" else "")
    for point in knee.points:
        panel.mark(point.rate, point.share, "s1")
    return f'<p><b>{escape(str(knee))}</b></p><div class="panels">{panel.figure()}</div>'
