"""Batch work beside interactive traffic: what the interactive requests notice, and what a batch and its lines cost.

The scenario is llm-d-batch-gateway's (issue 491): interactive requests, 15 a second for 90 s and then 1 a second for
90 s; and Azure's chat requests at their own times. Sections:

- scheduler: vLLM's own scheduler without a model. A step takes what a cost model says of what the scheduler has put
  into it, so one command gives the same figures anywhere. Our service tiers, and the gateway's line before stock
  vLLM, beside vLLM's `priority` and caps.
- gateway: an engine without a model that cannot displace anybody, in real time.
- lines: a long batch over an engine that takes no time. kills: the gateway is killed while it runs a batch.
- cpu-engines (not by default): as `scheduler`, but real engines on a tiny model, on a clock of their own CPU time.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from loadtest.bench.batch import gateway, lines
from loadtest.bench.batch.goals import WAY_HEAD, Figure, Scene, table, way_rows
from loadtest.bench.batch.loads import JOBS, PEOPLE, Size
from loadtest.bench.batch.runs import WITHOUT_END, CpuScale, Run, outcomes
from loadtest.bench.batch.work import (
    ALONE,
    BATCH_ONLY,
    OURS_ALONE,
    PRIORITY,
    TIERS,
    Outcome,
    Way,
    behind_gateway,
    capped,
)
from loadtest.bench.gateway.relay_load import BenchmarkError
from loadtest.bench.table import machine, markdown
from loadtest.simulator.costmodel import PRESETS

CPU_CAP = 8  # a quarter of its slots

Section = Callable[[argparse.Namespace, Console], Sequence[Figure]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sections",
        default="scheduler,gateway,lines,kills",
        help=f"some of {', '.join(SECTIONS)} (default %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="of each burst and each calm (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="bursts, each with a calm after it (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with other arrivals (default %(default)s)")
    parser.add_argument(
        "--people", default="bursts,azure", help=f"interactive requests of `scheduler`: {', '.join(PEOPLE)}"
    )
    parser.add_argument("--jobs", default="short,mooncake", help=f"the batch's requests there: {', '.join(JOBS)}")
    parser.add_argument("--traces", type=Path, help="folder with Azure's and Mooncake's traces (default: made up)")
    parser.add_argument(
        "--caps", default="16,64", help="requests at a time of a batch without any help (default %(default)s)"
    )
    parser.add_argument(
        "--shares", default="0.25", help="values of tiers.flex_share (default %(default)s, its default)"
    )
    parser.add_argument("--cost", choices=sorted(PRESETS), default="gpu-7b", help="of a step (default %(default)s)")
    parser.add_argument("--lines", type=int, default=50_000, help="of the batch of `lines` (default %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="of `kills`, during 200 lines each (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs the sections, prints the tables. 2 for options that make no sense, 1 for a run that fails."""
    progress = Console(stderr=True, highlight=False)
    for option, known in (("sections", SECTIONS), ("people", PEOPLE), ("jobs", JOBS)):
        if wrong := [name for name in getattr(args, option).split(",") if name not in known]:
            said = f"evenhand bench batch: --{option} takes some of {', '.join(known)}, not {wrong[0]!r}"
            progress.print(said, markup=False)
            return 2
    figures: list[Figure] = []
    try:
        for name in args.sections.split(","):
            figures += SECTIONS[name](args, progress)
    except (BenchmarkError, RuntimeError, OSError) as error:
        progress.print(f"evenhand bench batch: {error}", markup=False)
        return 1
    _print(f"{machine()}\n\n{table(figures)}")
    return 0


def _print(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _size(args: argparse.Namespace) -> Size:
    return Size(args.seconds, args.rounds, traces=args.traces)


def _shares(args: argparse.Namespace) -> list[float]:
    return [float(share) for share in args.shares.split(",") if share]


def _caps(args: argparse.Namespace) -> list[int]:
    return [int(cap) for cap in args.caps.split(",") if cap]


# on an engine's own clock
def _scheduler(args: argparse.Namespace, progress: Console) -> list[Figure]:
    ways = [ALONE, BATCH_ONLY, TIERS, PRIORITY, *map(behind_gateway, _shares(args)), *map(capped, _caps(args))]
    pairs = [(people, jobs) for people in args.people.split(",") for jobs in args.jobs.split(",")]
    of_a_model = Run("", "", ALONE, 0, _size(args), args.cost)
    return _on_own_clock("scheduler", pairs, ways, args, of_a_model)


def _cpu_engines(args: argparse.Namespace, progress: Console) -> list[Figure]:
    scale = CpuScale.measured(_size(args))
    size = scale.size
    progress.print(f"real engines: arrivals times {size.rate:.2f}, lengths times {size.length:g}")
    # A tiny model's steps are so short that what our scheduler itself takes shows: hence ours without a batch.
    ways = [ALONE, OURS_ALONE, BATCH_ONLY, TIERS, PRIORITY, capped(CPU_CAP)]
    of_a_cpu = Run("", "", ALONE, 0, size, "", scale.reference_s)
    return _on_own_clock("real CPU engine", [("bursts", "short")], ways, args, of_a_cpu)


def _on_own_clock(
    where: str, pairs: Sequence[tuple[str, str]], ways: Sequence[Way], args: argparse.Namespace, like: Run
) -> list[Figure]:
    """All ways in one kind of engine. like: its size and its costs."""
    seeds = range(args.seeds)
    runs = {
        (people, jobs, way, seed): replace(like, people=people, jobs=jobs, way=way, seed=seed)
        for people, jobs in pairs
        for way in ways
        for seed in seeds
    }
    endless = {
        (people, seed): replace(like, people="", jobs=WITHOUT_END[people], way=BATCH_ONLY, seed=seed)
        for people, _ in pairs
        for seed in seeds
    }
    made = outcomes([*runs.values(), *endless.values()], args.processes, fresh=not like.cost)
    figures: list[Figure] = []
    for people, jobs in pairs:
        of = {way.name: [made[runs[people, jobs, way, seed].key] for seed in seeds] for way in ways}
        full = [made[endless[people, seed].key] for seed in seeds]
        ours = [way.name for way in ways if way.batch and (way.policy is not None or way.share is not None)]
        figures += _scene(f"{where}, {people} and {jobs} jobs", ours, of, full)
    return figures


def _scene(
    where: str, ours: Sequence[str], of: Mapping[str, Sequence[Outcome]], endless: Sequence[Outcome] = ()
) -> Sequence[Figure]:
    """Prints a line for each way; returns the figures of ours."""
    scene = Scene(of[ALONE.name], of.get(BATCH_ONLY.name, ()), endless)
    _print(f"{where}\n\n{markdown(WAY_HEAD, way_rows(of))}\n")
    beside = {name: way for name, way in of.items() if name not in (ALONE.name, BATCH_ONLY.name, *ours)}
    return [figure for name in ours for figure in scene.figures(f"{where}: {name}", name, {name: of[name], **beside})]


# in real time
def _gateway(args: argparse.Namespace, progress: Console) -> Sequence[Figure]:
    compared = gateway.ways(_shares(args), _caps(args))
    found = gateway.outcomes(compared, _size(args), range(args.seeds), progress)
    ours = [name for name, batch in compared.items() if batch is not None and batch.cap is None]
    return _scene("through a gateway, engine without our scheduler", ours, found)


def _lines(args: argparse.Namespace, progress: Console) -> Sequence[Figure]:
    progress.print(f"{args.lines} lines over an engine that takes no time")
    return lines.line_cost(args.lines).figures()


def _kills(args: argparse.Namespace, progress: Console) -> Sequence[Figure]:
    progress.print(f"{args.kills} kills of a gateway that runs a batch")
    return lines.killed(args.kills, 200 * args.kills)


SECTIONS: Mapping[str, Section] = {
    "scheduler": _scheduler,
    "gateway": _gateway,
    "lines": _lines,
    "kills": _kills,
    "cpu-engines": _cpu_engines,
}
