"""The simulated part of `evenhand bench disaggregation`: GPUs, with lengths and limits four times as long as measured,
or the CPU engines that the benchmark measures. Each request goes where the gateway's own code sends it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from random import Random
from statistics import mean

from rich.console import Console

from loadtest.bench.disaggregation_load import WORKERS, Idle, means_of, ratio_of
from loadtest.bench.table import markdown, quantile
from loadtest.report.report import ATTAINMENT_GOAL, Objective, goodput
from loadtest.simulator.costmodel import PRESETS, CostModel
from loadtest.simulator.simulate import Plan, Simulation
from loadtest.traces.arrivals import poisson
from loadtest.traces.workload import Fit, Maker, Shape, mean_lengths
from scheduler.objectives import Objectives
from scheduler.placement import Rules
from scheduler.step_cost import pairs_of

REQUESTS, LEAST = 250, 2000  # of one run, for each engine; of all runs at one load, at least
WARM_UP = 0.2  # the share of a run that is not judged: the forecast learns
# Of what one engine reads of prompts of mean length, for two engines.
SIMULATED_LOADS = tuple(at / 20 for at in range(1, 29)) + (1.5, 1.6, 1.7, 1.8, 2.0)


@dataclass(frozen=True)
class Engine:
    """What one engine is taken to cost, and what it is asked.

    steps: sizes of steps, in tokens, that are tried where engines do both. longer: lengths and limits, as multiples of
    those measured. longest: tokens of prompt and answer together; what is longer is cut.
    """

    cost: CostModel
    steps: Sequence[int] = (512, 1024, 2048)
    longer: int = 4
    longest: int = 1 << 17

    @classmethod
    def named(cls, name: str) -> "Engine":
        """KeyError if there is none."""
        return MEASURED if name == MEASURED_NAME else cls(PRESETS[name])

    @property
    def rules(self) -> Rules:
        rules = Rules()
        return Rules(
            busy_tokens=self.longer * rules.busy_tokens, max_arriving_tokens=self.longer * rules.max_arriving_tokens
        )

    def asked(self, lengths: Sequence[Shape]) -> list[Shape]:
        """Of these lengths, what it is asked."""
        fit = Fit(length_scale=self.longer, context_tokens=self.longest)
        return [fit(shape) for shape in lengths]

    def idle(self, lengths: Sequence[Shape]) -> Idle:
        """What it takes alone."""
        tokens = self.longer * mean_lengths(lengths)[0]
        cost = self.cost
        read_s = cost.prefill_s_per_token * tokens + cost.attention_s_per_pair * pairs_of(tokens)
        return Idle(read_s, cost.iteration_s)


# What the engines of the benchmark learn of their own steps on one core with AVX-512, rounded.
MEASURED_NAME = "cpu-bench"
MEASURED = Engine(
    CostModel(
        iteration_s=0.0095,
        prefill_s_per_token=0.16e-3,
        decode_s_per_sequence=0.3e-3,
        attention_s_per_kv_token=0.4e-6,
        transfer_s_per_token=4e-6,
        attention_s_per_pair=0.125e-6,
        max_seqs=16,
        max_batched_tokens=512,
        kv_capacity_tokens=1 << 18,
    ),
    steps=(128, 512),
    longer=1,
    longest=3072,
)


ENGINES = (*PRESETS, MEASURED_NAME)


@dataclass(frozen=True)
class Run:
    """share: of requests inside the objective. errors: of predicted times to first token. handed_over: share of those
    whose prompt one engine read and another one answered. Beginnings are left out, but for the last."""

    share: float
    errors: Sequence[float]
    handed_over: float


@dataclass(frozen=True)
class SimulatedSide:
    """One division of the engines. goodput: requests a second for each. at_most: at the highest load that is inside."""

    plan: Plan
    goodput: float
    at_most: Run | None

    @classmethod
    def of(cls, lengths: Sequence[Shape], idle: Idle, objective: Objective, plan: Plan) -> "SimulatedSide":
        """By bisection over the loads."""
        rates = [load * (plan.workers + plan.prefill_workers) / WORKERS / idle.ttft_s for load in SIMULATED_LOADS]
        seen: dict[int, Run] = {}
        low, high = -1, len(rates)
        while high - low > 1:
            middle = (low + high) // 2 if seen else len(rates) // 3
            seen[middle] = offered(plan, lengths, rates[middle], objective)
            low, high = (middle, high) if seen[middle].share >= ATTAINMENT_GOAL else (low, middle)
        points = [(SIMULATED_LOADS[at] / WORKERS / idle.ttft_s, run.share) for at, run in seen.items()]
        return cls(plan, goodput(points), seen.get(low))


def offered(plan: Plan, lengths: Sequence[Shape], rate: float, objective: Objective) -> Run:
    """A few runs at this many requests a second."""
    number = REQUESTS * (plan.workers + plan.prefill_workers)
    judged: list[bool] = []
    errors: list[float] = []
    handed_over: list[float] = []
    for seed in range(-(-LEAST // number)):
        rng = Random(f"simulated:{seed}")
        drawn = [rng.choice(lengths) for _ in range(number)]
        times = list(islice(poisson(rate, rng), len(drawn)))
        maker, simulation = Maker(lambda *_: [], Fit(context_tokens=1 << 17)), Simulation(plan)
        records = simulation.run(maker.calls(drawn, times, rng)).records
        first = int(WARM_UP * len(times))
        judged += [objective.met(one) for one in records if one.sent_s >= times[first]]
        errors += [abs(1 - ratio) for ratio in simulation.ttft_errors[first:]]
        handed_over.append(simulation.handed_over / len(times))
    return Run(mean(judged), errors, mean(handed_over))


def divided(engine: Engine, engines: int, objective: Objective) -> list[Plan]:
    """All do both, with each step size; some only read, a quarter or half of them, with first tokens that wait for the
    KV, as vLLM by itself hands over, and with such that are passed on; all by prediction."""
    cost, rules = engine.cost, engine.rules
    readers = sorted({engines // 4, engines // 2} - {0})
    asked = Objectives(objective.ttft_s, objective.tpot_s)
    return [
        *(Plan(replace(cost, max_batched_tokens=tokens), workers=engines) for tokens in engine.steps),
        *(
            Plan(cost, workers=engines - number, prefill_workers=number, rules=rules, passes_on=passes_on)
            for number in readers
            for passes_on in (False, True)
        ),
        Plan(cost, workers=engines, objectives=asked),
    ]


def simulated(
    drawn: Mapping[str, list[Shape]], cost_name: str, engines: int, progress: Console, processes: Executor
) -> str:
    """Goodput by the simulator, in each division of the engines."""
    engine, rows, ratios = Engine.named(cost_name), [], []
    for name, lengths in drawn.items():
        of, idle = engine.asked(lengths), engine.idle(lengths)
        for objective in idle.objectives():
            plans = divided(engine, engines, objective)
            *sides, hybrid = processes.map(partial(SimulatedSide.of, of, idle, objective), plans)
            both = max(sides[: len(engine.steps)], key=lambda side: side.goodput)
            apart = max(sides[len(engine.steps) :], key=lambda side: side.goodput)
            best = max(both.goodput, apart.goodput)
            ratios.append(ratio_of(hybrid.goodput, best))
            rows.append(
                [
                    f"{name}, TPOT ≤ {1e3 * objective.tpot_s:.0f} ms",
                    f"{both.goodput:.2f} (steps of {both.plan.cost.max_batched_tokens})",
                    f"{apart.goodput:.2f} ({apart.plan.prefill_workers} read)",
                    f"{hybrid.goodput:.2f}",
                    f"{ratios[-1]:.2f}",
                    *_of_prediction(hybrid.at_most),
                ]
            )
            progress.print(" | ".join(rows[-1]))
    told = (
        f"Simulated, not measured: cost model {cost_name}, {engines} engines; requests/s per engine with "
        f"{ATTAINMENT_GOAL:.0%} inside TTFT and TPOT. By prediction ÷ the better of the others: {means_of(ratios)}"
    )
    head = ["lengths, objective", "best that do both", "best apart", "by prediction", "÷ best", "handed over"]
    return f"{told}\n\n" + markdown([*head, "error of predicted TTFT, %: p50, p90"], rows)


def _of_prediction(run: Run | None) -> tuple[str, str]:
    if run is None or not run.errors:
        return "-", "-"
    return f"{run.handed_over:.0%}", ", ".join(f"{100 * quantile(run.errors, at):.0f}" for at in (0.5, 0.9))
