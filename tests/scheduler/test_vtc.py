"""VTC keeps its published bounds, and a version without one of its parts does not."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes
from scheduler.policies.fcfs import Fcfs
from scheduler.policies.vtc import Vtc
from scheduler.policy import Account, Bill, Policy
from tests.scheduler.engine_model import Engine, Request
from tests.scheduler.vtc_reference import Auditor

SEEDS = range(20)


def on_off_traffic(seed: int, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> list[Request]:
    """Tenants that come and go: each sends in bursts of its own rate, with pauses, sizes of its own."""
    rng = random.Random(seed)
    requests = []
    for number, weight in enumerate(weights):
        at, on_s, off_s = 0.0, rng.uniform(3, 12), rng.uniform(0, 12)
        rate, prompt, output = rng.uniform(1, 6), rng.randint(10, 150), rng.randint(5, 80)
        while at < 20:
            burst_ends = at + rng.expovariate(1 / on_s)
            while at < burst_ends:
                at += rng.expovariate(rate)
                sizes = rng.randint(1, 2 * prompt), rng.randint(1, 2 * output)
                requests.append(Request(at, *sizes, tenant=f"t{number}", weight=weight))
            at += rng.expovariate(1 / off_s) if off_s else 0.0
    return requests


def audit(policy: Policy, seed: int, burst: float = 0.0, **engine: object) -> Auditor:
    weights = engine.pop("weights", (1.0, 1.0, 1.0, 1.0))
    settings: dict[str, object] = {"slots": 16, "kv_tokens": 2000, **engine}
    auditor = Auditor(Engine(policy, **settings), burst=burst)  # type: ignore[arg-type]
    auditor.engine.run(on_off_traffic(seed, weights))  # type: ignore[arg-type]
    return auditor


@pytest.mark.parametrize(
    ("within", "seed"),
    [("fcfs", seed) for seed in SEEDS] + [(within, seed) for within in ("mlfq", "gittins") for seed in range(8)],
)
def test_counters_and_service_of_waiting_tenants_stay_within_the_published_bounds(within: str, seed: int) -> None:
    policy = build("vtc", {"within": within})
    assert audit(policy, seed).violations() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_with_credit_the_bounds_are_wider_by_it_and_hold(seed: int) -> None:
    auditor = audit(build("vtc", {"burst": "10"}), seed, burst=10.0, weights=(1.0, 2.0, 3.0, 0.5))
    assert (auditor.violations(), auditor.wrong_means) == ([], 0)


def test_credit_without_a_bound_breaks_them() -> None:
    class Generous(Vtc):
        def lift(self, account: Account, level: float, *, contended: bool) -> None:
            pass

    auditors = [audit(Policy("vtc", Fcfs(), Generous()), seed, burst=10.0) for seed in SEEDS]
    assert any({"spread", "gap"} & set(auditor.violations()) for auditor in auditors)


def test_credit_lets_a_light_tenant_go_first_and_no_further() -> None:
    def light_started_before(burst: str) -> int:
        """Of ten requests that a light tenant sends at once beside a flood, those that go before the flood's next."""
        lanes = Lanes(build("vtc", {"burst": burst}))
        lanes.push(Job("usual", "flood", 10, 0.0), 0.0)
        usual = lanes.pop(0.0)
        lanes.serve(usual, 20, 0.0)
        lanes.finish(usual, Outcome.DONE, 0.0)
        lanes.told("flood", 10_000.0, 1.0, 0.0)
        for number in range(10):
            lanes.push(Job(f"flood{number}", "flood", 50, 0.0), 0.0)
        for number in range(10):
            lanes.push(Job(f"light{number}", "light", 50, 0.0), 0.0)
        order = [lanes.pop(0.0).tenant for _ in range(20)]
        return order.index("flood")

    assert [light_started_before(burst) for burst in ("0", "4", "8")] == [0, 4, 8]


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_hold_for_weighted_tenants(seed: int) -> None:
    assert audit(build("vtc", {}), seed, weights=(1.0, 2.0, 3.0, 0.5)).violations() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_hold_when_memory_runs_short_and_jobs_are_preempted(seed: int) -> None:
    auditor = audit(build("vtc", {}), seed, admission="optimistic", kv_tokens=900)
    assert auditor.violations() == []


def test_memory_does_run_short_in_that_traffic() -> None:
    assert sum(
        audit(build("vtc", {}), seed, admission="optimistic", kv_tokens=900).engine.preemptions for seed in SEEDS
    )


def test_jobs_of_one_tenant_displace_each_other_under_an_order_that_preempts() -> None:
    auditors = [audit(build("vtc", {"within": "mlfq", "quantum_steps": "4"}), seed) for seed in range(5)]
    assert sum(auditor.engine.preemptions for auditor in auditors) > 0
    assert [auditor.violations() for auditor in auditors] == [[]] * len(auditors)


@pytest.mark.parametrize("within", ["fcfs", "mlfq", "gittins"])
def test_bounds_hold_when_tenants_take_slots_from_each_other(within: str) -> None:
    policy = {"within": within, "slots": "shared", "preemptions_per_s": "100000"}
    auditors = [audit(build("vtc", policy), seed, slots=6, weights=(1.0, 2.0, 3.0, 0.5)) for seed in range(20)]
    assert [auditor.violations() for auditor in auditors] == [[]] * len(auditors)
    assert sum(auditor.engine.preemptions for auditor in auditors) > 100


def run_of(lanes: Lanes, tenant: str, number: int, weight: float = 1.0) -> list[Job]:
    """So many jobs of a tenant, all running."""
    for index in range(number):
        lanes.push(job(f"{tenant}{index}", tenant, weight=weight), 0.0)
    return [lanes.pop(0.0) for _ in range(number)]


def test_a_tenant_takes_slots_until_it_has_as_many_for_its_weight_as_the_other() -> None:
    for weight, taken in ((1.0, 4), (3.0, 6), (1 / 3, 2)):
        lanes = lanes_with(slots="shared")
        running = run_of(lanes, "flood", 8)
        for index in range(8):
            lanes.push(job(f"light{index}", "light", 1, weight=weight), 0.0)
        lanes.serve(running[0], 100, 0.0)
        for _ in range(taken):
            pair = lanes.displacement(0.0)
            assert pair is not None and pair[1] is running.pop(), "the newest of the flood"
            lanes.preempt(pair[1], 0.0)
            assert lanes.pop(0.0) is pair[0]
        assert lanes.displacement(0.0) is None


def test_slots_are_taken_no_more_often_than_allowed_and_not_at_all_as_published() -> None:
    for options, offers in (({"slots": "shared", "preemptions_per_s": "2"}, [True, True, False]), ({}, [False])):
        lanes = lanes_with(**options)
        running = run_of(lanes, "flood", 8)
        for index in range(4):
            lanes.push(job(f"light{index}", "light", 1), 0.0)
        lanes.serve(running[0], 100, 0.0)
        for offered in offers:
            pair = lanes.displacement(0.5)
            assert (pair is not None) is offered
            if pair is not None:
                lanes.preempt(pair[1], 0.5)
                lanes.pop(0.5)


class NoLift(Vtc):
    """Mutant: least counter first; time away saves up service."""

    def lift(self, account: Account, level: float, *, contended: bool) -> None:
        pass


class LateCharge(Vtc):
    """Mutant: the prompt is charged with the first token, not when the job is taken."""

    def take(self, account: Account, job: Job) -> Bill:
        bill = super().take(account, job)
        account.counter -= bill.prompt
        return bill


class LateChargeLanes(Lanes):
    def serve(self, job: Job, tokens: int, now: float) -> None:
        if not job.output_tokens:
            self._places[job.id].account.counter += job.prompt_tokens / job.weight
        super().serve(job, tokens, now)


def broken_in_most_seeds(run: Callable[[int], Auditor]) -> set[str]:
    counts = Counter(found for seed in SEEDS for found in run(seed).violations())
    return {found for found, count in counts.items() if count > len(SEEDS) / 2}


def test_without_the_lift_the_bounds_break_in_most_seeds() -> None:
    def run(seed: int) -> Auditor:
        return audit(Policy("no lift", Fcfs(), NoLift()), seed)

    assert {"spread", "choice"} <= broken_in_most_seeds(run)


def test_first_come_first_served_does_not_choose_fairly() -> None:
    assert "choice" in broken_in_most_seeds(lambda seed: audit(build("fcfs", {}), seed))


def test_charging_the_prompt_late_takes_from_the_wrong_tenant_in_most_seeds() -> None:
    def run(seed: int) -> Auditor:
        return audit(Policy("late", Fcfs(), LateCharge()), seed, lanes=LateChargeLanes)

    assert "choice" in broken_in_most_seeds(run)


def test_tenant_that_was_not_waiting_is_dispatched_within_the_published_time() -> None:
    """Theorem 4.11: 2 (n - 1) U / a after its arrival, however much the others send."""
    policy = build("vtc", {})
    heavy = [Request(0.001 * i, 100, 50, tenant=f"h{i % 3}") for i in range(900)]
    engine = Engine(policy, 8, kv_tokens=1200, step_s=0.01)
    auditor = Auditor(engine)
    lives = engine.run([*heavy, Request(10.0, 100, 50, tenant="light")])
    light = next(life for life in lives if life.request.tenant == "light")
    total_service = sum(life.request.prompt_tokens + 2 * life.request.output_tokens for life in lives)
    slowest_capacity = 0.8 * total_service / engine.now
    assert light.started[0] - 10.0 <= 2 * 3 * auditor.bound / slowest_capacity
    assert light.started[0] - 10.0 < 1.5
    assert auditor.violations() == []


def job(name: str, tenant: str, prompt_tokens: int = 100, **rest: object) -> Job:
    return Job(name, tenant, prompt_tokens, 0.0, **rest)  # type: ignore[arg-type]


def lanes_with(**options: str) -> Lanes:
    return Lanes(build("vtc", options))


def test_prompt_is_charged_when_the_job_is_taken_and_output_as_it_is_made() -> None:
    lanes = lanes_with()
    lanes.push(job("1", "a", weight=2.0), 0.0)
    assert lanes.service("a") == 0.0
    taken = lanes.pop(0.0)
    assert lanes.service("a") == 100.0
    lanes.serve(taken, 3, 0.1)
    assert lanes.service("a") == 106.0


def test_weights_of_prompt_and_output_are_options() -> None:
    lanes = lanes_with(prompt_weight="0.5", output_weight="4")
    lanes.push(job("1", "a"), 0.0)
    lanes.serve(lanes.pop(0.0), 1, 0.1)
    assert lanes.service("a") == 54.0


def test_put_back_undoes_the_charge_and_the_job_goes_next_again() -> None:
    lanes = lanes_with()
    for number in range(3):
        lanes.push(job(str(number), "a"), 0.0)
    taken = lanes.pop(0.0)
    lanes.put_back(taken, 0.0)
    assert lanes.service("a") == 0.0
    assert lanes.peek(0.0) is taken


def test_returning_tenant_is_lifted_to_the_lowest_that_waits() -> None:
    lanes = lanes_with()
    lanes.push(job("1", "busy", 500), 0.0)
    lanes.push(job("2", "busy", 500), 0.0)
    lanes.pop(0.0)
    lanes.push(job("3", "new"), 0.0)
    assert lanes.service("new") == 500.0


def test_with_nobody_waiting_a_returning_tenant_is_lifted_to_the_last_that_left() -> None:
    lanes = lanes_with()
    lanes.push(job("1", "busy", 500), 0.0)
    running = lanes.pop(0.0)
    lanes.serve(running, 10, 0.1)
    lanes.push(job("2", "new"), 0.2)
    assert lanes.service("new") == 520.0


def test_preempted_job_is_not_charged_its_prompt_again_and_its_tenant_is_lifted() -> None:
    lanes = lanes_with()
    first = job("1", "a", 100)
    lanes.push(first, 0.0)
    lanes.pop(0.0)
    for name, prompt_tokens in (("2", 900), ("3", 900)):
        lanes.push(job(name, "b", prompt_tokens), 0.0)
    lanes.pop(0.0)
    assert lanes.service("b") == 1000.0  # lifted to 100, then charged 900
    lanes.preempt(first, 0.1)
    assert lanes.service("a") == 1000.0
    assert lanes.pop(0.2) is first
    assert lanes.service("a") == 1000.0


def test_tie_goes_to_the_earliest_head() -> None:
    lanes = lanes_with()
    for name, tenant in (("1", "z"), ("2", "a"), ("3", "m")):
        lanes.push(job(name, tenant), 0.0)
    assert [lanes.pop(0.0).tenant for _ in range(3)] == ["z", "a", "m"]


def finish_some(lanes: Lanes, tenant: str, lengths: list[int]) -> None:
    for number, length in enumerate(lengths):
        lanes.push(job(f"{tenant}-{number}", tenant, 0), 0.0)
        taken = lanes.pop(0.0)
        lanes.serve(taken, length, 0.1)
        lanes.finish(taken, Outcome.DONE, 0.2)


def test_prediction_charges_the_mean_of_the_last_five_in_advance_and_only_the_excess_later() -> None:
    lanes = lanes_with(predict="last5")
    finish_some(lanes, "a", [1000, 10, 20, 30, 40, 50])
    before = lanes.service("a")
    lanes.push(job("x", "a", 100), 1.0)
    taken = lanes.pop(1.0)
    assert lanes.service("a") - before == 100 + 2 * 30
    lanes.serve(taken, 20, 1.1)
    assert lanes.service("a") - before == 100 + 2 * 30
    lanes.serve(taken, 15, 1.2)  # five of these are beyond the prediction
    assert lanes.service("a") - before == 100 + 2 * 35
    lanes.serve(taken, 1, 1.3)
    assert lanes.service("a") - before == 100 + 2 * 36


@pytest.mark.parametrize("outcome", list(Outcome))
def test_predicted_output_that_was_not_made_is_refunded_however_the_job_ends(outcome: Outcome) -> None:
    lanes = lanes_with(predict="last5")
    finish_some(lanes, "a", [30])
    before = lanes.service("a")
    lanes.push(job("x", "a", 100), 1.0)
    taken = lanes.pop(1.0)
    lanes.serve(taken, 12, 1.1)
    lanes.finish(taken, outcome, 1.2)
    assert lanes.service("a") - before == 100 + 2 * 12


def test_without_prediction_an_aborted_job_gets_nothing_back() -> None:
    lanes = lanes_with()
    lanes.push(job("1", "a", 100), 0.0)
    taken = lanes.pop(0.0)
    lanes.serve(taken, 5, 0.1)
    lanes.finish(taken, Outcome.ABORTED, 0.2)
    assert lanes.service("a") == 110.0


@pytest.mark.parametrize(("charge", "service"), [("all", 100.0), ("computed", 30.0)])
def test_cached_prompt_tokens_are_free_if_only_computed_ones_are_charged(charge: str, service: float) -> None:
    lanes = lanes_with(charge=charge)
    lanes.push(job("1", "a", 100), 0.0)
    taken = lanes.pop(0.0)
    lanes.computed(taken, 70, 0.0)
    lanes.computed(taken, 70, 0.0)
    assert lanes.service("a") == service
    lanes.preempt(taken, 0.1)
    lanes.pop(0.2)
    lanes.computed(taken, 100, 0.2)
    assert lanes.service("a") == service


def test_the_larger_of_our_counter_and_the_told_one_counts() -> None:
    lanes = lanes_with()
    lanes.push(job("1", "a", weight=2.0), 0.0)
    lanes.push(job("2", "b"), 0.0)
    lanes.told("a", 400.0, 2.0, 0.0)
    assert lanes.pop(0.0).tenant == "b"
    lanes.told("b", 1.0, 1.0, 0.0)
    assert (lanes.service("a"), lanes.service("b")) == (400.0, 100.0)


def test_idle_tenants_are_forgotten_only_where_the_lift_makes_up_for_it() -> None:
    lanes = lanes_with()
    lanes.push(job("w", "waits"), 0.0)
    lanes.told("ahead", 5000.0, 1.0, 0.0)
    for number in range(20_000):
        passer = job(f"p{number}", f"passer{number}", 1)
        lanes.push(passer, 1.0)
        lanes.finish(passer, Outcome.ABORTED, 1.0)
    assert lanes.service("ahead") == 5000.0
    assert len(lanes._lines) < 10_000
