"""Whatever is called in whatever order, every job that enters is in one place and leaves once."""

import random
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes
from tests.steps import lines_executed

POLICIES: dict[str, tuple[str, dict[str, str]]] = {
    "fcfs": ("fcfs", {}),
    "mlfq": ("mlfq", {"quantum_steps": "2", "patience_s": "3"}),
    "gittins": ("gittins", {"min_samples": "20", "patience_s": "3"}),
    "srpt": ("srpt", {"patience_s": "3"}),
    "vtc": ("vtc", {"predict": "last5", "charge": "computed"}),
    "vtc of mlfq": ("vtc", {"within": "mlfq", "quantum_steps": "2", "patience_s": "3"}),
    "vtc sharing slots": ("vtc", {"slots": "shared", "preemptions_per_s": "100000"}),
    "vtc of gittins": ("vtc", {"within": "gittins", "min_samples": "20", "patience_s": "3", "predict": "last5"}),
}
NAMES = st.sampled_from(sorted(POLICIES))


def state_of(lanes: Lanes) -> object:
    """All that a caller can tell."""
    accounts = [
        (account.tenant, account.counter, account.lifted, account.weight, waits)
        for account, waits in lanes.standings()
    ]  # fmt: skip
    victim = lanes.victim(0.0)
    return accounts, lanes.depth(), lanes.running(), len(lanes), None if victim is None else victim.id


class Machine(RuleBasedStateMachine):
    """Calls everything at random and keeps its own, obvious, books."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.lanes = Lanes(build("fcfs", {}))
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, Job] = {}
        self.made: dict[str, int] = {}

    def pick(self, jobs: dict[str, Job], number: int) -> Job:
        return list(jobs.values())[number % len(jobs)]

    @rule(name=NAMES)
    def switch(self, name: str) -> None:
        self.lanes.switch(build(*POLICIES[name]), self.now)

    @rule(name=NAMES, lengths=st.lists(st.integers(1, 400), min_size=25, max_size=40))
    def teach(self, name: str, lengths: list[int]) -> None:
        policy = build(*POLICIES[name])
        for length in lengths:
            policy.order.learn(Job("", "t0", 10, 0.0, output_tokens=length), Outcome.DONE)
        self.lanes.switch(policy, self.now)

    @rule(tenant=st.integers(0, 3), prompt=st.integers(0, 4000), weight=st.sampled_from([0.5, 1.0, 3.0]))
    def push(self, tenant: int, prompt: int, weight: float) -> None:
        self.count += 1
        job = Job(f"j{self.count}", f"t{tenant}", prompt, self.now, weight=weight, max_tokens=self.count % 3 * 100)
        self.lanes.push(job, self.now)
        with pytest.raises(ValueError, match="already in"):
            self.lanes.push(job, self.now)
        self.waiting[job.id] = job
        self.made[job.id] = 0

    @precondition(lambda self: not self.waiting)
    @rule(tenant=st.integers(0, 3), prompt=st.integers(0, 4000), weight=st.sampled_from([0.5, 1.0, 3.0]))
    def admit(self, tenant: int, prompt: int, weight: float) -> None:
        """As if it were pushed and popped."""
        self.count += 1
        job = Job(f"j{self.count}", f"t{tenant}", prompt, self.now, weight=weight, max_tokens=self.count % 3 * 100)
        twin = deepcopy(self.lanes)
        same = replace(job)
        twin.push(same, self.now)
        assert twin.pop(self.now) is same
        self.lanes.admit(job, self.now)
        self.running[job.id] = job
        self.made[job.id] = 0
        assert state_of(self.lanes) == state_of(twin)

    @precondition(lambda self: self.waiting)
    @rule()
    def admit_past_those_that_wait(self) -> None:
        with pytest.raises(ValueError, match="cannot pass"):
            self.lanes.admit(Job("late", "t0", 1, self.now), self.now)

    @rule(steps=st.floats(0, 2))
    def time_passes(self, steps: float) -> None:
        self.now += steps

    @rule(late=st.floats(0, 5))
    def pop(self, late: float) -> None:
        head = self.lanes.peek(self.now)
        assert head is self.lanes.peek(self.now)
        self.now += late
        if head is None:
            assert not self.waiting
            with pytest.raises(IndexError):
                self.lanes.pop(self.now)
            return
        assert self.lanes.pop(self.now) is head
        self.running[head.id] = self.waiting.pop(head.id)

    @precondition(lambda self: self.waiting)
    @rule()
    def pop_and_put_back(self) -> None:
        tenants = {job.tenant for job in self.waiting.values()}
        before = {tenant: self.lanes.service(tenant) for tenant in tenants}
        job = self.lanes.pop(self.now)
        self.lanes.put_back(job, self.now)
        for tenant in tenants:
            assert self.lanes.service(tenant) == pytest.approx(before[tenant])

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99), tokens=st.integers(0, 60))
    def serve(self, number: int, tokens: int) -> None:
        job = self.pick(self.running, number)
        self.lanes.serve(job, tokens, self.now)
        self.made[job.id] += tokens

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 99), tokens=st.integers(1, 60))
    def late_tokens_of_one_that_waits(self, number: int, tokens: int) -> None:
        job = self.pick(self.waiting, number)
        self.lanes.serve(job, tokens, self.now)
        self.made[job.id] += tokens

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99), cached=st.integers(0, 5000))
    def computed(self, number: int, cached: int) -> None:
        self.lanes.computed(self.pick(self.running, number), cached, self.now)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 99))
    def preempt(self, number: int) -> None:
        job = self.pick(self.running, number)
        self.lanes.preempt(job, self.now)
        self.waiting[job.id] = self.running.pop(job.id)
        with pytest.raises(ValueError, match="waits"):
            self.lanes.preempt(job, self.now)

    @precondition(lambda self: self.running)
    @rule()
    def yield_to_memory_shortage(self) -> None:
        job = self.lanes.victim(self.now)
        assert job is not None and job.id in self.running
        self.lanes.preempt(job, self.now)
        self.waiting[job.id] = self.running.pop(job.id)

    @rule()
    def displace(self) -> None:
        pair = self.lanes.displacement(self.now)
        if pair is None:
            return
        head, victim = pair
        assert head.id in self.waiting and victim.id in self.running
        self.lanes.preempt(victim, self.now)
        assert self.lanes.pop(self.now) is head
        self.running[head.id] = self.waiting.pop(head.id)
        self.waiting[victim.id] = self.running.pop(victim.id)

    @precondition(lambda self: self.waiting or self.running)
    @rule(number=st.integers(0, 99), outcome=st.sampled_from(list(Outcome)))
    def finish(self, number: int, outcome: Outcome) -> None:
        job = self.pick({**self.waiting, **self.running}, number)
        self.lanes.finish(job, outcome, self.now)
        self.waiting.pop(job.id, None)
        self.running.pop(job.id, None)
        with pytest.raises(KeyError):
            self.lanes.finish(job, outcome, self.now)

    @rule(
        tenant=st.integers(0, 5),
        service=st.floats(0, 1e6, allow_subnormal=False),
        weight=st.sampled_from([0.5, 1.0, 3.0]),
    )
    def told(self, tenant: int, service: float, weight: float) -> None:
        self.lanes.told(f"t{tenant}", service, weight, self.now)
        shared = self.lanes.policy.shares is not None
        assert self.lanes.service(f"t{tenant}") >= service * (1 - 1e-9) * shared

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        assert len(self.lanes) == len(self.waiting)
        assert self.lanes.running() == len(self.running)
        assert sum(self.lanes.depth().values()) == len(self.waiting)
        listed = [job.id for job in self.lanes.waiting_jobs()]
        assert sorted(listed) == sorted(self.waiting)
        assert all(job in self.lanes for job in self.waiting.values())
        assert not any(job in self.lanes for job in self.running.values())
        assert all(job.output_tokens == self.made[job.id] for job in [*self.waiting.values(), *self.running.values()])

    def teardown(self) -> None:
        for job in self.running.values():
            self.lanes.finish(job, Outcome.DONE, self.now)
        left = []
        while len(self.lanes):
            left.append(self.lanes.pop(self.now).id)
            self.lanes.finish(self.waiting[left[-1]], Outcome.DONE, self.now)
        assert sorted(left) == sorted(self.waiting)
        assert self.lanes.running() == 0
        assert self.lanes.victim(self.now) is None
        assert self.lanes.depth() == {}


Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_interleavings = Machine.TestCase


def filled(name: str, waiting: int, tenants: int) -> Lanes:
    rng = random.Random(1)
    kind, options = POLICIES[name]
    policy = build(kind, {key: "1e6" if key == "patience_s" else value for key, value in options.items()})
    for _ in range(200):
        policy.order.learn(Job("", "t1", 1, 0.0, output_tokens=int(rng.lognormvariate(4, 1.5)) + 1), Outcome.DONE)
    lanes = Lanes(policy)
    for number in range(waiting):
        lanes.push(Job(f"f{number}", f"t{rng.randrange(tenants)}", rng.randrange(2000), 0.0), number * 1e-6)
    for _ in range(64):
        lanes.pop(1.0)
    return lanes


def churn(lanes: Lanes, aborts: list[Job], tenants: int) -> None:
    """One of everything, the way an engine calls it, and aborts from the middle of the line."""
    rng = random.Random(2)
    running = []
    for number, aborted in enumerate(aborts):
        lanes.push(Job(f"c{number}", f"t{rng.randrange(tenants)}", rng.randrange(2000), 2.0), 2.0)
        lanes.peek(2.0)
        running.append(lanes.pop(2.0))
        for job in running[-8:]:
            lanes.serve(job, 3, 2.0)
        if (pair := lanes.displacement(2.0)) is not None:
            lanes.preempt(pair[1], 2.0)
            running = [job for job in running if job is not pair[1]]
        if len(running) > 32:
            lanes.finish(running.pop(0), Outcome.DONE, 2.0)
        if aborted in lanes:
            lanes.finish(aborted, Outcome.ABORTED, 2.0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_work_per_job_hardly_grows_with_the_number_that_wait(name: str) -> None:
    """Executed lines, not seconds, so that a busy machine does not matter."""
    lines = []
    large = (100_000, 10_000) if name == "vtc" else (30_000, 3000)
    for waiting, tenants in ((1000, 100), large):
        lanes = filled(name, waiting, tenants)
        aborts = random.Random(3).sample(list(lanes.waiting_jobs()), 100)
        lines.append(lines_executed(partial(churn, lanes, aborts, tenants)))
    assert lines[1] < 2 * lines[0], lines


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_serving_a_token_is_a_handful_of_lines(name: str) -> None:
    lanes = filled(name, 100, 10)
    job = lanes.pop(1.0)
    lanes.serve(job, 1700, 1.0)

    def work() -> None:
        for _ in range(100):
            lanes.serve(job, 1, 1.0)

    assert lines_executed(work) < 100 * 12


def test_thousands_losing_patience_at_once_do_not_stop_the_line() -> None:
    lanes = Lanes(build("mlfq", {"patience_s": "1"}))
    for number in range(5_000):
        lanes.push(Job(str(number), "t", 10_000, 0.0), 0.0)
    assert lines_executed(partial(lanes.displacement, 100.0)) < 10_000


def test_switching_keeps_the_order_of_arrival_and_the_counters() -> None:
    lanes = Lanes(build("vtc", {}))
    jobs = [Job(str(number), f"t{number % 2}", 100, 0.0) for number in range(6)]
    for job in jobs:
        lanes.push(job, 0.0)
    running = lanes.pop(0.0)
    lanes.switch(build("vtc", {"within": "mlfq"}), 1.0)
    assert (lanes.service("t0"), lanes.service("t1")) == (100.0, 0.0)
    assert lanes.running() == 1
    lanes.switch(build("fcfs", {}), 2.0)
    assert [lanes.pop(2.0) for _ in range(5)] == jobs[1:]
    lanes.switch(build("vtc", {}), 3.0)
    lanes.serve(running, 5, 3.0)
    assert lanes.service("t0") == 10.0


def test_weight_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="weight"):
        Lanes(build("vtc", {})).push(Job("1", "t", 1, 0.0, weight=0.0), 0.0)


def vtc_with_job(**options: str) -> tuple[Lanes, Job]:
    lanes = Lanes(build("vtc", options))
    job = Job("a", "t", 100, 0.0, weight=2.0)
    lanes.push(job, 0.0)
    lanes.pop(0.0)
    return lanes, job


def test_what_the_next_queue_is_told_leaves_out_the_job_that_goes_there() -> None:
    lanes, job = vtc_with_job()
    lanes.push(other := Job("b", "t", 30, 0.0, weight=2.0), 0.0)
    lanes.pop(0.0)
    lanes.serve(job, 3, 0.0)
    assert lanes.service("t") == 100 + 30 + 2 * 3
    assert lanes.service_without(job) == 30
    assert lanes.service_without(other) == 100 + 2 * 3


def test_a_queue_that_is_told_so_never_runs_ahead_of_the_one_that_tells() -> None:
    gateway, engine = Lanes(build("vtc", {})), Lanes(build("vtc", {}))
    for number, prompt in enumerate([500, 20, 3000, 1, 40]):
        at_gateway, at_engine = (Job(str(number), "t", prompt, 0.0) for _ in range(2))
        gateway.push(at_gateway, 0.0)
        gateway.pop(0.0)
        engine.told("t", gateway.service_without(at_gateway), 1.0, 0.0)
        engine.push(at_engine, 0.0)
        engine.pop(0.0)
        for lanes, job in ((gateway, at_gateway), (engine, at_engine)):
            lanes.serve(job, 10, 0.0)
            lanes.finish(job, Outcome.DONE, 0.0)
        assert engine.service("t") == gateway.service("t")


@pytest.mark.parametrize(("charge", "charged"), [("all", 140), ("computed", 40)])
def test_an_estimated_prompt_is_charged_as_it_was(charge: str, charged: int) -> None:
    lanes, job = vtc_with_job(charge=charge)
    lanes.computed(job, 100, 0.0, prompt_tokens=140)
    assert lanes.service("t") == charged


@given(
    name=NAMES,
    served=st.lists(st.integers(1, 30), max_size=3),
    tokens=st.integers(0, 200),
    cached=st.integers(0, 200),
    outcome=st.sampled_from(Outcome),
)
def test_what_is_told_at_a_jobs_end_is_charged_as_if_it_had_been_told_before(
    name: str, served: list[int], tokens: int, cached: int, outcome: Outcome
) -> None:
    at_once, before = Lanes(build(*POLICIES[name])), Lanes(build(*POLICIES[name]))
    for lanes in (at_once, before):
        for number in range(6):  # of its tenant some have ended, so that there is something to predict
            job = Job(f"{number}", "t", 100, 0.0, max_tokens=300, weight=2.0)
            lanes.push(job, 0.0)
            lanes.pop(0.0)
            if number < 5:
                lanes.serve(job, 20 + number, 0.0)
                lanes.finish(job, Outcome.DONE, 0.0)
        for some in served:
            lanes.serve(job, some, 0.0)
        if lanes is at_once:
            lanes.finish(job, outcome, 1.0, tokens=tokens, prompt_tokens=140, cached_tokens=cached)
        else:
            lanes.computed(job, cached, 1.0, prompt_tokens=140)
            lanes.serve(job, tokens, 1.0)
            lanes.finish(job, outcome, 1.0)
        assert (job.prompt_tokens, job.output_tokens) == (140, sum(served) + tokens)
    assert at_once.service("t") == pytest.approx(before.service("t"))
    assert at_once.running() == before.running() == len(at_once) == 0


def test_who_cannot_yield_is_passed_over() -> None:
    lanes = Lanes(build("mlfq", {"quantum_steps": "1"}))
    jobs = [Job(name, "t", 1, 0.0) for name in ("old", "stuck")]
    for job in jobs:
        lanes.push(job, 0.0)
        lanes.pop(0.0)
        lanes.serve(job, 50, 0.0)
    lanes.push(head := Job("head", "t", 1, 0.0), 0.0)
    assert lanes.displacement(0.0, lambda job: job is jobs[0]) == (head, jobs[0])
    assert lanes.victim(0.0, lambda job: job is jobs[0]) is jobs[0]
    assert lanes.displacement(0.0, lambda job: False) is None
    assert lanes.victim(0.0, lambda job: False) is None


def test_shared_slots_pass_over_a_tenant_none_of_whose_jobs_can_yield() -> None:
    lanes = Lanes(build("vtc", {"slots": "shared"}))
    held = [
        Job(f"{tenant}{number}", tenant, 50, 0.0)
        for tenant, count in (("big", 5), ("mid", 3))
        for number in range(count)
    ]
    for job in held:
        lanes.push(job, 0.0)
        lanes.pop(0.0)
    lanes.told("light", 0.0, 1.0, 0.0)
    lanes.push(head := Job("head", "light", 1, 0.0), 0.0)
    lanes._lines["light"].account.counter = 0.0
    swap = lanes.displacement(0.0, lambda job: job.tenant == "mid")
    assert swap is not None and (swap[0], swap[1].tenant) == (head, "mid")
