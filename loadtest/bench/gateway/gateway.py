"""What the gateway costs beside nginx, which only relays: each on one core, in turns, before a mock engine.

Ours runs with a key, admission under VTC, every limit (set where nobody reaches it) and metrics.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml
from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.gateway.gateway_table import STREAMS, YARDSTICK, Runs, TableRun, notes, table
from loadtest.bench.gateway.relay_load import (
    SOURCES,
    BenchmarkError,
    LoadPhase,
    RelayBench,
    open_files,
    program,
    wait_until_quiet,
)
from loadtest.bench.table import machine
from server.request.tenants import new_key

DIRECT, OURS = "direct", "evenhand"
OPEN_STREAMS = 10_000
FILES_BESIDE = 600  # what a gateway has open that is no stream: nginx keeps up to 256 idle connections
CHUNK_US = 20_000  # between two chunks: 50 a second, as an engine makes them

PHASES: Mapping[str, LoadPhase] = {
    "idle": LoadPhase(64, 4.0, 1.0, chunks=16, interval_us=5_000, rate=50.0),
    "whole": LoadPhase(64, 3.0, 1.0),
    "paced": LoadPhase(64, 4.0, 1.0, chunks=256, interval_us=CHUNK_US),
    "many": LoadPhase(STREAMS, 4.0, 2.0, chunks=256, interval_us=CHUNK_US),
}
WARM_UP = (LoadPhase(64, 0.5, 0.5), LoadPhase(16, 0.3, 0.2, chunks=64))
QUICK_S = 0.2


@dataclass(frozen=True, slots=True)
class MeasuredGateway:
    """A gateway that can be started: its command for a port, and the environment it gets."""

    command: Callable[[int], Sequence[str]]
    env: Mapping[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of all, in turns (default 5)")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more gateway: a command that listens on {port}, relays to {backend} and takes {key}; may be repeated",
    )
    parser.add_argument(
        "--streams", type=int, default=OPEN_STREAMS, metavar="N", help=f"open while memory is read ({OPEN_STREAMS})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one repetition of short phases: that it works; its figures mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints the table; 1 if something is missing, or our gateway made an error."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    streams = min(args.streams, (open_files() - FILES_BESIDE) // 2)
    try:
        added, files = named(args.add), 2 * max(streams, STREAMS) + FILES_BESIDE
        with tempfile.TemporaryDirectory(prefix="evenhand-gateway-") as folder, ExitStack() as stack:
            bench = RelayBench(Path(folder), new_key())
            stack.enter_context(bench.engine())
            runs = measure(bench, gateways(bench, added, files), args, streams, progress)
    except BenchmarkError as error:
        progress.print(f"evenhand bench gateway: {error}", markup=False)
        return 1
    console.print(machine())
    console.print(table(runs, DIRECT))
    for line in notes(runs, args.streams, streams, bench.gateway_core == bench.core):
        console.print(f"- {line}", markup=False)
    return 1 if any(one.errors() for one in runs.get(OURS, [])) else 0


def named(added: Sequence[str]) -> dict[str, str]:
    """NAME=COMMAND pairs by name. BenchmarkError for an invalid pair or a duplicate name."""
    commands: dict[str, str] = {}
    for text in added:
        name, equals, command = text.partition("=")
        if not (name and equals and command) or name in (DIRECT, YARDSTICK, OURS, *commands):
            raise BenchmarkError(f"--add {text!r}: write it as NAME=COMMAND, with a name that no other has")
        commands[name] = command
    return commands


def gateways(bench: RelayBench, added: Mapping[str, str], files: int) -> dict[str, MeasuredGateway]:
    """nginx, ours, and those that were added. BenchmarkError if nginx is missing."""
    nginx = program(YARDSTICK, hint="it is what all are compared with (Debian and Ubuntu: apt install nginx-light)")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EVENHAND_")}
    known = {
        YARDSTICK: MeasuredGateway(lambda port: nginx_command(bench, nginx, port, files), clean),
        OURS: MeasuredGateway(lambda port: our_command(bench, port), clean),
    }
    for name, command in added.items():
        known[name] = MeasuredGateway(partial(added_command, bench, command), clean)
    return known


def nginx_command(bench: RelayBench, nginx: str, port: int, files: int) -> Sequence[str]:
    """nginx over the mock engine, with a configuration written for it."""
    template = (SOURCES / "nginx.conf").read_text(encoding="utf-8")
    config = bench.folder / "nginx.conf"
    config.write_text(template.format(folder=bench.folder, backend=bench.port, port=port, files=files))
    return [nginx, "-c", str(config), "-p", str(bench.folder)]


def our_command(bench: RelayBench, port: int) -> Sequence[str]:
    """Our gateway over the mock engine, with everything on."""
    return [sys.executable, "-m", "deploy.cli", "gateway", *our_options(bench, port)]


def our_options(bench: RelayBench, port: int) -> Sequence[str]:
    """What our gateway is told: the mock engine, a tenant with all limits, a policy."""
    tenant = {
        "name": "bench",
        "keys": [bench.key],
        "models": ["mock"],
        "requests_per_minute": 1e9,
        "tokens_per_minute": 1e12,
        "concurrency": 1_000_000,
        "budget": {"tokens_per_day": 10**15, "tokens_per_month": 10**15},
    }
    file = bench.folder / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": [tenant]}))
    options = {"--port": str(port), "--worker": f"{bench.url},slots=16384", "--policy": "vtc", "--tenants": str(file)}
    return [part for option in options.items() for part in option]


def added_command(bench: RelayBench, command: str, port: int) -> Sequence[str]:
    """Somebody else's gateway. BenchmarkError for a name in braces that we do not fill in."""
    try:
        return shlex.split(command.format(port=port, backend=bench.url, key=bench.key))
    except (KeyError, IndexError, ValueError) as error:
        raise BenchmarkError(f"--add: {command!r}: {error}; in braces there may be port, backend and key") from None


def measure(
    bench: RelayBench, known: Mapping[str, MeasuredGateway], args: argparse.Namespace, streams: int, progress: Console
) -> Runs:
    """Measures all gateways in turns, and the engine directly; an added gateway that fails is left out from then on."""
    runs: Runs = {name: [] for name in (DIRECT, *known)}
    for number in range(1 if args.quick else args.repetitions):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
            try:
                chosen = phases(args.quick, streams, weigh=number == 0)
                runs[name].append(one_run(bench, name, known.get(name), chosen, patient=not args.quick))
            except BenchmarkError as error:
                if name in (DIRECT, YARDSTICK, OURS):
                    raise
                del runs[name]
                progress.print(f"{name} is left out: {error}", markup=False)
                continue
            progress.print(f"repetition {number + 1}: {name}", markup=False)
    return runs


def phases(quick: bool, streams: int, *, weigh: bool) -> dict[str, LoadPhase]:
    """What a gateway goes through. Its memory is read once: it is the same each time."""
    all_phases = dict(PHASES)
    if weigh:  # a slow gateway takes some time to open them all; then each stream is silent
        patience_s = 2.0 + streams / 1_000
        all_phases["open"] = LoadPhase(streams, 1.0, patience_s, chunks=2, interval_us=60_000_000, weighs=True)
    if quick:
        return {name: replace(phase, seconds=QUICK_S, warm_up_s=QUICK_S) for name, phase in all_phases.items()}
    return all_phases


def one_run(
    bench: RelayBench, name: str, gateway: MeasuredGateway | None, chosen: Mapping[str, LoadPhase], *, patient: bool
) -> TableRun:
    """One gateway through all phases; without one the engine alone, for the time to its first byte."""
    if gateway is None:
        if patient:
            wait_until_quiet()
        return TableRun({"idle": bench.observe(chosen["idle"], bench.port, None)})
    port = free_port()
    with bench.gateway(name, gateway.command(port), port, gateway.env) as pid:
        if patient:
            for phase in WARM_UP:
                bench.observe(phase, port, pid)
            wait_until_quiet()
        return TableRun({key: bench.observe(phase, port, pid) for key, phase in chosen.items()})
