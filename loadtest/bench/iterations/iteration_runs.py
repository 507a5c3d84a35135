"""Policies against stock vLLM inside real engines, on a clock that is the engine's own CPU time.

evenhand bench iterations --workloads C --policies mlfq,gittins --loads 1.2,0.9,3:200 --slots 8

Two real engines on a tiny model, stock and with the plug-in, each in a process of its own without a server in front.
Requests arrive on a clock that stands still while an engine does not compute: that other programs use the cores is in
no figure. How fast the machine is from one minute to the next still is; with --step-ms the clock counts the steps and
the tokens that the engine computes, and the same command gives the same figures anywhere, whether the model is run or
left out (--without-model). A server's and a client's work is not in them either; `evenhand bench policies` measures
those too, on the wall clock, where the machine is quiet enough.

Each repetition draws its own requests, measures at which rate stock vLLM is saturated by them, and offers them to all
at the loads asked for. Gittins is taught the lengths of other requests of the same kind first, as it would have been
in service; what it may not see is `max_tokens`, which is the exact length here (SRPT sees it: it is the bound).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loadtest.bench.iterations import isolation, iterations
from loadtest.bench.iterations.environment import ENVIRONMENT
from loadtest.bench.iterations.in_process_engine import chaotic_model
from loadtest.bench.iterations.iterated import CorePace, IteratedEngine
from loadtest.bench.policies.policies_bench import MEASURES, Draws, Results, Setting, page_of, parse_load
from loadtest.call import TraceCall
from loadtest.records import read
from loadtest.report import report

STOCK = "stock"
_SATURATING_JOBS = 500


@dataclass(frozen=True, slots=True)
class Iterated:
    """One run.

    preemptions: by the policy.
    recomputed: tokens computed beyond each prompt and answer once, as a share of those.
    """

    summary: report.Summary
    preemptions: int
    recomputed: float


def _of(measure: Callable[[report.Summary], float]) -> Callable[[Iterated], float]:
    return lambda run: measure(run.summary)


class EngineChild:
    """An engine in a process of its own, which reads its runs from standard input, one per line."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, **asked: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the engine ended with code {self._process.wait()}")


@contextmanager
def child(args: argparse.Namespace, kind: str, slots: int, model: Path) -> Iterator[EngineChild]:
    argv = [sys.executable, "-m", "loadtest.bench.iterations.iteration_runs", *sys.argv[1:]]
    argv += ["--child", kind, "--model", str(model), "--slots", str(slots)]
    if args.core is not None:
        argv = ["taskset", "-c", str(args.core), *argv]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, env=os.environ | ENVIRONMENT, text=True, **pipes)
    try:
        yield EngineChild(process)
    finally:
        process.kill()
        process.wait()


class IterationComparison:
    """All runs, the engines one after the other, neighbours in time."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self._args = args
        self._model = model
        self._policies = [name for name in args.policies.split(",") if name]
        self._loads = [parse_load(load, args.limit) for load in args.loads.split(",")]

    def run(self) -> Results[Iterated]:
        results: Results[Iterated] = {}
        for slots in map(int, self._args.slots.split(",")):
            with self._engines(slots) as engines:
                for workload in self._args.workloads.split(","):
                    self._workload(results, engines, workload, slots)
        return results

    @contextmanager
    def _engines(self, slots: int) -> Iterator[Mapping[str, EngineChild]]:
        with ExitStack() as stack:
            yield {
                kind: stack.enter_context(child(self._args, kind, slots, self._model))
                for kind in ((STOCK, "plugin") if self._policies else (STOCK,))
            }

    @staticmethod
    def _warm_up(engines: Mapping[str, EngineChild], workload: str) -> None:
        """An engine's first steps are slower than all later ones."""
        for kind, engine in engines.items():
            policy = "" if kind == STOCK else "fcfs"
            engine.run(policy=policy, workload=workload, rate=None, repetition=-1, jobs=100, out="", flood=None)

    def _workload(
        self, results: Results[Iterated], engines: Mapping[str, EngineChild], workload: str, slots: int
    ) -> None:
        names = [STOCK, *self._policies]
        self._warm_up(engines, workload)
        for repetition in range(self._args.repetitions):
            full = self._ask(engines, STOCK, workload, slots, None, repetition, self._args.limit)
            rate = full["saturation_per_s"]
            say(f"{workload} slots={slots} repetition {repetition}: stock is saturated at {rate:.2f} requests/s")
            for load, jobs in self._loads:
                by_name = results.setdefault(Setting(workload, slots, load, jobs), {name: [] for name in names})
                for name in names:
                    told = self._ask(engines, name, workload, slots, rate * load, repetition, jobs)
                    by_name[name].append(self._read(told, f"{workload}-{slots}-{load:g}-{name}-{repetition}"))

    def _ask(
        self, engines: Mapping[str, EngineChild], name: str, workload: str, slots: int, rate: float | None,
        repetition: int, jobs: int, flood: float | None = None,
    ) -> Any:  # fmt: skip
        out = self._args.out / f"{workload}-{slots}-{rate or 0:.3g}-{flood}-{name}-{repetition}.jsonl"
        return engines[STOCK if name == STOCK else "plugin"].run(
            policy="" if name == STOCK else name, workload=workload, rate=rate, repetition=repetition, jobs=jobs,
            out=str(out), flood=flood,
        )  # fmt: skip

    def isolation(self) -> str:
        """The page of what a flood does to a light tenant."""
        workload, slots = self._args.workloads.split(",")[0], int(self._args.slots.split(",")[0])
        with self._engines(slots) as engines:
            self._warm_up(engines, workload)

            def saturation_per_s(repetition: int) -> float:
                full = self._ask(engines, STOCK, workload, slots, None, repetition, _SATURATING_JOBS)
                return float(full["saturation_per_s"])

            def ask(name: str, light_per_s: float, flood: float, repetition: int) -> Any:
                return self._ask(engines, name, workload, slots, light_per_s, repetition, self._args.limit, flood)

            return isolation.compare(self._args, [STOCK, *self._policies], saturation_per_s, ask)

    def _read(self, told: Mapping[str, Any], label: str) -> Iterated:
        _, records = read(Path(told["out"]))
        summary = report.summarize(records)
        say(
            f"{label}: JCT {report.seconds(summary.e2e.mean)}  TTFT p99 {report.seconds(summary.ttft.p99)}  "
            f"span {report.seconds(summary.duration_s)}  {told['preemptions']} preemptions  "
            f"recomputed {told['recomputed']:.1%}"
        )
        return Iterated(summary, told["preemptions"], told["recomputed"])


def preemption_rows(results: Results[Iterated]) -> report.Rows:
    """Medians of what is no ratio: preemptions per second of arrivals, and recomputed tokens."""
    names = list(next(iter(results.values())))[1:]
    rows: report.Rows = [["workload", "slots", "load", *names]]
    for setting, by_name in results.items():
        cells = []
        for name in names:
            middle = sorted(by_name[name], key=lambda run: run.recomputed)[len(by_name[name]) // 2]
            cells.append(f"{middle.preemptions} ({middle.recomputed:.1%})")
        rows.append([setting.workload, str(setting.slots), f"{setting.load:g}", *cells])
    return rows


def whole_page(args: argparse.Namespace, results: Results[Iterated]) -> str:
    """In Markdown."""
    measures = {name: _of(measure) for name, measure in MEASURES.items()}
    preempted = f"## Preemptions, and tokens computed again\n\n{report.markdown(preemption_rows(results))}"
    return f"{clock_of(args)}\n\n{page_of(results, measures)}\n{preempted}\n"


def clock_of(args: argparse.Namespace) -> str:
    """What a second is."""
    if args.step_ms is None:
        return "Seconds are the engine's own CPU time."
    return f"A step takes {args.step_ms:g} ms, and as long again for every {args.tokens_per_step:g} tokens it computes."


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    Draws.of(args)
    with tempfile.TemporaryDirectory() as folder:
        comparison = IterationComparison(args, chaotic_model(Path(folder)))
        page = comparison.isolation() if args.isolation else whole_page(args, comparison.run())
    (args.out / "iterations.md").write_text(page)
    sys.stdout.write(page)
    return 0


def calls_for(draws: Draws, asked: Mapping[str, Any]) -> list[TraceCall]:
    """What one run sends."""
    workload, rate, repetition, jobs = asked["workload"], asked["rate"], asked["repetition"], asked["jobs"]
    if asked["flood"] is not None:
        return isolation.calls_of(draws, workload, rate, asked["flood"], repetition, jobs)
    return list(draws.calls(workload, rate or 1.0, repetition, jobs))


def serve(args: argparse.Namespace) -> None:
    """The child: one engine, one run per line."""
    draws = Draws.of(args)
    slots = int(args.slots)
    pace = None if args.step_ms is None else CorePace(args.step_ms / 1000, args.tokens_per_step)
    sizes = {"slots": slots, "context": args.context, "kv_tokens": args.kv_tokens}
    made = {"plugin": args.child == "plugin", "with_model": not args.without_model}
    with IteratedEngine.started(args.model, pace, **made, **sizes) as engine:
        for line in sys.stdin:
            asked = json.loads(line)
            calls = calls_for(draws, asked)
            taught = islice(draws.calls(asked["workload"], 1.0, 7000 + asked["repetition"], args.taught), args.taught)
            told = engine.run(calls, asked, list(taught))
            sys.stdout.write("\n" + json.dumps(told) + "\n")
            sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    iterations.add_arguments(parser)
    parser.add_argument("--child", choices=(STOCK, "plugin"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args)
        return 0
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
