"""`evenhand advise`: by simulation, under which policy how many workers keep a trace inside its objective, and how many
of them should only read prompts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from rich.console import Console

from loadtest import provenance
from loadtest.client.replay import CannotReplay
from loadtest.report import report
from loadtest.report.charts import Panel, Series, linear
from loadtest.report.comparison import Side
from loadtest.report.page import page
from loadtest.report.pictures import colour, count, percent
from loadtest.report.report import ATTAINMENT_GOAL
from loadtest.simulator import simulate_command

_MOST_WORKERS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    simulate_command.add_arguments(parser)
    parser.add_argument(
        "--slo", metavar="ttft=S,tpot=S", type=slo, help="the objective, seconds; one of the two may be left out"
    )
    parser.add_argument(
        "--most-workers", type=int, default=_MOST_WORKERS, help="do not look further (default: %(default)s)"
    )
    parser.add_argument("--apart", action="store_true", help="try workers that only read prompts, too")
    parser.set_defaults(policy="fcfs,mlfq,vtc,gittins")


def slo(text: str) -> report.Objective:
    """`ttft=0.5,tpot=0.05` → an objective. ValueError for anything else."""
    limits = dict(part.partition("=")[::2] for part in text.split(","))
    if not limits or set(limits) - {"ttft", "tpot"}:
        raise ValueError("write it as ttft=SECONDS,tpot=SECONDS")
    return report.Objective(*(float(limits.get(name, "inf")) for name in ("ttft", "tpot")))


def run(args: argparse.Namespace) -> int:
    """0, or 1 when no number of workers is enough, 2 when the trace cannot be read."""
    screen = Console(stderr=True)
    objective = args.slo or report.Objective.of(args.ttft, args.tpot)
    try:
        if objective is None:
            raise ValueError("give the objective, for example --slo ttft=1,tpot=0.1")
        advice = [_search(args, text, objective, screen) for text in args.policy.split(",")]
        best = min(advice, key=lambda one: (one.workers or sys.maxsize, -one.share))
        if args.html:
            shown = [one.side for one in advice]
            args.html.write_text(page(shown, objective, lead=_picture(advice), command=provenance.command()), "utf-8")
    except (CannotReplay, ValueError, OSError) as error:
        screen.print(f"evenhand advise: {error}", style="red", markup=False, highlight=False)
        return 2
    sys.stdout.write(f"{report.text(_rows(advice))}\n\n{sentence(best)}\n")
    return 0 if best.workers else 1


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found for one policy. workers: the fewest that are enough, None if none is.

    shares: of the requests inside the objective, by workers tried, as well divided as was found. readers: how many of
    them only read prompts. side: the run with `workers`, else with the most.
    """

    policy: str
    workers: int | None
    shares: dict[int, float]
    readers: dict[int, int]
    side: Side

    @property
    def share(self) -> float:
        return self.shares[self.workers] if self.workers else max(self.shares.values())


def fewest(enough: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` that is enough, if more is never worse; None if even the most is not.

    Doubles until it is enough, then halves the distance: few tries, for each is a simulation.
    """
    low, high = 0, 1
    while not enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _search(args: argparse.Namespace, policy: str, objective: report.Objective, screen: Console) -> Advice:
    shares: dict[int, float] = {}
    readers: dict[int, int] = {}
    sides: dict[int, Side] = {}

    def enough(workers: int) -> bool:
        for reading in divisions(workers) if args.apart else [0]:
            args.workers, args.prefill_workers = workers - reading, reading
            side = simulate_command.simulated(args, policy, objective, screen)
            attained = side.summaries[0].attainment
            share = attained.share if attained else 0.0
            if share > shares.get(workers, -1.0):
                shares[workers], readers[workers], sides[workers] = share, reading, side
        return shares[workers] >= ATTAINMENT_GOAL

    workers = fewest(enough, args.most_workers)
    return Advice(policy, workers, dict(sorted(shares.items())), readers, sides[workers or max(sides)])


def divisions(workers: int) -> list[int]:
    """How many of so many workers might only read prompts: none, a quarter, a third, a half, two thirds."""
    return sorted({0, workers // 4, workers // 3, workers // 2, 2 * workers // 3} - {workers})


def sentence(best: Advice) -> str:
    """The advice itself."""
    if best.workers is None:
        return f"No policy keeps {ATTAINMENT_GOAL:.0%} inside the objective with {max(best.shares)} workers or fewer."
    plural = "worker" if best.workers == 1 else "workers"
    reading = best.readers[best.workers]
    apart = f", {reading} of which only read prompts" if reading else ""
    return f"{best.policy} on {best.workers} {plural}{apart}: {best.share:.1%} inside the objective."


def _rows(advice: Sequence[Advice]) -> report.Rows:
    rows: report.Rows = [["policy", "workers", "only reading", "inside", "tried"]]
    for one in advice:
        tried = ", ".join(f"{workers}: {share:.0%}" for workers, share in one.shares.items())
        reading = f"{one.readers[one.workers]}" if one.workers else "-"
        rows.append([one.policy, f"{one.workers or '-'}", reading, f"{one.share:.1%}", tried])
    return rows


def _picture(advice: Sequence[Advice]) -> str:
    """How many are inside, by workers."""
    x = linear((float(workers) for one in advice for workers in one.shares), count)
    panel = Panel("Inside the objective, by workers", x, linear([1.0], percent), "dotted: 90 %")
    panel.rule(y=ATTAINMENT_GOAL)
    for at, one in enumerate(advice):
        workers, shares = np.array(list(one.shares.items()), dtype=np.float64).T
        panel.line(Series(one.policy, colour(at, len(advice)), workers, shares))
        for number, share in one.shares.items():
            panel.mark(number, share, colour(at, len(advice)))
    best = min(advice, key=lambda one: (one.workers or sys.maxsize, -one.share))
    return f'<p><b>{escape(sentence(best))}</b></p><div class="panels">{panel.figure()}</div>'
