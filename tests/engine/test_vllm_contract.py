"""How vLLM behaves where the plug-in relies on it: names alone do not show it. Each test drives the real scheduler."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from loadtest.bench.driven import DrivenEngine, StepClock, build_scheduler, expected, request
from scheduler.jobs import Job, Outcome
from tests.engine.test_vllm_plugin import ArrivingBlocks, metric

pytestmark = pytest.mark.engine

PREEMPTING = ("mlfq", "gittins", "srpt")
OPTIONS = {"mlfq": {"quantum_steps": "4"}, "gittins": {"tail": "inf"}}


def eight_running(folder: Path, policy: str, *, slots: int) -> DrivenEngine:
    """Eight long requests that have run for a while, so that a short newcomer ranks before them all."""
    clock = StepClock()
    scheduler = build_scheduler(folder, policy, OPTIONS.get(policy), slots=slots, blocks=1000, clock=clock)
    if policy == "gittins":
        teach(scheduler)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(*(request(f"long{index}", 20, 300) for index in range(8)))
    for _ in range(60):
        engine.step()
    return engine


def teach(scheduler: Any) -> None:
    """Most answers are short, some very long: whoever has run for a while will run for long."""
    for index in range(400):
        length = 4 if index % 10 else 300
        job = Job(f"taught{index}", "", 20, 0.0, max_tokens=length, output_tokens=length)
        scheduler._lanes.policy.order.learn(job, Outcome.DONE)


def displaced(engine: DrivenEngine, policy: str) -> float:
    return metric(engine.scheduler, "preemptions_total", policy=policy, reason="policy")


@pytest.mark.parametrize("policy", PREEMPTING)
def test_while_vllm_takes_nobody_new_the_batch_is_left_alone(hollow_model: Path, policy: str) -> None:
    engine = eight_running(hollow_model, policy, slots=8)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add(*(request(f"short{index}", 20, 3) for index in range(8)))
    for _ in range(20):
        engine.step()
    assert (displaced(engine, policy), len(engine.scheduler.running)) == (0, 8)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.step()
    assert displaced(engine, policy) > 0


@pytest.mark.parametrize("slots", [8, 16], ids=["slots_taken", "slots_free"])
@pytest.mark.parametrize("policy", PREEMPTING)
def test_while_prefills_are_throttled_the_batch_is_left_alone(hollow_model: Path, policy: str, slots: int) -> None:
    engine = eight_running(hollow_model, policy, slots=slots)
    engine.scheduler.prefill_capacity_bound = False
    engine.add(*(request(f"short{index}", 20, 3) for index in range(8)))
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: schedule(throttle_prefills=True)
    for _ in range(20):
        engine.step()
    assert (displaced(engine, policy), len(engine.scheduler.running)) == (0, 8)


@pytest.mark.parametrize("policy", PREEMPTING)
def test_a_head_that_vllm_stops_at_with_memory_to_spare_displaces_nobody(
    hollow_model: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = eight_running(hollow_model, policy, slots=64)
    scheduler = engine.scheduler
    monkeypatch.setattr(Request, "has_encoder_inputs", property(lambda one: one.request_id == "head"))
    scheduler._try_schedule_encoder_inputs = lambda one, computed, new, budget, **_: (None, 0, budget, [], [])
    scheduler.encoder_cache_manager.free = lambda one: None
    engine.add(request("head", 30, 5))
    for _ in range(20):
        engine.step()
    assert (displaced(engine, policy), len(scheduler.running)) == (0, 8)


def preempted_when_memory_ends(folder: Path) -> list[str]:
    """Two run until the KV cache is full, while a third that ranks last waits for its KV blocks."""
    clock = StepClock()
    scheduler = build_scheduler(folder, "vtc", slots=8, blocks=40, clock=clock)
    scheduler.connector = ArrivingBlocks({"arriving": 64})
    engine = DrivenEngine(scheduler, clock=clock)
    seen: list[str] = []
    original = scheduler._preempt_request

    def preempt(one: Request, *args: Any, **kwargs: Any) -> None:
        seen.append(one.request_id)
        original(one, *args, **kwargs)

    scheduler._preempt_request = preempt
    engine.add(request("heavy", 150, 300, tenant="flood"))
    for _ in range(5):
        engine.step()
    engine.add(request("light", 20, 300, tenant="light"))
    engine.step()
    engine.add(request("arriving", 65, 20, tenant="flood"))
    for _ in range(320):
        engine.step()
        if seen:
            break
    return seen


def test_a_tenant_whose_newest_job_is_still_loading_yields_another_of_its_own(hollow_model: Path) -> None:
    assert preempted_when_memory_ends(hollow_model)[0] == "heavy"


def test_shared_slots_pass_over_a_job_whose_blocks_are_on_their_way(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "vtc", {"slots": "shared"}, slots=3, clock=clock)
    scheduler.connector = ArrivingBlocks({"arriving": 32})
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("near1", 20, 300, tenant="flood"), request("near2", 20, 300, tenant="flood"))
    engine.step()
    engine.add(request("arriving", 33, 20, tenant="flood"))
    engine.step()
    engine.add(request("near3", 20, 300, tenant="flood"))
    engine.step()
    engine.add(request("light", 20, 3, tenant="light"))
    for _ in range(6):
        engine.step()
    assert engine.finished == ["light"]


def test_a_prompt_read_elsewhere_is_free_to_charge_and_dear_to_displace(hollow_model: Path) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "vtc", slots=2, clock=clock)
    scheduler.connector = ArrivingBlocks({"far": 64})
    engine = DrivenEngine(scheduler, clock=clock)
    far = request("far", 65, 5)
    far.sampling_params.extra_args["kv_transfer_params"] = {"do_remote_prefill": True}
    engine.add(far)
    job = scheduler.waiting.entries["far"].job
    assert (job.prefill_tokens, job.charged_tokens(cached_free=False), job.context_tokens) == (0, 0, 65)
    engine.step()
    scheduler.finished_recving_kv_req_ids.add("far")
    engine.run()
    assert engine.answers == {"far": expected("far", 65, 5)}
    assert scheduler.waiting.lanes.service("") == 2 * 5


@pytest.mark.parametrize("policy", ["mlfq", "gittins"])
def test_a_cached_prompt_counts_for_what_is_left_of_it(hollow_model: Path, policy: str) -> None:
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, policy, slots=2, step_tokens=4096, blocks=1000, clock=clock)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("same", 4001, 1))
    engine.run()
    engine.add(request("same", 4001, 5))
    job = scheduler.waiting.entries["same"].job
    assert (job.cached_tokens, job.prefill_tokens) == (4000, 1)
    spot = scheduler._lanes.policy.order.spot(job, running=False, boosted_at=None)
    fresh = scheduler._lanes.policy.order.spot(Job("fresh", "", 1, 0.0, max_tokens=5), running=False, boosted_at=None)
    assert spot.lane == fresh.lane


@pytest.mark.parametrize("policy", ["mlfq", "gittins", "srpt"])
def test_a_short_request_starts_beside_a_prompt_that_would_take_every_token(hollow_model: Path, policy: str) -> None:
    """64 slots, 512 tokens a step: without a cap the short one waits for 16 steps, under every policy."""
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, policy, slots=64, step_tokens=512, blocks=2000, clock=clock)
    if policy == "gittins":
        teach(scheduler)
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("long", 8000, 20))
    engine.step()
    engine.add(request("short", 30, 4))
    steps = {}
    step = 1
    while scheduler.has_requests():
        step += 1
        engine.step()
        for name, answer in engine.answers.items():
            if answer:
                steps.setdefault(name, step)
    assert steps["short"] <= 3  # one step to start, one in which its token comes
    assert steps["long"] <= 19
    assert engine.answers == {"long": expected("long", 8000, 20), "short": expected("short", 30, 4)}
    assert scheduler.scheduler_config.long_prefill_token_threshold == 0


def test_requests_whose_blocks_have_arrived_start_before_the_line(hollow_model: Path) -> None:
    """A decode worker's requests with KV in place are vLLM's own queue, which it drains first, even when paused."""
    clock = StepClock()
    scheduler = build_scheduler(hollow_model, "mlfq", slots=1, clock=clock)
    scheduler.connector = ArrivingBlocks({"far": 32})
    engine = DrivenEngine(scheduler, clock=clock)
    engine.add(request("far", 33, 4))
    engine.step()
    assert scheduler.requests["far"].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.add(request("near", 10, 4))
    scheduler.finished_recving_kv_req_ids.add("far")
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.step()
    assert [one.request_id for one in scheduler.running] == ["far"]
