"""The simulator's engine, run on given jobs under a policy, and synthetic jobs to give it."""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from loadtest.simulator.batch import ContinuousBatch
from loadtest.simulator.costmodel import CostModel
from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.shadow import Shadow
from scheduler.tiers import TieredLanes

STEP_S, TOKENS_PER_STEP, SLOTS = 0.01, 256, 8
Size = tuple[int, int]  # tokens of a prompt, and of its answer

Lengths = Callable[[random.Random], int]
LENGTHS: dict[str, Lengths] = {
    "constant": lambda rng: 60,
    "uniform": lambda rng: rng.randint(1, 120),
    "exponential": lambda rng: max(1, round(rng.expovariate(1 / 60))),
    "Pareto": lambda rng: min(4000, max(1, round(12 * rng.random() ** (-1 / 1.2)))),
}


def cost(step_s: float) -> CostModel:
    """A step takes as long again for every `TOKENS_PER_STEP` tokens that it computes."""
    return CostModel(
        iteration_s=step_s,
        prefill_s_per_token=step_s / TOKENS_PER_STEP,
        decode_s_per_sequence=step_s / TOKENS_PER_STEP,
        max_seqs=SLOTS,
        kv_capacity_tokens=1 << 20,
    )


class Lived:
    """A run: seconds to the first token and to the end, by job, in order of arrival."""

    def __init__(self) -> None:
        self.started_s: dict[int, float] = {}
        self.first_s: dict[int, float] = {}
        self.end_s: dict[int, float] = {}
        self.displaced = 0
        self.shadow: Shadow | None = None

    def note_starts(self, jobs: Iterable[Job], lanes: TieredLanes, now: float) -> None:
        """Those that do not wait run."""
        for job in jobs:
            if job not in lanes:
                self.started_s.setdefault(int(job.id), now)


def work(lengths: str, count: int, seed: int) -> list[Size]:
    """Prompts that tell nothing of the lengths of their answers."""
    rng = random.Random(seed)
    return [(rng.randint(20, 400), LENGTHS[lengths](rng)) for _ in range(count)]


def shuffled(jobs: Sequence[Size], seed: int) -> list[Size]:
    """The same in another order."""
    return random.Random(seed).sample(list(jobs), len(jobs))


def arrivals(jobs: Sequence[Size], load: float, seed: int, step_s: float = STEP_S) -> list[float]:
    """Poisson, at `load` times what the engine can do of them."""
    seconds = sum(step_s * ((prompt + made) / TOKENS_PER_STEP + made / SLOTS) for prompt, made in jobs)
    rng, at, times = random.Random(seed), 0.0, []
    for _ in jobs:
        at += rng.expovariate(load * len(jobs) / seconds)
        times.append(at)
    return times


def live(
    policy: str,
    options: Mapping[str, str],
    jobs: Sequence[Size],
    times: Sequence[float],
    taught: Sequence[Size] = (),
    step_s: float = STEP_S,
    engine: CostModel | None = None,
) -> Lived:
    """The simulator's engine under a policy that knows the lengths of some other jobs, the `taught`; SRPT knows all."""
    built = build(policy, options)
    lanes = TieredLanes(built)
    batch, lived = ContinuousBatch(engine or cost(step_s), lanes), Lived()
    for prompt, made in taught:
        built.order.learn(Job("", "t", prompt, 0.0, output_tokens=made), Outcome.DONE)
    now, coming = 0.0, 0
    left: dict[Job, int] = {}
    while coming < len(jobs) or left:
        if not left:
            now = max(now, times[coming])
        while coming < len(jobs) and times[coming] <= now:
            prompt, made = jobs[coming]
            job = Job(str(coming), "t", prompt, now, max_tokens=made if policy == "srpt" else 0)
            left[job] = made
            batch.add(job, now)
            coming += 1
        iteration = batch.schedule(now)
        assert iteration is not None
        lived.note_starts(left, lanes, now)
        now += iteration.duration_s
        for job in batch.complete(iteration, now):
            number = int(job.id)
            lived.first_s.setdefault(number, now - times[number])
            if job.output_tokens == left[job]:
                del left[job]
                batch.finish(job, Outcome.DONE, now)
                lived.end_s[number] = now - times[number]
    lived.displaced, lived.shadow = batch.counts.displaced, lanes.shadow
    return lived


def p99(values: Collection[float]) -> float:
    """The value below which 99 of 100 lie."""
    return sorted(values)[int(0.99 * len(values))]
