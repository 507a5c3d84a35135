"""Prefill and decode apart, one engine each, against two engines that do both: the same cores and requests, in turns.

Both run all the time, each under its own `evenhand serve`; whichever is not asked is idle. The model is made up: a
few layers with random weights, so that a prompt of 4,000 tokens takes long beside a step of the streams that run.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from math import inf
from pathlib import Path
from random import Random
from statistics import geometric_mean, mean, median

import httpx2
from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.random_model import write
from loadtest.bench.table import machine, markdown, quantile, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.records import Record
from loadtest.report.report import ATTAINMENT_GOAL, Objective, goodput
from loadtest.simulator.costmodel import PRESETS
from loadtest.simulator.simulate import Plan, Simulation
from loadtest.traces.arrivals import poisson
from loadtest.traces.formats import read
from loadtest.traces.prompts import token_prompts
from loadtest.traces.workload import Fit, Maker, Shape, mean_lengths, shapes
from scheduler.objectives import Objectives
from scheduler.placement import Rules

SIDES = {"2 × both": ("--workers", "2"), "apart": ("--prefill-workers", "1", "--decode-workers", "1")}
BOTH, APART = SIDES
WORKERS = 2
MODEL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
CONTEXT_TOKENS = 8192  # what is longer, prompt and answer together, is cut to it
ENGINE = (f"--max-model-len={CONTEXT_TOKENS}", "--max-num-seqs=16", "--max-num-batched-tokens=256")
TRACES = {"Mooncake": "mooncake_conversation_trace.first2000.jsonl", "Azure code": "AzureLLMInferenceTrace_code.csv"}
MEAN_PROMPT_TOKENS = 1500  # lengths are scaled to it
SHORT, LONG = 128, 4096  # prompts whose hand-over is timed; shorter ones than SHORT are not read apart
STREAM = Shape(64, 200)
STREAMS = 6
# The objectives, as multiples of what an idle engine takes: how long for a prompt of mean length, and per later token.
TTFT_SLOWDOWN, TPOT_SLOWDOWNS = 5.0, (1.5, 2.5, 5.0)
ITL_GOAL, GOODPUT_GOAL, ADDED_SHARE, ADDED_S = 1 / 3, 1.5, 0.1, 0.005


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
    parser.add_argument("--engines", default="2", help="that are simulated (default %(default)s)")
    parser.add_argument("--costs", default="gpu-7b", help="cost models that are simulated (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")


@dataclass(frozen=True)
class Idle:
    """What one request takes alone: seconds to the first token of a prompt of mean length, and for each later one."""

    ttft_s: float
    tpot_s: float

    def objectives(self) -> list[Objective]:
        """From tight to loose."""
        return [Objective(TTFT_SLOWDOWN * self.ttft_s, slowdown * self.tpot_s) for slowdown in TPOT_SLOWDOWNS]


Runs = list[tuple[float, Sequence[Record]]]  # (requests a second, what came of them)


def goodputs(runs: Runs, objectives: Sequence[Objective]) -> list[float]:
    """Requests a second for each worker, under each objective."""
    return [
        goodput([(rate, mean(map(objective.met, records)) if records else 0.0) for rate, records in runs]) / WORKERS
        for objective in objectives
    ]


def run(args: argparse.Namespace) -> int:
    """Measures, simulates, prints the tables."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    wanted = args.parts.split(",")
    if unknown := set(wanted) - set(ALL_PARTS):
        progress.print(f"evenhand bench disaggregation: no part {unknown.pop()!r}: choose of {', '.join(ALL_PARTS)}")
        return 2
    drawn = mixes(args.traces, Random(args.seed))
    tables = list(measured(args, drawn, progress)) if set(wanted) & set(PARTS) else []
    console.print(machine())
    models = [(cost, int(engines)) for cost in args.costs.split(",") for engines in args.engines.split(",")]
    if SIMULATED_PART in wanted:
        tables += [simulated(drawn, cost, engines, progress) for cost, engines in models]
    for table in tables:
        console.print(f"\n{table}")
    return 0


def measured(args: argparse.Namespace, drawn: Mapping[str, list[Shape]], progress: Console) -> Iterator[str]:
    """Starts both; a table for each part that is wanted."""
    with tempfile.TemporaryDirectory(prefix="evenhand-apart-") as name, ExitStack() as stack:
        folder = Path(name) / "bench"
        folder.mkdir()
        model = write(folder, MODEL)
        urls = {side: stack.enter_context(served(model, Path(name), *options)) for side, options in SIDES.items()}
        for url in urls.values():
            wait_ready(url)
        bench = DisaggregationBench(urls, args, progress)
        for part in args.parts.split(","):
            if part in PARTS:
                yield PARTS[part](bench, drawn)
        yield f"Where requests went, apart: {placements(urls[APART])}"


@contextmanager
def served(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """`evenhand serve` with these workers; yields its URL once one is ready."""
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--model", str(model), *options]
    command += ["--kv-cache-gib", "1", "--state-folder", str(folder / str(port))]
    command += [f"--engine-arg={argument}" for argument in ENGINE]
    url = f"http://127.0.0.1:{port}"
    with running(command, dict(os.environ), f"{url}/ready"):
        yield url


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


def mixes(traces: Path | None, rng: Random) -> Mapping[str, list[Shape]]:
    """Lengths of requests, scaled so that prompts have the mean that they should, and cut to the context."""
    if traces is None:
        return {"made up (C)": scaled(list(islice(shapes("C", rng), 2000)))}
    return {
        name: scaled([Shape(row.prompt_tokens, row.output_tokens) for row in islice(read(traces / file), 2000)])
        for name, file in TRACES.items()
    }


def scaled(drawn: Sequence[Shape]) -> list[Shape]:
    """Prompts and answers by the same factor."""
    fit = Fit(length_scale=MEAN_PROMPT_TOKENS / mean_lengths(drawn)[0], context_tokens=CONTEXT_TOKENS)
    return [fit(shape) for shape in drawn]


class DisaggregationBench:
    """Measures both sides in turns."""

    def __init__(self, urls: Mapping[str, str], args: argparse.Namespace, progress: Console) -> None:
        self.urls = urls
        self.args = args
        self.progress = progress
        self._runs = count(args.seed * 1_000_000)
        for side in urls:  # warms up, the way between the engines too
            self.one(side, Shape(LONG, 8))
            self.one(side, Shape(SHORT, 8))
        self.idle = self._idle()
        self.rate = 1 / self.idle.ttft_s  # prompts of mean length that one engine reads in a second

    def _idle(self) -> Idle:
        seen = [self.one(BOTH, Shape(MEAN_PROMPT_TOKENS, 30)) for _ in range(5)]
        return Idle(median(record.ttft_s or 0.0 for record in seen), median(record.tpot_s or 0.0 for record in seen))

    def maker(self) -> Maker:
        """Prompts that nobody has seen."""
        run = next(self._runs)
        return Maker(token_prompts(run), Fit(context_tokens=CONTEXT_TOKENS), name=f"run-{run}")

    def client(self, side: str) -> Client:
        return Client(Target(self.urls[side], model="bench"))

    def one(self, side: str, shape: Shape) -> Record:
        """One request alone."""
        calls = self.maker().calls([shape], [0.0], Random(0))
        (record,) = checked(asyncio.run(self.client(side).closed_loop(calls, 1)))
        return record

    def in_turns(self) -> Iterator[tuple[int, str]]:
        """Every repetition on both sides; who begins changes."""
        for repetition in range(self.args.repetitions):
            for side in list(SIDES)[:: 1 if repetition % 2 == 0 else -1]:
                wait_ready(self.urls[side])
                yield repetition, side

    # What the hand-over adds

    def handover_table(self) -> str:
        taken: dict[tuple[str, int], list[float]] = {}
        for _, side in self.in_turns():
            for tokens in (SHORT, LONG):
                seen = [self.one(side, Shape(tokens, 2)).ttft_s or 0.0 for _ in range(6)]
                taken.setdefault((side, tokens), []).append(median(seen))
        rows = []
        for tokens in (SHORT, LONG):
            alone, apart = taken[BOTH, tokens], taken[APART, tokens]
            added = [1e3 * (with_it - without) for without, with_it in zip(alone, apart, strict=True)]
            goal_ms = 1e3 * (ADDED_SHARE * median(alone) + ADDED_S)
            whole, split = (spread([1e3 * value for value in values], digits=0) for values in (alone, apart))
            rows.append(
                [f"{tokens}", whole, split, spread(added, digits=0), f"≤ {goal_ms:.0f}", met(median(added) <= goal_ms)]
            )
        return markdown(["prompt tokens", "TTFT on one engine, ms", "apart, ms", "added, ms", "goal, ms", ""], rows)

    # What running streams feel of long prompts

    def stutter_table(self, drawn: Mapping[str, list[Shape]]) -> str:
        rows = []
        for name, lengths in drawn.items():
            gaps: dict[str, list[list[float]]] = {side: [] for side in SIDES}
            for repetition, side in self.in_turns():
                gaps[side].append(asyncio.run(self._stutter(side, lengths, repetition)))
                self.progress.print(f"ITL {name} {side}: p99 {1e3 * quantile(gaps[side][-1], 0.99):.0f} ms")
            p99 = {side: [1e3 * quantile(run, 0.99) for run in gaps[side]] for side in SIDES}
            p50 = {side: [1e3 * quantile(run, 0.5) for run in gaps[side]] for side in SIDES}
            ratio = [apart / both for both, apart in zip(p99[BOTH], p99[APART], strict=True)]
            cells = [spread(of[side], digits=0) for side in SIDES for of in (p50, p99)]
            rows.append([name, *cells, spread(ratio), met(median(ratio) <= ITL_GOAL)])
        head = [f"{side}: ITL {which}, ms" for side in SIDES for which in ("p50", "p99")]
        return markdown(["lengths", *head, "p99, ÷ 2 × both", "goal ≤ 1/3"], rows)

    async def _stutter(self, side: str, lengths: Sequence[Shape], repetition: int) -> list[float]:
        """Seconds between tokens of streams that run while long prompts come."""
        rng = Random(f"{self.args.seed}:{repetition}")
        end = time.monotonic() + self.args.seconds
        streams = stopping(self.maker().calls(repeat(STREAM), repeat(0.0), rng), end)
        times = list(until(poisson(self.args.load * self.rate, rng), self.args.seconds))
        prompts = self.maker().calls((replace(rng.choice(lengths), output_tokens=2) for _ in times), times, rng)
        ran, _ = await asyncio.gather(
            self.client(side).closed_loop(streams, STREAMS), self.client(side).open_loop(prompts)
        )
        return [gap / 1e6 for record in checked(ran) for gap in record.gaps_us]

    # How much is served inside both objectives

    def goodput_table(self, drawn: Mapping[str, list[Shape]]) -> str:
        rows = []
        for name, lengths in drawn.items():
            best: dict[str, list[list[float]]] = {side: [] for side in SIDES}
            for repetition, side in self.in_turns():
                runs = [self._offered(side, lengths, float(load), repetition) for load in self.args.rates.split(",")]
                best[side].append(goodputs(runs, self.idle.objectives()))
                self.progress.print(f"goodput {name} {side}: {', '.join(f'{one:.2f}/s' for one in best[side][-1])}")
            for at, objective in enumerate(self.idle.objectives()):
                both, apart = ([repetition[at] for repetition in best[side]] for side in SIDES)
                ratio = [mine / other if other else float("inf") for other, mine in zip(both, apart, strict=True)]
                asked = f"{name}, TPOT ≤ {1e3 * objective.tpot_s:.0f} ms"
                rows.append([asked, spread(both), spread(apart), spread(ratio), met(median(ratio) >= GOODPUT_GOAL)])
        head = ["lengths", *(f"{side}: goodput per worker, requests/s" for side in SIDES), "÷ 2 × both"]
        told = f"TTFT ≤ {self.idle.objectives()[0].ttft_s:.2f} s in every row"
        return f"{told}\n\n" + markdown([*head, f"goal ≥ {GOODPUT_GOAL}"], rows)

    def _offered(
        self, side: str, lengths: Sequence[Shape], load: float, repetition: int
    ) -> tuple[float, Sequence[Record]]:
        rng = Random(f"{self.args.seed}:{load}:{repetition}")
        times = list(until(poisson(load * self.rate, rng), self.args.seconds))
        calls = self.maker().calls((rng.choice(lengths) for _ in times), times, rng)
        return load * self.rate, checked(asyncio.run(self.client(side).open_loop(calls)))

    # Whether they say the same

    def equality(self, prompts: int = 24) -> str:
        rng = Random(self.args.seed)
        ids = token_prompts(-1 - self.args.seed)
        asked = [
            ids(number, rng.choice((1, SHORT, 500, 1000, LONG)) + rng.randrange(64), (), 0) for number in range(prompts)
        ]
        same = sum(said(self.urls[APART], prompt) == said(self.urls[BOTH], prompt) for prompt in asked)
        return f"Greedy answers of 32 tokens that are the same, token for token: {same} of {prompts}"


def said(url: str, prompt: object) -> object:
    """The token ids of a greedy answer."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    answer = httpx2.post(
        f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=120.0, trust_env=False
    )
    return answer.raise_for_status().json()["choices"][0]["token_ids"]


def until(times_s: Iterator[float], end_s: float) -> Iterator[float]:
    """Those before the end."""
    for at_s in times_s:
        if at_s >= end_s:
            return
        yield at_s


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


def placements(url: str) -> str:
    """How many requests went which way, and what a transfer took."""
    told = {labels.split('"')[1]: value for labels, value in metrics(url, "evenhand_placements_total").items() if value}
    whole = sum(told.values())
    (took,), (times,) = (metrics(url, f"evenhand_kv_transfer_seconds_{what}").values() for what in ("sum", "count"))
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in sorted(told.items(), key=lambda item: -item[1]))
    return f"{shares}; from read to first bytes {1e3 * took / max(1.0, times):.0f} ms on average"


# The same where engines share no core: simulated, lengths and limits so many times as long.

LONGER = 4
RULES = Rules(busy_tokens=LONGER * Rules().busy_tokens, max_arriving_tokens=LONGER * Rules().max_arriving_tokens)
REQUESTS, WARM_UP = 500, 0.2  # of one run with two engines; the share of them that is not judged: the forecast learns
STEP_TOKENS = (512, 2048)
# Of what one engine reads of prompts of mean length, for two engines.
SIMULATED_LOADS = tuple(at / 20 for at in range(1, 29)) + (1.5, 1.6, 1.7, 1.8, 2.0)


@dataclass(frozen=True)
class SimulatedSide:
    """One division of the engines. goodput: requests a second for each. errors: of predicted times to first token."""

    plan: Plan
    goodput: float
    errors: Sequence[float]

    @classmethod
    def of(cls, plan: Plan, lengths: Sequence[Shape], idle: Idle, objective: Objective) -> "SimulatedSide":
        """By bisection over the loads; the errors are those at the highest load that is inside."""
        rates = [load * (plan.workers + plan.prefill_workers) / WORKERS / idle.ttft_s for load in SIMULATED_LOADS]
        seen: dict[int, tuple[float, list[float]]] = {}
        low, high = -1, len(rates)
        while high - low > 1:
            middle = (low + high) // 2 if seen else len(rates) // 3
            seen[middle] = offered(plan, lengths, rates[middle], objective)
            low, high = (middle, high) if seen[middle][0] >= ATTAINMENT_GOAL else (low, middle)
        points = [(SIMULATED_LOADS[at] / WORKERS / idle.ttft_s, share) for at, (share, _) in seen.items()]
        return cls(plan, goodput(points), seen[low][1] if low >= 0 else [])


def offered(plan: Plan, lengths: Sequence[Shape], rate: float, objective: Objective) -> tuple[float, list[float]]:
    """(share inside the objective, errors of predicted times to first token) of two runs, beginnings left out."""
    judged: list[bool] = []
    errors: list[float] = []
    for seed in range(2):
        rng = Random(f"simulated:{seed}")
        drawn = [rng.choice(lengths) for _ in range(REQUESTS * (plan.workers + plan.prefill_workers) // WORKERS)]
        times = list(islice(poisson(rate, rng), len(drawn)))
        maker, simulation = Maker(lambda *_: [], Fit(context_tokens=1 << 17)), Simulation(plan)
        records = simulation.run(maker.calls(drawn, times, rng)).records
        first = int(WARM_UP * len(times))
        judged += [objective.met(one) for one in records if one.sent_s >= times[first]]
        errors += [abs(1 - ratio) for ratio in simulation.ttft_errors[first:]]
    return mean(judged), errors


def simulated(drawn: Mapping[str, list[Shape]], cost_name: str, engines: int, progress: Console) -> str:
    """Goodput by the simulator: engines that do both, with each step size, some that only read, and by prediction."""
    cost, rows, ratios = PRESETS[cost_name], [], []
    readers = sorted({engines // 4, engines // 2} - {0})
    for name, lengths in drawn.items():
        of = [Shape(LONGER * shape.prompt_tokens, LONGER * shape.output_tokens) for shape in lengths]
        idle = Idle(cost.prefill_s_per_token * mean_lengths(of)[0], cost.iteration_s)
        for objective in idle.objectives():
            sides = [
                SimulatedSide.of(plan, of, idle, objective)
                for plan in (
                    *(Plan(replace(cost, max_batched_tokens=tokens), workers=engines) for tokens in STEP_TOKENS),
                    *(Plan(cost, workers=engines - n, prefill_workers=n, rules=RULES) for n in readers),
                )
            ]
            both = max(sides[: len(STEP_TOKENS)], key=lambda side: side.goodput)
            apart = max(sides[len(STEP_TOKENS) :], key=lambda side: side.goodput)
            asked = Objectives(objective.ttft_s, objective.tpot_s)
            hybrid = SimulatedSide.of(Plan(cost, workers=engines, objectives=asked), of, idle, objective)
            best = max(both.goodput, apart.goodput)
            ratios.append(hybrid.goodput / best if best else inf)
            rows.append(
                [
                    f"{name}, TPOT ≤ {1e3 * objective.tpot_s:.0f} ms",
                    f"{both.goodput:.2f} (steps of {both.plan.cost.max_batched_tokens})",
                    f"{apart.goodput:.2f} ({apart.plan.prefill_workers} read)",
                    f"{hybrid.goodput:.2f}",
                    f"{ratios[-1]:.2f}",
                    ", ".join(f"{100 * quantile(hybrid.errors, at):.0f}" for at in (0.5, 0.9) if hybrid.errors) or "-",
                ]
            )
            progress.print(" | ".join(rows[-1]))
    told = (
        f"Simulated, not measured: cost model {cost_name}, {engines} engines; requests/s per engine with 90 % inside "
        "TTFT and TPOT. By prediction ÷ the better of the others: "
        f"geometric mean {geometric_mean(ratios) if min(ratios) else 0.0:.2f}, least {min(ratios):.2f}"
    )
    head = ["lengths, objective", "best that do both", "best apart", "by prediction", "÷ best"]
    return f"{told}\n\n" + markdown([*head, "error of predicted TTFT, %: p50, p90"], rows)


PARTS: Mapping[str, Callable[[DisaggregationBench, Mapping[str, list[Shape]]], str]] = {
    "handover": lambda bench, drawn: bench.handover_table(),
    "itl": DisaggregationBench.stutter_table,
    "goodput": DisaggregationBench.goodput_table,
    "equality": lambda bench, drawn: bench.equality(),
}
SIMULATED_PART = "simulated"
ALL_PARTS = (*PARTS, SIMULATED_PART)
