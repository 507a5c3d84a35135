"""`evenhand calibrate`: a cost model fitted to an engine over HTTP, and how well it foretells requests it has not seen.

One request at a time with prompts of growing length says what prefill and a request as such cost; batches of growing
size, and one of long prompts, say what decode and attention cost. All are fitted together, each by its relative error.
"""

import argparse
import asyncio
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from statistics import fmean, median
from time import perf_counter

import httpx2
import numpy as np
import orjson
from numpy.typing import NDArray
from rich.console import Console

from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.client.samples import Sampler
from loadtest.records import Record, Sample
from loadtest.replay.replay import CannotReplay, served
from loadtest.simulator.costmodel import CostModel
from loadtest.simulator.kv_blocks import block_hashes
from loadtest.simulator.simulate import Plan, Simulation
from loadtest.traces import arrivals
from loadtest.traces.prompts import Prompts, token_prompts
from loadtest.traces.workload import MIXES, Fit, Maker, shapes

Floats = NDArray[np.float64]

_PROBES = 3
_PROMPT_LENGTHS = (16, 64, 128, 256, 512, 1024, 1536)
_SHORT_TOKENS, _LONG_TOKENS = 32, 1024
_ANSWER_TOKENS = 48
_MOST_SLOTS, _FLOOD_TOKENS = 256, 4
_BLOCKS = re.compile(r'vllm:cache_config_info\{.*?block_size="(\d+)".*?num_gpu_blocks="(\d+)"')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", required=True, help="address of the engine, which must be idle, e.g. http://127.0.0.1:8101"
    )
    parser.add_argument("--out", type=Path, help="file for the cost model, for --cost-file")
    parser.add_argument("--model", help="model name (default: the first that the server lists)")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--slots", type=int, help="batch slots (default: as the engine reports)")
    parser.add_argument(
        "--batched-tokens", type=int, default=2048, help="vLLM's --max-num-batched-tokens (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, help="context length, tokens (default: as the server reports)")
    parser.add_argument(
        "--check", type=int, default=100, metavar="N", help="requests to predict for the check (default: %(default)s)"
    )
    parser.add_argument(
        "--workload", choices=sorted(MIXES), default="S", help="workload of the check (default: %(default)s)"
    )
    parser.add_argument(
        "--load", type=float, default=0.7, help="load of the check, as a share of the capacity (default: %(default)s)"
    )
    parser.add_argument(
        "--length-scale", type=float, default=0.1, help="multiply the lengths of the check (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="timeout of a request, seconds (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """0, or 2 when the engine does not answer."""
    screen = Console(stderr=True)
    try:
        engine = ProbedEngine(args)
        fitted = engine.fit(screen)
    except (CannotReplay, ValueError, OSError) as error:
        screen.print(f"evenhand calibrate: {error}", style="red", markup=False, highlight=False)
        return 2
    text = orjson.dumps(asdict(fitted.cost), option=orjson.OPT_INDENT_2).decode()
    if args.out:
        args.out.write_text(text + "\n")
    sys.stdout.write(f"{text}\n{fitted}\n")
    if args.check:
        sys.stdout.write(f"{engine.check(fitted.cost)}\n")
    return 0


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One kind of iteration as it was timed. request: the time includes a request's way to the batch and back."""

    prefill_tokens: int
    sequences: int
    kv_tokens: int
    duration_s: float
    request: bool = False


@dataclass(frozen=True, slots=True)
class Fitted:
    """errors: of each kind of iteration, relative."""

    cost: CostModel
    errors: Sequence[float]

    def __str__(self) -> str:
        worst, middle = max(map(abs, self.errors)), median(map(abs, self.errors))
        return f"{len(self.errors)} kinds of iteration, error {middle:.1%} in the median and {worst:.1%} at most"


def fit(seen: Sequence[ProbeResult], like: CostModel) -> Fitted:
    """Least squares of the relative errors, no cost below zero. ValueError with fewer kinds than there are costs."""
    if len(seen) < 5:
        raise ValueError("There are too few measurements to fit a cost model.")
    rows = np.array(
        [[1.0, one.prefill_tokens, one.sequences, one.kv_tokens, float(one.request)] for one in seen], dtype=np.float64
    )
    times = np.array([one.duration_s for one in seen])
    weighted = rows / times[:, None]
    costs = _no_less_than_zero(weighted, np.ones(len(seen)))
    errors = rows @ costs / times - 1.0
    iteration_s, prefill_s, decode_s, attention_s, request_s = (float(cost) for cost in costs)
    cost = replace(
        like,
        iteration_s=iteration_s,
        prefill_s_per_token=prefill_s,
        decode_s_per_sequence=decode_s,
        attention_s_per_kv_token=attention_s,
        start_s_per_sequence=request_s,
    )
    return Fitted(cost, [float(error) for error in errors])


def _no_less_than_zero(rows: Floats, goal: Floats) -> Floats:
    """Least squares over the columns that come out positive: the most negative leaves until none is."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)
    columns = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, columns] / scale[columns], goal, rcond=None)[0]
        if not found.size or found.min() >= 0:
            break
        columns.pop(int(found.argmin()))
    costs = np.zeros(rows.shape[1])
    costs[columns] = found / scale[columns]
    return costs


@dataclass(frozen=True, slots=True)
class CalibrationCheck:
    """Measured against foretold, request by request."""

    pairs: Sequence[tuple[Record, Record]]

    def __str__(self) -> str:
        parts = []
        for name, of in (("TTFT", _ttft_s), ("E2E", _e2e_s)):
            real, told = (np.array([of(pair[at]) for pair in self.pairs]) for at in (0, 1))
            p99 = np.percentile(told, 99) / np.percentile(real, 99) - 1.0
            parts.append(f"{name}: {np.median(np.abs(told / real - 1.0)):.1%} in the median, {p99:+.1%} at P99")
        return f"error on {len(self.pairs)} requests that it has not seen: {'; '.join(parts)}"


def _ttft_s(record: Record) -> float:
    return record.ttft_s or 0.0


def _e2e_s(record: Record) -> float:
    return record.e2e_s


class Probes:
    """What is asked of an idle engine to see what its iterations cost.

    ask: sends calls, so many at a time, and returns their records; it raises where one fails.
    most_tokens: of a prompt, so that it is read in one iteration.
    """

    def __init__(
        self, ask: Callable[[Sequence[TraceCall], int], Sequence[Record]], prompts: Prompts, context_tokens: int,
        most_tokens: int,
    ) -> None:  # fmt: skip
        self._send = ask
        self._prompts = prompts
        self._context_tokens = context_tokens
        self._most_tokens = min(most_tokens, context_tokens - 2)
        self._numbers = count()

    def seen(self, slots: int) -> list[ProbeResult]:
        """Prompts one at a time, and batches up to so many slots. CannotReplay if the engine is too fast to overlap."""
        self._ask(_PROBES, 1, _SHORT_TOKENS, 2)  # the first requests of an engine are slower than all later ones
        return [*self._prefill(), *self._decode(slots)]

    def prompt(self, tokens: int) -> list[int] | str:
        """One that was not asked before."""
        return self._prompts(next(self._numbers), tokens, (), 0)

    def _prefill(self) -> Iterator[ProbeResult]:
        for tokens in (length for length in _PROMPT_LENGTHS if length <= self._most_tokens):
            records = self._ask(_PROBES, 1, tokens, 1)
            yield ProbeResult(tokens, 0, 0, median(record.ttft_s or 0.0 for record in records), request=True)

    def _decode(self, slots: int) -> Iterator[ProbeResult]:
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < slots] + [slots]
        for size in sizes:
            yield self._batch(size, _SHORT_TOKENS)
        long_tokens = min(_LONG_TOKENS, self._context_tokens - _ANSWER_TOKENS)
        for size in {1, max(1, slots // 2)}:
            yield self._batch(size, long_tokens)

    def _batch(self, size: int, prompt_tokens: int) -> ProbeResult:
        """Gaps of a batch in which all decode: those between the last first token and the first last one."""
        records = self._ask(size, size, prompt_tokens, _ANSWER_TOKENS)
        begin = max(record.sent_s + (record.ttft_s or 0.0) for record in records)
        gaps_s = []
        for record in records:
            at_s = record.sent_s + (record.ttft_s or 0.0)
            for gap_us in record.gaps_us:
                if at_s >= begin and gap_us:
                    gaps_s.append(gap_us / 1e6)
                at_s += gap_us / 1e6
        if not gaps_s:
            raise CannotReplay("The answers did not overlap: give fewer --slots.")
        return ProbeResult(0, size, size * (prompt_tokens + _ANSWER_TOKENS // 2), fmean(gaps_s))

    def _ask(self, number: int, concurrency: int, prompt_tokens: int, output_tokens: int) -> Sequence[Record]:
        calls = [
            TraceCall(
                f"probe-{at}", 0.0, "default", self._prompts(at, prompt_tokens, (), 0), prompt_tokens, output_tokens
            )
            for at in (next(self._numbers) for _ in range(number))
        ]
        return self._send(calls, concurrency)


class ProbedEngine:
    """An engine that is probed. Everything here talks to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        """CannotReplay if it does not say what it serves."""
        self._args = args
        model, context_tokens = served(args.url, args.key, args.model)
        self._target = Target(args.url, model, args.key, timeout_s=args.timeout)
        self._context_tokens = args.context or context_tokens or 2048
        self._prompts = token_prompts(args.seed)
        self._probes = Probes(self._ask, self._prompts, self._context_tokens, args.batched_tokens)

    def fit(self, screen: Console) -> Fitted:
        """CannotReplay if a probe fails, ValueError if the engine does not tell its slots and nobody else does."""
        slots = self._args.slots or self._slots()
        screen.print(f"{slots} slots; probing", highlight=False)
        seen = self._probes.seen(slots)
        return fit(seen, self._with_kv(CostModel(max_seqs=slots, max_batched_tokens=self._args.batched_tokens)))

    def check(self, cost: CostModel) -> CalibrationCheck:
        """Sends a workload, and simulates the very same calls at the times at which they were sent."""
        args = self._args
        calls = list(self._workload(cost))
        client = Client(self._target)
        asyncio.run(client.open_loop(calls))
        sent = {record.id: record for record in client.records if record.ok}
        again = []
        for call in sorted(calls, key=lambda one: sent[one.id].sent_s if one.id in sent else one.at_s):
            if call.id in sent:
                blocks = block_hashes(call.prompt, cost.prefix_block_tokens) if isinstance(call.prompt, list) else ()
                again.append(replace(call, at_s=sent[call.id].sent_s, prompt=list(blocks), waits=False))
        told = Simulation(Plan(cost, gateway=False)).run(again).records
        if not told:
            raise CannotReplay(f"{args.url} ended none of the check's requests well.")
        return CalibrationCheck([(sent[record.id], record) for record in told])

    def _workload(self, cost: CostModel) -> Iterator[TraceCall]:
        args = self._args
        maker = Maker(self._prompts, Fit(args.length_scale, self._context_tokens), name="check")
        drawn = [
            shape for shape, _ in zip(shapes(args.workload, Random(args.seed + 1)), range(args.check), strict=False)
        ]
        fitted = [maker.fit(shape) for shape in drawn]
        prompt, output = (
            float(np.mean([getattr(one, name) for one in fitted])) for name in ("prompt_tokens", "output_tokens")
        )
        rate = args.load * cost.saturation_tokens_per_s(prompt, output) / output
        return maker.calls(drawn, arrivals.poisson(rate, Random(args.seed + 2)), Random(args.seed + 3))

    def _ask(self, calls: Sequence[TraceCall], concurrency: int) -> Sequence[Record]:
        client = Client(self._target)
        asyncio.run(client.closed_loop(calls, concurrency))
        bad = [record for record in client.records if not record.ok]
        if bad:
            raise CannotReplay(f"A probe failed: {bad[0].ending.value}, {bad[0].error or 'no reason given'}")
        return client.records

    def _slots(self) -> int:
        """How many the engine runs at once when it has more than enough to do, as it says itself."""
        seen: list[Sample] = []

        async def flood() -> None:
            calls = [
                TraceCall(f"flood-{at}", 0.0, "default", self._probes.prompt(8), 8, _FLOOD_TOKENS)
                for at in range(_MOST_SLOTS)
            ]
            async with Sampler([self._args.url], seen.append, perf_counter, period_s=0.1) as sampler:
                task = asyncio.create_task(sampler.run())
                await Client(self._target).closed_loop(calls, _MOST_SLOTS)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(flood())
        most = max((int(sample.running) for sample in seen if sample.running), default=0)
        if not most:
            raise ValueError("The server does not say how many requests it runs: give --slots.")
        return most

    def _with_kv(self, cost: CostModel) -> CostModel:
        """With the KV cache's room by the engine's own metrics, if it says; one of its blocks holds nothing."""
        try:
            page = httpx2.get(f"{self._args.url.rstrip('/')}/metrics", timeout=10).text
        except httpx2.HTTPError:
            return cost
        found = _BLOCKS.search(page)
        if found is None:
            return cost
        size = int(found[1])
        return replace(cost, prefix_block_tokens=size, kv_capacity_tokens=size * (int(found[2]) - 1))
