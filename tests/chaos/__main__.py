"""`python -m tests.chaos RUN`: what happens when things fail, seen by clients who know what they should get.

Each run prints a table of its figures beside their goals, and ends with 1 if one is missed.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import uvloop

from deploy.benchmarks.table import machine
from tests.chaos.figures import Figure, table
from tests.chaos.soak import Soak
from tests.chaos.workers import Chaos

Figures = Sequence[Figure]


class Run(NamedTuple):
    """purpose: in a line. options: (name, default, what it is). measure: the figures, for the options' values."""

    purpose: str
    options: Sequence[tuple[str, float, str]]
    measure: Callable[[argparse.Namespace], Coroutine[Any, Any, Figures]]


async def workers(args: argparse.Namespace) -> Figures:
    report = await Chaos(args.seed, args.blows, clients=args.clients, streams=args.streams).run()
    return report.figures()


async def soak(args: argparse.Namespace) -> Figures:
    return await Soak(args.seed, 60.0 * args.minutes, args.per_second, args.blow_s).run()


SEED = ("seed", 1, "what the plan follows from")
RUNS: Mapping[str, Run] = {
    "workers": Run(
        "workers are killed and stopped under streams",
        (
            SEED,
            ("blows", 20, "how often a worker is killed or stopped"),
            ("clients", 8, "who never pause"),
            ("streams", 0, "it goes on until so many have ended"),
        ),
        workers,
    ),
    "soak": Run(
        "an hour in which all of it happens now and then: what grows, what is stuck, what is miscounted",
        (
            SEED,
            ("minutes", 60.0, "how long it takes"),
            ("per-second", 4.0, "requests a second"),
            ("blow-s", 30.0, "seconds between two blows, about"),
        ),
        soak,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    chosen = parser.add_subparsers(dest="run", metavar="RUN", required=True)
    for name, run in RUNS.items():
        one = chosen.add_parser(name, help=run.purpose, description=f"{run.purpose[0].upper()}{run.purpose[1:]}.")
        for option, default, meaning in run.options:
            one.add_argument(f"--{option}", type=type(default), default=default, help=f"{meaning} (default: {default})")
    args = parser.parse_args(argv)
    # What was started must stop, so a request to end is taken as a Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tests.chaos").setLevel(logging.INFO)
    figures = uvloop.run(RUNS[args.run].measure(args))
    typed = " ".join(["python -m tests.chaos", *(sys.argv[1:] if argv is None else argv)])
    sys.stdout.write(f"`{typed}`, {machine()}\n\n{table(figures)}\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
