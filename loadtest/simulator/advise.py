"""`evenhand advise`: by simulation, under which policy how many workers keep a trace inside its objective, and how
these should divide prompts and answers."""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from loadtest import provenance
from loadtest.replay import options
from loadtest.replay.prepare import CannotReplay
from loadtest.report import report
from loadtest.report.charts import Panel, Series, linear
from loadtest.report.comparison import Side
from loadtest.report.page import page
from loadtest.report.pictures import colour, count, percent
from loadtest.report.report import ATTAINMENT_GOAL
from loadtest.report.trust import trust
from loadtest.simulator import simulate_command

_MOST_WORKERS = 64
_STEP_TOKENS = (1024, 512)  # of engines that answer, beside the cost model's own
_ALIKE = 0.005  # shares that are nearer to each other are no reason to prefer one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    simulate_command.add_arguments(parser)
    parser.add_argument(
        "--slo", metavar="ttft=S,tpot=S", type=slo, help="objectives, seconds; one of the two may be left out"
    )
    parser.add_argument(
        "--most-workers",
        type=options.at_least(1),
        default=_MOST_WORKERS,
        help="largest number of workers to try (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--apart", action="store_true",
        help="also try other divisions of prefill and decode: smaller steps, placement by prediction, fixed roles",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=options.at_least(1), default=3, metavar="N",
        help="number of simulations with different seeds, if the trace leaves something to chance "
        "(default: %(default)s)",
    )  # fmt: skip
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
        if args.html:
            shown = [one.side for one in advice]
            args.html.write_text(page(shown, objective, lead=_picture(advice), command=provenance.command()), "utf-8")
    except (CannotReplay, ValueError, OSError) as error:
        screen.print(f"evenhand advise: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    sys.stdout.write(f"{trust(advice[0].side.runs[0])}\n\n{report.text(_rows(advice))}\n\n")
    if args.apart:
        sys.stdout.write(f"{report.text(_by_way(chosen(advice)))}\n\n")
    sys.stdout.write(f"{sentence(advice)}\n")
    return 0 if chosen(advice).workers else 1


@dataclass(frozen=True, slots=True)
class Way:
    """How engines divide prompts and answers.

    readers: engines that read prompts; only that, or `predicted`: by preference, each request placed by prediction.
    step_tokens: of engines that answer, None for the cost model's.
    """

    readers: int = 0
    predicted: bool = False
    step_tokens: int | None = None

    def __str__(self) -> str:
        roles = "all do both"
        if self.readers:
            roles = f"{self.readers} {'prefer to read' if self.predicted else 'only read'} prompts"
        how = ", placed by prediction" if self.predicted else ""
        return f"{roles}{how}" + (f", steps of {self.step_tokens} tokens" if self.step_tokens else "")


def ways(workers: int, *, apart: bool) -> list[Way]:
    """Those that are tried with so many workers."""
    if not apart:
        return [Way()]
    both = [Way(), *(Way(step_tokens=tokens) for tokens in _STEP_TOKENS)]
    if workers == 1:
        return both
    some = [readers for readers in divisions(workers) if readers]
    fixed = [Way(readers) for readers in some]
    predicted = [Way(0, predicted=True), *(Way(readers, True, _STEP_TOKENS[-1]) for readers in some)]
    return [*both, *fixed, *predicted]


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found for one policy. workers: the fewest that are enough, None if none is.

    shares: of the requests inside the objective, by workers tried, as well divided as was found: the median over the
    seeds. ranges: their smallest and largest. ways: how the workers divide prompts and answers then. seen: what each
    way gave. side: the run with `workers`, else with the most.
    """

    policy: str
    workers: int | None
    shares: dict[int, float]
    ranges: dict[int, tuple[float, float]]
    ways: dict[int, "Way"]
    seen: dict[int, dict["Way", float]]
    side: Side

    @property
    def tried(self) -> int:
        """The number of workers that the policy is judged by."""
        return self.workers or max(self.shares)

    @property
    def share(self) -> float:
        return self.shares[self.tried]

    @property
    def range(self) -> tuple[float, float]:
        return self.ranges[self.tried]


def chosen(advice: Sequence[Advice]) -> Advice:
    """The policy with the fewest workers; of those with as many, the one with the most requests inside."""
    return min(advice, key=lambda one: (one.workers or sys.maxsize, -one.share))


def ties(advice: Sequence[Advice]) -> list[Advice]:
    """Those that need as many workers as the chosen one, and whose shares overlap with its own."""
    best = chosen(advice)
    return [
        one
        for one in advice
        if one is not best and one.workers == best.workers and one.range[1] >= best.range[0] - _ALIKE
    ]


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
    ranges: dict[int, tuple[float, float]] = {}
    chosen_ways: dict[int, Way] = {}
    seen_ways: dict[int, dict[Way, float]] = {}
    sides: dict[int, Side] = {}

    def enough(workers: int) -> bool:
        for way in ways(workers, apart=args.apart):
            seen = [_simulated(args, policy, objective, screen, workers, way, seed) for seed in seeds(args)]
            each = [one.summaries[0].attainment for one in seen]
            inside = [one.share if one else 0.0 for one in each]
            seen_ways.setdefault(workers, {})[way] = median(inside)
            if median(inside) > shares.get(workers, -1.0):
                shares[workers], ranges[workers] = median(inside), (min(inside), max(inside))
                chosen_ways[workers], sides[workers] = way, seen[0]
        return shares[workers] >= ATTAINMENT_GOAL

    workers = fewest(enough, args.most_workers)
    curve = dict(sorted(shares.items()))
    return Advice(policy, workers, curve, ranges, chosen_ways, seen_ways, sides[workers or max(sides)])


def seeds(args: argparse.Namespace) -> range:
    """A trace that is replayed at its own times leaves nothing to chance but tenants that it does not name."""
    drawn = not Path(args.trace).exists() or args.rate or args.stages or args.shares
    return range(args.seed, args.seed + (args.seeds if drawn else 1))


def _simulated(
    args: argparse.Namespace, policy: str, objective: report.Objective, screen: Console, workers: int, way: Way,
    seed: int,
) -> Side:  # fmt: skip
    one = copy(args)
    one.workers, one.prefill_workers, one.seed = workers - way.readers, way.readers, seed
    one.answer_step_tokens = way.step_tokens or args.answer_step_tokens
    one.slo_ttft, one.slo_tpot = (objective.ttft_s, objective.tpot_s) if way.predicted else (None, None)
    return simulate_command.simulated(one, policy, objective, screen)


def divisions(workers: int) -> list[int]:
    """How many of so many workers might read prompts: none, a quarter, a third, a half, two thirds."""
    return sorted({0, workers // 4, workers // 3, workers // 2, 2 * workers // 3} - {workers})


def sentence(advice: Sequence[Advice]) -> str:
    """The advice itself, why it is that one, and which others are as good."""
    best = chosen(advice)
    if best.workers is None:
        return (
            f"No policy keeps {ATTAINMENT_GOAL:.0%} inside the objective with {max(best.shares)} workers or fewer; "
            f"{best.policy} comes nearest, with {_inside(best)}."
        )
    plural = "worker" if best.workers == 1 else "workers"
    way = best.ways[best.workers]
    apart = "" if way == Way() else f", {way}"
    return f"{best.policy} on {best.workers} {plural}{apart}: {_inside(best)} inside the objective. {_why(advice)}"


def _inside(one: Advice) -> str:
    low, high = one.range
    return f"{one.share:.1%}" + (f" ({low:.1%} to {high:.1%})" if low < high else "")


def _why(advice: Sequence[Advice]) -> str:
    best, alike = chosen(advice), ties(advice)
    more = [one for one in advice if one.workers != best.workers]
    if alike:
        return (
            f"{', '.join(one.policy for one in alike)} need as many workers and cannot be told from it: "
            f"{', '.join(_inside(one) for one in alike)}. Choose among them by what else they do."
        )
    if more:
        needs = ", ".join(f"{one.policy} needs {one.workers or f'more than {max(one.shares)}'}" for one in more)
        return f"It needs the fewest workers: {needs}."
    return "Of those that need as few workers it has the most requests inside." if len(advice) > 1 else ""


def _rows(advice: Sequence[Advice]) -> report.Rows:
    rows: report.Rows = [["policy", "workers", "way", "inside", "tried"]]
    for one in advice:
        tried = ", ".join(f"{workers}: {share:.0%}" for workers, share in one.shares.items())
        rows.append([one.policy, f"{one.workers or '-'}", str(one.ways[one.tried]), _inside(one), tried])
    return rows


def _by_way(best: Advice) -> report.Rows:
    """What each way gives, best first."""
    seen = sorted(best.seen[best.tried].items(), key=lambda item: -item[1])
    return [[f"{best.policy}, {best.tried} workers", "inside"], *([str(way), f"{share:.1%}"] for way, share in seen)]


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
    return f'<p><b>{escape(sentence(advice))}</b></p><div class="panels">{panel.figure()}</div>'
