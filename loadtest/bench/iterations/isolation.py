"""Isolation inside a real engine: a light tenant's time to first token alone, and while another floods the engine.

Both tenants draw their lengths from one workload. The light one sends the same calls alone and beside the flood, and a
run ends with the last of them.
"""

import argparse
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.bench.policies.policies_bench import Draws
from loadtest.call import TraceCall
from loadtest.records import read
from loadtest.report import report

LIGHT, FLOOD = "light", "flood"

# Policy ("" for stock), light requests per second, flood by the light tenant's rate, repetition → what an engine told.
Ask = Callable[[str, float, float, int], Mapping[str, Any]]


def calls_of(
    draws: Draws, workload: str, light_per_s: float, flood: float, repetition: int, jobs: int
) -> list[TraceCall]:
    """`jobs` calls of the light tenant, and the flood's until the last of them, in order of time."""
    light = list(replace(draws, shares={LIGHT: 1.0}).calls(workload, light_per_s, repetition, jobs))
    if not flood:
        return light
    other = replace(draws, shares={FLOOD: 1.0}, seed=draws.seed + 500)
    drawn = other.calls(workload, light_per_s * flood, repetition, round(3 * jobs * flood))
    flooding = takewhile(lambda call: call.at_s <= light[-1].at_s, (replace(c, id=f"flood-{c.id}") for c in drawn))
    return list(heapq.merge(light, flooding, key=lambda call: call.at_s))


def ttft_of(path: Path) -> report.Spread:
    """The light tenant's, in seconds."""
    _, records = read(path)
    return report.spread(
        record.ttft_s for record in records if record.tenant == LIGHT and record.ttft_s is not None
    )  # fmt: skip


def compare(args: argparse.Namespace, names: Sequence[str], saturation_per_s: Callable[[int], float], ask: Ask) -> str:
    """All runs; the page in Markdown."""
    seen: dict[str, list[tuple[report.Spread, report.Spread]]] = {name: [] for name in names}
    for repetition in range(args.repetitions):
        light_per_s = saturation_per_s(repetition) * args.light
        for name in names:
            alone, flooded = (
                ttft_of(Path(ask(name, light_per_s, flood, repetition)["out"])) for flood in (0.0, args.flood)
            )
            seen[name].append((alone, flooded))
    return page_of(args, seen)


def page_of(args: argparse.Namespace, seen: Mapping[str, Sequence[tuple[report.Spread, report.Spread]]]) -> str:
    """Medians over the repetitions, and the range of the ratio."""
    rows: report.Rows = [["engine", "P50 alone", "P50 flooded", "P99 alone", "P99 flooded", "P99: flooded ÷ alone"]]
    for name, pairs in seen.items():
        cells = [
            report.seconds(median(values))
            for values in (
                [alone.p50 for alone, _ in pairs], [flooded.p50 for _, flooded in pairs],
                [alone.p99 for alone, _ in pairs], [flooded.p99 for _, flooded in pairs],
            )
        ]  # fmt: skip
        ratios = sorted(flooded.p99 / alone.p99 for alone, flooded in pairs)
        rows.append([name, *cells, f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"])
    head = (
        f"A light tenant's TTFT at {args.light:g} of saturation, alone and beside a flood of {args.flood:g} times as "
        f"many requests; medians of {args.repetitions} repetitions of {args.limit} requests."
    )
    return f"{head}\n\n{report.markdown(rows)}\n"
