"""What the gateway adds to the time to the first token, against asking the same engine directly, in turns."""

import argparse
import asyncio
from collections.abc import Sequence

from rich.console import Console

from loadtest.bench.engines import engine, gateway
from loadtest.bench.table import machine, markdown, quantile, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny-random", help="model to serve (default tiny-random)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of both, in turns (default 7)")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="requests in a round (default 100)")


def run(args: argparse.Namespace) -> int:
    """Starts an engine and a gateway before it, asks both in turns, prints the table."""
    with engine(args.model, policy="fcfs") as engine_url, gateway("--worker", f"{engine_url},slots=32") as gateway_url:
        rounds = [
            (first_tokens(engine_url, args, number), first_tokens(gateway_url, args, number))
            for number in range(args.rounds + 1)
        ][1:]  # the first warms both up
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(f"{args.rounds} rounds of {args.requests} streamed requests, one at a time, {args.model}")
    rows = []
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        direct = [1e3 * quantile(one, share) for one, _ in rounds]
        through = [1e3 * quantile(other, share) for _, other in rounds]
        added = [after - before for before, after in zip(direct, through, strict=True)]
        rows.append([f"TTFT {name}, ms", spread(direct), spread(through), spread(added)])
    console.print(markdown(["what", "engine alone", "through the gateway", "added"], rows))
    return 0


def first_tokens(url: str, args: argparse.Namespace, seed: int) -> Sequence[float]:
    """Seconds to the first token of each request. RuntimeError if one failed."""
    calls = [
        TraceCall(f"{seed}-{number}", 0.0, "bench", [1 + (seed * 7919 + number * 31) % 40_000] * 8, 8, 2)
        for number in range(args.requests)
    ]
    records = asyncio.run(Client(Target(url, model=args.model)).closed_loop(calls, 1))
    failed = [record for record in records if not record.ok or record.ttft_s is None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests to {url} failed, the first with {failed[0].error}")
    return [record.ttft_s for record in records if record.ttft_s is not None]
