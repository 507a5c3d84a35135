"""The plug-in in vLLM's real scheduler, with a rule in place of the model: order, preemption, charging, live switch."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import PoolingParams
from vllm.v1.request import Request, RequestStatus

from loadtest.bench.plugin.driven import DrivenEngine, StepClock, build_scheduler, expected, request, token
from scheduler.fairness import FairnessTally
from scheduler.jobs import Job, Outcome
from scheduler.kept_blocks import Kept
from scheduler.policies.fcfs import Fcfs
from scheduler.policy import Policy
from scheduler.tiers import TieredLanes
from scheduler.vllm.contract import METHODS, missing_members, require_supported_vllm
from scheduler.vllm.plugin import Filled, PolicyQueue, job_from, options_from, policy_from

pytestmark = pytest.mark.engine

POLICIES = ("fcfs", "mlfq", "vtc", "gittins")
PLENTY, SCARCE = 1000, 40  # KV blocks


def mixed_work(seed: int, count: int = 60) -> list[tuple[str, int, int]]:
    rng = random.Random(seed)
    return [(f"r{index}", rng.randint(1, 90), rng.choice([3, 8, 20, 200])) for index in range(count)]


def run_mixed_work(folder: Path, policy: str | None, *, is_async: bool, blocks: int, seed: int = 1) -> DrivenEngine:
    clock = StepClock()
    scheduler = build_scheduler(folder, policy, slots=6, step_tokens=128, blocks=blocks, is_async=is_async, clock=clock)
    engine = DrivenEngine(scheduler, is_async=is_async, clock=clock)
    rng = random.Random(seed)
    coming = [request(*each, tenant=f"t{index % 3}") for index, each in enumerate(mixed_work(seed))]
    while coming:
        for _ in range(min(rng.randint(0, 3), len(coming))):
            engine.add(coming.pop(0))
        engine.step()
    engine.run()
    return engine


def metric(scheduler: Any, name: str, **labels: str) -> float:
    return scheduler.registry.get_sample_value(f"evenhand_engine_{name}", labels) or 0.0


def test_contract_with_the_installed_vllm_holds() -> None:
    assert missing_members() == []


def test_a_member_that_vllm_dropped_is_named() -> None:
    scheduler = next(iter(METHODS))
    assert missing_members(
        {scheduler: {"forgotten": ("request",), "schedule": ("new_argument",)}}, {Request: ("lost",)}
    ) == [
        "Scheduler.forgotten(request)",
        "Scheduler.schedule(new_argument)",
        "Request.lost",
    ]


@pytest.mark.parametrize("version", [(0, 25, 1), (0, 34, 0), (1, 0), ("dev",), (0, "dev")])
def test_another_vllm_is_refused_with_what_to_install(version: tuple[int | str, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"install vllm>=0\.26,<0\.34"):
        require_supported_vllm(version)


def test_a_policy_that_is_not_understood_is_refused_at_start(hollow_model: Path) -> None:
    with pytest.raises(ValueError, match="mlfq"):
        build_scheduler(hollow_model, "mlqf")
    with pytest.raises(ValueError, match="evenhand"):
        policy_from({"evenhand": "mlfq"})
    assert policy_from({}).name == "fcfs"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_async", [False, True], ids=["in_step", "one_step_behind"])
@pytest.mark.parametrize("blocks", [PLENTY, SCARCE], ids=["memory_enough", "memory_scarce"])
def test_no_token_is_lost_or_doubled(hollow_model: Path, policy: str, is_async: bool, blocks: int) -> None:
    engine = run_mixed_work(hollow_model, policy, is_async=is_async, blocks=blocks)
    assert engine.answers == {name: expected(name, prompt, most) for name, prompt, most in mixed_work(1)}
    if policy == "mlfq":
        assert metric(engine.scheduler, "preemptions_total", policy="mlfq", reason="policy") > 10
    if blocks == SCARCE:
        assert metric(engine.scheduler, "preemptions_total", policy=policy, reason="memory") > 10


@pytest.mark.parametrize("is_async", [False, True], ids=["in_step", "one_step_behind"])
@pytest.mark.parametrize("blocks", [PLENTY, SCARCE], ids=["memory_enough", "memory_scarce"])
def test_fcfs_finishes_every_request_at_the_same_step_as_stock_vllm(
    hollow_model: Path, is_async: bool, blocks: int
) -> None:
    ours = run_mixed_work(hollow_model, "fcfs", is_async=is_async, blocks=blocks)
    stock = run_mixed_work(hollow_model, None, is_async=is_async, blocks=blocks)
    assert ours.finished_at == stock.finished_at


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_remembered_of_requests_that_are_gone(hollow_model: Path, policy: str) -> None:
    scheduler = run_mixed_work(hollow_model, policy, is_async=True, blocks=SCARCE).scheduler
    assert scheduler.waiting.entries == {}
    assert (len(scheduler.waiting), scheduler.waiting.lanes.running()) == (0, 0)


def test_mlfq_gives_a_long_ones_slot_to_a_short_one_and_stock_does_not(hollow_model: Path) -> None:
    def first_done(policy: str | None) -> str:
        clock = StepClock()
        engine = DrivenEngine(build_scheduler(hollow_model, policy, slots=2, clock=clock), clock=clock)
        engine.add(request("long1", 10, 300), request("long2", 10, 300))
        for _ in range(60):
            engine.step()
        engine.add(request("short", 10, 5))
        engine.run()
        return engine.finished[0]

    assert first_done("mlfq") == "short"
    assert first_done(None) == "long1"


def alike(folder: Path, admission: str, answer_tokens: int = 60) -> DrivenEngine:
    """60 requests alike in length, which is known, and memory for six of them at their ends; there are 12 slots."""
    clock = StepClock()
    options = {"tail": "inf", "admission": admission}
    scheduler = build_scheduler(folder, "gittins", options, slots=12, step_tokens=512, blocks=40, clock=clock)
    for _ in range(100):
        scheduler._lanes.policy.order.learn(Job("", "", 30, 0.0, output_tokens=60), Outcome.DONE)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(*(request(f"r{number}", 30, answer_tokens) for number in range(60)))
    engine.run()
    assert engine.answers == {f"r{number}": expected(f"r{number}", 30, answer_tokens) for number in range(60)}
    return engine


def test_admission_by_the_peak_interrupts_nobody_for_memory_where_lengths_are_known(hollow_model: Path) -> None:
    interrupted = [
        metric(alike(hollow_model, admission).scheduler, "preemptions_total", policy="gittins", reason="memory")
        for admission in ("now", "peak")
    ]
    assert interrupted[0] > 20
    assert interrupted[1] == 0


def test_admission_by_the_peak_goes_on_where_all_answers_are_longer_than_was_thought(hollow_model: Path) -> None:
    scheduler = alike(hollow_model, "peak", answer_tokens=200).scheduler
    assert metric(scheduler, "preemptions_total", policy="gittins", reason="memory") > 0


def test_admission_by_the_peak_looks_again_once_kv_that_another_engine_fetched_is_free(hollow_model: Path) -> None:
    clock = StepClock()
    options = {"tail": "inf", "admission": "peak"}
    scheduler = build_scheduler(hollow_model, "gittins", options, slots=8, blocks=20, clock=clock)
    for _ in range(100):
        scheduler._lanes.policy.order.learn(Job("", "", 30, 0.0, output_tokens=60), Outcome.DONE)
    scheduler.connector = UntilFetched({})
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("runs", 30, 60), request("read", 160, 1))
    while "read" not in engine.finished:
        engine.step()
    engine.add(request("head", 30, 60))
    for _ in range(5):
        engine.step()
    assert not engine.answers.get("head") and "runs" not in engine.finished
    scheduler._free_blocks(scheduler.requests["read"])  # as vLLM does when it has been fetched
    for _ in range(3):
        engine.step()
    assert engine.answers["head"] and "runs" not in engine.finished


def test_a_live_switch_starts_and_ends_admission_by_the_peak(hollow_model: Path) -> None:
    scheduler = build_scheduler(hollow_model, "gittins")
    assert scheduler.waiting.admits is None
    for options, looks_ahead in ((["admission=peak"], True), ([], False)):
        scheduler.add_request(request("order", 1, 1, policy="gittins", policy_options=options))
        assert (scheduler.waiting.admits is not None) is looks_ahead


def test_mlfq_makes_room_in_memory_too_when_slots_are_free(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", slots=8, blocks=30, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("long1", 100, 130), request("long2", 100, 130))  # 15 blocks of 16 tokens each, in the end
    for _ in range(100):
        engine.step()
    engine.add(request("short", 100, 5))
    for _ in range(12):
        engine.step()
    assert engine.finished == ["short"]
    assert metric(scheduler, "preemptions_total", policy="mlfq", reason="policy") == 1
    engine.run()
    assert engine.answers["long2"] == expected("long2", 100, 130)


@pytest.mark.parametrize("late", [False, True])
def test_blocks_that_are_freed_late_cost_no_second_victim(hollow_model: Path, late: bool) -> None:
    """With steps in flight, a KV connector holds what a victim had until its last step is over."""
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", slots=8, blocks=45, is_async=True, clock=clock)
    scheduler.defer_block_free = late
    engine = DrivenEngine(scheduler, is_async=True, clock=clock)
    engine.add(*(request(f"long{index}", 100, 130) for index in range(3)))
    for _ in range(100):
        engine.step()
    engine.add(request("short", 100, 5))
    for _ in range(15):
        engine.step()
    assert engine.finished == ["short"]
    assert metric(scheduler, "preemptions_total", policy="mlfq", reason="policy") == 1
    engine.run()
    assert engine.answers["long2"] == expected("long2", 100, 130)


@pytest.mark.parametrize(
    ("policy", "cached", "warned"), [("mlfq", False, True), ("mlfq", True, False), ("vtc", False, False)]
)
def test_displacing_without_a_prefix_cache_is_warned_of(
    hollow_model: Path, caplog: pytest.LogCaptureFixture, policy: str, cached: bool, warned: bool
) -> None:
    scheduler = build_scheduler(hollow_model, "fcfs")
    scheduler.kv_cache_manager.enable_caching = cached
    engine = DrivenEngine(scheduler)
    engine.add(request("order", 1, 1, policy=policy))
    engine.run()
    assert ("has no prefix cache" in caplog.text) is warned


def test_when_memory_is_short_the_one_that_the_policy_ranks_last_yields(hollow_model: Path) -> None:
    def preempted(policy: str | None) -> set[str]:
        clock = StepClock()
        scheduler = build_scheduler(hollow_model, policy, slots=4, blocks=26, clock=clock)
        engine = DrivenEngine(scheduler, clock=clock)
        engine.add(request("long", 16, 300))
        for _ in range(200):
            engine.step()
        engine.add(request("new", 160, 15))
        engine.run()
        assert engine.answers == {"long": expected("long", 16, 300), "new": expected("new", 160, 15)}
        return {name for name, made in seen.items() if made}

    seen: dict[str, int] = {}
    original = Request.record_event

    def record(self: Request, event: Any, timestamp: float | None = None) -> None:
        if event.name == "PREEMPTED":
            seen[self.request_id] = seen.get(self.request_id, 0) + 1
        original(self, event, timestamp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "record_event", record)
        assert preempted("mlfq") == {"long"}
        seen.clear()
        assert preempted(None) == {"new"}


def test_vtc_takes_turns_between_a_heavy_and_a_light_tenant(hollow_model: Path) -> None:
    clock = StepClock()
    engine = DrivenEngine(build_scheduler(hollow_model, "vtc", slots=1, clock=clock), clock=clock)
    engine.add(*(request(f"heavy{index}", 20, 10, tenant="heavy") for index in range(10)))
    engine.add(*(request(f"light{index}", 20, 10, tenant="light") for index in range(3)))
    engine.run()
    assert (
        engine.finished[:6].count("light0") + engine.finished[:6].count("light1") + engine.finished[:6].count("light2")
        == 3
    )


def test_a_tenant_whom_other_engines_served_much_waits_its_turn(hollow_model: Path) -> None:
    clock = StepClock()
    engine = DrivenEngine(build_scheduler(hollow_model, "vtc", slots=1, clock=clock), clock=clock)
    engine.add(request("here1", 5, 2, tenant="idle"))
    engine.add(request("elsewhere", 5, 2, tenant="busy", service=1e6), request("here2", 5, 2, tenant="idle"))
    engine.run()
    assert engine.finished == ["here1", "here2", "elsewhere"]


@pytest.mark.parametrize("is_async", [False, True], ids=["in_step", "one_step_behind"])
def test_what_is_charged_is_prompt_once_and_every_output_token(hollow_model: Path, is_async: bool) -> None:
    engine = run_mixed_work(hollow_model, "vtc", is_async=is_async, blocks=SCARCE, seed=5)
    work = mixed_work(5)
    own = {f"t{tenant}": sum(prompt + 2 * most for _, prompt, most in work[tenant::3]) for tenant in range(3)}
    service = engine.scheduler.waiting.lanes.service
    # Three tenants that waited all along: a lift may only raise a counter.
    assert all(service(tenant) >= charged for tenant, charged in own.items())
    assert max(service(tenant) for tenant in own) - max(own.values()) <= 400
    engine.scheduler._report(0.0)
    assert {t: metric(engine.scheduler, "tenant_service_total", tenant=t) for t in own} == own


def test_prompt_tokens_that_the_prefix_cache_held_are_free_if_asked_for(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "vtc", {"charge": "computed"}, slots=1, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("same", 64, 1, tenant="first"))
    engine.run()
    engine.add(request("same", 64, 1, tenant="second"))
    engine.run()
    service = scheduler.waiting.lanes.service
    assert service("first") == 64 + 2
    assert service("second") - service("first") <= 16 + 2


def test_requests_stopped_by_a_token_by_length_and_by_the_client_leave_as_what_they_are(hollow_model: Path) -> None:
    class Learner(Fcfs):
        def __init__(self) -> None:
            self.learned: dict[str, tuple[Outcome, int]] = {}

        def learn(self, job: Job, outcome: Outcome) -> None:
            self.learned[job.id] = (outcome, job.output_tokens)

    learner = Learner()
    scheduler = build_scheduler(hollow_model, "fcfs", slots=3)
    scheduler.waiting.lanes.switch(Policy("learner", learner), 0.0)
    engine = DrivenEngine(scheduler)
    engine.add(request("stops", 10, 50, stop_token=token("stops", 14)), request("full", 10, 9), request("left", 10, 50))
    engine.add(request("never", 10, 50))
    for _ in range(3):
        engine.step()
    engine.abort("left", "never")
    engine.run()
    assert learner.learned == {
        "stops": (Outcome.DONE, 5),
        "full": (Outcome.LENGTH, 9),
        "left": (Outcome.ABORTED, 3),
        "never": (Outcome.ABORTED, 0),
    }


@pytest.mark.parametrize("is_async", [False, True], ids=["in_step", "one_step_behind"])
@pytest.mark.parametrize("policy", POLICIES)
def test_aborts_anywhere_leave_the_others_whole(hollow_model: Path, policy: str, is_async: bool) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, policy, slots=4, blocks=60, is_async=is_async, clock=clock)
    engine = DrivenEngine(scheduler, is_async=is_async, clock=clock)
    work = mixed_work(9)
    engine.add(*(request(*each) for each in work))
    rng = random.Random(3)
    gone = set()
    for name, _, _ in rng.sample(work, 30):
        for _ in range(rng.randint(1, 4)):
            engine.step()
        gone.add(name)
        engine.abort(name, "unknown")
    engine.run()
    for name, prompt, most in work:
        answer = engine.answers.get(name, [])
        assert answer == expected(name, prompt, most)[: len(answer)]
        assert name in gone or len(answer) == most
    assert scheduler.waiting.entries == {}


@pytest.mark.parametrize("is_async", [False, True], ids=["in_step", "one_step_behind"])
def test_a_reset_of_the_prefix_cache_restarts_everybody_in_place(hollow_model: Path, is_async: bool) -> None:
    scheduler = build_scheduler(hollow_model, "mlfq", slots=4, is_async=is_async)
    engine = DrivenEngine(scheduler, is_async=is_async)
    work = [(f"r{index}", 20, 40) for index in range(8)]
    engine.add(*(request(*each) for each in work))
    for _ in range(10):
        engine.step()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert engine.answers == {name: expected(name, prompt, most) for name, prompt, most in work}
    assert metric(scheduler, "preemptions_total", policy="mlfq", reason="reset") == 4


def test_an_order_changes_the_policy_at_once_and_loses_nobody(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "fcfs", slots=2, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock)
    work = [(f"r{index}", 20, 100 if index < 4 else 5) for index in range(12)]
    engine.add(*(request(*each, tenant=f"t{index % 2}") for index, each in enumerate(work)))
    for policy, options in (("mlfq", ["quantum_steps=4"]), ("vtc", []), ("gittins", []), ("fcfs", []), ("mlfq", [])):
        for _ in range(20):
            engine.step()
        order = request(f"to-{policy}", 3, 1, policy=policy, policy_options=options)
        engine.add(order)
        engine.step()
        assert engine.notes.pop(order.request_id) == {"evenhand": {"policy": policy}}
        assert engine.answers.pop(order.request_id) == []
        assert metric(scheduler, "policy_info", policy=policy) == 1
    engine.run()
    assert engine.answers == {name: expected(name, prompt, most) for name, prompt, most in work}
    assert metric(scheduler, "policy_switches_total", outcome="done") == 5


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ({"policy": "lottery"}, "lottery"),
        ({"policy": "mlfq", "policy_options": ["quantum_steps=many"]}, "quantum_steps"),
        ({"policy": "mlfq", "policy_options": ["nonsense=1"]}, "nonsense"),
        ({"policy": "mlfq", "policy_options": "quantum_steps"}, "list like"),
        ({"policy": 7}, "7"),
    ],
)
def test_an_order_that_makes_no_sense_is_answered_and_the_policy_stays(
    hollow_model: Path, order: dict[str, Any], says: str
) -> None:
    scheduler = build_scheduler(hollow_model, "vtc")
    engine = DrivenEngine(scheduler)
    engine.add(request("order", 3, 1, **order))
    engine.run()
    assert says in engine.notes["order"]["evenhand"]["error"]
    assert (scheduler.waiting.lanes.policy.name, engine.finished) == ("vtc", ["order"])
    assert metric(scheduler, "policy_switches_total", outcome="refused") == 1
    assert metric(scheduler, "policy_info", policy="vtc") == 1


def test_options_are_read_as_on_the_command_line() -> None:
    assert options_from(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}


def queue_of(policy: str, options: dict[str, str] | None = None) -> PolicyQueue:
    built = policy_from({"evenhand": {"policy": policy, "options": options or {}}})
    return PolicyQueue(TieredLanes(built), FairnessTally(), StepClock())


def test_a_request_that_was_taken_and_skipped_has_paid_nothing_and_is_first_again() -> None:
    queue = queue_of("vtc")
    first, second = request("first", 50, 5, tenant="a"), request("second", 50, 5, tenant="a")
    queue.add_request(first)
    queue.add_request(second)
    taken = [queue.pop_request(), queue.pop_request()]
    queue.prepend_requests(reversed(taken))
    assert queue.lanes.service("a") == 0
    assert [each.request_id for each in queue] == ["first", "second"]
    assert queue.pop_request() is first


def test_a_preempted_request_has_paid_for_its_prompt_for_good() -> None:
    queue = queue_of("vtc")
    queue.add_request(request("r", 50, 5, tenant="a"))
    taken = queue.pop_request()
    taken.status = RequestStatus.PREEMPTED
    queue.prepend_request(taken)
    assert queue.lanes.service("a") == 50
    queue.pop_request()
    queue.prepend_requests([taken])
    assert queue.lanes.service("a") == 50


def test_strangers_are_removed_without_a_word_and_an_empty_queue_says_so() -> None:
    queue = queue_of("fcfs")
    queue.remove_requests([request("stranger", 5, 5)])
    queue.remove_request(request("stranger", 5, 5))
    assert not queue
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()


def test_who_was_preempted_for_the_head_is_not_resumed_in_the_same_pass() -> None:
    queue = queue_of("mlfq")
    victim = request("victim", 5, 500)
    queue.add_request(victim)
    queue.pop_request()
    victim.status = RequestStatus.PREEMPTED
    queue.prepend_request(victim)
    assert queue
    queue.barred = {queue.entries["victim"].job}
    assert (bool(queue), len(queue)) == (False, 1)
    queue.add_request(request("other", 5, 5))
    queue.barred = {queue.entries["other"].job}
    assert queue


def test_a_pooling_request_is_a_job_without_output() -> None:
    pooling = Request(
        request_id="embed", prompt_token_ids=[1, 2, 3], sampling_params=None, pooling_params=PoolingParams(task="embed")
    )
    job = job_from(pooling, 7.0)
    assert (job.id, job.tenant, job.prompt_tokens, job.arrived_at, job.max_tokens) == ("embed", "", 3, 7.0, 1)


def test_a_prompt_whose_kv_comes_from_a_prefill_worker_counts_for_nothing() -> None:
    for transfer, counted_tokens in (
        ({"do_remote_prefill": True, "do_remote_decode": False}, 0),
        ({"do_remote_prefill": False, "do_remote_decode": True}, 5),
        ("nonsense", 5),
        (None, 5),
    ):
        fetched = request("r", 5, 5)
        assert fetched.sampling_params is not None
        fetched.sampling_params.extra_args = {"kv_transfer_params": transfer}
        assert job_from(fetched, 0.0).charged_tokens(cached_free=False) == counted_tokens


@pytest.mark.parametrize("weight", ["heavy", -1, 0, float("nan"), float("inf"), [2], None])
def test_a_weight_that_makes_no_sense_counts_as_one(weight: object) -> None:
    assert job_from(request("r", 5, 5, weight=weight, service=weight), 0.0).weight == 1.0


def test_what_a_request_tells_of_itself_reaches_its_job() -> None:
    job = job_from(request("r", 5, 9, tenant="acme", weight="2.5", kind="tools"), 1.0)
    assert (job.tenant, job.weight, job.kind, job.max_tokens) == ("acme", 2.5, "tools", 9)


def test_the_line_and_the_longest_stall_are_shown(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", slots=1, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock, step_s=0.1)
    engine.add(request("long", 10, 200))
    for _ in range(30):
        engine.step()
    engine.add(*(request(f"short{index}", 10, 10) for index in range(8)))
    for _ in range(30):
        engine.step()
    waiting = [s for m in scheduler.registry.collect() for s in m.samples if s.name == "evenhand_engine_waiting"]
    assert sum(sample.value for sample in waiting) == len(scheduler.waiting)
    assert metric(scheduler, "longest_stall_seconds") == pytest.approx(2.5)
    engine.run()
    scheduler._report(clock.now)
    scheduler._report(clock.now)
    assert metric(scheduler, "longest_stall_seconds") == 0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("adds", [(0, 2, 4), (0, 1, 2, 3, 4, 5)], ids=str)
def test_a_stall_lasts_until_the_displaced_request_computes_again(
    hollow_model: Path, is_async: bool, adds: tuple[int, ...]
) -> None:
    """With a step in flight it is looked at again and again before it can have its slot back."""
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", {"quantum_steps": "2"}, slots=1, is_async=is_async, clock=clock)
    engine = DrivenEngine(scheduler, is_async=is_async, clock=clock, step_s=0.1)
    engine.add(request("long", 20, 60))
    for _ in range(12):
        engine.step()
    away_since, longest, shown = clock.now, 0.0, 0.0
    for step in range(40):
        if step in adds:
            engine.add(request(f"short{step}", 5, 1))
        engine.step()
        if "long" in {one.request_id for one in scheduler.running}:
            away_since = clock.now
        longest = max(longest, clock.now - away_since)
        scheduler._report(clock.now)
        now_shown = metric(scheduler, "longest_stall_seconds")
        assert now_shown >= clock.now - away_since - 0.1000001
        shown = max(shown, now_shown)
    assert longest > 0.05
    assert shown == pytest.approx(longest)


def recomputed_by_a_displaced_request(folder: Path, *, kept: bool) -> int:
    """Tokens that a long request computes twice, displaced while others fill the KV cache four times over."""
    clock = StepClock()
    scheduler = build_scheduler(folder, "mlfq", slots=1, blocks=100, clock=clock)
    if not kept:
        scheduler._kept = Kept(99, 16, Filled.intact, lambda blocks: None)
    engine = DrivenEngine(scheduler, clock=clock)
    work = [("long", 320, 100), *((f"short{index}", 160, 5) for index in range(40))]
    computed = 0
    for step in range(1000):
        if step == 0:
            engine.add(request(*work[0]))
        elif step == 30:
            engine.add(*(request(*each) for each in work[1:]))
        elif not scheduler.has_requests():
            break
        output = engine.step()
        computed += output.total_num_scheduled_tokens if output else 0
    assert engine.finished[-1] == "long"
    assert engine.answers == {name: expected(name, *sizes) for name, *sizes in work}
    return computed - sum(prompt + most - 1 for _, prompt, most in work)


def test_what_a_displaced_request_has_computed_outlives_what_finished_requests_have(hollow_model: Path) -> None:
    assert recomputed_by_a_displaced_request(hollow_model, kept=True) < 32
    assert recomputed_by_a_displaced_request(hollow_model, kept=False) > 320


def test_of_many_displaced_requests_no_more_are_kept_than_may_be(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", {"preemptions_per_s": "1000"}, slots=4, blocks=80, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock)
    work = [(f"r{index}", 100 + index, 60) for index in range(30)]
    engine.add(*(request(*each) for each in work))
    engine.run()
    assert engine.answers == {name: expected(name, *sizes) for name, *sizes in work}
    assert metric(scheduler, "preemptions_total", policy="mlfq", reason="policy") > 30
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 79  # all but vLLM's null block
    assert scheduler.reset_prefix_cache()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_streaming_session_goes_as_in_stock_vllm_and_leaves_nothing_behind(hollow_model: Path, policy: str) -> None:
    def talk(name: str | None) -> DrivenEngine:
        engine = DrivenEngine(build_scheduler(hollow_model, name, slots=2))
        engine.add(request("other", 10, 40))
        for prompt, is_last in ((10, False), (4, False), (1, True)):
            turn = request("session", prompt, 5)
            turn.resumable = not is_last
            engine.add(turn)
            for _ in range(12):
                engine.step()
        engine.run()
        return engine

    ours, stock = talk(policy), talk(None)
    assert (ours.answers, ours.finished) == (stock.answers, stock.finished)
    assert ours.finished.count("session") == 2
    assert (ours.scheduler.waiting.entries, ours.scheduler.waiting.lanes.running()) == ({}, 0)


class ArrivingBlocks:
    """A stand-in for a KV connector, as a decode worker has one: prompts of `remote` come from elsewhere, later."""

    supports_divergent_local_hybrid_hits = False
    requires_kv_delivery = False

    def __init__(self, remote: dict[str, int]) -> None:
        self.remote = remote
        self.loading: list[str] = []

    def get_num_new_matched_tokens(self, wanted: Request, computed: int) -> tuple[int, bool]:
        tokens = self.remote.pop(wanted.request_id, 0)
        return tokens, tokens > 0

    def update_state_after_alloc(self, wanted: Request, blocks: object, external_tokens: int) -> None:
        if external_tokens:
            self.loading.append(wanted.request_id)

    def request_finished(self, gone: Request, block_ids: object) -> tuple[bool, None]:
        return False, None

    request_finished_all_groups = request_finished

    def take_events(self) -> tuple[()]:
        return ()

    def get_loaded_kv_cache_group_ids(self, wanted: Request) -> tuple[()]:
        return ()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class UntilFetched(ArrivingBlocks):
    """As a prefill worker has one: what was read with a single token is kept until somebody has fetched it."""

    def request_finished(self, gone: Request, block_ids: object) -> tuple[bool, Any]:
        return gone.max_tokens == 1, None

    request_finished_all_groups = request_finished


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_whose_blocks_arrive_from_a_prefill_worker_runs_when_they_are_there(
    hollow_model: Path, policy: str
) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, policy, slots=3, clock=clock)
    scheduler.connector = connector = ArrivingBlocks({"far": 32, "lost": 32})
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("long", 10, 120, tenant="a"))
    engine.step()
    engine.add(request("far", 33, 20, tenant="b"), request("lost", 33, 20, tenant="b"), request("near", 10, 20))
    for _ in range(5):
        engine.step()
    assert connector.loading == ["far", "lost"]
    assert len(engine.answers["near"]) > 0
    engine.abort("lost")
    scheduler.finished_recving_kv_req_ids.add("far")
    scheduler._free_blocks(scheduler.requests["lost"])  # what vLLM does when the blocks of the aborted one are there
    engine.run()
    assert engine.answers == {
        "long": expected("long", 10, 120),
        "far": expected("far", 33, 20),
        "near": expected("near", 10, 20),
    }
    assert (scheduler.waiting.entries, scheduler.waiting.lanes.running()) == ({}, 0)


def test_the_engine_says_what_it_has_and_that_it_steps(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "fcfs", slots=7, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock, step_s=0.4)
    assert metric(scheduler, "slots") == 7
    assert metric(scheduler, "info", dtype="float32") == 1
    engine.add(request("one", 10, 40))
    for _ in range(10):
        engine.step()
    assert 6 <= metric(scheduler, "steps_total") <= 10
