"""Gittins is first come, first served where lengths are alike, near shortest-first where they are not."""

import random
from math import inf
from typing import Literal

import pytest

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes
from scheduler.policies.gittins import Gittins
from scheduler.policy import Order, Policy, Spot
from tests.scheduler.engine_model import Request
from tests.scheduler.workloads import (
    Sizes,
    chat,
    code_and_chat,
    mean_jct_s,
    mean_time_per_token_s,
    open_loop,
    simulate,
    with_reasoning,
)


class Oracle:
    """Shortest remaining work first, knowing the lengths: the best there is, for comparison."""

    name = "oracle"
    patience_s = float("inf")
    stall_s = float("inf")
    preemptions_per_s = 1000
    tail = float("inf")
    admission: Literal["now", "peak"] = "now"
    tokens_per_step = 256.0
    epoch = 0

    def __init__(self, requests: list[Request]) -> None:
        ordered = sorted(requests, key=lambda request: request.at)
        self._lengths = {str(number): request.output_tokens for number, request in enumerate(ordered)}

    def fit(self, slots: int) -> None:
        pass

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        return float(self._lengths[job.id] - job.output_tokens)

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        return Spot((self._lengths[job.id] - job.output_tokens,), job.output_tokens + 16)

    def rank(self, lane: tuple[int, ...]) -> float:
        return lane[0]

    def label(self, lane: tuple[int, ...]) -> str:
        return ""

    def displaces(self, head: Job, victim: Job, head_lane: tuple[int, ...], victim_lane: tuple[int, ...]) -> bool:
        return 1.5 * head_lane[0] < victim_lane[0]

    def learn(self, job: Job, outcome: Outcome) -> None:
        pass


def jct_gain(sizes: Sizes, policy: Policy, seed: int, load: float = 1.2) -> float:
    requests = open_loop(sizes, 900, load, seed)
    return mean_jct_s(simulate(build("fcfs", {}), requests)[1]) / mean_jct_s(simulate(policy, requests)[1])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_where_lengths_are_alike_it_hardly_ever_preempts_and_costs_nothing(seed: int) -> None:
    requests = open_loop(chat, 900, 1.2, seed)
    _, first_come = simulate(build("fcfs", {}), requests)
    engine, lives = simulate(build("gittins", {"patience_s": "inf"}), requests)
    assert engine.preemptions <= 9
    assert mean_jct_s(lives) <= 1.01 * mean_jct_s(first_come)


def test_where_lengths_are_alike_mlfq_loses() -> None:
    assert jct_gain(chat, build("mlfq", {}), 1) < 0.9


@pytest.mark.parametrize(("sizes", "least"), [(code_and_chat, 1.15), (with_reasoning, 2.0)])
def test_where_lengths_differ_it_beats_first_come_and_nears_the_oracle(sizes: Sizes, least: float) -> None:
    seeds = (1, 2)
    learned = sum(jct_gain(sizes, build("gittins", {}), seed) for seed in seeds) / 2
    best = sum(jct_gain(sizes, Policy("oracle", Oracle(open_loop(sizes, 900, 1.2, seed))), seed) for seed in seeds) / 2
    assert learned > least
    assert learned > 0.4 * best


def test_short_jobs_gain_most() -> None:
    requests = open_loop(with_reasoning, 900, 1.2, 1)
    first_come = mean_time_per_token_s(simulate(build("fcfs", {}), requests)[1])
    assert first_come > 5 * mean_time_per_token_s(simulate(build("gittins", {}), requests)[1])


def taught(lengths: list[int], **options: str) -> Order:
    order = build("gittins", options).order
    for tokens in lengths:
        order.learn(Job("", "t", 1, 0.0, output_tokens=tokens), Outcome.DONE)
    return order


MIXED = [10 if number % 10 else 1000 for number in range(1000)]


def running_and_head(order: Order, made: int) -> tuple[Lanes, Job, Job]:
    lanes = Lanes(Policy("gittins", order))
    running, head = Job("running", "t", 1, 0.0), Job("head", "t", 1, 0.0)
    lanes.push(running, 0.0)
    lanes.pop(0.0)
    lanes.serve(running, made, 0.0)
    lanes.push(head, 0.0)
    return lanes, head, running


def test_job_that_outlived_the_short_ones_is_displaced_by_a_new_one() -> None:
    lanes, head, running = running_and_head(taught(MIXED), 30)
    assert lanes.displacement(0.0) == (head, running)
    lanes.preempt(running, 0.0)
    assert lanes.pop(0.0) is head


def test_told_to_ignore_max_tokens_it_knows_no_class_by_it() -> None:
    heads = []
    for choice in ("use", "ignore"):
        order = build("gittins", {"max_tokens": choice}).order
        for tokens in MIXED:
            order.learn(Job("", "t", 1, 0.0, max_tokens=tokens, output_tokens=tokens), Outcome.DONE)
        lanes = [
            order.spot(Job("", "t", 1, 0.0, max_tokens=tokens), running=False, boosted_at=None).lane
            for tokens in (10, 1000)
        ]
        heads.append(order.rank(lanes[0]) < order.rank(lanes[1]))
    assert heads == [True, False]


def test_job_that_is_about_to_end_is_not_displaced() -> None:
    lanes, _, _ = running_and_head(taught([10 if number % 10 else 40 for number in range(1000)]), 33)
    assert lanes.displacement(0.0) is None


def test_before_enough_jobs_have_ended_it_is_first_come_first_served() -> None:
    lanes, _, _ = running_and_head(taught(MIXED[:49]), 30)
    assert lanes.displacement(0.0) is None
    requests = open_loop(with_reasoning, 45, 1.2, 5)
    first_come = simulate(build("fcfs", {}), requests)[1]
    assert [life.started for life in simulate(build("gittins", {}), requests)[1]] == [
        life.started for life in first_come
    ]


def test_recomputation_of_the_victim_counts_against_the_swap() -> None:
    order = taught([10 if number % 2 else 100 for number in range(1000)])
    cheap, dear = Job("", "t", 1, 0.0, output_tokens=12), Job("", "t", 50_000, 0.0, output_tokens=12)
    head = Job("", "t", 1, 0.0)
    head_lane = order.spot(head, running=False, boosted_at=None).lane
    for victim, displaced in ((cheap, True), (dear, False)):
        lane = order.spot(victim, running=True, boosted_at=None).lane
        assert order.displaces(head, victim, head_lane, lane) is displaced


def test_more_hysteresis_displaces_less() -> None:
    requests = open_loop(code_and_chat, 600, 1.2, 1)
    counts = [
        simulate(build("gittins", {"hysteresis": ratio}), requests)[0].preemptions for ratio in ("1.3", "3", "100")
    ]
    assert counts[0] > counts[1] > counts[2]


def test_follows_when_lengths_drift() -> None:
    """Once alike and long, then mixed: jobs that ran past the new short ones are displaced."""
    order = taught([500] * 500, window="500")
    assert running_and_head(order, 30)[0].displacement(0.0) is None
    for tokens in MIXED[:600]:
        order.learn(Job("", "t", 1, 0.0, output_tokens=tokens), Outcome.DONE)
    assert running_and_head(order, 30)[0].displacement(0.0) is not None


def test_what_waits_is_ranked_anew_when_the_lengths_are_refitted() -> None:
    order = build("gittins", {}).order
    lanes = Lanes(Policy("gittins", order))
    slow, quick = Job("slow", "slow", 1, 0.0, kind="essay"), Job("quick", "quick", 1, 0.0, kind="yes or no")
    for tenant, kind, tokens in (("slow", "essay", 900), ("quick", "yes or no", 5)):
        for _ in range(60):
            order.learn(Job("", tenant, 1, 0.0, kind=kind, output_tokens=tokens), Outcome.DONE)
    lanes.push(slow, 0.0)
    lanes.push(quick, 0.0)
    assert lanes.peek(0.0) is quick
    for _ in range(3000):
        order.learn(Job("", "quick", 1, 0.0, kind="yes or no", output_tokens=2000), Outcome.DONE)
    lanes.push(Job("late", "late", 1, 0.0), 0.0)
    assert lanes.pop(0.0) is slow


def test_class_with_few_samples_goes_by_its_parent() -> None:
    order = Gittins()
    for number in range(200):
        short = Job("", f"tenant{number}", 1, 0.0, kind="json", output_tokens=5)
        order.learn(short, Outcome.DONE)
        order.learn(Job("", "writer", 1, 0.0, kind="", output_tokens=800), Outcome.DONE)
    new_json = order.spot(Job("", "unknown", 1, 0.0, kind="json"), running=False, boosted_at=None).lane
    new_text = order.spot(Job("", "unknown", 1, 0.0, kind=""), running=False, boosted_at=None).lane
    assert order.rank(new_json) < order.rank(new_text)


def test_class_that_chance_could_have_made_goes_by_its_parent() -> None:
    """The lengths are all of one law, so no tenant and no prompt's length says anything of them."""
    rng, order = random.Random(1), Gittins(max_tokens="ignore")
    for _ in range(4000):
        job = Job("", f"tenant{rng.randint(1, 4)}", rng.randint(20, 400), 0.0)
        job.output_tokens = round(rng.expovariate(1 / 60)) + 1
        order.learn(job, Outcome.DONE)
    news = [Job("", f"tenant{tenant}", 1 << octave, 0.0) for tenant in (1, 2, 3, 4) for octave in (5, 6, 7, 8)]
    classes = [order.spot(job, running=False, boosted_at=None).lane[0] for job in news]
    assert classes.count(0) >= 14


def test_tenant_and_prompt_that_tell_make_classes_of_their_own() -> None:
    order = Gittins(max_tokens="ignore")
    for number in range(800):
        tenant = f"tenant{number % 2}"
        prompt, output = ((30, 10), (3000, 400))[number % 4 // 2] if number % 2 else (300, 100)
        order.learn(Job("", tenant, prompt, 0.0, output_tokens=output), Outcome.DONE)
    ranks = [
        order.rank(order.spot(Job("", tenant, prompt, 0.0), running=False, boosted_at=None).lane)
        for tenant, prompt in (("tenant1", 30), ("tenant0", 300), ("tenant1", 3000))
    ]
    assert ranks == sorted(set(ranks))


def test_number_of_classes_is_bounded() -> None:
    order = Gittins(min_samples=1)
    for number in range(3000):
        order.learn(Job("", f"tenant{number}", 1, 0.0, output_tokens=5), Outcome.DONE)
    assert len(order._lengths) <= 1030
    assert order.rank((1, 0, 0)) == order.rank((0, 0, 0))


def test_unserved_job_goes_first_when_its_patience_ends_and_keeps_its_slot_for_a_while() -> None:
    lanes, head, running = running_and_head(taught(MIXED, patience_s="5"), 30)
    lanes.preempt(running, 0.0)
    lanes.pop(0.0)
    for number in range(3):
        lanes.push(Job(f"new{number}", "t", 1, 4.0), 4.0)
    assert lanes.displacement(4.9) is None
    lanes.finish(head, Outcome.DONE, 4.9)
    assert lanes.peek(5.0) is running
    lanes.pop(5.0)
    lanes.serve(running, 60, 5.1)
    assert lanes.displacement(5.2) is None
    lanes.serve(running, 10, 5.3)
    assert lanes.displacement(5.3) is not None


def test_lane_is_constant_up_to_its_end() -> None:
    order = taught(MIXED)
    rng = random.Random(1)
    for _ in range(200):
        job = Job("", "t", rng.randrange(5000), 0.0, output_tokens=rng.randrange(3000))
        spot = order.spot(job, running=True, boosted_at=None)
        job.output_tokens = rng.randrange(job.output_tokens, spot.until)
        assert order.spot(job, running=True, boosted_at=None) == spot
        job.output_tokens = spot.until
        assert order.spot(job, running=True, boosted_at=None).lane != spot.lane


def test_patience_does_not_make_jobs_of_alike_lengths_take_turns() -> None:
    requests = open_loop(chat, 600, 1.3, 1)
    engine, lives = simulate(build("gittins", {"patience_s": "10"}), requests)
    assert max(life.first_token_at - life.request.at for life in lives) > 30
    assert engine.preemptions <= 6


@pytest.mark.parametrize("promised_s", [inf, 2.5, 0.5])
def test_an_answer_that_was_interrupted_goes_on_after_its_own_time_and_no_other_job_before(promised_s: float) -> None:
    """Whether a promise to it comes due before that, after it, or never."""
    policy = build("gittins", {"stall_s": "2", "patience_s": "60", "max_tokens": "ignore"})
    for number in range(200):
        policy.order.learn(Job("", "t", 30, 0.0, output_tokens=(5, 400)[number % 2]), Outcome.DONE)
    lanes = Lanes(policy)
    lanes.feed(1)
    long, first, second = Job("long", "t", 30, 0.0), Job("first", "t", 30, 1.0), Job("second", "t", 30, 1.0)
    lanes.push(long, 0.0)
    lanes.pop(0.0)
    lanes.serve(long, 100, 1.0)
    lanes.push(first, 1.0)
    lanes.push(second, 1.0)
    assert lanes.displacement(1.0) == (first, long)
    lanes.preempt(long, 1.0)
    assert lanes.pop(1.0) is first
    lanes._fresh_s, lanes._end_s = inf, promised_s
    assert lanes.peek(2.9) is (second if promised_s == inf else long)
    assert lanes.peek(3.1) is long
    assert lanes.displacement(3.1) == (long, first)
