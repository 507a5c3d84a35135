"""How the cost of a request grows: with workers, tenants, waiting requests, and gateways that share a Redis.

Everything is measured on a gateway alone on one core, over a mock engine that is there at a thousand addresses; a row's
ratios are taken against the first row of its table within the same repetition.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import orjson
from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.gateway.relay_load import BenchmarkError, LoadPhase, RelayBench, cpu_s, open_files, pss_bytes
from loadtest.bench.scale.exchange_cost import exchange_cost
from loadtest.bench.scale.replicas import redis_server
from loadtest.bench.table import machine, markdown, spread
from server.request.tenants import new_key

WORKERS = (1, 16, 64, 256, 1000)
TENANTS = (1, 1_000, 100_000)
WAITING = (64, 1_024, 8_192)
GATEWAYS = (1, 4, 8)
CHANGES = (10, 100, 1_000)  # tenants that changed between two exchanges
SLOTS = 64  # of a worker
ACTIVE = 1_000  # tenants whose requests come, at most
ADDRESSES = 250  # in each 127.0.n.0/24
RATE = 1_000.0  # requests/s at all gateways together
DIAL_S = 0.0004  # the load generator opens a connection in half of it
READY_S = 120.0

Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Spans:
    """How long each part is measured, in seconds."""

    load_s: float
    warm_up_s: float
    idle_s: float


FULL, QUICK = Spans(5.0, 2.0, 15.0), Spans(1.5, 0.7, 3.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of all, in turns (default 3)")
    parser.add_argument(
        "--only",
        choices=["workers", "tenants", "tenants-yaml", "waiting", "gateways", "gateways-2-redis", "changes"],
        action="append",
        help="one of the tables; may be repeated (default: all)",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="N", help="these rows only (default: all of each table)"
    )
    parser.add_argument("--quick", action="store_true", help="one repetition of short parts, in two minutes")


def run(args: argparse.Namespace) -> int:
    """Measures and prints the tables; 1 if something is missing or a request failed."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    open_files()
    console.print(machine())
    try:
        with tempfile.TemporaryDirectory(prefix="evenhand-scale-") as folder, ExitStack() as stack:
            site = Site(Path(folder), QUICK if args.quick else FULL)
            stack.enter_context(site.bench.engine(fleet=True))
            for name in args.only or TABLES:
                every, measure, columns = TABLES[name]
                sizes = [size for size in every if not args.sizes or size in args.sizes]
                runs: dict[int, list[Row]] = {size: [] for size in sizes}
                for number in range(1 if args.quick else args.repetitions):
                    for size in sizes if number % 2 == 0 else reversed(sizes):
                        progress.print(f"{name}: {size:,}, repetition {number + 1}")
                        runs[size].append(measure(site, size))
                if sizes:
                    console.print(f"\n{table(name, runs, columns)}")
    except BenchmarkError as error:
        progress.print(f"evenhand bench scale: {error}", markup=False)
        return 1
    if site.errors:
        progress.print(f"evenhand bench scale: {len(site.errors)} parts had errors, first {site.errors[0]}")
    return 1 if site.errors else 0


class Site:
    """A mock engine at many addresses, and gateways before it."""

    def __init__(self, folder: Path, spans: Spans) -> None:
        self.folder = folder
        self.spans = spans
        self.bench = RelayBench(folder, new_key())
        self.errors: list[str] = []
        self._files: dict[int, Path] = {}

    def command(
        self, port: int, *, workers: int = 1, tenants: int = 1, in_yaml: bool = False, more: Sequence[str] = ()
    ) -> list[str]:
        """A gateway's command line."""
        urls = (f"http://127.0.{at // ADDRESSES}.{1 + at % ADDRESSES}:{self.bench.port}" for at in range(workers))
        fleet = [part for at, url in enumerate(urls) for part in ("--worker", f"{url},slots={SLOTS},id=w{at}")]
        file = self.in_yaml(tenants) if in_yaml else self.tenants(tenants)
        options = ["--port", str(port), "--policy", "vtc", "--tenants", str(file), *more]
        return [sys.executable, "-m", "deploy.cli", "gateway", *options, *fleet]

    def tenants(self, number: int) -> Path:
        """A file with this many tenants, each with a key and limits that are never reached."""
        if number not in self._files:
            made = [self.bench.key, *(new_key() for _ in range(number - 1))]
            limits = {"requests_per_minute": 1e9, "tokens_per_minute": 1e12, "concurrency": 100_000}
            rows = [{"name": f"t{at}", "keys": [key]} | limits for at, key in enumerate(made)]
            self._files[number] = self.folder / f"tenants-{number}.json"
            self._files[number].write_bytes(orjson.dumps({"tenants": rows}))
            self.keys(number).write_text("".join(f"{key}\n" for key in made[:ACTIVE]))
        return self._files[number]

    def in_yaml(self, number: int) -> Path:
        """The same tenants as people write them, one field a line."""
        path = self.tenants(number).with_suffix(".yaml")
        if not path.exists():
            rows = orjson.loads(self.tenants(number).read_bytes())["tenants"]
            with path.open("w") as out:
                out.write("tenants:\n")
                for row in rows:
                    fields = (f"{name}: {orjson.dumps(value).decode()}" for name, value in row.items())
                    out.write("- " + "\n  ".join(fields) + "\n")
        return path

    def keys(self, number: int) -> Path:
        """The keys of the tenants that send requests."""
        return self.folder / f"keys-{number}"

    def phase(self, connections: int, tenants: int = 1, rate: float = 0.0) -> LoadPhase:
        """Whole answers to prompts of their own."""
        spans = self.spans
        warm_up_s = spans.warm_up_s + connections * DIAL_S
        return LoadPhase(connections, spans.load_s, warm_up_s, rate=rate, keys=self.keys(tenants), own_prompts=True)

    def observe(self, phase: LoadPhase, port: int, pid: int) -> Row:
        """CPU per request in µs, and requests per second, from when all connections are at work."""
        load = self.load(phase, port)
        time.sleep(phase.warm_up_s)
        used = cpu_s(pid)
        time.sleep(phase.seconds)
        used = cpu_s(pid) - used
        seen = orjson.loads(load.communicate()[0])
        self.judge(seen)
        requests = int(seen["requests"])
        return {"cpu_us": 1e6 * used / max(1, requests), "per_s": requests / phase.seconds}

    def load(self, phase: LoadPhase, port: int) -> "subprocess.Popen[bytes]":
        """The load generator, at work."""
        process = subprocess.Popen(self.bench.load_command(phase, port), stdout=subprocess.PIPE)
        os.sched_setaffinity(process.pid, {self.bench.core})
        return process

    def judge(self, load: Mapping[str, object]) -> None:
        if load["errors"]:
            self.errors.append(str(load["error"]))


def with_workers(site: Site, workers: int) -> Row:
    """One gateway over so many workers, 64 connections: idle, then under load."""
    port = free_port()
    site.tenants(1)
    with site.bench.gateway("gateway", site.command(port, workers=workers), port, dict(os.environ)) as pid:
        until_ready(port, workers)
        site.bench.observe(LoadPhase(64, 0.5, 0.3, own_prompts=True), port, pid)
        time.sleep(1.0)
        used, began = cpu_s(pid), time.monotonic()
        time.sleep(site.spans.idle_s)
        idle = (cpu_s(pid) - used) / (time.monotonic() - began)
        return {**site.observe(site.phase(64), port, pid), "idle": idle, "mb": pss_bytes(pid) / 1e6}


def with_tenants(site: Site, tenants: int, *, in_yaml: bool = False) -> Row:
    """One gateway that knows so many tenants, up to a thousand of which send requests."""
    port = free_port()
    command = site.command(port, tenants=tenants, in_yaml=in_yaml)
    began = time.monotonic()
    with site.bench.gateway("gateway", command, port, dict(os.environ)) as pid:
        start_s, start_cpu_s, loaded = time.monotonic() - began, cpu_s(pid), pss_bytes(pid) / 1e6
        row = site.observe(site.phase(64, tenants), port, pid)
        return {**row, "start_s": start_s, "start_cpu_s": start_cpu_s, "mb": loaded}


def with_waiting(site: Site, waiting: int) -> Row:
    """One gateway whose worker is full, so that so many requests wait."""
    port, room = free_port(), SLOTS + 4
    site.tenants(1_000)
    command = site.command(port, tenants=1_000)
    with site.bench.gateway("gateway", command, port, dict(os.environ)) as pid:
        return site.observe(site.phase(waiting + room, 1_000), port, pid)


def with_gateways(site: Site, gateways: int, *, servers: int = 1) -> Row:
    """So many gateways that share Redis servers and a thousand active tenants, a thousand requests a second in all."""
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(dir=site.folder))) for _ in range(servers)]
        urls = [stack.enter_context(redis_server(folder)) for folder in folders]
        redis = [part for url in urls for part in ("--redis-url", url)]
        site.tenants(ACTIVE)
        running: list[tuple[int, int]] = []
        for at in range(gateways):
            port = free_port()
            more = [*redis, "--replica", f"g{at}"]
            command = site.command(port, workers=16, tenants=ACTIVE, more=more)
            running.append(
                (port, stack.enter_context(site.bench.gateway(f"gateway-{at}", command, port, dict(os.environ))))
            )
        phase = site.phase(64, ACTIVE, rate=RATE / gateways)
        time.sleep(site.spans.warm_up_s)
        idle, began = counts_of(urls), time.monotonic()
        time.sleep(site.spans.idle_s / 3)
        idle_kb = (_bytes(counts_of(urls)) - _bytes(idle)) / 1e3 / (time.monotonic() - began)
        before, used, began = counts_of(urls), sum(cpu_s(pid) for _, pid in running), time.monotonic()
        loads = [site.load(phase, port) for port, _ in running]
        seen = [orjson.loads(load.communicate()[0]) for load in loads]
        took_s, after = time.monotonic() - began, counts_of(urls)
        cores = (sum(cpu_s(pid) for _, pid in running) - used) / took_s
    for one in seen:
        site.judge(one)
    kb = (_bytes(after) - _bytes(before)) / 1e3 / took_s
    requests = sum(int(one["requests"]) for one in seen) / phase.seconds
    commands = (after["total_commands_processed"] - before["total_commands_processed"]) / took_s
    return {
        "idle_kb": idle_kb / gateways,
        "bytes": 1e3 * max(0.0, kb - idle_kb) / gateways / max(1.0, requests),
        "commands": commands / gateways,
        "kb": kb / gateways,
        "redis_commands": commands / servers,
        "redis_kb": kb / servers,
        "cores": cores,
        "p99_ms": max(float(one["first_byte_us"]["p99"]) for one in seen) / 1e3,
    }


def with_changes(site: Site, tenants: int) -> Row:
    """Two gateways that share a Redis, one of which has served so many tenants since the last exchange."""
    with redis_server(site.folder) as url:
        return exchange_cost(url, tenants)


def _bytes(counts: Mapping[str, int]) -> int:
    return counts["total_net_input_bytes"] + counts["total_net_output_bytes"]


def counts_of(urls: Sequence[str]) -> Counter[str]:
    """What these Redis servers have counted, together."""
    return sum((Counter(redis_counts(url)) for url in urls), Counter())


def redis_counts(url: str, section: str = "stats") -> dict[str, int]:
    """What a Redis has counted since its start; another section of its INFO: that."""
    address = urlsplit(url)
    with (
        socket.create_connection((address.hostname, address.port or 6379), timeout=10) as link,
        link.makefile("rb") as said,
    ):
        link.sendall(f"INFO {section}\r\n".encode())
        text = said.read(int(said.readline()[1:])).decode()
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def until_ready(port: int, workers: int) -> None:
    """Returns when so many workers are ready. BenchmarkError if they are not after a while."""
    end, ready = time.monotonic() + READY_S, 0
    while time.monotonic() < end:
        said = httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=10).json()
        ready = sum(worker["state"] == "ready" for worker in said["workers"])
        if ready == workers:
            return
        time.sleep(0.2)
    raise BenchmarkError(f"only {ready} of {workers} workers are ready after {READY_S:.0f} s")


Column = tuple[str, str, int, bool]  # heading, figure, digits, whether the ratio to the first row is shown
OF_TENANTS: Sequence[Column] = (
    ("CPU per request, µs", "cpu_us", 1, True),
    ("requests/s", "per_s", 0, False),
    ("command to first answer, s", "start_s", 2, False),
    ("CPU of it, s", "start_cpu_s", 2, False),
    ("memory, MB", "mb", 0, False),
)
OF_GATEWAYS: Sequence[Column] = (
    ("Redis commands/s, each", "commands", 0, False),
    ("kB/s, each", "kb", 0, False),
    ("kB/s when idle, each", "idle_kb", 1, False),
    ("bytes per request, each", "bytes", 0, False),
    ("commands/s at each Redis", "redis_commands", 0, False),
    ("kB/s at each Redis", "redis_kb", 0, False),
    ("CPU of all, cores", "cores", 2, True),
    ("TTFB p99, ms", "p99_ms", 2, True),
)
# name: (sizes, how one is measured, its columns)
TABLES: Mapping[str, tuple[Sequence[int], Callable[[Site, int], Row], Sequence[Column]]] = {
    "workers": (
        WORKERS,
        with_workers,
        (
            ("CPU per request, µs", "cpu_us", 1, True),
            ("requests/s", "per_s", 0, False),
            ("idle, cores", "idle", 3, False),
            ("memory, MB", "mb", 0, False),
        ),
    ),
    "tenants": (TENANTS, with_tenants, OF_TENANTS),
    "tenants-yaml": (TENANTS, partial(with_tenants, in_yaml=True), OF_TENANTS),
    "waiting": (
        WAITING,
        with_waiting,
        (("CPU per request, µs", "cpu_us", 1, True), ("requests/s", "per_s", 0, False)),
    ),
    "gateways": (GATEWAYS, with_gateways, OF_GATEWAYS),
    "gateways-2-redis": (GATEWAYS, partial(with_gateways, servers=2), OF_GATEWAYS),
    "changes": (
        CHANGES,
        with_changes,
        (
            ("sending, ms of CPU", "tell_ms", 2, False),
            ("holds the loop for, ms", "tell_hold_ms", 2, False),
            ("receiving, ms of CPU", "hear_ms", 2, False),
            ("holds the loop for, ms ", "hear_hold_ms", 2, False),
        ),
    ),
}


def table(name: str, runs: Mapping[int, Sequence[Row]], columns: Sequence[Column]) -> str:
    """A row per size: medians and spread, and ratios to the first row."""
    head, rows = [name], []
    for heading, _, _, ratio in columns:
        head += [heading, "÷ first"] if ratio else [heading]
    first = next(iter(runs.values()))
    for size, mine in runs.items():
        cells = [f"{size:,}"]
        for _, figure, digits, ratio in columns:
            cells.append(spread([row[figure] for row in mine], digits=digits))
            if ratio:
                pairs = zip(mine, first, strict=True)
                cells.append(spread([row[figure] / max(1e-9, base[figure]) for row, base in pairs]))
        rows.append(cells)
    return markdown(head, rows)
