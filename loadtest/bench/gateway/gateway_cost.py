"""What a request and a streamed chunk cost the gateway, beside nginx and other checkouts of this repository.

All gateways run at once on one core, and one of them at a time has work, in many short rounds: a ratio is that of two
gateways within the same round, so that a machine whose speed changes from minute to minute still gives the same ratios.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.gateway.gateway import OURS, MeasuredGateway, gateways, our_options
from loadtest.bench.gateway.gateway_table import YARDSTICK
from loadtest.bench.gateway.relay_load import BenchmarkError, LoadPhase, Observed, RelayBench
from loadtest.bench.table import machine, markdown, spread
from server.request.tenants import new_key

FILES = 4096
CHUNK_US = 20_000
BURST_US = 100

Round = Mapping[str, float]
# Each column with its digits behind the point.
FIGURES: Mapping[str, int] = {"requests/s": 0, "CPU per request, µs": 1, "CPU per chunk, µs": 1, "in bursts, µs": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="of all, in turns (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="of each figure in each round (default %(default)s)"
    )
    parser.add_argument(
        "--checkout",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another checkout of this repository, run by this Python with these packages; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints the table; 1 if something is missing or a request failed."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with tempfile.TemporaryDirectory(prefix="evenhand-cost-") as folder, ExitStack() as stack:
            bench = RelayBench(Path(folder), new_key())
            stack.enter_context(bench.engine())
            known = {**gateways(bench, {}, FILES), **checkouts(bench, args.checkout)}
            ports = {name: free_port() for name in known}
            pids = {
                name: stack.enter_context(bench.gateway(name, gateway.command(ports[name]), ports[name], gateway.env))
                for name, gateway in known.items()
            }
            rounds: dict[str, list[Round]] = {name: [] for name in known}
            for number in range(args.rounds + 1):
                names = list(known)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    figures = one_round(bench, ports[name], pids[name], args.seconds)
                    if number:  # the first round warms them up
                        rounds[name].append(figures)
                progress.print(f"round {number} of {args.rounds}")
    except BenchmarkError as error:
        progress.print(f"evenhand bench gateway-cost: {error}", markup=False)
        return 1
    console.print(machine())
    console.print(table(rounds))
    return 0


def checkouts(bench: RelayBench, named: Sequence[str]) -> dict[str, MeasuredGateway]:
    """Our gateway as checked out in other folders. BenchmarkError unless each is NAME=FOLDER with a checkout in it."""
    found: dict[str, MeasuredGateway] = {}
    for text in named:
        name, _, folder = text.partition("=")
        if not name or name in (YARDSTICK, OURS, *found) or not Path(folder, "deploy", "cli.py").is_file():
            raise BenchmarkError(f"--checkout {text!r}: write it as NAME=FOLDER, a checkout of this repository")
        env = {key: value for key, value in os.environ.items() if not key.startswith("EVENHAND_")}
        # Before all that is installed, and `-P` keeps the folder that this runs in out.
        command = [sys.executable, "-P", "-m", "deploy.cli", "gateway"]
        found[name] = MeasuredGateway(
            lambda port, command=command: [*command, *our_options(bench, port)],  # type: ignore[misc]
            env | {"PYTHONPATH": str(Path(folder).resolve())},
        )
    return found


def one_round(bench: RelayBench, port: int, pid: int, seconds: float) -> Round:
    """One gateway's figures, all others idle. BenchmarkError if a request failed."""
    whole = bench.observe(LoadPhase(64, seconds, 0.0), port, pid)
    paced = bench.observe(LoadPhase(64, seconds, 0.0, chunks=256, interval_us=CHUNK_US), port, pid)
    burst = bench.observe(LoadPhase(16, seconds, 0.0, chunks=256, interval_us=BURST_US), port, pid)
    for seen in (whole, paced, burst):
        if seen.load["errors"]:
            raise BenchmarkError(f"a request failed: {seen.load['error']}")
    requests = int(whole.load["requests"])
    return {
        "requests/s": requests / float(whole.load["seconds"]),
        "CPU per request, µs": 1e6 * whole.gateway_cpu_s / max(1, requests),
        "CPU per chunk, µs": chunk_us(paced),
        "in bursts, µs": chunk_us(burst),
    }


def chunk_us(seen: Observed) -> float:
    """Processor time of the gateway per relayed chunk, requests included."""
    return 1e6 * seen.gateway_cpu_s / max(1, int(seen.load["all_chunks"]))


def table(rounds: Mapping[str, Sequence[Round]]) -> str:
    """One line per gateway, and one for each that ours is compared with: median (least–most)."""
    rows = [
        [name, *(spread([one[figure] for one in mine], digits=digits) for figure, digits in FIGURES.items())]
        for name, mine in rounds.items()
    ]
    rows += [
        [f"{OURS} ÷ {name}", *(ratio(rounds[OURS], theirs, figure) for figure in FIGURES)]
        for name, theirs in rounds.items()
        if name != OURS
    ]
    return markdown(("gateway", *FIGURES), rows)


def ratio(ours: Sequence[Round], theirs: Sequence[Round], figure: str) -> str:
    """Ours over theirs, round by round."""
    pairs = zip(ours, theirs, strict=True)
    return spread([one[figure] / max(1e-9, other[figure]) for one, other in pairs])
