"""Prefill and decode divided in every way that `evenhand serve` knows, on the same two cores or GPUs, in turns.

Engines that do both, with each step size; one that reads and one that answers; and placement by prediction. All run all
the time, each under its own `evenhand serve`; whichever is not asked is idle. The model is made up: a few layers with
random weights, so that a prompt of 4,000 tokens takes long beside a step of the streams that run. On one GPU the
engines share its memory.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, repeat, takewhile
from pathlib import Path
from random import Random
from statistics import median

import httpx2
from rich.console import Console

from deploy.machine.machine import look
from loadtest.bench.bench_target import free_port
from loadtest.bench.disaggregation_load import (
    CONTEXT_TOKENS,
    MEAN_PROMPT_TOKENS,
    TRACES,
    WORKERS,
    Idle,
    goodputs,
    means_of,
    mixes,
    ratio_of,
    told_of,
)
from loadtest.bench.disaggregation_simulated import ENGINES, MEASURED_NAME, simulated
from loadtest.bench.engines import running
from loadtest.bench.random_model import write
from loadtest.bench.table import machine, markdown, quantile, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.records import Record
from loadtest.report.report import ATTAINMENT_GOAL, Objective
from loadtest.traces.arrivals import poisson
from loadtest.traces.prompts import token_prompts
from loadtest.traces.workload import Fit, Maker, Shape

APART, PREDICTED = "apart", "by prediction"
ROLES = {APART: ("--prefill-workers", "1", "--decode-workers", "1")}
TOGETHER = ("--workers", f"{WORKERS}")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What suits the machine's engines. steps: tokens of a step, from tuned to untuned. longest: prompt and answer of a
    request together, in tokens: what is longer is cut, for alone it would take longer than the objective."""

    model: Mapping[str, int]
    steps: tuple[int, ...]
    options: tuple[str, ...]
    longest: int = CONTEXT_TOKENS

    @classmethod
    def here(cls) -> "Hardware":
        machine = look(os.environ)
        return GPU if machine.engine is not None and machine.engine.build != "cpu" else CPU


CPU = Hardware(
    {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64,
    },
    (128, 512),
    ("--kv-cache-gib", "1", "--engine-arg=--max-num-seqs=16"),
    longest=3072,
)  # fmt: skip
GPU = Hardware(
    {
        "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    (512, 2048),
    ("--engine-arg=--dtype=bfloat16",),
)  # fmt: skip
GPU_MEMORY = 0.9
SHORT, LONG = 128, 4096  # prompts whose hand-over is timed; shorter ones than SHORT are not read apart
ALONE = {SHORT: 30, LONG: 5}  # how often each is asked
STREAM = Shape(64, 200)
STREAMS = 6
LEVELS = ("tight", "middle", "loose")
UNTUNED_GOAL, TUNED_GOAL, GOODPUT_GOAL = 1 / 3, 0.7, 0.97
ADDED_S, ADDED_SHARE = 0.009, 0.03
ERRORS = {0.15: (0.85, 1.15), 0.4: (0.6, 1.4)}  # buckets of the metric that bound so large an error
BUCKET = re.compile(r'^evenhand_predicted_ttft_ratio_bucket\{.*le="([\d.]+|\+Inf)".*\} (\S+)$', re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, help=f"folder with {', '.join(TRACES.values())} (default: workload C, made up)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of each, in turns (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one run (default %(default)s)")
    parser.add_argument(
        "--load",
        type=float,
        default=0.5,
        help="of long prompts, beside running streams: of one engine's (default %(default)s)",
    )
    parser.add_argument(
        "--rates", default="0.3,0.5,0.7,0.9,1.1,1.4", help="for goodput, by the same measure (default %(default)s)"
    )
    parser.add_argument("--parts", default=",".join(ALL_PARTS), help="what is measured (default %(default)s)")
    parser.add_argument(
        "--steps",
        help="tokens of a step of engines that do both, the tuned one first (default 128,512; a GPU 512,2048)",
    )
    parser.add_argument("--engines", default="2", help="that are simulated (default %(default)s)")
    parser.add_argument(
        "--costs",
        default="gpu-7b",
        help=f"cost models that are simulated; {MEASURED_NAME} is the engines that are measured (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measures, simulates, prints the tables."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    wanted = args.parts.split(",")
    for what, asked, known in (("part", wanted, ALL_PARTS), ("cost model", args.costs.split(","), ENGINES)):
        if unknown := set(asked) - set(known):
            progress.print(f"evenhand bench disaggregation: no {what} {unknown.pop()!r}: choose of {', '.join(known)}")
            return 2
    drawn = mixes(args.traces, Random(args.seed))
    tables = list(measured(args, drawn, progress)) if set(wanted) & set(PARTS) else []
    console.print(machine())
    models = [(cost, int(engines)) for cost in args.costs.split(",") for engines in args.engines.split(",")]
    if SIMULATED_PART in wanted:
        with ProcessPoolExecutor() as processes:
            tables += [simulated(drawn, cost, engines, progress, processes) for cost, engines in models]
    for table in tables:
        console.print(f"\n{table}")
    return 0


def measured(args: argparse.Namespace, drawn: Mapping[str, list[Shape]], progress: Console) -> Iterator[str]:
    """Starts all; a table for each part that is wanted."""
    hardware = Hardware.here()
    steps = [int(tokens) for tokens in args.steps.split(",")] if args.steps else hardware.steps
    with tempfile.TemporaryDirectory(prefix="evenhand-apart-") as name, ExitStack() as stack:
        folder = Path(name) / "bench"
        folder.mkdir()
        served = Served(write(folder, hardware.model), Path(name), hardware, sides=len(steps) + 2)
        urls = {both(tokens): stack.enter_context(served.with_steps(tokens, *TOGETHER)) for tokens in steps}
        wait_ready(urls[both(steps[-1])])
        bench = DisaggregationBench(urls, [both(tokens) for tokens in steps], args, progress)
        urls[APART] = stack.enter_context(served.with_steps(steps[-1], *ROLES[APART]))
        tight_to_loose = bench.idle.objectives()
        tenants = served.tenants(tight_to_loose)
        asked = ("--slo-ttft", f"{tight_to_loose[1].ttft_s}", "--slo-tpot", f"{tight_to_loose[1].tpot_s}")
        urls[PREDICTED] = stack.enter_context(
            served.with_steps(steps[-1], *TOGETHER, *asked, "--tenants", str(tenants))
        )
        fit = Fit(context_tokens=hardware.longest)
        drawn = {name: [fit(shape) for shape in lengths] for name, lengths in drawn.items()}
        bench.warm_up(drawn)
        for part in args.parts.split(","):
            if part in PARTS:
                yield PARTS[part](bench, drawn)
        for side in (APART, PREDICTED):
            yield f"Where requests went, {side}: {placements(urls[side])}"
        yield prediction(urls[PREDICTED])


def both(step_tokens: int) -> str:
    """The name of the side whose engines do both."""
    return f"{WORKERS} × both, steps of {step_tokens}"


@dataclass(frozen=True)
class Served:
    """Starts `evenhand serve` for one side. sides: that share a GPU's memory."""

    model: Path
    folder: Path
    hardware: Hardware
    sides: int

    @contextmanager
    def with_steps(self, tokens: int, *options: str) -> Iterator[str]:
        """Yields its URL once a worker is ready."""
        port = free_port()
        command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--model", str(self.model)]
        command += ["--state-folder", str(self.folder / str(port)), *options, *self.hardware.options]
        command += [f"--engine-arg=--max-model-len={CONTEXT_TOKENS}", f"--engine-arg=--max-num-batched-tokens={tokens}"]
        if self.hardware is GPU:
            on_one = WORKERS if len(look(os.environ).gpus) < WORKERS else 1
            share = GPU_MEMORY / (self.sides * on_one)
            command.append(f"--engine-arg=--gpu-memory-utilization={share:.3f}")
        url = f"http://127.0.0.1:{port}"
        with running(command, dict(os.environ), f"{url}/ready"):
            yield url

    def tenants(self, objectives: Sequence[Objective]) -> Path:
        """A tenant file with one for each objective, which is also the beginning of its key."""
        path = self.folder / "tenants.yaml"
        path.write_text(
            json.dumps(
                {
                    "tenants": [
                        {"name": level, "keys": [key_of(level)], "slo": {"ttft_s": one.ttft_s, "tpot_s": one.tpot_s}}
                        for level, one in zip(LEVELS, objectives, strict=True)
                    ]
                }
            )
        )
        return path


def key_of(level: str) -> str:
    return f"{level}-key-of-a-benchmark"


def metrics(url: str, name: str) -> dict[str, float]:
    """A gateway's metric by its labels as they stand."""
    text = httpx2.get(f"{url}/metrics", trust_env=False).text
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)}


def wait_ready(url: str, limit_s: float = 400.0) -> None:
    """Returns when all workers take requests and none has any. RuntimeError if that takes too long."""
    end = time.monotonic() + limit_s
    while sum(metrics(url, "evenhand_worker_up").values()) < WORKERS or any(
        metrics(url, "evenhand_worker_in_flight").values()
    ):
        if time.monotonic() > end:
            raise RuntimeError(f"the workers of {url} are not ready after {limit_s:.0f} s")
        time.sleep(0.2)


@dataclass
class DisaggregationBench:
    """Asks all sides in turns. both: the sides whose engines do both, from tuned to untuned."""

    urls: Mapping[str, str]
    both: Sequence[str]
    args: argparse.Namespace
    progress: Console
    idle: Idle = field(init=False)
    rate: float = field(init=False)  # prompts of mean length that one engine reads in a second

    def __post_init__(self) -> None:
        self._runs = count(self.args.seed * 1_000_000)
        self.one(self.both[-1], Shape(LONG, 8))
        seen = [self.one(self.both[-1], Shape(MEAN_PROMPT_TOKENS, 30)) for _ in range(5)]
        self.idle = Idle(
            median(record.ttft_s or 0.0 for record in seen), median(record.tpot_s or 0.0 for record in seen)
        )
        self.rate = 1 / self.idle.ttft_s

    def warm_up(self, drawn: Mapping[str, list[Shape]]) -> None:
        """Of every side, the way between its engines too; and what placement by prediction learns of its engines."""
        for side, url in self.urls.items():
            wait_ready(url)
            for tokens in (LONG, SHORT):
                self.one(side, Shape(tokens, 8))
        for lengths in drawn.values():
            self._offered(PREDICTED, lengths, self.args.load, -1)

    def maker(self) -> Maker:
        """Prompts that nobody has seen."""
        run = next(self._runs)
        return Maker(token_prompts(run), Fit(context_tokens=CONTEXT_TOKENS), name=f"run-{run}")

    def client(self, side: str, level: str = LEVELS[1]) -> Client:
        """level: whose objectives count, where placement looks at them."""
        return Client(Target(self.urls[side], model="bench", key=key_of(level) if side == PREDICTED else ""))

    def one(self, side: str, shape: Shape) -> Record:
        """One request alone."""
        calls = self.maker().calls([shape], [0.0], Random(0))
        (record,) = checked(asyncio.run(self.client(side).closed_loop(calls, 1)))
        return record

    def in_turns(self) -> Iterator[tuple[int, str]]:
        """Every repetition on all sides; who begins changes."""
        for repetition in range(self.args.repetitions):
            for side in list(self.urls)[:: 1 if repetition % 2 == 0 else -1]:
                wait_ready(self.urls[side])
                yield repetition, side

    # What the hand-over adds

    def handover_table(self) -> str:
        untuned, sides = self.both[-1], (self.both[-1], APART, PREDICTED)
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(self.args.repetitions):
            for side in sides:
                wait_ready(self.urls[side])
            for tokens, times in ALONE.items():  # one request of each side after the other: none has the better moments
                seen = [[self.one(side, Shape(tokens, 2)).ttft_s or 0.0 for side in sides] for _ in range(times)]
                for side, of_side in zip(sides, zip(*seen, strict=True), strict=True):
                    taken.setdefault((side, tokens), []).append(median(of_side))
        rows = []
        for side in (APART, PREDICTED):
            for tokens in (SHORT, LONG):
                alone, divided = taken[untuned, tokens], taken[side, tokens]
                added = [1e3 * (with_it - without) for without, with_it in zip(alone, divided, strict=True)]
                goal_ms = 1e3 * max(ADDED_S, ADDED_SHARE * median(alone))
                cells = [spread(values, digits=0) for values in (in_ms(alone), in_ms(divided), added)]
                rows.append([f"{side}, {tokens}", *cells, f"≤ {goal_ms:.0f}", met(median(added) <= goal_ms)])
        head = ["side, prompt tokens", f"TTFT, {untuned}, ms", "of this side, ms", "added, ms", "goal, ms", ""]
        return markdown(head, rows)

    # What running streams feel of long prompts

    def stutter_table(self, drawn: Mapping[str, list[Shape]]) -> str:
        rows = []
        for name, lengths in drawn.items():
            gaps: dict[str, list[list[float]]] = {side: [] for side in self.urls}
            for repetition, side in self.in_turns():
                gaps[side].append(asyncio.run(self._stutter(side, lengths, repetition)))
                self.progress.print(f"ITL {name} {side}: p99 {1e3 * quantile(gaps[side][-1], 0.99):.0f} ms")
            p99 = {side: [quantile(run, 0.99) for run in gaps[side]] for side in self.urls}
            for side in self.urls:
                ratios = [
                    [mine / other for mine, other in zip(p99[side], p99[of], strict=True)]
                    for of in (self.both[-1], self.both[0])
                ]
                goals = side in self.both or all(
                    median(ratio) <= goal for ratio, goal in zip(ratios, (UNTUNED_GOAL, TUNED_GOAL), strict=True)
                )
                p50 = spread(in_ms([quantile(run, 0.5) for run in gaps[side]]), digits=0)
                row = [f"{name}, {side}", p50, spread(in_ms(p99[side]), digits=0), *map(spread, ratios)]
                rows.append([*row, "" if side in self.both else met(goals)])
        head = ["lengths, side", "ITL p50, ms", "p99, ms", "p99 ÷ untuned both", "÷ tuned both"]
        return markdown([*head, f"goals ≤ {UNTUNED_GOAL:.2f}, ≤ {TUNED_GOAL}"], rows)

    async def _stutter(self, side: str, lengths: Sequence[Shape], repetition: int) -> list[float]:
        """Seconds between tokens of streams that run while long prompts come."""
        rng = Random(f"{self.args.seed}:{repetition}")
        end = time.monotonic() + self.args.seconds
        streams = stopping(self.maker().calls(repeat(STREAM), repeat(0.0), rng), end)
        times = list(takewhile(lambda at_s: at_s < self.args.seconds, poisson(self.args.load * self.rate, rng)))
        prompts = self.maker().calls((replace(rng.choice(lengths), output_tokens=2) for _ in times), times, rng)
        ran, _ = await asyncio.gather(
            self.client(side).closed_loop(streams, STREAMS), self.client(side).open_loop(prompts)
        )
        return [gap / 1e6 for record in checked(ran) for gap in record.gaps_us]

    # How much is served inside both objectives

    def goodput_table(self, drawn: Mapping[str, list[Shape]]) -> str:
        rows, ratios = [], []
        objectives = self.idle.objectives()
        for name, lengths in drawn.items():
            best = self._best(name, lengths)
            for at, objective in enumerate(objectives):
                of = {side: goodput[at] for side, goodput in best.items()}
                tuned = max(self.both, key=lambda side: of[side])
                ratio = ratio_of(of[PREDICTED], max(of[tuned], of[APART]))
                ratios.append(ratio)
                asked = f"{name}, TPOT ≤ {1e3 * objective.tpot_s:.0f} ms"
                row = [asked, f"{of[tuned]:.2f} ({tuned.rpartition(', ')[2]})", f"{of[APART]:.2f}"]
                rows.append([*row, f"{of[PREDICTED]:.2f}", f"{ratio:.2f}", met(ratio >= GOODPUT_GOAL)])
        head = ["lengths, objective", "best that do both", APART, PREDICTED, "÷ best", f"goal ≥ {GOODPUT_GOAL}"]
        told = (
            f"Requests/s per engine with {ATTAINMENT_GOAL:.0%} inside both objectives, TTFT ≤ "
            f"{objectives[0].ttft_s:.2f} s in every row, all repetitions taken together. By prediction ÷ the better of "
            f"the others: {means_of(ratios)}"
        )
        return f"{told}\n\n" + markdown(head, rows)

    def _best(self, name: str, lengths: Sequence[Shape]) -> Mapping[str, list[float]]:
        """Goodput of each side under each objective. Where placement looks at objectives, each has its own runs."""
        loads, objectives = [float(load) for load in self.args.rates.split(",")], self.idle.objectives()
        of: dict[str, dict[str, dict[float, list[Record]]]] = {}
        for repetition, side in self.in_turns():
            for level in LEVELS if side == PREDICTED else LEVELS[1:2]:
                for load in loads:
                    rate, records = self._offered(side, lengths, load, repetition, level)
                    of.setdefault(side, {}).setdefault(level, {}).setdefault(rate, []).extend(records)
                    shares = ", ".join(told_of(records, objective) for objective in objectives)
                    asked = f"{name} {side} {level} {rate:.2f}/s"
                    self.progress.print(f"goodput {asked}: {len(records)} requests, inside {shares}")
        best = {side: goodputs(list(of[side][LEVELS[1]].items()), objectives) for side in self.urls}
        best[PREDICTED] = [
            goodputs(list(of[PREDICTED][level].items()), [objective])[0]
            for level, objective in zip(LEVELS, objectives, strict=True)
        ]
        return best

    def _offered(
        self, side: str, lengths: Sequence[Shape], load: float, repetition: int, level: str = LEVELS[1]
    ) -> tuple[float, Sequence[Record]]:
        rng = Random(f"{self.args.seed}:{load}:{repetition}")
        times = list(takewhile(lambda at_s: at_s < self.args.seconds, poisson(load * self.rate, rng)))
        calls = self.maker().calls((rng.choice(lengths) for _ in times), times, rng)
        return load * self.rate, checked(asyncio.run(self.client(side, level).open_loop(calls)))

    # Whether they say the same

    def equality(self, prompts: int = 24) -> str:
        rng = Random(self.args.seed)
        ids = token_prompts(-1 - self.args.seed)
        asked = [
            ids(number, rng.choice((1, SHORT, 500, 1000, LONG)) + rng.randrange(64), (), 0) for number in range(prompts)
        ]
        alone = [said(self.urls[self.both[-1]], prompt) for prompt in asked]
        same = sum(said(self.urls[APART], prompt) == other for prompt, other in zip(asked, alone, strict=True))
        return f"Greedy answers of 32 tokens that are the same, token for token: {same} of {prompts}"


def in_ms(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]


def said(url: str, prompt: object) -> object:
    """The token ids of a greedy answer."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    answer = httpx2.post(
        f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=120.0, trust_env=False
    )
    return answer.raise_for_status().json()["choices"][0]["token_ids"]


def stopping(calls: Iterator[TraceCall], end: float) -> Iterator[TraceCall]:
    """As long as it is not later than `end`."""
    while time.monotonic() < end:
        yield next(calls)


def checked(records: Sequence[Record]) -> Sequence[Record]:
    """RuntimeError if one failed."""
    failed = [record for record in records if not record.ok]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} requests failed, the first with {failed[0].error}")
    return records


def met(goal: bool) -> str:
    return "met" if goal else "**missed**"


def prediction(url: str) -> str:
    """How far predicted times to first token were off, by the gateway's own metric."""
    below = {bound: float(value) for bound, value in BUCKET.findall(httpx2.get(f"{url}/metrics", trust_env=False).text)}
    total = below.get("+Inf", 0.0)
    if not total:
        return "No time to first token was predicted."
    shares = {error: (below[f"{high}"] - below[f"{low}"]) / total for error, (low, high) in ERRORS.items()}
    told = ", ".join(f"{share:.0%} by at most {error:.0%}" for error, share in shares.items())
    good = met(shares[0.15] >= 0.5 and shares[0.4] >= 0.9)
    return f"Predicted times to first token are off: {told}, of {total:.0f} (goals 50 %, 90 %: {good})"


def placements(url: str) -> str:
    """How many requests went which way, and what a transfer took."""
    told = {labels.split('"')[1]: value for labels, value in metrics(url, "evenhand_placements_total").items() if value}
    whole = sum(told.values())
    (took,), (times,) = (metrics(url, f"evenhand_kv_transfer_seconds_{what}").values() for what in ("sum", "count"))
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in sorted(told.items(), key=lambda item: -item[1]))
    return f"{shares}; from read to first bytes {1e3 * took / max(1.0, times):.0f} ms on average"


PARTS: Mapping[str, Callable[[DisaggregationBench, Mapping[str, list[Shape]]], str]] = {
    "handover": lambda bench, drawn: bench.handover_table(),
    "itl": DisaggregationBench.stutter_table,
    "goodput": DisaggregationBench.goodput_table,
    "equality": lambda bench, drawn: bench.equality(),
}
SIMULATED_PART = "simulated"
ALL_PARTS = (*PARTS, SIMULATED_PART)
