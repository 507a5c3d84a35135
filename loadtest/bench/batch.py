"""Batch work beside interactive traffic: what the interactive requests notice, and what a line of a batch costs.

The scenario is llm-d-batch-gateway's (issue 491): bursts of 15 requests a second, then 1 a second, here over an engine
without a model that takes the time of a 7B model on one GPU. Every share of the slots is run beside the same requests.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx2
from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.gateway.relay_load import BenchmarkError, cpu_s
from loadtest.bench.table import machine, markdown, quantile
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.records import Record

PROMPT_TOKENS, OUTPUT_TOKENS, SIGMA = 512, 128, 0.8  # of the interactive requests: output lognormal, this is its mean
BURST_PER_S, CALM_PER_S = 15.0, 1.0
POLL_S = 0.2
OVER = ("completed", "failed", "expired", "cancelled")
MODEL = "fake"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=45.0, help="of each burst and each calm (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="bursts, each with a calm after it (default %(default)s)")
    parser.add_argument("--shares", default="0.25,0.5", help="of the slots, one run each (default %(default)s)")
    parser.add_argument("--lines", type=int, default=50_000, help="of the batch that is counted (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Runs all, prints the tables."""
    progress = Console(stderr=True, highlight=False)
    shares = [float(share) for share in args.shares.split(",")]
    calls = list(interactive(Random(args.seed), args.seconds, args.rounds))
    try:
        progress.print(f"interactive alone: {calls[-1].at_s:.0f} s")
        runs = {"interactive alone": measured(calls, None)}
        for share in shares:
            progress.print(f"with a batch in {share:.0%} of the slots")
            runs[f"with a batch, share {share:g}"] = measured(calls, share)
        progress.print(f"{args.lines} lines over an engine that takes no time")
        cost = line_cost(args.lines)
    except (BenchmarkError, RuntimeError) as error:
        progress.print(f"evenhand bench batch: {error}", markup=False)
        return 1
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(table(runs))
    console.print(cost.text())
    return 0


def output_length(rng: Random) -> int:
    """Of one answer, in tokens."""
    return max(2, min(1024, round(rng.lognormvariate(math.log(OUTPUT_TOKENS) - SIGMA**2 / 2, SIGMA))))


def interactive(rng: Random, seconds: float, rounds: int) -> Iterator[TraceCall]:
    """Poisson arrivals, fast and slow in turns."""
    at_s, number = 0.0, 0
    while (phase := int(at_s / seconds)) < 2 * rounds:
        at_s += rng.expovariate(CALM_PER_S if phase % 2 else BURST_PER_S)
        length = output_length(rng)
        prompt = [rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
        yield TraceCall(f"i{number}", at_s, "people", prompt, PROMPT_TOKENS, length)
        number += 1


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. records: of the interactive requests. batch_tokens: output tokens of the batch meanwhile."""

    records: Sequence[Record]
    seconds: float
    batch_tokens: float = 0.0

    def p99(self) -> tuple[float, float]:
        """P99 of TTFT and of the gap between tokens, in seconds."""
        firsts = [record.ttft_s for record in self.records if record.ttft_s is not None]
        gaps = [gap / 1e6 for record in self.records for gap in record.gaps_us]
        return quantile(firsts, 0.99), quantile(gaps, 0.99)

    def tokens_per_s(self) -> float:
        return sum(record.output_tokens for record in self.records) / self.seconds


def measured(calls: Sequence[TraceCall], share: float | None) -> Figures:
    """The interactive requests over a gateway and an engine of their own, with a batch beside them unless `share` is
    None. BenchmarkError if one of them fails."""
    with tempfile.TemporaryDirectory(prefix="evenhand-batch-") as folder, served("gpu-7b", Path(folder), share) as url:
        before = 0.0
        if share is not None:
            submit(url, 20_000, output_tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS)
            wait_for_lines(url)
            before = output_tokens(url)
        began = time.monotonic()
        records = asyncio.run(Client(Target(url, model=MODEL)).open_loop(calls))
        seconds = time.monotonic() - began
        made = output_tokens(url) - before if share is not None else 0.0
    failed = [record for record in records if not record.ok]
    if failed:
        raise BenchmarkError(f"{len(failed)} interactive requests failed, the first with {failed[0].error!r}")
    own = sum(record.output_tokens for record in records)
    return Figures(records, seconds, max(0.0, made - own))


@contextmanager
def served(cost: str, folder: Path, share: float | None) -> Iterator[str]:
    """A gateway with a batch folder over one engine without a model; yields its URL."""
    worker, port = free_port(), free_port()
    engine = [sys.executable, "-m", "loadtest.fake.engine", "--port", str(worker), "--model", MODEL, "--cost", cost]
    environ = dict(os.environ) | ({} if share is None else {"EVENHAND_TIERS__FLEX_SHARE": str(share)})
    slots = 1024 if cost == "instant" else 256
    command = [sys.executable, "-m", "deploy.cli", "gateway", "--port", str(port), "--batch-folder", str(folder)]
    command += ["--worker", f"http://127.0.0.1:{worker},slots={slots}"]
    url = f"http://127.0.0.1:{port}"
    with running(engine, dict(os.environ), f"http://127.0.0.1:{worker}/health"):
        with running(command, environ, f"{url}/ready", 120):
            yield url


def submit(url: str, lines: int, *, output_tokens: int, prompt_tokens: int) -> str:
    """Starts a batch of such requests; returns its id."""
    body = {"model": MODEL, "max_tokens": output_tokens, "ignore_eos": True}
    text = "".join(
        json.dumps(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/completions",
                "body": body | {"prompt": [number % 30_000 + 100] * prompt_tokens},
            }
        )
        + "\n"
        for number in range(lines)
    )
    form: dict[str, Any] = {"file": ("in.jsonl", text.encode()), "purpose": (None, "batch")}
    with httpx2.Client(base_url=url, timeout=300) as client:
        file = client.post("/v1/files", files=form).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        return str(client.post("/v1/batches", json=asked).json()["id"])


def sample(url: str, name: str) -> float:
    """One sample of the gateway's metrics, 0 if it is not there."""
    text = httpx2.get(f"{url}/metrics", timeout=60).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def output_tokens(url: str) -> float:
    return sample(url, 'evenhand_tokens_total{kind="completion"}')


def wait_for_lines(url: str) -> None:
    """Returns once lines of the batch have been answered."""
    while not sample(url, 'evenhand_batch_lines_total{outcome="answered"}'):
        time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class LineCost:
    """lines: of the batch. cpu_s: of the gateway. rss_bytes: the most that it held. seconds: from start to end."""

    lines: int
    cpu_s: float
    rss_bytes: int
    seconds: float

    def text(self) -> str:
        return (
            f"{self.lines} lines: {1000 * self.cpu_s / self.lines:.2f} ms of the gateway's processor time a line, "
            f"{self.rss_bytes / 1e6:.0f} MB at most, {self.seconds:.0f} s"
        )


def line_cost(lines: int) -> LineCost:
    """What the gateway spends on a batch when the engine takes no time."""
    with tempfile.TemporaryDirectory(prefix="evenhand-batch-") as folder, served("instant", Path(folder), 0.5) as url:
        pid = _pid(url)
        before, began = cpu_s(pid), time.monotonic()
        peak = Peak(pid)
        batch_id = submit(url, lines, output_tokens=1, prompt_tokens=8)
        with httpx2.Client(base_url=url, timeout=60) as client:
            while client.get(f"/v1/batches/{batch_id}").json()["status"] not in OVER:
                time.sleep(POLL_S)
        peak.stop.set()
        return LineCost(lines, cpu_s(pid) - before, peak.bytes, time.monotonic() - began)


def _pid(url: str) -> int:
    """The gateway's process, by the port that it listens on."""
    port = url.rpartition(":")[2]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().split(b"\0")
        if b"gateway" in words and port.encode() in words:
            return int(entry.parent.name)
    raise BenchmarkError("the gateway's process was not found")


class Peak:
    """The most memory that a process holds while this looks, five times a second."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self.stop = threading.Event()
        self._statm = Path(f"/proc/{pid}/statm")
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self.stop.wait(POLL_S):
            self.bytes = max(self.bytes, int(self._statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def table(runs: dict[str, Figures]) -> str:
    """P99 of the interactive requests in each run, beside those alone."""
    (_, alone), *_ = runs.items()
    first, gap = alone.p99()
    rows = []
    for name, figures in runs.items():
        p99_first, p99_gap = figures.p99()
        batch = figures.batch_tokens / figures.seconds
        rows.append(
            [
                name,
                f"{p99_first * 1000:.0f} ({p99_first / first:.2f})",
                f"{p99_gap * 1000:.1f} ({p99_gap / gap:.2f})",
                f"{figures.tokens_per_s():.0f}",
                f"{batch:.0f}",
                f"{(figures.tokens_per_s() + batch) / alone.tokens_per_s():.2f}",
            ]
        )
    head = ["run", "P99 TTFT, ms (÷ alone)", "P99 gap, ms (÷ alone)"]
    head += ["interactive tokens/s", "batch tokens/s", "all ÷ alone"]
    return markdown(head, rows)
