"""How near the simulator comes to a real engine.

evenhand bench simulator --workloads S,C --loads 0.8 --traces FOLDER

A real vLLM engine on a tiny model, with our plug-in, in this process without a server in front; its clock is its own
CPU time, corrected for how fast the core is at that moment (--clock cpu: uncorrected), so that other programs are in no
figure; or, with --clock work, it counts the steps and tokens that the engine computes: then the cost of an iteration is
known exactly, and all that is left is whether the simulator forms the same batches.

Before each run the engine is probed as `evenhand calibrate` does it, with other prompts than the trace has. The cost
model is fitted to all probes together, and the simulator foretells each policy's calls once. How fast the machine is
changes from one run to the next; so every policy serves the very same calls in each repetition, and what is foretold
is held against the median over the repetitions, of each request and of each percentile. How far a single repetition is
from the median of the others says how far chance goes.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
from numpy.typing import NDArray

from loadtest.bench.iterations import simulator
from loadtest.bench.iterations.environment import ENVIRONMENT
from loadtest.bench.iterations.in_process_engine import chaotic_model
from loadtest.bench.iterations.iterated import CorePace, IteratedEngine, Steadied, reference_s
from loadtest.bench.policies.policies_bench import Draws, Setting, label, parse_load
from loadtest.bench.table import machine
from loadtest.call import TraceCall
from loadtest.records import Record
from loadtest.report import report
from loadtest.simulator.calibrate import ProbeResult, Probes, fit
from loadtest.simulator.costmodel import CostModel
from loadtest.simulator.kv_blocks import block_hashes
from loadtest.simulator.simulate import Plan, Simulation
from loadtest.simulator.simulate_command import words
from loadtest.traces.prompts import token_prompts
from scheduler.catalog import choose

WORK = CorePace(0.01, 256.0)
_SATURATING_JOBS = 200
_ALIKE = 1e-3  # two policies that differ less are not told apart
Times = NDArray[np.float64]  # seconds: a row per repetition, a column per call


@dataclass(frozen=True, slots=True)
class Foretold:
    """One setting and policy: what the engine did, repetition by repetition, and what the simulator said."""

    e2e_s: Times
    ttft_s: Times
    told_e2e_s: Times
    told_ttft_s: Times

    @classmethod
    def of(cls, runs: Sequence[Sequence[Record]], told: Sequence[Record]) -> Self:
        return cls(*_times(runs), *_times([told]))


def _times(runs: Sequence[Sequence[Record]]) -> tuple[Times, Times]:
    e2e_s = np.array([[record.e2e_s for record in run] for run in runs])
    return e2e_s, np.array([[record.ttft_s or 0.0 for record in run] for run in runs])


def error(real: Times, told: Times) -> float:
    """Of each request, relative, in the median."""
    return float(np.median(np.abs(np.median(told, axis=0) / np.median(real, axis=0) - 1.0)))


def p99_error(real: Times, told: Times) -> float:
    """Of the 99th percentile, relative."""
    ratio = np.median(np.percentile(told, 99, axis=1)) / np.median(np.percentile(real, 99, axis=1))
    return float(abs(ratio - 1.0))


def chance(of: Callable[[Times, Times], float], real: Times) -> float | None:
    """The error of a repetition against all others, in the median; None if there is only one."""
    if len(real) < 2:
        return None
    return median(of(np.delete(real, at, axis=0), real[at : at + 1]) for at in range(len(real)))


Results = Mapping[Setting, Mapping[str, Foretold]]


class SimulatorComparison:
    """All runs on one engine."""

    def __init__(self, args: argparse.Namespace, engine: IteratedEngine, slots: int) -> None:
        self._args = args
        self._engine = engine
        self._slots = slots
        self._draws = Draws.of(args)
        self._policies = args.policies.split(",")
        self._seen: list[ProbeResult] = []
        self._probed = 0

    def run(self) -> tuple[Results, CostModel, float]:
        """What came of it, the cost model, and the median error of its fit."""
        self._probe()  # an engine's first batches are slower than all later ones
        loads = list(self._loads())
        self._seen.clear()
        real: dict[tuple[Setting, str], list[list[Record]]] = {}
        for repetition in range(self._args.repetitions):
            for setting, calls in loads:
                for policy in self._policies:
                    self._probe()
                    real.setdefault((setting, policy), []).append(self._served(policy, calls))
                    sys.stderr.write(f"{repetition}: {setting.workload}, load {setting.load:g}, {policy}\n")
        cost, off = self._cost()
        return {
            setting: {
                policy: Foretold.of(real[setting, policy], self._told(policy, calls, cost)) for policy in self._policies
            }
            for setting, calls in loads
        }, cost, off  # fmt: skip

    def _loads(self) -> Iterator[tuple[Setting, list[TraceCall]]]:
        for workload in self._args.workloads.split(","):
            full = list(self._draws.calls(workload, 1.0, 0, _SATURATING_JOBS))
            rate = self._engine.serve(full, at_once=True)[1]
            for load in self._args.loads.split(","):
                share, jobs = parse_load(load, self._args.limit)
                setting = Setting(label(workload), self._slots, share, jobs)
                yield setting, list(self._draws.calls(workload, rate * share, 0, jobs))

    def _served(self, policy: str, calls: Sequence[TraceCall]) -> list[Record]:
        name, options = choose(policy)
        self._engine.switch(name, options, ())
        served = {one.id: one for one in self._engine.serve(calls, at_once=False)[0]}
        return [served[call.id] for call in calls]

    def _told(self, policy: str, calls: Sequence[TraceCall], cost: CostModel) -> list[Record]:
        name, options = choose(policy)
        known = [replace(call, prompt=list(block_hashes(ids(call), cost.prefix_block_tokens))) for call in calls]
        told = {one.id: one for one in Simulation(Plan(cost, name, options, gateway=False)).run(known).records}
        return [told[call.id] for call in calls]

    def _probe(self) -> None:
        """How fast the engine is at this moment; nothing to ask on a clock that counts its work."""
        if self._args.clock == "work":
            return
        self._probed += 1
        limits = self._engine.limits()
        probes = Probes(self._ask, token_prompts(-self._probed), self._args.context, limits.max_batched_tokens)
        self._seen += probes.seen(self._slots)

    def _ask(self, calls: Sequence[TraceCall], concurrency: int) -> Sequence[Record]:
        each = [calls[at : at + concurrency] for at in range(0, len(calls), concurrency)]
        return [record for some in each for record in self._engine.serve(some, at_once=True)[0]]

    def _cost(self) -> tuple[CostModel, float]:
        limits = self._engine.limits()
        if self._args.clock == "work":
            token_s = WORK.step_s / WORK.tokens_per_step
            known = replace(limits, iteration_s=WORK.step_s, prefill_s_per_token=token_s, decode_s_per_sequence=token_s)
            return known, 0.0
        kinds: dict[ProbeResult, list[float]] = {}
        for one in self._seen:
            kinds.setdefault(replace(one, duration_s=0.0), []).append(one.duration_s)
        fitted = fit([replace(kind, duration_s=median(times_s)) for kind, times_s in kinds.items()], limits)
        return fitted.cost, median(map(abs, fitted.errors))


def ids(call: TraceCall) -> list[int]:
    """Its prompt, which is made of tokens here."""
    assert isinstance(call.prompt, list)
    return call.prompt


# The page


def error_rows(results: Results) -> report.Rows:
    """A row per setting and policy: errors, and beside each how far chance goes."""
    rows: report.Rows = [["workload", "load", "policy", "E2E, median", "E2E, P99", "TTFT, median", "TTFT, P99"]]
    for setting, by_policy in results.items():
        for policy, one in by_policy.items():
            cells = [
                _cell(of, real, told)
                for real, told in ((one.e2e_s, one.told_e2e_s), (one.ttft_s, one.told_ttft_s))
                for of in (error, p99_error)
            ]
            rows.append([setting.workload, f"{setting.load:g}", policy, *cells])
    return rows


def _cell(of: Callable[[Times, Times], float], real: Times, told: Times) -> str:
    by_chance = chance(of, real)
    return f"{of(real, told):.1%}" + ("" if by_chance is None else f" ({by_chance:.1%})")


_RANKED: Mapping[str, Callable[[Foretold], tuple[Times, Times]]] = {
    "mean JCT": lambda one: (one.e2e_s.mean(axis=1), one.told_e2e_s.mean(axis=1)),
    "P99 TTFT": lambda one: (np.percentile(one.ttft_s, 99, axis=1), np.percentile(one.told_ttft_s, 99, axis=1)),
}


def ranking(results: Results) -> Iterator[str]:
    """In how many pairs of policies the same one is ahead, of those in which every repetition says the same."""
    for name, measure in _RANKED.items():
        kept = decided = 0
        for by_policy in results.values():
            for (one, told_one), (other, told_other) in combinations(map(measure, by_policy.values()), 2):
                ahead = set((one < other).tolist())
                if len(ahead) == 1 and not np.allclose(one, other, rtol=_ALIKE):
                    decided += 1
                    kept += ahead == {bool(told_one[0] < told_other[0])}
        yield f"{name}: the same policy ahead in {kept} of {decided} pairs of policies in which the engine is clear"


_CLOCKS: Mapping[str, str] = {
    "steady": "the engine's own CPU time, corrected for the core's speed at that moment",
    "cpu": "the engine's own CPU time",
    "work": "the steps and tokens that it computes",
}


def page_of(args: argparse.Namespace, results: Results, cost: CostModel, off: float) -> str:
    """In Markdown."""
    plural = "s" * (args.repetitions > 1)
    head = (
        f"{machine()}\n\nA tiny model, {args.slots} slots; the clock is {_CLOCKS[args.clock]}; {args.limit} requests, "
        f"{args.repetitions} repetition{plural}. Relative errors against the median over the repetitions; in brackets, "
        f"of one repetition against the others. Cost model, {off:.1%} off in the median of its probes: {words(cost)}."
    )
    every = [one for by_policy in results.values() for one in by_policy.values()]
    overall = (
        f"All {len(every)}: {median(error(one.e2e_s, one.told_e2e_s) for one in every):.1%} of a request's E2E in the "
        f"median, {median(p99_error(one.e2e_s, one.told_e2e_s) for one in every):.1%} of P99."
    )
    return "\n\n".join([head, report.markdown(error_rows(results)), overall, *ranking(results)]) + "\n"


def run(args: argparse.Namespace) -> int:
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    slots = int(args.slots)
    pace = WORK if args.clock == "work" else None
    clock = Steadied(reference_s()) if args.clock == "steady" else None
    with tempfile.TemporaryDirectory() as folder:
        model = chaotic_model(Path(folder))
        sizes = {"slots": slots, "context": args.context, "kv_tokens": args.kv_tokens}
        with IteratedEngine.started(model, pace, plugin=True, clock=clock, **sizes) as engine:
            page = page_of(args, *SimulatorComparison(args, engine, slots).run())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"simulator-{args.clock}.md").write_text(page)
    sys.stdout.write(page)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    simulator.add_arguments(parser)
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # Some of it is read when vLLM is imported.
        os.execve(sys.executable, [sys.executable, "-m", simulator.PROGRAM, *sys.argv[1:]], os.environ | ENVIRONMENT)
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
