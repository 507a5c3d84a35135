"""Between tiers the order is strict, but for the reserve of flex; within a tier nothing is different."""

from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome, Tier
from scheduler.tiers import PATIENCE_S, TieredLanes

POLICIES: dict[str, tuple[str, dict[str, str]]] = {
    "fcfs": ("fcfs", {}),
    "mlfq": ("mlfq", {"quantum_steps": "2", "patience_s": "3"}),
    "gittins": ("gittins", {"min_samples": "20", "patience_s": "3"}),
    "vtc": ("vtc", {"predict": "last5"}),
    "vtc sharing slots": ("vtc", {"slots": "shared", "preemptions_per_s": "100000"}),
}
RESERVES = (0.0, 0.05, 0.3)


class Machine(RuleBasedStateMachine):
    """A batch with few slots over a queue of all tiers, with books of its own."""

    SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, Job] = {}

    @initialize(policy=st.sampled_from(sorted(POLICIES)), reserve=st.sampled_from(RESERVES))
    def begin(self, policy: str, reserve: float) -> None:
        self.reserve = reserve
        self.lanes = TieredLanes(build(*POLICIES[policy]), reserve)
        self.lanes.feed(self.SLOTS)
        self.starts = self.flex_starts = 0  # while flex waits and does not run in what others leave

    def started(self, job: Job) -> None:
        del self.waiting[job.id]
        self.running[job.id] = job

    @rule(tenant=st.sampled_from("ab"), tier=st.sampled_from(Tier), prompt_tokens=st.integers(0, 50))
    def arrive(self, tenant: str, tier: Tier, prompt_tokens: int) -> None:
        self.now += 0.1
        self.count += 1
        job = Job(str(self.count), tenant, prompt_tokens, self.now, tier=tier)
        self.lanes.push(job, self.now)
        self.waiting[job.id] = job

    @precondition(lambda self: self.waiting and len(self.running) < self.SLOTS)
    @rule(does_not_fit=st.booleans())
    def take(self, does_not_fit: bool) -> None:
        due = any(self.lanes.is_due(job) for job in self.waiting.values())
        best = min(job.tier for job in self.waiting.values())
        job, owed = self.lanes.peek(self.now), self.lanes._owed
        assert job is not None
        assert job.tier is (Tier.FLEX if due else best)
        assert self.lanes.pop(self.now) is job
        self.started(job)
        if does_not_fit:
            self.lanes.put_back(job, self.now)
            self.waiting[job.id] = self.running.pop(job.id)
            assert self.lanes.peek(self.now) is job
            assert self.lanes._owed == pytest.approx(owed) or not self.lanes.by_tier()[Tier.FLEX]

    @precondition(lambda self: self.waiting and len(self.running) == self.SLOTS)
    @rule()
    def displace(self) -> None:
        self.now += 0.01
        swap = self.lanes.displacement(self.now)
        head = self.lanes.peek(self.now)
        assert head is not None
        lower = [job for job in self.running.values() if job.tier > head.tier and job not in self.lanes._reserved]
        if swap is None:
            assert not lower or self.lanes.is_due(head)
            return
        taken, victim = swap
        assert taken is head
        assert victim.tier == max((job.tier for job in lower), default=head.tier)
        self.lanes.preempt(victim, self.now)
        self.waiting[victim.id] = self.running.pop(victim.id)
        assert self.lanes.pop(self.now) is head
        self.started(head)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 10), tokens=st.integers(1, 5))
    def serve(self, number: int, tokens: int) -> None:
        job = list(self.running.values())[number % len(self.running)]
        made = job.output_tokens
        self.lanes.serve(job, tokens, self.now)
        assert job.output_tokens == made + tokens

    @precondition(lambda self: self.waiting or self.running)
    @rule(number=st.integers(0, 10), outcome=st.sampled_from(Outcome))
    def leave(self, number: int, outcome: Outcome) -> None:
        jobs = [*self.waiting.values(), *self.running.values()]
        job = jobs[number % len(jobs)]
        self.lanes.finish(job, outcome, self.now)
        self.waiting.pop(job.id, None)
        self.running.pop(job.id, None)

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def switch(self, policy: str) -> None:
        self.lanes.switch(build(*POLICIES[policy]), self.now)

    @precondition(lambda self: self.running)
    @rule()
    def memory_is_short(self) -> None:
        victim = self.lanes.victim(self.now)
        assert victim is not None
        unreserved = [job for job in self.running.values() if job not in self.lanes._reserved]
        assert victim.tier == max(job.tier for job in unreserved or self.running.values())

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "lanes"):
            return
        assert {job.id for job in self.lanes.waiting_jobs()} == self.waiting.keys()
        assert self.lanes.running() == len(self.running)
        assert len(self.lanes) == len(self.waiting) == sum(self.lanes.depth().values())
        assert self.lanes._reserved <= set(self.running.values())


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def starts(lanes: TieredLanes, count: int, *, slots: int) -> list[Tier]:
    """The tiers of so many starts in a batch that is always full of jobs of one length; default waits always."""
    running: list[Job] = []
    begun: list[Tier] = []
    for number in range(count + slots):
        lanes.push(Job(f"d{number}", "people", 10, float(number)), float(number))
    while len(begun) < count:
        now = 1000.0 + len(begun)
        if len(running) == slots:
            lanes.finish(running.pop(0), Outcome.DONE, now)
        job = lanes.pop(now)
        running.append(job)
        begun.append(job.tier)
    return begun


@settings(max_examples=15)
@given(reserve=st.floats(0.0, 0.5), slots=st.integers(1, 20))
def test_reserve_is_what_flex_gets_of_the_starts_under_saturation_and_no_more(reserve: float, slots: int) -> None:
    lanes = TieredLanes(build("vtc", {}), reserve)
    for number in range(150):
        lanes.push(Job(f"f{number}", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)
    begun = starts(lanes, 150, slots=slots)
    for length in range(1, len(begun) + 1):
        flex = begun[:length].count(Tier.FLEX)
        assert flex <= reserve * length + 1e-6
        assert flex >= reserve * length - 2.0


def test_without_a_reserve_flex_waits_for_as_long_as_others_do() -> None:
    lanes = TieredLanes(build("fcfs", {}), 0.0)
    lanes.push(Job("f", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)
    assert set(starts(lanes, 300, slots=4)) == {Tier.DEFAULT}


def test_flex_that_runs_in_what_others_leave_is_owed_nothing() -> None:
    lanes = TieredLanes(build("fcfs", {}), 0.5)
    for number in range(3):
        lanes.push(Job(f"f{number}", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)
    lanes.pop(0.0)
    assert set(starts(lanes, 100, slots=4)) == {Tier.DEFAULT}


def test_nothing_is_owed_to_flex_for_two_minutes_after_it_ran_in_what_others_left() -> None:
    lanes = TieredLanes(build("fcfs", {}), 0.1)
    numbers = count()

    def start(tier: Tier, now: float) -> Tier:
        """One of this tier comes; whoever is first starts and ends."""
        lanes.push(Job(f"{tier.label}{next(numbers)}", "anyone", 10, now, tier=tier), now)
        first = lanes.pop(now)
        lanes.finish(first, Outcome.DONE, now)
        return first.tier

    assert {start(Tier.FLEX, 0.0) for _ in range(20)} == {Tier.FLEX}  # a calm
    for number in range(5):
        lanes.push(Job(f"waits{number}", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)
    assert {start(Tier.DEFAULT, PATIENCE_S - 1.0) for _ in range(100)} == {Tier.DEFAULT}  # a burst
    later = [start(Tier.DEFAULT, PATIENCE_S) for _ in range(40)]
    assert later.count(Tier.FLEX) == 4  # and what started so is no reason to wait again


def test_what_runs_by_the_reserve_is_not_displaced_and_yields_memory_last() -> None:
    lanes = TieredLanes(build("fcfs", {}), 0.5)
    flex = Job("f", "batch", 10, 0.0, tier=Tier.FLEX)
    lanes.push(flex, 0.0)
    for number in range(3):
        lanes.push(Job(f"d{number}", "people", 10, 0.0), 0.0)
    first = lanes.pop(0.0)
    assert lanes.pop(0.0) is flex
    assert lanes.displacement(0.0) is None
    assert lanes.victim(0.0) is first
    lanes.finish(first, Outcome.DONE, 1.0)
    assert lanes.victim(1.0) is flex


def test_newcomer_passes_those_of_lower_tiers_only() -> None:
    lanes = TieredLanes(build("fcfs", {}), 0.0)
    lanes.push(Job("f", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)
    lanes.admit(Job("d", "people", 10, 0.0), 0.0)
    assert [lanes.ahead(tier) for tier in Tier] == [0, 0, 1]
    with pytest.raises(ValueError, match="cannot pass"):
        lanes.admit(Job("g", "batch", 10, 0.0, tier=Tier.FLEX), 0.0)


def test_head_of_a_higher_tier_outranks_prompts_of_lower_ones() -> None:
    lanes = TieredLanes(build("fcfs", {}))
    reading = [Job("f", "batch", 900, 0.0, tier=Tier.FLEX), Job("d", "people", 900, 0.0)]
    for job in reading:
        lanes.push(job, 0.0)
    lanes.pop(0.0)
    lanes.pop(0.0)
    head = Job("p", "vip", 10, 0.0, tier=Tier.PRIORITY)
    lanes.push(head, 0.0)
    assert lanes.outranks(0.0, reading) is head
    assert lanes.outranks(0.0, []) is None
    lanes.pop(0.0)
    same = Job("q", "vip", 10, 0.0, tier=Tier.PRIORITY)
    lanes.push(same, 0.0)
    assert lanes.outranks(0.0, [head]) is None
    lanes.finish(same, Outcome.ABORTED, 0.0)
    lanes.push(Job("e", "people", 10, 0.0), 0.0)
    assert lanes.outranks(0.0, [head, *reading]) is None


def step(lanes: TieredLanes, running: dict[str, Job], answers: dict[str, int], slots: int, now: float) -> None:
    """One iteration of a batch: displacements, starts, and a token for everybody."""
    while len(running) == slots and (swap := lanes.displacement(now)) is not None:
        lanes.preempt(swap[1], now)
        del running[swap[1].id]
        head = lanes.pop(now)
        running[head.id] = head
    while len(lanes) and len(running) < slots:
        job = lanes.pop(now)
        running[job.id] = job
    for job in list(running.values()):
        lanes.serve(job, 1, now)
        if job.output_tokens >= answers[job.id]:
            lanes.finish(running.pop(job.id), Outcome.DONE, now)


@settings(max_examples=12)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=30, max_size=80),
    others=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=80),
    slots=st.integers(1, 6),
)
def test_within_a_tier_vtc_keeps_its_bound_whatever_else_runs(
    sizes: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]], slots: int
) -> None:
    """Two tenants that wait in flex all along differ by 2 U at most, U = max(longest prompt, 2·slots·longest answer)
    (Theorem 4.4), though one of them is also served in the default tier and displaces."""
    lanes = TieredLanes(build("vtc", {}), 0.1)
    answers: dict[str, int] = {}
    for number, (prompt, answer) in enumerate(sizes):
        for tenant in ("a", "b"):
            job = Job(f"{tenant}{number}", tenant, prompt, 0.0, tier=Tier.FLEX)
            answers[job.id] = answer
            lanes.push(job, 0.0)
    coming = [Job(f"d{number}", "a", prompt, 0.0) for number, (prompt, _) in enumerate(others)]
    answers |= {job.id: answer for job, (_, answer) in zip(coming, others, strict=True)}
    bound = max(max(prompt for prompt, _ in sizes), 2 * slots * max(answer for _, answer in sizes))
    running: dict[str, Job] = {}
    now = 0.0
    while all(sum(job.tenant == name for job in lanes.waiting_jobs() if job.tier is Tier.FLEX) for name in "ab"):
        now += 1.0
        if coming and int(now) % 3 == 0:
            lanes.push(coming.pop(), now)
        step(lanes, running, answers, slots, now)
        counters = {name: account.counter for name, account, _ in lanes.standings()}
        assert abs(counters["a:flex"] - counters["b:flex"]) <= 2 * bound


@settings(max_examples=25)
@given(
    jobs=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(Tier), st.integers(0, 40), st.integers(1, 20)),
        min_size=1,
        max_size=40,
    ),
    slots=st.integers(1, 4),
)
def test_each_job_is_charged_once_however_often_it_is_displaced(
    jobs: Sequence[tuple[str, Tier, int, int]], slots: int
) -> None:
    """What accounts hold, less lifts, is every prompt and every token made, in the tier in which it was asked for."""
    lanes = TieredLanes(build("vtc", {}))
    answers, due = {}, dict.fromkeys(((tenant, tier) for tenant in "ab" for tier in Tier), 0.0)
    coming = []
    for number, (tenant, tier, prompt, answer) in enumerate(jobs):
        coming.append(Job(str(number), tenant, prompt, 0.0, tier=tier))
        answers[str(number)] = answer
        due[tenant, tier] += prompt + 2 * answer
    running: dict[str, Job] = {}
    now = 0.0
    while coming or len(lanes) or running:
        now += 1.0
        if coming:
            lanes.push(coming.pop(), now)
        step(lanes, running, answers, slots, now)
    charged = {name: account.counter - account.lifted for name, account, _ in lanes.standings()}
    for (tenant, tier), service in due.items():
        name = tenant if tier is Tier.DEFAULT else f"{tenant}:{tier.label}"
        assert charged.get(name, 0.0) == pytest.approx(service)


def test_accounts_of_a_tier_are_merged_by_name() -> None:
    lanes = TieredLanes(build("vtc", {}))
    lanes.merge("a:flex", 70.0, 0.0, elsewhere=False)
    lanes.merge("a", 30.0, 0.0, elsewhere=False)
    lanes.merge("a:of-tomorrow", 5.0, 0.0, elsewhere=False)
    assert {name: account.counter for name, account, _ in lanes.standings()} == {"a": 30.0, "a:flex": 70.0}


def test_lanes_are_labelled_by_tier() -> None:
    lanes = TieredLanes(build("mlfq", {}))
    for tier in Tier:
        lanes.push(Job(tier.label, "t", 1, 0.0, tier=tier), 0.0)
    default = next(label for label in lanes.depth() if " " not in label or label.split()[0] not in ("flex", "priority"))
    assert lanes.depth() == {default: 1, f"priority {default}": 1, f"flex {default}": 1}
    assert lanes.by_tier() == dict.fromkeys(Tier, 1)


@pytest.mark.parametrize("reserve", [-0.1, 1.0])
def test_reserve_must_be_a_share(reserve: float) -> None:
    with pytest.raises(ValueError, match="share"):
        TieredLanes(build("fcfs", {}), reserve)
