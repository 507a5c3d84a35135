"""Whether looking at a few workers places requests as well as looking at all: the same trace under both, simulated."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean

from rich.console import Console

from loadtest.bench.full_scan import FullScan
from loadtest.bench.scale.replicas import made_up
from loadtest.bench.table import machine, markdown, quantile
from loadtest.call import TraceCall
from loadtest.simulator.costmodel import PRESETS
from loadtest.simulator.simulate import Plan, Simulation, block_prompts
from loadtest.traces.formats import TraceRow, read
from loadtest.traces.workload import Fit, Maker, Shape, mean_lengths
from scheduler.routing import Choice

TRACES = {
    "Mooncake": "mooncake_conversation_trace.first2000.jsonl",
    "Azure code": "AzureLLMInferenceTrace_code.csv",
    "Azure conversations": "AzureLLMInferenceTrace_conv.csv",
}
COST, SLOTS, CONTEXT_TOKENS = "gpu-7b", 2, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, help=f"folder with {', '.join(TRACES.values())} (default: made up)")
    parser.add_argument("--workers", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--requests", type=int, default=8000, help="of a trace, at most (default %(default)s)")
    parser.add_argument("--load", type=float, default=0.9, help="offered ÷ what the fleet can do (default %(default)s)")
    parser.add_argument("--length-scale", type=float, default=1 / 8, help="multiply lengths (default 1/8)")


def run(args: argparse.Namespace) -> int:
    """Simulates and prints the table."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    rows = []
    for name, trace in traces(args).items():
        progress.print(name)
        calls = placed_calls(trace[: args.requests], args)
        scan, index = (simulated(calls, args.workers, choice) for choice in (FullScan, Choice))
        rows.append([name, f"{len(calls):,}", *compared(scan, index)])
    console.print(machine())
    console.print(f"{args.workers:,} workers with {SLOTS} slots, load {args.load:g}; all workers looked at → a few")
    console.print(markdown(["trace", "requests", "mean TTFT, s", "P99 TTFT, s", "prompt tokens found in caches"], rows))
    return 0


def traces(args: argparse.Namespace) -> dict[str, list[TraceRow]]:
    """Rows by the trace's name."""
    if args.traces is None:
        return {"made up": made_up(Random(0))}
    return {name: list(read(args.traces / file)) for name, file in TRACES.items()}


def placed_calls(rows: Sequence[TraceRow], args: argparse.Namespace) -> list[TraceCall]:
    """The trace's requests in its rhythm, so fast that the fleet is as busy as `--load` says."""
    fit = Fit(length_scale=args.length_scale, context_tokens=CONTEXT_TOKENS)
    prompt_tokens, output_tokens = mean_lengths([fit(Shape(row.prompt_tokens, row.output_tokens)) for row in rows])
    cost = replace(PRESETS[COST], max_seqs=SLOTS)
    rate = cost.saturation_tokens_per_s(prompt_tokens, output_tokens) * args.workers * args.load / output_tokens
    first, last = rows[0].at_s or 0.0, rows[-1].at_s or 1.0
    stretch = len(rows) / rate / max(1e-9, last - first)
    times = [((row.at_s or 0.0) - first) * stretch for row in rows]
    return list(Maker(block_prompts(cost.prefix_block_tokens), fit, wait=False).replay(rows, times, Random(0)))


Placed = tuple[list[float], float]  # seconds to the first token, and the share of prompt tokens found in caches


def simulated(calls: Sequence[TraceCall], workers: int, choice: type[Choice]) -> Placed:
    """One run."""
    plan = Plan(replace(PRESETS[COST], max_seqs=SLOTS), workers=workers)
    done = Simulation(plan, choice=choice).run(calls)
    return [record.ttft_s or 0.0 for record in done.records], done.prefix_hits


def compared(scan: Placed, index: Placed) -> list[str]:
    """Both figures, and how far they are apart."""

    def cell(one: float, other: float) -> str:
        return f"{one:.3f} → {other:.3f} ({other / one - 1:+.1%})" if one else f"{one:.3f} → {other:.3f}"

    return [
        cell(mean(scan[0]), mean(index[0])),
        cell(quantile(scan[0], 0.99), quantile(index[0], 0.99)),
        cell(scan[1], index[1]),
    ]
