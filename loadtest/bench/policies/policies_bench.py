"""Policies side by side: workloads S, C, R, A or a trace, at several loads and batch sizes, as ratios with spread.

    python -m loadtest.bench.policies.policies_bench --out runs/policies \
        --target 'fcfs=python -m loadtest.fake.engine --port {port} --max-seqs {slots} --policy fcfs' \
        --target 'gittins=python -m loadtest.fake.engine --port {port} --max-seqs {slots} --policy gittins'

The first target is the baseline. Within one repetition every target gets the very same calls, and ratios are taken
there, so that what changes on the machine from minute to minute falls out.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median
from typing import Self, TypeVar

from rich.console import Console

from loadtest.bench.bench_target import BenchTarget, CannotStart, running
from loadtest.call import TraceCall
from loadtest.client.client import Target
from loadtest.records import Record
from loadtest.replay.replay import CannotReplay, Prepared, measure, served
from loadtest.report import report
from loadtest.report.comparison import measure as measure_named
from loadtest.report.comparison import repeated
from loadtest.traces import arrivals
from loadtest.traces.formats import Skipped, TraceRow, read
from loadtest.traces.prompts import Prompts, token_prompts
from loadtest.traces.workload import (
    CONVERSATIONS,
    WORKLOADS,
    Fit,
    Maker,
    Shape,
    conversations,
    mean_lengths,
    mean_turns,
    parse_shares,
    shapes,
)

# Enough requests to fill every slot many times over; their rate is what the engine can do. An engine's first batches
# are slower than all later ones: every target is warmed up before anything is measured.
SATURATING_ROUNDS = 100
_WARMING_PART = 0.08
_MEAN_OF = 20_000


@dataclass(frozen=True, slots=True)
class Setting:
    """What one comparison is made under. load: offered rate ÷ the baseline's saturation; jobs: how many requests."""

    workload: str
    slots: int
    load: float
    jobs: int


# Workload A: the requests of Chatbot Arena that VTC was published with: 27 tenants, their lengths and their times.
ARENA = "A"
ARENA_FILE = "vtc_arena_real_trace.csv"


def arena(traces: Path | None) -> list[TraceRow]:
    """The rows of the Arena trace. ValueError without it, for its tenants cannot be made up."""
    if traces is None or not (traces / ARENA_FILE).is_file():
        raise ValueError(f"Workload {ARENA} needs the folder with {ARENA_FILE}: give --traces.")
    return list(read(traces / ARENA_FILE))


def rows_of(workload: str, traces: Path | None) -> list[TraceRow]:
    """The rows of the Arena trace or of a trace file. ValueError if there is none."""
    if workload == ARENA:
        return arena(traces)
    if not Path(workload).is_file():
        raise ValueError(
            f"There is no workload {workload}: choose of {', '.join(WORKLOADS)}, {ARENA}, or give the path of a trace."
        )
    rows = list(read(Path(workload)))
    if not rows:
        raise ValueError(f"{workload} has no row that can be replayed.")
    return rows


def label(workload: str) -> str:
    """The workload's name, for files and titles: a trace's own without folder and ending."""
    return Path(workload).stem


# What came of each run, by target, one per repetition, in the same order.
Outcome = TypeVar("Outcome")
Results = dict[Setting, dict[str, list[Outcome]]]

# As scheduling papers call them, and as `sides` measures them. Smaller is better for all.
MEASURES: Mapping[str, Callable[[report.Summary], float]] = {
    "mean JCT": measure_named("E2E, mean").pick,
    "P99 JCT": measure_named("E2E, P99").pick,
    "mean time per token": measure_named("E2E per token, mean").pick,
    "P99 TTFT": measure_named("TTFT, P99").pick,
    "P99 longest gap": measure_named("longest gap, P99").pick,
    "max service difference": measure_named("service difference, max").pick,
    "mean service difference": measure_named("service difference, mean").pick,
    "span": lambda summary: summary.duration_s,
}


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked of every target, and how often."""
    parser.add_argument(
        "--workloads", default="S,C,R", help=f"of {', '.join(WORKLOADS)}, {ARENA}, or trace files (default: S,C,R)"
    )
    parser.add_argument(
        "--loads", default="0.7,1.0,1.2", metavar="LOAD[:JOBS],…",
        help="offered rate by saturation, 3:200 for a burst of 200 at three times it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--slots", default="8,16", help="batch slots (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="of every run, interleaved (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="requests per run (default: %(default)s)")
    parser.add_argument("--length-scale", type=float, default=1.0, help="multiply all lengths (default: %(default)s)")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="multiply prompts more (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens that a request may have in all (default: %(default)s)"
    )
    parser.add_argument("--shares", default="heavy=3,light=1", help="requests by tenant (default: %(default)s)")
    parser.add_argument("--traces", type=Path, help="folder of trace files (default: quantiles of the same traces)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", action="append", required=True, metavar="NAME=URL|COMMAND",
        help="what to measure, the baseline first; a command is started with {port} and {slots} filled in",
    )  # fmt: skip
    add_workload_arguments(parser)
    parser.add_argument("--saturation", type=float, help="requests per second at saturation (default: measured)")
    add_saturating_rounds(parser)
    parser.add_argument("--ready", type=float, default=300.0, help="seconds a command may take to serve (default: 300)")
    parser.add_argument("--timeout", type=float, default=600.0, help="patience per request, seconds (default: 600)")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="restart for every run, one engine alive at a time"
    )
    parser.add_argument(
        "--tenant-xargs", action="store_true", help="name the tenant in vllm_xargs (engine, no gateway)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/policies"), help="records and logs (default: runs/policies)"
    )


def add_saturating_rounds(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "--saturating-rounds", type=int, default=SATURATING_ROUNDS, metavar="N",
        help="requests per slot that measure a real engine's saturation (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0, or 2 when a target does not start or does not answer."""
    screen = Console(stderr=True)
    try:
        bench = PoliciesBench(args, [BenchTarget.parse(text) for text in args.target], screen)
        results = bench.run()
    except (CannotStart, CannotReplay, ValueError, OSError) as error:
        screen.print(f"policies_bench: {error}", style="red", markup=False, highlight=False)
        return 2
    page = f"{page_of(results, MEASURES)}\n## Requests that did not end well\n\n{_failures(results) or 'None.'}\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "policies.md").write_text(page)
    sys.stdout.write(page)
    return 0


@dataclass(frozen=True, slots=True)
class Draws:
    """Where the calls of every run come from: the same for every target of a repetition."""

    fit: Fit
    shares: Mapping[str, float]
    traces: Path | None
    seed: int
    rows: Mapping[str, Sequence[TraceRow]]
    prompts: Callable[[int], Prompts] = token_prompts

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As the options say. ValueError for a workload that there is not, or without its trace."""
        rows = {name: rows_of(name, args.traces) for name in args.workloads.split(",") if name not in WORKLOADS}
        fit = Fit(args.length_scale, args.context, args.prompt_scale)
        return cls(fit, parse_shares(args.shares), args.traces, args.seed, rows)

    def calls(self, workload: str, rate: float, repetition: int, number: int) -> Iterator[TraceCall]:
        """`number` calls at `rate` per second: Poisson, or at the trace's times, stretched, where it has some."""
        seed = self.seed * 1000 + repetition
        maker = Maker(self.prompts(seed), self.fit, self.shares)
        poisson = arrivals.poisson(rate, Random(seed + 2))
        rows = self.rows.get(workload)
        if workload == CONVERSATIONS:
            begin_s = arrivals.poisson(rate / mean_turns(self.traces), Random(seed + 2))
            said = conversations(Random(seed + 1), self.traces)
            return islice(maker.conversations(said, begin_s, Random(seed + 3)), number)
        if rows is None:
            drawn = shapes(workload, Random(seed + 1), self.traces)
            return islice(maker.calls(drawn, poisson, Random(seed + 3)), number)
        times = [row.at_s or 0.0 for row in rows]
        stretch = len(times) / max(times) / rate if max(times) > 0 else 0.0
        timed = [at_s * stretch for at_s in times] if stretch else poisson
        return islice(maker.replay(rows, timed, Random(seed)), number)

    def sample(self, workload: str) -> Iterable[Shape]:
        """Lengths as the workload has them, before they are scaled."""
        rows = self.rows.get(workload)
        if workload == CONVERSATIONS:
            rows = list(islice(conversations(Random(0), self.traces), _MEAN_OF))
        if rows is not None:
            return [Shape(row.prompt_tokens, row.output_tokens) for row in rows]
        return islice(shapes(workload, Random(0), self.traces), _MEAN_OF)


class PoliciesBench:
    """All runs of one benchmark.

    told: noted in every file of records. sample_s: how often the targets' /metrics are read; 0, never.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        targets: Sequence[BenchTarget],
        screen: Console,
        *,
        told: Mapping[str, str] | None = None,
        sample_s: float = 0.0,
    ) -> None:
        self._args = args
        self._told = told or {}
        self._sample_s = sample_s
        self.targets = targets
        self._screen = screen
        self._workloads = args.workloads.split(",")
        self._loads = [parse_load(load, args.limit) for load in args.loads.split(",")]
        self._slots = [int(slots) for slots in args.slots.split(",")]
        self._draws = Draws.of(args)
        self.fit = self._draws.fit

    def run(self) -> Results[report.Summary]:
        """Repetitions outside, targets inside: neighbours in time are compared."""
        results: Results[report.Summary] = {}
        for slots in self._slots:
            if self._args.one_at_a_time:
                self._under(slots, results, {})
                continue
            with ExitStack() as stack:
                urls = {target.name: stack.enter_context(self.started(target, slots)) for target in self.targets}
                self._under(slots, results, urls)
        return results

    def _under(self, slots: int, results: Results[report.Summary], urls: Mapping[str, str]) -> None:
        for workload in self._workloads:
            rate = self.saturation(workload, slots, urls)
            for load, jobs in self._loads:
                setting = Setting(workload, slots, load, jobs)
                results[setting] = {target.name: [] for target in self.targets}
                for repetition in range(self._args.repetitions):
                    for target in self.targets:
                        summary = self._one(target, setting, repetition, rate * load, urls)
                        results[setting][target.name].append(summary)

    def started(self, target: BenchTarget, slots: int) -> AbstractContextManager[str]:
        return running(target, {"slots": slots}, self._args.out, self._args.ready)

    def saturation(self, workload: str, slots: int, urls: Mapping[str, str]) -> float:
        """Requests per second that the baseline ends when it is never without work."""
        if self._args.saturation:
            return float(self._args.saturation)
        baseline = self.targets[0]
        setting = Setting(workload, slots, 0.0, self._args.saturating_rounds * slots)
        rounds = max(1, round(_WARMING_PART * self._args.saturating_rounds))
        for target in self.targets if urls else ():
            warming = self._draws.calls(workload, 1.0, -2, rounds * slots)
            self.measure(target, setting, urls, warming, f"{label(workload)}-{slots}-warming-{target.name}")
        calls = self._draws.calls(workload, 1.0, -1, setting.jobs)
        records = self.measure(baseline, setting, urls, calls, f"{label(workload)}-{slots}-saturation")
        if not any(record.ok for record in records):
            raise CannotReplay(f"{baseline.name} ended no request well: {records[0].error if records else 'none sent'}")
        fit = self.fit
        rate = saturation_per_s(records, mean_lengths(map(fit, self._draws.sample(workload)))[1])
        self.say(f"{workload} slots={slots}: saturated at {rate:.2f} requests/s")
        return rate

    def _one(
        self, target: BenchTarget, setting: Setting, repetition: int, rate: float, urls: Mapping[str, str]
    ) -> report.Summary:
        calls = self._draws.calls(setting.workload, rate, repetition, setting.jobs)
        name = run_name(setting, target.name, repetition)
        records = self.measure(target, setting, urls, calls, name)
        summary = report.summarize(records)
        self.say(
            f"{name}: JCT {report.seconds(summary.e2e.mean)}  TTFT p99 {report.seconds(summary.ttft.p99)}  "
            f"{summary.endings}"
        )
        return summary

    def measure(
        self, target: BenchTarget, setting: Setting, urls: Mapping[str, str], calls: Iterator[TraceCall],
        name: str, *, drain_s: float | None = None,
    ) -> Sequence[Record]:  # fmt: skip
        """One run; a load of 0 is a closed loop that never leaves the engine without work.

        drain_s: how long the last answers are waited for once all is sent; None for as long as any request.
        """
        alive = nullcontext(urls[target.name]) if target.name in urls else self.started(target, setting.slots)
        with alive as url:
            model, context_tokens = served(url, "", None)
            if 0 < context_tokens < self._args.context:
                raise CannotReplay(
                    f"{target.name} takes {context_tokens} tokens: give --context {context_tokens} or less."
                )
            prepared = Prepared(
                target=Target(url, model, tenant_xargs=self._args.tenant_xargs, timeout_s=self._args.timeout),
                calls=calls,
                total=0,
                concurrency=None if setting.load else 2 * setting.slots,
                drain_s=self._args.timeout if drain_s is None else drain_s,
                out=self._args.out / f"{name}.jsonl",
                name=label(setting.workload),
                objective=None,
                skipped=Skipped(),
                quiet=True,
                metrics=[url] if self._sample_s else [],
                sample_s=self._sample_s,
                options={**self._told, "slots": f"{setting.slots}", "load": f"{setting.load:g}"},
            )
            return measure(prepared, self._screen)[0]

    def say(self, line: str) -> None:
        self._screen.print(line, markup=False, highlight=False)


def run_name(setting: Setting, target: str, repetition: int) -> str:
    """The file of a run's records, without its ending."""
    return f"{label(setting.workload)}-{setting.slots}-{setting.load}-{target}-{repetition}"


def parse_load(text: str, jobs: int) -> tuple[float, int]:
    """`1.2` or `3:200` → (offered rate by saturation, requests). ValueError for anything else."""
    load, _, given = text.partition(":")
    try:
        parsed = float(load), int(given or jobs)
    except ValueError:
        raise ValueError(f"The load {text!r} is no LOAD or LOAD:JOBS, like 1.2 or 3:200.") from None
    if parsed[0] <= 0 or parsed[1] <= 0:
        raise ValueError(f"The load {text!r} must be above 0.")
    return parsed


def saturation_per_s(records: Sequence[Record], mean_output_tokens: float) -> float:
    """Requests per second of an engine that was never without work, from a closed loop's records.

    Counted up to the last request sent, for then the batch begins to empty; a request that was on its way counts by
    the part of its time that had passed. Corrected for a sample of shorter or longer answers than the workload's mean.
    """
    ok = [record for record in records if record.ok]
    until_s = max(record.sent_s for record in ok)
    ended = sum(min(1.0, (until_s - record.sent_s) / record.e2e_s) for record in ok)
    sample_tokens = sum(record.output_tokens for record in ok) / len(ok)
    return ended / until_s * sample_tokens / mean_output_tokens


# The page: baseline ÷ target, so that larger is better for the target.


def ratio_rows(results: Results[Outcome], measure: Callable[[Outcome], float]) -> report.Rows:
    """One row per setting, one column per target but the baseline: median ratio over the repetitions, and its range."""
    baseline, *others = next(iter(results.values()))
    rows: report.Rows = [["workload", "slots", "load", f"{baseline}", *others]]
    for setting, by_target in results.items():
        base = [measure(outcome) for outcome in by_target[baseline]]
        cells = [_ratio(base, [measure(outcome) for outcome in by_target[other]]) for other in others]
        rows.append([setting.workload, str(setting.slots), f"{setting.load:g}", f"{median(base):.3g}", *cells])
    return rows


def _ratio(base: Sequence[float], other: Sequence[float]) -> str:
    made = repeated(base, other)
    return f"{made.value:.2f}{made.interval}" if made is not None else "-"


def page_of(results: Results[Outcome], measures: Mapping[str, Callable[[Outcome], float]]) -> str:
    """The whole comparison in Markdown."""
    baseline = next(iter(next(iter(results.values()))))
    head = (
        f"Baseline {baseline} as measured (seconds; service in weighted tokens/s); the others as {baseline} ÷ target."
    )
    parts = [f"{head} Larger is better. Median over the repetitions, smallest to largest in brackets."]
    for name, measured in measures.items():
        parts.append(f"## {name}\n\n{report.markdown(ratio_rows(results, measured))}")
    return "\n\n".join(parts) + "\n"


def _failures(results: Results[report.Summary]) -> str:
    lines = []
    for setting, by_target in results.items():
        for name, summaries in by_target.items():
            bad = sum(summary.requests - summary.endings.get("ok", 0) for summary in summaries)
            if bad:
                lines.append(f"- {setting.workload}, {setting.slots} slots, load {setting.load:g}, {name}: {bad}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.policies.policies_bench", description=(__doc__ or "").partition("\n")[0]
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
