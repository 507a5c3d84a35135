"""What Gittins costs and gains by itself: `python -m tests.scheduler.no_regret --traces FOLDER` prints a table of docs.

Each trace and each law of lengths at three loads: 1,000 jobs on 8 slots, Poisson arrivals, a step of 9 ms that takes as
long again for every 256 tokens. Gittins knows the lengths of 1,000 others of the same kind. Stock is first come, first
served in the same simulator. With `--memory 12` there are 64 slots, and KV memory for 12 requests of mean size.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median

from loadtest.simulator.costmodel import CostModel
from loadtest.traces.formats import read
from loadtest.traces.workload import shapes
from scheduler.catalog import choose
from tests.scheduler.simulated import LENGTHS, Lived, Size, arrivals, cost, live, p99, work

JOBS = 1000
LOADS = (0.7, 0.9, 1.2)
STEP_S = 0.009
SHORT_SLOTS = 64
MIXES: Mapping[str, float] = {"S": 0.1, "C": 0.2, "R": 0.15}  # and by how much their lengths are scaled
FILES: Mapping[str, str] = {
    "Azure chat": "AzureLLMInferenceTrace_conv.csv",
    "Azure code": "AzureLLMInferenceTrace_code.csv",
    "Mooncake": "mooncake_conversation_trace.first2000.jsonl",
    "Chatbot Arena": "vtc_arena_real_trace.csv",
    "ShareGPT, all turns": "sharegpt_v3_lengths.first2000convs.csv",
}


def sizes(name: str, traces: Path, seed: int) -> tuple[list[Size], list[Size]]:
    """The jobs to serve and those to learn from."""
    if name in LENGTHS:
        drawn = work(name, 2 * JOBS, seed)
    elif name in MIXES:
        scale = MIXES[name]
        some = islice(shapes(name, random.Random(seed * 1000 + 1), traces), 2 * JOBS)
        drawn = [
            (max(1, round(each.prompt_tokens * scale)), max(1, round(each.output_tokens * scale))) for each in some
        ]
    else:
        rows = read(traces / FILES[name])
        return _part(
            [(row.prompt_tokens, row.output_tokens) for row in rows if row.prompt_tokens and row.output_tokens], seed
        )
    return drawn[:JOBS], drawn[JOBS:]


def _part(rows: list[Size], seed: int) -> tuple[list[Size], list[Size]]:
    """Of a trace as many rows as are wanted, other ones for each seed as far as there are."""
    jobs = min(JOBS, len(rows) // 2)
    first = seed * jobs % (len(rows) - 2 * jobs + 1)
    part = rows[first : first + 2 * jobs]
    return (part[jobs:], part[:jobs]) if seed % 2 else (part[:jobs], part[jobs:])


def measures(lived: Lived) -> tuple[float, float, float]:
    """Mean JCT, P99 TTFT and P99 JCT in seconds."""
    return mean(lived.end_s.values()), p99(lived.first_s.values()), p99(lived.end_s.values())


def short_of_memory(jobs: Sequence[Size], requests: int, slots: int = SHORT_SLOTS) -> CostModel:
    """Memory for so many requests of mean size, or for the largest one if that needs more."""
    tokens = [prompt + made for prompt, made in jobs]
    kv_tokens = max(round(requests * mean(tokens)), round(1.1 * max(tokens)))
    return replace(cost(STEP_S), max_seqs=slots, kv_capacity_tokens=kv_tokens)


def ratios(name: str, load: float, seed: int, policy: str, traces: Path, memory: int | None = None) -> list[float]:
    """Stock's by the policy's."""
    jobs, others = sizes(name, traces, seed)
    if memory is None:
        engine, times = cost(STEP_S), arrivals(jobs, load, seed + 77, STEP_S)
    else:
        engine = short_of_memory(jobs, memory)
        full_s = max(live("fcfs", {}, jobs, [0.0] * len(jobs), engine=engine).end_s.values())
        unit = arrivals(jobs, 1.0, seed + 77, STEP_S)
        times = [at * full_s / (load * unit[-1]) for at in unit]
    stock = measures(live("fcfs", {}, jobs, times, engine=engine))
    ours = measures(live(*choose(policy), jobs, times, others, engine=engine))
    return [one / other for one, other in zip(stock, ours, strict=True)]


def lines(
    names: Sequence[str], policy: str, seeds: Sequence[int], traces: Path, memory: int | None = None
) -> Iterator[str]:
    """The table as Markdown."""
    yield "| lengths | load | mean JCT | P99 TTFT | P99 JCT |"
    yield "| --- | --- | --- | --- | --- |"
    for name in names:
        for load in LOADS:
            seen = zip(*(ratios(name, load, seed, policy, traces, memory) for seed in seeds), strict=True)
            cells = (f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in seen)
            yield f"| {name} | {load:g} | {' | '.join(cells)} |"


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    parser.add_argument("--policy", default="gittins", help="NAME[:KEY=VALUE…] (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of each (default: %(default)s)")
    parser.add_argument("--memory", type=int, help="KV memory in mean requests, with 64 slots (default: plenty, 8)")
    parser.add_argument("--only", help="of the traces and laws (default: all)")
    args = parser.parse_args()
    names = [args.only] if args.only else [*LENGTHS, *MIXES, *FILES]
    for line in lines(names, args.policy, range(1, args.seeds + 1), args.traces, args.memory):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
