"""What it costs to give each tenant a prefix cache of its own: tenants whose prompts begin alike, with and without."""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import httpx2
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from loadtest.bench.engines import engine, gateway
from loadtest.bench.scale.replicas import tenant_file
from loadtest.bench.table import machine, markdown, quantile, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from server.request.tenants import new_key

VOCABULARY = 40_000


class SaltFigures(NamedTuple):
    """One round. ttft_s: the median. cached: the part of all prompt tokens that the engine had computed before."""

    ttft_s: float
    cached: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="model to serve (default %(default)s)")
    parser.add_argument("--tenants", type=int, default=8, help="tenants (default %(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="of each, in a round (default %(default)s)")
    parser.add_argument(
        "--shared", type=int, default=512, help="tokens that all prompts begin with (default %(default)s)"
    )
    parser.add_argument("--own", type=int, default=64, help="tokens that follow, of each request (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both, in turns (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Starts an engine and two gateways before it, asks both in turns, prints the table."""
    keys = {f"tenant-{number}": new_key() for number in range(args.tenants)}
    with engine(args.model, policy="fcfs") as engine_url, gateways(engine_url, keys) as (shared_url, salted_url):
        rounds = [
            (
                measured(shared_url, engine_url, args, keys, 2 * number),
                measured(salted_url, engine_url, args, keys, 2 * number + 1),
            )
            for number in range(args.rounds + 1)
        ][1:]  # the first warms both up
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(
        f"{args.rounds} rounds of {args.requests} requests of each of {args.tenants} tenants, one at a time; prompts "
        f"of {args.shared} tokens that all share and {args.own} of their own, {args.model}"
    )
    console.print(table(rounds))
    return 0


def table(rounds: Sequence[tuple[SaltFigures, SaltFigures]]) -> str:
    """One cache for all beside one for each, and the ratio within a round."""
    ttft = [[1e3 * seen.ttft_s for seen in side] for side in zip(*rounds, strict=True)]
    cached = [[100.0 * seen.cached for seen in side] for side in zip(*rounds, strict=True)]
    ratios = [salted / shared for shared, salted in zip(*ttft, strict=True)]
    rows = [
        ["TTFT p50, ms", spread(ttft[0], digits=0), spread(ttft[1], digits=0), spread(ratios)],
        ["prompt tokens found in the cache, %", spread(cached[0], digits=0), spread(cached[1], digits=0), ""],
    ]
    return markdown(["what", "one cache for all", "`salt_cache`: one for each tenant", "÷"], rows)


@contextmanager
def gateways(engine_url: str, keys: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Two over one engine: without `salt_cache`, and with it."""
    with tempfile.TemporaryDirectory(prefix="evenhand-salt-") as name:
        config = Path(name) / "salted.yaml"
        config.write_text(yaml.safe_dump({"salt_cache": True}))
        common = ["--worker", f"{engine_url},slots=8", "--tenants", str(tenant_file(Path(name), keys))]
        with gateway(*common) as shared, gateway(*common, "--config", str(config)) as salted:
            yield shared, salted


def measured(url: str, engine_url: str, args: argparse.Namespace, keys: dict[str, str], seed: int) -> SaltFigures:
    """One round, with a beginning that no round before had. RuntimeError if a request failed."""
    before = lookups(engine_url)
    asked = calls(args, list(keys), seed)
    records = asyncio.run(Client(Target(url, model=args.model, keys=keys)).closed_loop(asked, 1))
    failed = [record for record in records if not record.ok or record.ttft_s is None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests to {url} failed, the first with {failed[0].error}")
    queries, hits = (now - then for now, then in zip(lookups(engine_url), before, strict=True))
    return SaltFigures(
        quantile([record.ttft_s for record in records if record.ttft_s is not None], 0.5), hits / queries
    )


def calls(args: argparse.Namespace, tenants: Sequence[str], seed: int) -> list[TraceCall]:
    """Every tenant in turn; prompts are token ids, alike for `args.shared` of them."""
    rng = Random(seed)
    common = [rng.randrange(100, VOCABULARY) for _ in range(args.shared)]
    asked = []
    for number in range(args.requests):
        for tenant in tenants:
            prompt = common + [rng.randrange(100, VOCABULARY) for _ in range(args.own)]
            asked.append(TraceCall(f"{seed}-{number}-{tenant}", 0.0, tenant, prompt, len(prompt), 2))
    return asked


def lookups(engine_url: str) -> tuple[float, float]:
    """(prompt tokens that were looked up in the prefix cache, those that were found) since the engine started."""
    text = httpx2.get(f"{engine_url}/metrics", timeout=30).text
    total = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:prefix_cache_")
    }
    return total["vllm:prefix_cache_queries_total"], total["vllm:prefix_cache_hits_total"]
