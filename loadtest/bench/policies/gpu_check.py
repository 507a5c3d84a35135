"""Whether Evenhand works on this machine's GPU: stock vLLM beside the plug-in with each policy, on the same requests.

evenhand bench gpu-check [--model smollm2] [--requests 64] [--policies fcfs vtc mlfq]

One engine at a time answers the same greedy requests, long and short mixed, all at once; then `evenhand serve` with two
engines (on one GPU they share its memory), and with one that reads prompts and one that answers, over NIXL. The table
shows tokens a second against stock vLLM, how many answers are stock's to the letter, displacements or prompts that were
handed over, and on a GPU memory and energy. It runs on a CPU, too, without the last two. What does not start, or dies,
is a row that says so, and the rest goes on.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2

from deploy.model.model import BUNDLED
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import engine, running
from scheduler.energy import installed_nvml

MOST_TOKENS = (16, 16, 16, 256)  # of requests in turn: a long answer among short ones gives mlfq something to displace
LEAST_RATIO = 0.95  # of stock's tokens a second
LEAST_EQUAL = 0.9  # answers that are stock's: another batch may round a near tie the other way
LIMIT_S = 300.0
ENGINES = 2  # of a whole system
GIB = 1024**3
PREEMPTIONS = re.compile(r'^evenhand_engine_preemptions_total\{[^}]*reason="policy"[^}]*\}\s+([\d.e+]+)$', re.MULTILINE)
APART = re.compile(r'^evenhand_placements_total\{[^}]*placement="apart"[^}]*\}\s+([\d.e+]+)$', re.MULTILINE)
UP = re.compile(r"^evenhand_worker_up\{[^}]*\}\s+([\d.e+]+)$", re.MULTILINE)
TWO, SPLIT = "two engines", "prefill, decode"
SYSTEMS = {
    TWO: ("--workers", "2"),
    SPLIT: ("--prefill-workers", "1", "--decode-workers", "1"),
}
STEPS = re.compile(r"^evenhand_engine_steps_total(?:\{[^}]*\})?\s+([\d.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Round:
    """What one engine did, or a whole system. memory_bytes, energy_j: of the first GPU; 0 on a CPU.

    handed_over: prompts that another engine read than the one that answered. failure: why there is nothing to show.
    """

    name: str
    answers: tuple[str, ...]
    tokens: int
    seconds: float
    displaced: int = 0
    has_plugin: bool = False
    memory_bytes: int = 0
    energy_j: float = 0.0
    handed_over: int = 0
    failure: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def attempted(name: str, play: Callable[[], Round]) -> Round:
    """The round, or why there is none."""
    try:
        return play()
    except (RuntimeError, httpx2.HTTPError) as error:
        sys.stderr.write(f"{name}: {error or type(error).__name__}\n")
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Round(name, (), 0, 1.0, failure=f"failed: {last.replace('|', '/')[:120]}")


def bodies(model: str, count: int) -> list[dict[str, Any]]:
    """The requests: long prompts and short, each its own."""
    words = ("river", "engine", "winter", "paper", "garden", "signal", "copper", "harbour")
    return [
        {
            "model": model,
            "prompt": " ".join(words[(index * 7 + at) % len(words)] for at in range(8 + 40 * (index % 5))),
            "max_tokens": MOST_TOKENS[index % len(MOST_TOKENS)],
            "temperature": 0,
            "ignore_eos": True,
            "vllm_xargs": {"evenhand_tenant": f"t{index % 3}"},
        }
        for index in range(count)
    ]


async def asked(url: str, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once. RuntimeError for an answer that is none."""
    limits = httpx2.Limits(max_connections=len(requests))
    async with httpx2.AsyncClient(trust_env=False, timeout=LIMIT_S, limits=limits) as client:
        replies = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in requests))
    for reply in replies:
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}: {reply.text[:200]}")
    return [reply.json() for reply in replies]


def played(name: str, policy: str | None, args: argparse.Namespace) -> Round:
    """One engine from its start to its end."""
    options = [f"--max-num-seqs={args.slots}", *args.engine_args]
    with engine(args.model, policy=policy, args=options) as url:
        return measured(name, url, args)


def served(name: str, args: argparse.Namespace) -> Round:
    """A whole system of two engines from its start to its end. RuntimeError if they do not come up."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="evenhand-check-") as folder:
        argv = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--model", args.model]
        argv += [*SYSTEMS[name], "--state-folder", folder, f"--engine-arg=--max-num-seqs={args.slots}"]
        argv += [f"--engine-arg={one}" for one in args.engine_args]
        with running(argv, dict(os.environ), f"{url}/ready"):
            end = time.monotonic() + LIMIT_S
            while sum(map(float, UP.findall(metrics_of(url)))) < ENGINES:
                if time.monotonic() > end:
                    raise RuntimeError(f"{name}: one of the engines was not ready after {LIMIT_S:.0f} s")
                time.sleep(0.2)
            return measured(name, url, args, own=False)


def metrics_of(url: str) -> str:
    return httpx2.get(f"{url}/metrics", trust_env=False).text


def measured(name: str, url: str, args: argparse.Namespace, *, own: bool = True) -> Round:
    """What the requests get from whatever answers at this URL.

    own: it is an engine, which takes a tenant from whoever asks; a gateway does not.
    """
    model = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    requests = bodies(model, args.requests)
    if not own:
        requests = [{field: value for field, value in body.items() if field != "vllm_xargs"} for body in requests]
    asyncio.run(asked(url, requests[: args.slots]))  # warms caches and kernels up
    gpu = Gauge()
    began = time.perf_counter()
    answers = asyncio.run(asked(url, requests))
    seconds = time.perf_counter() - began
    energy_j, memory_bytes = gpu.since()
    metrics = metrics_of(url)
    return Round(
        name,
        tuple(answer["choices"][0]["text"] for answer in answers),
        sum(answer["usage"]["completion_tokens"] for answer in answers),
        seconds,
        round(sum(map(float, PREEMPTIONS.findall(metrics)))),
        bool(STEPS.search(metrics)),
        memory_bytes,
        energy_j,
        round(sum(map(float, APART.findall(metrics)))),
    )


class Gauge:
    """Energy and memory of the first GPU, where NVML tells them."""

    def __init__(self) -> None:
        self._nvml: Any = installed_nvml()
        self._began_mj = self._energy_mj()

    def _energy_mj(self) -> int:
        return int(self._ask("nvmlDeviceGetTotalEnergyConsumption") or 0)

    def _ask(self, question: str) -> Any:
        if self._nvml is None:
            return None
        try:
            self._nvml.nvmlInit()
            return getattr(self._nvml, question)(self._nvml.nvmlDeviceGetHandleByIndex(0))
        except self._nvml.NVMLError:
            return None

    def since(self) -> tuple[float, int]:
        """(joules since it was made, bytes in use)."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return (self._energy_mj() - self._began_mj) / 1000, int(memory.used) if memory is not None else 0


def faults(stock: Round, ours: Round) -> list[str]:
    """What is not as it should be."""
    if ours.failure or stock.failure:
        return [ours.failure or "nothing to compare with"]
    # The engines of a system stand behind a gateway, and share what stock has for itself.
    found = [] if ours.name in SYSTEMS else _faults_of_an_engine(stock, ours)
    if equal(stock, ours) < LEAST_EQUAL:
        found.append(f"only {equal(stock, ours):.0%} of its greedy answers are stock's")
    if ours.name == SPLIT and not ours.handed_over:
        found.append("no prompt was handed over")
    if ours.name == "mlfq" and not ours.displaced:
        found.append("nothing was displaced")
    return found


def _faults_of_an_engine(stock: Round, ours: Round) -> list[str]:
    found = []
    if not ours.has_plugin:
        found.append("the plug-in shows no metrics")
    if (ratio := ours.tokens_per_s / stock.tokens_per_s) < LEAST_RATIO and not ours.displaced:
        found.append(f"{ratio:.2f} of stock's throughput")
    return found


def equal(stock: Round, ours: Round) -> float:
    same = sum(mine == theirs for mine, theirs in zip(ours.answers, stock.answers, strict=True))
    return same / len(stock.answers)


def table(rounds: Sequence[Round]) -> str:
    """In Markdown."""
    stock = rounds[0]
    lines = [
        "| engine | tokens/s | of stock | answers equal | displaced | handed over | GPU memory | J/token | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rounds:
        said = ("; ".join(faults(stock, each)) or "ok") if each is not stock else stock.failure
        if each.failure or stock.failure:
            lines.append(f"| {each.name} |{' - |' * 7} {said} |")
            continue
        memory = f"{each.memory_bytes / GIB:.1f} GiB" if each.memory_bytes else "-"
        energy = f"{each.energy_j / each.tokens:.2f}" if each.energy_j else "-"
        lines.append(
            f"| {each.name} | {each.tokens_per_s:.0f} | {each.tokens_per_s / stock.tokens_per_s:.2f} | "
            f"{equal(stock, each):.0%} | {each.displaced} | {each.handed_over} | {memory} | {energy} | {said} |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is checked, and with how much."""
    parser.add_argument("--model", default=BUNDLED, help="model to serve (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="requests to each engine (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="sequences at once (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", default=["fcfs", "vtc", "mlfq"], help="(default: fcfs vtc mlfq)")
    parser.add_argument("--engine-arg", action="append", dest="engine_args", default=[], help="handed to vLLM")


def run(args: argparse.Namespace) -> int:
    """1 if something failed."""
    rounds: list[Round] = []
    for name in ("stock", *args.policies):
        sys.stderr.write(f"{name}: starting an engine\n")
        rounds.append(attempted(name, partial(played, name, None if name == "stock" else name, args)))
    for name in SYSTEMS:
        sys.stderr.write(f"{name}: starting evenhand serve\n")
        rounds.append(attempted(name, partial(served, name, args)))
    sys.stdout.write(table(rounds) + "\n")
    return int(any(faults(rounds[0], each) for each in rounds[1:]))
