"""Skip-join MLFQ keeps its invariants, and a version without one of its parts does not."""

import random
from collections.abc import Callable

import pytest

from scheduler.catalog import build
from scheduler.jobs import Job
from scheduler.lanes import Lanes
from scheduler.policies.mlfq import Mlfq
from scheduler.policy import NEVER, Policy, Spot
from tests.scheduler.engine_model import Engine, Request
from tests.scheduler.mlfq_reference import Auditor

SEEDS = range(20)
QUANTUM, LEVELS, PREFILL, PATIENCE_S = 4, 5, 50, 2.0


class Order(Mlfq):
    """The policy with quanta that a short run goes through, and no cap on preemptions to hide behind."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        super().__init__(QUANTUM, LEVELS, PREFILL, patience_s, preemptions_per_s=100_000)


class NoDemotion(Order):
    """Mutant: a job keeps the level it joined."""

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        level = super().spot(Job("", "", job.prompt_tokens, 0.0), running=running, boosted_at=boosted_at).lane
        return Spot(level, NEVER)


class NoPromotion(Order):
    """Mutant: nobody is promoted."""

    def __init__(self) -> None:
        super().__init__(patience_s=float("inf"))


def traffic(seed: int, load: float = 1.1) -> list[Request]:
    rng = random.Random(seed)
    requests, at = [], 0.0
    for _ in range(120):
        prompt, output = rng.randint(1, 400), min(300, int(rng.lognormvariate(2.5, 1.2)) + 1)
        requests.append(Request(at, prompt, output))
        at += rng.expovariate(load * 4 / (30 * 0.03))
    return requests


def audit(order: Mlfq, seed: int) -> Auditor:
    engine = Engine(Policy("mlfq", order), slots=4)
    auditor = Auditor(engine, [QUANTUM * 2**level for level in range(LEVELS)], PREFILL, PATIENCE_S)
    lives = engine.run(traffic(seed))
    assert all(life.job.output_tokens == life.request.output_tokens for life in lives)
    return auditor


@pytest.mark.parametrize("seed", SEEDS)
def test_invariants_hold(seed: int) -> None:
    assert audit(Order(), seed).found == set()


def test_that_traffic_demotes_promotes_and_preempts() -> None:
    auditors = [audit(Order(), seed) for seed in SEEDS]
    assert all(auditor.demotions > 50 for auditor in auditors)
    assert sum(auditor.promotions for auditor in auditors) > 50
    assert all(auditor.engine.preemptions > 20 for auditor in auditors)


@pytest.mark.parametrize("mutant", [NoDemotion, NoPromotion])
def test_invariants_break_in_most_seeds_without(mutant: Callable[[], Mlfq]) -> None:
    assert sum("I3 a lower level runs while a higher one waits" in audit(mutant(), seed).found for seed in SEEDS) > 10


def level(prompt_tokens: int, output_tokens: int, boosted_at: int | None = None) -> Spot:
    job = Job("1", "t", prompt_tokens, 0.0, output_tokens=output_tokens)
    return Order().spot(job, running=True, boosted_at=boosted_at)


def test_first_level_is_the_first_whose_quantum_holds_the_prefill() -> None:
    levels = [level(prompt_tokens, 0).lane[0] for prompt_tokens in (1, 200, 201, 400, 401, 800, 3200, 3201, 10**6)]
    assert levels == [0, 0, 1, 1, 2, 2, 4, 4, 4]
    assert levels == sorted(levels)


def test_quantum_doubles_from_level_to_level_and_the_last_is_for_good() -> None:
    bounds = [0]
    while bounds[-1] != NEVER:
        bounds.append(level(1, bounds[-1]).until)
    assert [level(1, bound).lane[0] for bound in bounds[:-1]] == [0, 1, 2, 3, 4]
    assert [after - before for before, after in zip(bounds[1:-2], bounds[2:-1], strict=True)] == [9, 17, 33]


@pytest.mark.parametrize("prompt_tokens", [1, 150, 700, 5000])
def test_lane_is_constant_up_to_its_end(prompt_tokens: int) -> None:
    spot = level(prompt_tokens, 0)
    for made in range(200):
        if made >= spot.until:
            spot = level(prompt_tokens, made)
        assert level(prompt_tokens, made) == spot


def test_promoted_job_has_a_fresh_quantum_at_the_top() -> None:
    assert level(5000, 300) == Spot((4,), NEVER)
    assert level(5000, 300, boosted_at=300) == Spot((0,), 305)
    assert level(5000, 305, boosted_at=300).lane == (1,)


def lanes_with(**options: str) -> Lanes:
    return Lanes(build("mlfq", options))


def push(lanes: Lanes, name: str, prompt_tokens: int = 1, now: float = 0.0) -> Job:
    job = Job(name, "t", prompt_tokens, now)
    lanes.push(job, now)
    return job


def test_short_arrival_displaces_a_demoted_job_but_never_one_of_its_own_level() -> None:
    lanes = lanes_with(quantum_steps="4")
    long = push(lanes, "long")
    lanes.pop(0.0)
    short = push(lanes, "short")
    assert lanes.displacement(0.0) is None
    lanes.serve(long, 5, 0.1)
    assert lanes.displacement(0.1) == (short, long)
    lanes.preempt(long, 0.1)
    assert lanes.pop(0.1) is short


def test_preempted_job_returns_before_its_peers() -> None:
    lanes = lanes_with()
    first, second = push(lanes, "1"), push(lanes, "2")
    lanes.pop(0.0)
    lanes.preempt(first, 0.1)
    assert lanes.pop(0.1) is first
    assert lanes.pop(0.1) is second


def test_no_more_jobs_are_displaced_in_any_second_than_allowed() -> None:
    lanes = lanes_with(quantum_steps="1", preemptions_per_s="3")
    rng = random.Random(1)
    times: list[float] = []
    running = [push(lanes, f"long{number}") for number in range(8)]
    for job in running:
        lanes.pop(0.0)
        lanes.serve(job, 3, 0.0)
    now = 0.0
    for number in range(400):
        now += rng.expovariate(20)
        push(lanes, f"short{number}", now=now)
        if (pair := lanes.displacement(now)) is not None:
            lanes.preempt(pair[1], now)
            lanes.serve(lanes.pop(now), 3, now)
            times.append(now)
    assert len(times) > 30
    assert all(after - before >= 1.0 for before, after in zip(times, times[3:], strict=False))


def test_yielding_to_a_memory_shortage_does_not_count_as_a_displacement() -> None:
    lanes = lanes_with(quantum_steps="1", preemptions_per_s="1")
    jobs = [push(lanes, str(number)) for number in range(2)]
    for job in jobs:
        lanes.pop(0.0)
        lanes.serve(job, 3, 0.0)
    lanes.preempt(jobs[0], 0.0)
    push(lanes, "short")
    assert lanes.displacement(0.0) is not None


def test_long_job_is_not_starved_by_a_stream_of_short_ones() -> None:
    """It waits for its patience, and then for those that already wait at the top."""
    rng = random.Random(3)
    requests = [Request(0.0, 10, 600)]
    at = 0.0
    while at < 60:
        at += rng.expovariate(0.95 * 2 / (10 * 0.03))
        requests.append(Request(at, 10, 10))
    gaps = {}
    for patience in ("3", "inf"):
        engine = Engine(build("mlfq", {"quantum_steps": "8", "patience_s": patience}), slots=2)
        gaps[patience] = engine.run(requests)[0].longest_gap
    assert gaps["3"] < 2 * 3
    assert gaps["inf"] > 2 * gaps["3"]
