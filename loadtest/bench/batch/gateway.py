"""Interactive requests and a batch through a gateway, over an engine without a model that cannot displace anybody."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import httpx2
from rich.console import Console

from loadtest.bench.batch.loads import JOBS, PEOPLE, Size
from loadtest.bench.batch.work import ALONE, Outcome
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.gateway.relay_load import BenchmarkError
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target

POLL_S = 0.2
FIRST_LINE_S = 120.0  # until a batch has answered something
MODEL = "fake"
SLOTS = 256
JOBS_PER_S = 25  # more than the engine can do beside others


@dataclass(frozen=True, slots=True)
class Batch:
    """share: of the slots, for a batch that runs by the Batch API (`tiers.flex_share`). cap: in its place a client
    sends so many ordinary requests at a time."""

    share: float | None = None
    cap: int | None = None


def ways(shares: Iterable[float], caps: Iterable[int]) -> Mapping[str, Batch | None]:
    """What is compared, the interactive requests alone first."""
    lines = {f"batch API, flex_share {share:g}": Batch(share=share) for share in shares}
    clients = {f"a client that sends {cap} at a time": Batch(cap=cap) for cap in caps}
    return {ALONE.name: None, **lines, **clients}


def outcomes(
    compared: Mapping[str, Batch | None], size: Size, seeds: Sequence[int], progress: Console
) -> dict[str, list[Outcome]]:
    """Of each way, one for each seed. BenchmarkError if an interactive request fails."""
    found: dict[str, list[Outcome]] = {name: [] for name in compared}
    for seed in seeds:
        people = list(PEOPLE["bursts"](Random(f"{seed}:people"), size))
        jobs = islice(JOBS["short"](Random(f"{seed}:jobs"), size), int(JOBS_PER_S * size.whole_s))
        lines = list(jobs)
        for name, batch in compared.items():
            progress.print(f"through a gateway: {name}, {size.whole_s:.0f} s")
            found[name].append(measured(people, lines, batch))
    return found


def measured(people: Sequence[TraceCall], jobs: Sequence[TraceCall], batch: Batch | None) -> Outcome:
    """The interactive requests over a gateway and an engine of their own, with a batch beside them unless that is
    None. BenchmarkError if one of them fails."""
    share = None if batch is None else batch.share
    with tempfile.TemporaryDirectory(prefix="evenhand-batch-") as folder:
        with served("gpu-7b", SLOTS, Path(folder), share) as url:
            if batch is not None and batch.cap is None:
                submit(url, jobs)
                _wait_for_lines(url)
            return asyncio.run(_send(url, people, jobs, None if batch is None else batch.cap))


async def _send(url: str, people: Sequence[TraceCall], jobs: Sequence[TraceCall], cap: int | None) -> Outcome:
    """The interactive requests, beside `cap` of the jobs at a time."""
    target = Target(url, model=MODEL)
    other = Client(target)
    beside = None if cap is None else asyncio.ensure_future(other.closed_loop(jobs, cap))
    before = await asyncio.to_thread(_output_tokens, url)
    began = time.monotonic()
    records = await Client(target).open_loop(people)
    seconds = time.monotonic() - began
    made = await asyncio.to_thread(_output_tokens, url) - before
    if beside is not None:
        other.stop("the interactive requests are over")
        await beside
    if failed := [record for record in records if not record.ok]:
        raise BenchmarkError(f"{len(failed)} interactive requests failed, the first with {failed[0].error!r}")
    own = sum(record.output_tokens for record in records)
    firsts = [record.ttft_s for record in records if record.ttft_s is not None]
    gaps = [gap / 1e6 for record in records for gap in record.gaps_us]
    return Outcome(firsts, gaps, own, max(0, round(made) - own), seconds, 0.0)


@contextmanager
def served(cost: str, slots: int, folder: Path, share: float | None = None) -> Iterator[str]:
    """A gateway with a batch folder over one engine without a model; yields its URL."""
    worker, port = free_port(), free_port()
    engine = [sys.executable, "-m", "loadtest.fake.engine", "--port", str(worker), "--model", MODEL, "--cost", cost]
    environ = dict(os.environ) | ({} if share is None else {"EVENHAND_TIERS__FLEX_SHARE": str(share)})
    command = [sys.executable, "-m", "deploy.cli", "gateway", "--port", str(port), "--batch-folder", str(folder)]
    command += ["--worker", f"http://127.0.0.1:{worker},slots={slots}"]
    url = f"http://127.0.0.1:{port}"
    with running(engine, dict(os.environ), f"http://127.0.0.1:{worker}/health"):
        with running(command, environ, f"{url}/ready", 120):
            yield url


def submit(url: str, jobs: Iterable[TraceCall]) -> str:
    """Starts a batch of such requests; returns its id."""
    lines = (
        {
            "custom_id": call.id,
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": MODEL, "max_tokens": call.output_tokens, "ignore_eos": True, "prompt": call.prompt},
        }
        for call in jobs
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    form: dict[str, Any] = {"file": ("in.jsonl", text.encode()), "purpose": (None, "batch")}
    with httpx2.Client(base_url=url, timeout=300) as client:
        file = client.post("/v1/files", files=form)
        if file.is_error:
            raise BenchmarkError(f"the gateway refused the batch's file: {file.text}")
        asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked)
        if batch.is_error:
            raise BenchmarkError(f"the gateway refused the batch: {batch.text}")
        return str(batch.json()["id"])


def _sample(url: str, name: str) -> float:
    """One sample of the gateway's metrics, 0 if it is not there."""
    text = httpx2.get(f"{url}/metrics", timeout=60).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def _output_tokens(url: str) -> float:
    return _sample(url, 'evenhand_tokens_total{kind="completion"}')


def _wait_for_lines(url: str) -> None:
    """Returns once lines of the batch have been answered."""
    end = time.monotonic() + FIRST_LINE_S
    while not _sample(url, 'evenhand_batch_lines_total{outcome="answered"}'):
        if time.monotonic() > end:
            raise BenchmarkError(f"no line of the batch was answered within {FIRST_LINE_S:.0f} s")
        time.sleep(POLL_S)
