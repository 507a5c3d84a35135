"""How vLLM behaves where the plug-in relies on it: names alone do not show it. Each test drives the real scheduler."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched import scheduler as scheduler_source
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from loadtest.bench.plugin.driven import DrivenEngine, StepClock, build_scheduler, expected, request
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


# What makes vLLM's loop over waiting requests stop there (`break`) or pass one over (`continue`): the conditions of its
# own source, from the innermost `if`, with the case of this file that shows it or the reason why there is none. A new
# vLLM that has another one fails here, and is looked at before the plug-in trusts it.
STOPS = {
    "not request_queue or input_budget <= draft_slots": "nothing waits; draft_slots",
    "num_running >= self.max_num_active_reqs": "slots: the policy displaces",
    "not ready_to_schedule": "test_a_tenant_whose_newest_job_is_still_loading…",
    "request.num_stale_output_tokens and (not request.drop_stale_output)": "stale_output",
    "self.lora_config and request.lora_request and (len(scheduled_loras) == self.lora_config.max_loras and "
    "request.lora_request.lora_int_id not in scheduled_loras)": "adapter",
    "ext_tokens is None": "connector",
    "self._ec_transfer_pending(request, num_computed_tokens)": "encoder_transfer",
    "defer_prefills and num_computed_tokens < request.num_tokens - 1": "test_while_prefills_are_throttled…",
    "padded_num_tokens > request_token_budget": "only without tokens left",
    "not self.scheduler_config.enable_chunked_prefill and num_new_tokens > request_token_budget and "
    "(not self.is_mm_encoder_only)": "unchunked",
    "num_new_tokens == 0": "encoder, state_alignment and lookahead",
    "new_blocks is None": "memory: the policy displaces",
    "load_kv_async": "test_a_tenant_whose_newest_job_is_still_loading…",
}


def test_every_reason_for_which_vllm_stops_or_passes_over_is_known() -> None:
    source = ast.parse(inspect.getsource(scheduler_source))
    method = next(node for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == "schedule")
    (loop,) = (
        node for node in ast.walk(method) if isinstance(node, ast.While) and "kv_holding_waiting" in ast.unparse(node)
    )
    found = {
        ast.unparse(node.test)
        for node in ast.walk(loop)
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Break | ast.Continue)
    }
    assert found == STOPS.keys()


def stop_at_encoder(scheduler: Any, head: Request) -> None:
    head.mm_features = [SimpleNamespace(mm_position=SimpleNamespace(offset=0, length=1))]
    scheduler._try_schedule_encoder_inputs = lambda one, computed, new, budget, **_: (None, 0, budget, [], [])
    scheduler.encoder_cache_manager.free = lambda one: None


def stop_at_state_alignment(scheduler: Any, head: Request) -> None:
    """A Mamba model whose next block would not be full."""
    scheduler.need_mamba_block_aligned_split = True
    scheduler._mamba_block_aligned_split = lambda one, new, *cached: 0 if one is head else new


def stop_at_lookahead(scheduler: Any, head: Request) -> None:
    reserve = scheduler._reserve_prefill_lookahead
    scheduler._reserve_prefill_lookahead = lambda one, computed, new: 0 if one is head else reserve(one, computed, new)


def stop_at_unchunked(scheduler: Any, head: Request) -> None:
    scheduler.scheduler_config.enable_chunked_prefill = False
    head.prompt_token_ids = head.prompt_token_ids * 100
    head._all_token_ids = list(head.prompt_token_ids)
    head.num_prompt_tokens = len(head.prompt_token_ids)


def stop_at_draft_slots(scheduler: Any, head: Request) -> None:
    """A draft model needs so many input slots beside those that run that none are left: 8 times 1 + 63 are all 512."""
    scheduler.vllm_config.speculative_config = SimpleNamespace(max_num_new_slots_for_drafting=63)


def pass_over_adapter(scheduler: Any, head: Request) -> None:
    """The one adapter that fits is that of those that run."""
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    for number, one in enumerate([*scheduler.running, head]):
        one.lora_request = LoRARequest(f"adapter{number == 8}", 1 + (number == 8), "/none")


def pass_over_connector(scheduler: Any, head: Request) -> None:
    """Where the KV of its prompt is has not been found out yet."""
    scheduler.connector = ArrivingBlocks({})
    scheduler.connector.get_num_new_matched_tokens = lambda one, computed: (None if one is head else 0, False)


def pass_over_encoder_transfer(scheduler: Any, head: Request) -> None:
    scheduler._ec_transfer_pending = lambda one, computed: one is head


def pass_over_stale_output(scheduler: Any, head: Request) -> None:
    head.num_stale_output_tokens = 1


WAYS = (
    stop_at_encoder,
    stop_at_state_alignment,
    stop_at_lookahead,
    stop_at_unchunked,
    stop_at_draft_slots,
    pass_over_adapter,
    pass_over_connector,
    pass_over_encoder_transfer,
    pass_over_stale_output,
)


@pytest.mark.parametrize("stop", WAYS, ids=lambda stop: stop.__name__)
@pytest.mark.parametrize("policy", PREEMPTING)
def test_a_head_that_vllm_does_not_start_with_memory_to_spare_displaces_nobody(
    hollow_model: Path, policy: str, stop: Callable[[Any, Request], None]
) -> None:
    engine = eight_running(hollow_model, policy, slots=64)
    scheduler = engine.scheduler
    head = request("head", 30, 5)
    stop(scheduler, head)
    engine.add(head)
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
