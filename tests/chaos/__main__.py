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

from loadtest.bench.table import machine
from tests.chaos.batch import BatchChaos
from tests.chaos.churn import Churn
from tests.chaos.figures import Figure, table
from tests.chaos.hostile import Hostile, Valid, longest_holds
from tests.chaos.memory import Memory
from tests.chaos.overload import Overload
from tests.chaos.redis import RedisChaos
from tests.chaos.rolling import Rolling
from tests.chaos.soak import Soak
from tests.chaos.workers import Chaos

Figures = Sequence[Figure]


class Run(NamedTuple):
    """purpose: in a line. options: (name, default, what it is). measure: the figures, for the options' values."""

    purpose: str
    options: Sequence[tuple[str, float | str, str]]
    measure: Callable[[argparse.Namespace], Coroutine[Any, Any, Figures]]


async def workers(args: argparse.Namespace) -> Figures:
    report = await Chaos(args.seed, args.blows, clients=args.clients, streams=args.streams).run()
    return report.figures()


async def engines(args: argparse.Namespace) -> Figures:
    from tests.chaos.engines import real_engines  # loads torch

    setting = real_engines(args.seed, args.workers)
    longest_s = 60.0 * args.minutes
    chaos = Chaos(
        args.seed, args.blows, clients=args.clients, streams=args.streams, setting=setting, longest_s=longest_s
    )
    return (await chaos.run()).figures()


async def seeds(args: argparse.Namespace) -> Figures:
    figures = []
    for seed in range(args.seed, args.seed + args.count):
        report = await Chaos(seed, args.blows).run()
        went = f"{report.seen.asked} answers, {report.failovers['resumed']} went on elsewhere, "
        went += f"{len(report.seen.wrong)} failed or different"
        figures.append(Figure(f"seed {seed}: {args.blows} blows", went, "0", not report.seen.wrong))
    return figures


async def redis(args: argparse.Namespace) -> Figures:
    return (await RedisChaos(args.seed, args.restarts).run()).figures()


async def rolling(args: argparse.Namespace) -> Figures:
    return (await Rolling(args.seed, args.rounds, clients=args.clients).run()).figures()


async def overload(args: argparse.Namespace) -> Figures:
    return (await Overload(args.times, args.seconds, args.policy).run()).figures()


async def hostile(args: argparse.Namespace) -> Figures:
    figures = (await Hostile(args.seed, args.requests).run()).figures() if args.requests else []
    return [*figures, *(await Valid(args.seed, args.seconds).run()).figures(), *await longest_holds()]


async def batch(args: argparse.Namespace) -> Figures:
    chaos = BatchChaos(
        args.seed, args.kills, args.lines, gateways=args.gateways, away_s=args.away, bucket=bool(args.bucket)
    )
    return (await chaos.run()).figures()


async def memory(args: argparse.Namespace) -> Figures:
    return await Memory(args.drops, args.keyless, args.waiting).run()


async def soak(args: argparse.Namespace) -> Figures:
    return await Soak(args.seed, 60.0 * args.minutes, args.per_second, args.blow_s).run()


async def churn(args: argparse.Namespace) -> Figures:
    return await Churn(args.seed, 60.0 * args.minutes, args.per_second, args.restart_s, count=args.workers).run()


SEED = ("seed", 1, "what the plan follows from")
RUNS: Mapping[str, Run] = {
    "workers": Run(
        "workers are killed and stopped under streams",
        (
            SEED,
            ("blows", 200, "how often a worker is killed or stopped"),
            ("clients", 24, "who never pause"),
            ("streams", 5000, "it goes on until so many have ended"),
        ),
        workers,
    ),
    "engines": Run(
        "each process of real vLLM engines on a tiny model is killed, stopped and told to end",
        (
            SEED,
            ("workers", 2, "engines"),
            ("blows", 40, "how often one is killed, stopped or told to end; 0: what differs when all is well"),
            ("clients", 4, "who never pause"),
            ("minutes", 60.0, "no blow begins later"),
            ("streams", 0, "it goes on until so many have ended"),
        ),
        engines,
    ),
    "seeds": Run(
        "workers are killed and stopped, one plan after the other",
        (SEED, ("count", 10, "seeds, one after the other"), ("blows", 8, "of each plan")),
        seeds,
    ),
    "redis": Run(
        "Redis is killed under two gateways, and comes back empty",
        (SEED, ("restarts", 20, "how often")),
        redis,
    ),
    "rolling": Run(
        "all gateways and all workers are restarted in turn",
        (SEED, ("rounds", 3, "how often each"), ("clients", 12, "who never pause")),
        rolling,
    ),
    "overload": Run(
        "ten times as much is asked for as can be answered",
        (
            ("times", 10.0, "offered ÷ what the engine can do"),
            ("seconds", 60.0, "how long"),
            ("policy", "fcfs", "of the gateway"),
        ),
        overload,
    ),
    "batch": Run(
        "gateways are killed again and again while they run a batch, and their Redis goes away",
        (
            SEED,
            ("kills", 50, "how often"),
            ("lines", 10_000, "of the batch"),
            ("gateways", 1, "how many; several share the batch through a Redis"),
            ("away", 0.0, "seconds for which that Redis is away in the middle of it"),
            ("bucket", 0, "1: files are in an S3 server, not in a folder"),
        ),
        batch,
    ),
    "hostile": Run(
        "malformed requests by the ten thousand, then valid ones that mean no good, beside honest tenants",
        (SEED, ("requests", 100_000, "how many malformed ones"), ("seconds", 60.0, "how long the valid ones")),
        hostile,
    ),
    "memory": Run(
        "large bodies that are dropped, have no key, or wait",
        (
            ("drops", 1000, "connections that are dropped in the middle of a body, one after the other"),
            ("keyless", 100, "connections without a valid key that send a body, at once"),
            ("waiting", 8, "large requests that wait at once"),
        ),
        memory,
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
    "churn": Run(
        "of many workers one joins and one leaves each second, and a gateway restarts now and then",
        (
            SEED,
            ("minutes", 30.0, "how long it takes"),
            ("workers", 256, "at a time"),
            ("per-second", 10.0, "requests a second"),
            ("restart-s", 60.0, "seconds between two restarts, about"),
        ),
        churn,
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
