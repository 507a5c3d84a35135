"""Isolation: a light tenant's time to first token alone, and while another floods the same engine.

    python -m loadtest.isolation_bench \
        --target 'vtc=python -m loadtest.fake_engine --port {port} --max-seqs {slots} --policy vtc'

Both tenants draw the same workload's lengths. The light one sends the same calls alone and beside the flood; its
requests are judged, the flood's are dropped when the light tenant's last call has been sent.
"""

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, takewhile
from random import Random
from statistics import median

from rich.console import Console

from loadtest import arrivals, policies_bench, report
from loadtest.bench_target import BenchTarget, CannotStart
from loadtest.call import Call
from loadtest.policies_bench import Bench, Setting
from loadtest.prompts import token_prompts
from loadtest.records import Record
from loadtest.replay import CannotReplay
from loadtest.workload import Maker, shapes

LIGHT, FLOOD = "light", "flood"
_DRAIN_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    policies_bench.add_arguments(parser)
    parser.add_argument("--light", type=float, default=0.2, help="the light tenant's load by saturation (default: 0.2)")
    parser.add_argument("--flood", type=float, default=10.0, help="the other's, by the light one's (default: 10)")


def run(args: argparse.Namespace) -> int:
    """0, or 2 when a target cannot be started or asked."""
    screen = Console(stderr=True)
    try:
        bench = Bench(args, [BenchTarget.parse(text) for text in args.target], screen)
        pairs = Isolation(args, bench).run()
    except (CannotStart, CannotReplay, ValueError, OSError) as error:
        screen.print(f"isolation_bench: {error}", style="red", markup=False, highlight=False)
        return 2
    page = page_of(args, pairs)
    (args.out / "isolation.md").write_text(page)
    sys.stdout.write(page)
    return 0


@dataclass(frozen=True, slots=True)
class Pair:
    """One repetition: the light tenant alone and beside the flood. TTFT in seconds."""

    alone: report.Spread
    flooded: report.Spread


class Isolation:
    """Each repetition measures every target twice, neighbours in time."""

    def __init__(self, args: argparse.Namespace, bench: Bench) -> None:
        self._args = args
        self._bench = bench
        self._slots = int(str(args.slots).split(",")[0])
        self._workload = str(args.workloads).split(",")[0]

    def run(self) -> dict[str, list[Pair]]:
        bench = self._bench
        pairs: dict[str, list[Pair]] = {target.name: [] for target in bench.targets}
        with ExitStack() as stack:
            urls = {
                target.name: stack.enter_context(bench.started(target, self._slots))
                for target in bench.targets
            }  # fmt: skip
            rate = bench.saturation(self._workload, self._slots, urls)
            for repetition in range(self._args.repetitions):
                for target in bench.targets:
                    spreads = [self._one(target, urls, repetition, rate, flood) for flood in (0.0, self._args.flood)]
                    pairs[target.name].append(Pair(*spreads))
        return pairs

    def _one(
        self, target: BenchTarget, urls: dict[str, str], repetition: int, rate: float, flood: float
    ) -> report.Spread:
        setting = Setting(self._workload, self._slots, max(flood, 1.0), self._args.limit)
        name = f"isolation-{target.name}-{flood:g}-{repetition}"
        calls = self._calls(repetition, rate * self._args.light, flood)
        records = self._bench.measure(target, setting, urls, calls, name, drain_s=_DRAIN_S)
        ttft = light_ttft(records)
        self._bench.say(f"{name}: light TTFT p50 {report.seconds(ttft.p50)}  p99 {report.seconds(ttft.p99)}")
        return ttft

    def _calls(self, repetition: int, rate: float, flood: float) -> Iterator[Call]:
        light = list(islice(self._of(LIGHT, rate, repetition), self._args.limit))
        if not flood:
            return iter(light)
        end_s = light[-1].at_s
        flooding = takewhile(lambda call: call.at_s <= end_s, self._of(FLOOD, rate * flood, repetition))
        return heapq.merge(light, flooding, key=lambda call: call.at_s)

    def _of(self, tenant: str, rate: float, repetition: int) -> Iterator[Call]:
        seed = self._args.seed * 1000 + repetition * 2 + (tenant == FLOOD)
        maker = Maker(token_prompts(seed), self._bench.fit, {tenant: 1.0}, tenant)
        drawn = shapes(self._workload, Random(seed + 1), self._args.traces)
        return maker.calls(drawn, arrivals.poisson(rate, Random(seed + 2)), Random(seed + 3))


def light_ttft(records: Sequence[Record]) -> report.Spread:
    """Of the light tenant's requests; one that saw no token counts with the time that it waited."""
    mine = [record for record in records if record.tenant == LIGHT]
    return report.spread(record.e2e_s if record.ttft_s is None else record.ttft_s for record in mine)


def page_of(args: argparse.Namespace, pairs: dict[str, list[Pair]]) -> str:
    """In Markdown."""
    rows: report.Rows = [["engine", "P50 alone", "P50 flooded", "P99 alone", "P99 flooded", "flooded ÷ alone, P99"]]
    for name, seen in pairs.items():
        cells = [
            report.seconds(median(values))
            for values in (
                [pair.alone.p50 for pair in seen], [pair.flooded.p50 for pair in seen],
                [pair.alone.p99 for pair in seen], [pair.flooded.p99 for pair in seen],
            )
        ]  # fmt: skip
        ratios = sorted(pair.flooded.p99 / pair.alone.p99 for pair in seen)
        rows.append([name, *cells, f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"])
    head = (
        f"A light tenant's TTFT, its load {args.light:g} of saturation, alone and beside a flood of {args.flood:g} "
        f"times as many requests; {len(next(iter(pairs.values())))} repetitions, medians and range."
    )
    return f"{head}\n\n{report.markdown(rows)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.isolation_bench", description=(__doc__ or "").partition("\n")[0]
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
