"""`evenhand compare`: sends the same requests to an engine under each policy in turn, and writes one page of results.

The engines are fake ones by default (no model; as slow as a cost model says, on the wire like vLLM), the bundled model
on real vLLM with --engine real, or simulated in virtual time, which takes seconds.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from loadtest import provenance
from loadtest.bench.bench_target import BenchTarget, CannotStart
from loadtest.bench.policies import policies, policies_bench
from loadtest.bench.policies.policies_bench import (
    SATURATING_ROUNDS,
    Draws,
    PoliciesBench,
    Setting,
    run_name,
    saturation_per_s,
)
from loadtest.replay.replay import CannotReplay
from loadtest.report import report
from loadtest.report.comparison import Side, rows, sides
from loadtest.report.page import page
from loadtest.simulator.costmodel import PRESETS, CostModel
from loadtest.simulator.simulate import Plan, Simulation, block_prompts
from loadtest.simulator.simulate_command import cost_of, simulate, words
from loadtest.traces.prompts import Prompts
from loadtest.traces.workload import WORKLOADS, mean_lengths
from scheduler.catalog import choose, describe

ENGINES = ("fake", "simulated", "real")
DEFAULT_POLICIES = "fcfs,mlfq,vtc,gittins"
_SAMPLE_S = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload", nargs="?", default="C", metavar="TRACE|WORKLOAD",
        help=f"a trace file, or one of {', '.join(WORKLOADS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--policies", default=DEFAULT_POLICIES, metavar="NAME[:KEY=VALUE…],…",
        help="policies to compare, the first is the baseline (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="fake", help="kind of engine (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="HTML page to write (default: page.html in --out)")
    _how(parser.add_argument_group("how much"))
    _cost(parser.add_argument_group("fake and simulated engines"))
    judged = parser.add_argument_group("objective")
    judged.add_argument(
        "--ttft", type=float, help="TTFT objective, seconds (default: 50 decode steps of the cost model)"
    )
    judged.add_argument("--tpot", type=float, help="TPOT objective, seconds (default: 5 decode steps)")
    real = parser.add_argument_group("real engines")
    real.add_argument("--model", default="smollm2", help="model to serve (default: %(default)s)")
    real.add_argument("--one-at-a-time", action="store_true", help="restart the engine for every run, one at a time")
    policies_bench.add_saturating_rounds(real)
    real.add_argument("--engine-args", default="", help="arguments for every engine, as one string")
    parser.epilog = describe()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _how(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--repetitions", type=int, default=3, help="repetitions of every run, interleaved (default: %(default)s)"
    )
    group.add_argument("--limit", type=int, default=400, help="requests per run (default: %(default)s)")
    group.add_argument(
        "--loads",
        default="1.1",
        metavar="LOAD,…",
        help="request rates, as multiples of the engine's capacity (default: %(default)s)",
    )
    group.add_argument("--slots", type=int, default=8, help="batch slots of the engine (default: %(default)s)")
    group.add_argument("--length-scale", type=float, default=0.25, help="multiply all lengths (default: %(default)s)")
    group.add_argument(
        "--prompt-scale", type=float, default=1.0, help="multiply prompt lengths again (default: %(default)s)"
    )
    group.add_argument("--context", type=int, default=4096, help="context length, tokens (default: %(default)s)")
    group.add_argument(
        "--shares", default="heavy=3,light=1", help="share of the requests per tenant (default: %(default)s)"
    )
    group.add_argument("--saturation", type=float, help="capacity in requests/s (default: simulated, or measured)")
    group.add_argument(
        "--traces", type=Path, help="folder with trace files for the workloads (default: built-in quantiles)"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=600.0, help="timeout of a request, seconds (default: 600)")
    group.add_argument(
        "--ready", type=float, default=300.0, help="timeout of an engine's start, seconds (default: 300)"
    )


def _cost(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--cost", choices=sorted(PRESETS), default="quick", help="cost model of the engine (default: %(default)s)"
    )
    group.add_argument(
        "--cost-file", type=Path, metavar="JSON", help="cost model from `evenhand calibrate`, for simulated engines"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 when something cannot be started or read."""
    screen = Console(stderr=True)
    try:
        comparison = PolicyComparison(args, screen)
        read = comparison.run()
    except (CannotStart, CannotReplay, ValueError, OSError) as error:
        screen.print(f"evenhand compare: {error}", style="red", markup=False, highlight=False)
        return 2
    path = args.html or args.out / "page.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(read, comparison.objective, command=provenance.command()), "utf-8")
    sys.stdout.write(report.text(rows(read)) + f"\n\n{path}\n")
    return 0


@dataclass(frozen=True, slots=True)
class ComparedPolicy:
    """One policy of the list. name: as it was written."""

    name: str
    policy: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "ComparedPolicy":
        """NAME[:KEY=VALUE…]; ValueError for a policy or an option that there is not."""
        return cls(text, *choose(text))


class PolicyComparison:
    """All runs of one comparison. objective: what they are judged by."""

    def __init__(self, args: argparse.Namespace, screen: Console) -> None:
        """ValueError for what cannot be compared."""
        self._args = args
        self._screen = screen
        self._choices = [ComparedPolicy.parse(text) for text in args.policies.split(",")]
        if args.cost_file and args.engine != "simulated":
            raise ValueError("--cost-file is for --engine simulated: a fake engine takes one of the presets of --cost.")
        args.workloads = args.workload
        self._cost = cost_of(args)
        self._draws = Draws.of(args)
        self.objective = objective(args, self._cost)
        self._settings = [
            Setting(args.workload, args.slots, *policies_bench.parse_load(load, args.limit))
            for load in args.loads.split(",")
        ]

    def run(self) -> list[Side]:
        """Every policy's runs, those of a load beside each other; names carry the load where there are several."""
        args = self._args
        if args.engine != "real" and not args.saturation:
            args.saturation = self._saturation()
            self._screen.print(f"saturated at {args.saturation:.1f} requests/s", highlight=False)
        if args.engine == "simulated":
            for setting in self._settings:
                for repetition in range(args.repetitions):
                    for choice in self._choices:
                        self._simulate(choice, setting, repetition)
        else:
            self._bench().run()
        files = [
            f"{self._side(choice, setting)}={args.out / run_name(setting, _file(choice), repetition)}.jsonl"
            for setting in self._settings
            for choice in self._choices
            for repetition in range(args.repetitions)
        ]
        return sides(files, self.objective)

    def _side(self, choice: ComparedPolicy, setting: Setting) -> str:
        name = choice.name.replace("=", " ")
        return name if len(self._settings) == 1 else f"{name}@{setting.load:g}"

    def _bench(self) -> PoliciesBench:
        args = self._args
        args.slots, args.tenant_xargs = f"{args.slots}", True
        if args.engine == "real":
            commands = [policies.target(_file(one), one.name, args, args.model) for one in self._choices]
        else:
            commands = [self._fake(choice) for choice in self._choices]
        return PoliciesBench(
            args, [BenchTarget.parse(text) for text in commands], self._screen, told=self._told(), sample_s=_SAMPLE_S
        )

    def _fake(self, choice: ComparedPolicy) -> str:
        options = " ".join(f"--policy-option {shlex.quote(f'{key}={value}')}" for key, value in choice.options.items())
        start = f"{shlex.quote(sys.executable)} -m loadtest.fake.engine --port {{port}} --max-seqs {{slots}}"
        context = f"--max-model-len {self._args.context}"
        return f"{_file(choice)}={start} --cost {self._args.cost} {context} --policy {choice.policy} {options}"

    def _told(self) -> dict[str, str]:
        if self._args.engine == "real":
            return {"engine": f"vLLM, model {self._args.model}"}
        return {"engine": f"{self._args.engine}, cost model {self._args.cost}: {words(self._cost)}"}

    def _saturation(self) -> float:
        """Requests per second of the first policy's engine when it is never without work, in virtual time."""
        draws = replace(self._draws, prompts=self._blocks)
        number = SATURATING_ROUNDS * self._args.slots
        calls = draws.calls(self._args.workload, 1.0, -1, number)
        first = self._choices[0]
        plan = Plan(self._cost, first.policy, first.options, gateway=False, concurrency=2 * self._args.slots)
        records = Simulation(plan).run(calls).records
        return saturation_per_s(records, mean_lengths(map(draws.fit, draws.sample(self._args.workload)))[1])

    def _blocks(self, seed: int) -> Prompts:
        return block_prompts(self._cost.prefix_block_tokens)

    def _simulate(self, choice: ComparedPolicy, setting: Setting, repetition: int) -> None:
        draws = replace(self._draws, prompts=self._blocks)
        calls = draws.calls(setting.workload, self._args.saturation * setting.load, repetition, setting.jobs)
        plan = Plan(self._cost, choice.policy, choice.options, gateway=False)
        path = self._args.out / f"{run_name(setting, _file(choice), repetition)}.jsonl"
        options = {**self._told(), "slots": f"{setting.slots}", "load": f"{setting.load:g}"}
        simulate(plan, calls, path, policies_bench.label(setting.workload), options)


def _file(choice: ComparedPolicy) -> str:
    return policies.label(choice.name)


def objective(args: argparse.Namespace, cost: CostModel) -> report.Objective | None:
    """What was asked for; else limits a few times what an engine with a full batch needs, where that is known."""
    given = report.Objective.of(args.ttft, args.tpot)
    if given is not None or args.engine == "real":
        return given
    step_s = cost.duration_s(0, cost.max_seqs, 0)
    return report.Objective(50 * step_s, 5 * step_s)
