"""Our policies at every iteration of an unpatched vLLM.

vLLM loads it with `--scheduler-cls scheduler.vllm.plugin.PolicyScheduler`; the policy comes with
`--additional-config '{"evenhand": {"policy": "mlfq", "options": {"quantum_steps": "32"}}}'` (FCFS if absent).

A request tells whose it is through `vllm_xargs`: `evenhand_tenant`, `evenhand_weight` (the tenant's share),
`evenhand_service` (the tenant's service as the gateways saw it, in weighted tokens), `evenhand_kind` (what is alike in
length), `evenhand_tier` (`priority`, `default` or `flex`), and, where it is not that of the engine, the objective
`evenhand_tpot_s`, the time per token.

A request that carries `evenhand_policy`, and perhaps `evenhand_policy_options` (["name=value", …]), is not
work but an order: the policy changes at once, nothing that waits or runs is lost, and the answer's `kv_transfer_params`
hold either {"evenhand": {"policy": name}} or {"evenhand": {"error": sentence}}. It travels in a request because that is
the one channel that reaches the scheduler of a stock vLLM on any machine, and that answers its caller.

A request that finishes on a stop *string* is aborted by vLLM's front end, so its length counts as a lower bound. A
streaming-input session is one job per turn; a turn that starts with its KV blocks in place runs as in stock vLLM.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from types import MethodType
from typing import Any, Final, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from scheduler.batching import prompt_cap
from scheduler.catalog import build, options_from
from scheduler.energy import meters
from scheduler.fairness import FairnessTally
from scheduler.jobs import Job, Outcome, Tier
from scheduler.kept_blocks import Kept
from scheduler.memory_peak import FuturePeak, Running
from scheduler.objectives import NO_OBJECTIVES, Objectives
from scheduler.policy import Policy
from scheduler.slack import Headroom, Slack, StepLoad
from scheduler.step_limit import LOOKED_AT, Batch, Limit, Prompt, StepLimit, UnderWay
from scheduler.tiers import BY_NAME, DEFAULT_RESERVE, TieredLanes
from scheduler.vllm import first_token
from scheduler.vllm.contract import require_supported_vllm
from scheduler.vllm.metrics import REPORT_INTERVAL_S, engine_metrics, watch_meters
from scheduler.weights import packed_bits_of, weights_of

logger = init_logger("vllm.evenhand")  # below "vllm", or the engine's log would not show it

HELD_LOOK_S: Final = 0.005
MOST_UNDER_WAY: Final = 64  # steps whose end was not told
YIELDS_FIRST: Final = 2**31  # above any priority that a client may send
HEADROOM: Final = (0.05, 0.5)  # of the KV blocks, least and most that flex leaves to others who were there lately

OUTCOMES: Final = {
    RequestStatus.FINISHED_STOPPED: Outcome.DONE,
    RequestStatus.FINISHED_LENGTH_CAPPED: Outcome.LENGTH,
    RequestStatus.FINISHED_ABORTED: Outcome.ABORTED,
}


def policy_from(config: object) -> Policy:
    """The policy named in vLLM's `additional_config`. ValueError if it is not understood."""
    ours = config.get("evenhand", {}) if isinstance(config, Mapping) else {}
    if not isinstance(ours, Mapping) or not isinstance(options := ours.get("options", {}), Mapping):
        raise ValueError(
            'additional_config must look like {"evenhand": {"policy": "mlfq", "options": {"name": "value"}}}'
        )
    return build(str(ours.get("policy", "fcfs")), {str(name): str(value) for name, value in options.items()})


def reserve_from(config: object) -> float:
    """The share of starts that is flex's under saturation, as vLLM's `additional_config` has it. ValueError if none."""
    ours = config.get("evenhand", {}) if isinstance(config, Mapping) else {}
    return float(ours.get("flex_reserve", DEFAULT_RESERVE))


def objectives_from(config: object) -> Objectives:
    """The objective for the time per token that vLLM's `additional_config` names. ValueError if it is no number."""
    ours = config.get("evenhand", {}) if isinstance(config, Mapping) else {}
    return Objectives(tpot_s=float(ours.get("tpot_s", math.inf)))


def xargs_of(request: Request) -> Mapping[str, Any]:
    """What the caller sent as `vllm_xargs`."""
    params = request.sampling_params
    extra = getattr(request.pooling_params, "extra_kwargs", None) if params is None else params.extra_args
    return extra if isinstance(extra, Mapping) else {}


def job_from(request: Request, now: float, cached_tokens: int = 0, objectives: Objectives = NO_OBJECTIVES) -> Job:
    """The request as policies see it. Its id is vLLM's, for the n > 1 answers to one call are as many jobs. objectives:
    of whoever names none.

    A prompt whose KV comes from a prefill worker was computed, and charged, there; but if it is displaced here, it is
    this engine that computes it again.
    """
    xargs = xargs_of(request)
    transfer = xargs.get("kv_transfer_params")
    is_remote = isinstance(transfer, Mapping) and bool(transfer.get("do_remote_prefill"))
    return Job(
        id=request.request_id,
        tenant=str(xargs.get("evenhand_tenant", "")),
        prompt_tokens=request.num_prompt_tokens,
        arrived_at=now,
        max_tokens=request.max_tokens,
        weight=_positive(xargs.get("evenhand_weight"), default=1.0),
        kind=str(xargs.get("evenhand_kind", "json" if request.structured_output_request is not None else "")),
        tier=BY_NAME.get(str(xargs.get("evenhand_tier")), Tier.DEFAULT),
        objectives=_objectives(xargs, objectives),
        remote_tokens=request.num_prompt_tokens if is_remote else 0,
        cached_tokens=cached_tokens,
    )


def _objectives(xargs: Mapping[str, Any], of_engine: Objectives) -> Objectives:
    """A request's own objectives, and the engine's for what it does not name; one object where nothing is its own."""
    tpot_s = _positive(xargs.get("evenhand_tpot_s"), of_engine.tpot_s)
    return of_engine if tpot_s == of_engine.tpot_s else Objectives(tpot_s=tpot_s)


def _positive(value: object, default: float) -> float:
    """A number above zero. Nonsense counts as absent: an exception here would end the engine for everybody."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return default
    return number if math.isfinite(number) and number > 0 else default


class QueueEntry(NamedTuple):
    """A request that waits or runs, and its job."""

    request: Request
    job: Job


class PolicyQueue(RequestQueue):  # type: ignore[misc]  # vLLM is not type-checked here
    """vLLM's waiting queue over `TieredLanes`. What is popped runs, as far as lanes are concerned, until it comes back.

    vLLM gives a request back in two ways: `prepend_request` is a preemption, `prepend_requests` returns what was popped
    and skipped (its grammar is not compiled, its adapter does not fit): for the policy that pop has not happened.

    now: time of the current scheduling pass; fixed within it, so that peek and pop agree.
    barred: were preempted for this pass's heads and must not be resumed within it: vLLM's workers cannot take a request
        that leaves and joins in one step. While one of them is first in line the queue says that it is empty.
    refused: the head that vLLM looked at last in this pass, and did not take.
    cached_tokens: how much of a request's prompt the prefix cache holds.
    takes_flex: whether a flex request may start now; while it may not and is first in line, the queue says that it is
        empty. flex_started: those that were popped in this pass. left: is told of a job that is over.
    admits: the same for any request, where the policy looks at memory to come; None where it does not.
    objectives: of requests that name none.
    """

    def __init__(
        self,
        lanes: TieredLanes,
        tally: FairnessTally,
        clock: Callable[[], float],
        cached_tokens: Callable[[Request], int] = lambda request: 0,
    ) -> None:
        self.lanes = lanes
        self.tally = tally
        self.entries: dict[str, QueueEntry] = {}
        self.now = clock()
        self.barred: set[Job] = set()
        self.refused: Request | None = None
        self.takes_flex: Callable[[Request], bool] = lambda request: True
        self.flex_started: list[Request] = []
        self.left: Callable[[Job], None] = lambda job: None
        self.admits: Callable[[Request], bool] | None = None
        self.objectives = NO_OBJECTIVES
        self._clock = clock
        self._cached_tokens = cached_tokens

    def add_request(self, request: Request) -> None:
        now = self._clock()
        self.leave(request)  # a streaming session that is back for its next turn
        job = job_from(request, now, self._cached_tokens(request), self.objectives)
        service = _positive(xargs_of(request).get("evenhand_service"), default=0.0)
        if service:
            self.lanes.told(job, service, now)
        self.lanes.push(job, now)
        self.tally.queued(job)
        self.entries[job.id] = QueueEntry(request, job)

    def peek_request(self) -> Request:
        job = self.lanes.peek(self.now)
        if job is None:
            raise IndexError("peek from an empty queue")
        self.refused = self.entries[job.id].request
        return self.refused

    def pop_request(self) -> Request:
        self.refused = None
        job = self.lanes.pop(self.now)
        self.tally.started(job, self.now)
        request = self.entries[job.id].request
        if job.tier is Tier.FLEX:
            self.flex_started.append(request)
        return request

    def prepend_request(self, request: Request) -> None:
        entry = self.entries.get(request.request_id)
        if entry is None:  # a streaming session's later turn, preempted
            self.add_request(request)
            return
        self.lanes.preempt(entry.job, self.now)
        self.tally.preempted(entry.job, self.now)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            job = self.entries[request.request_id].job
            self.lanes.put_back(job, self.now)
            self.tally.put_back(job)

    def remove_request(self, request: Request) -> None:
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            entry = self.entries.get(request.request_id)
            if entry is not None and entry.job in self.lanes:
                self.leave(request)

    def leave(self, request: Request) -> None:
        """The request's job is over, wherever it is; nothing happens if it has none."""
        entry = self.entries.pop(request.request_id, None)
        if entry is None:
            return
        job, now = entry.job, self._clock()
        unserved = request.num_output_tokens - job.output_tokens
        if unserved > 0:  # the last step's tokens: vLLM frees a request before it hands them out
            self.lanes.serve(job, unserved, now)
        self.left(job)
        self.tally.left(job, was_waiting=job in self.lanes, now=now)
        outcome = OUTCOMES.get(request.status, Outcome.FAILED) if request.is_finished() else Outcome.ABORTED
        self.lanes.finish(job, outcome, now)

    def __bool__(self) -> bool:
        lanes = self.lanes
        if not len(lanes):
            return False
        if not self.barred and self.admits is None and not lanes.waiting(Tier.FLEX):
            return True
        head = lanes.peek(self.now)
        if head is None or head in self.barred:
            return False
        request = self.entries[head.id].request
        if head.tier is Tier.FLEX and not lanes.is_due(head) and not self.takes_flex(request):
            return False
        return self.admits is None or self.admits(request)

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Request]:
        return (self.entries[job.id].request for job in self.lanes.waiting_jobs())


class Deferred(RequestQueue):  # type: ignore[misc]
    """Stands in for the second queue of older vLLMs (`skipped_waiting`): what is put here goes to the one queue.

    vLLM hands over skipped requests in order of arrival; the last of them must be put in front first.
    """

    def __init__(self, queue: PolicyQueue) -> None:
        self._queue = queue

    def add_request(self, request: Request) -> None:
        self._queue.add_request(request)

    def prepend_request(self, request: Request) -> None:
        self._queue.prepend_requests((request,))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        self._queue.prepend_requests(reversed(list(requests)))

    def peek_request(self) -> Request:
        raise IndexError("nothing is kept here")

    def pop_request(self) -> Request:
        raise IndexError("nothing is kept here")

    def remove_request(self, request: Request) -> None:
        """It is in the other queue."""

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """They are in the other queue."""

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Request]:
        """vLLM looks here for requests whose KV blocks are on their way."""
        return iter(self._queue)


class Filled(NamedTuple):
    """A full KV block and the hash of what was in it, all tokens up to its end."""

    block: KVCacheBlock
    content: object

    def intact(self) -> bool:
        return bool(self.block.block_hash == self.content)


def filled(groups: Iterable[Sequence[KVCacheBlock]]) -> list[Filled]:
    """Of a request's blocks those that can be found again once they are free."""
    return [
        Filled(block, block.block_hash)
        for blocks in groups
        for block in blocks
        if block.block_hash and not block.is_null
    ]


def kept_in(pool: BlockPool, block_tokens: int) -> Kept[Filled]:
    """Keeps displaced requests' blocks of vLLM's pool, of which one holds nothing."""

    def free_anew(blocks: Sequence[Filled]) -> None:
        free = [each.block for each in blocks if not each.block.ref_cnt]
        pool.touch(free)
        pool.free_blocks(reversed(free))

    return Kept(pool.num_gpu_blocks - 1, block_tokens, Filled.intact, free_anew)


def blocks_for(spec: Any, tokens: int) -> int:  # noqa: ANN401
    """The least KV blocks of one kind of layer for so many tokens; a sliding window needs no more than its own."""
    if not isinstance(spec, AttentionSpec):
        return 1
    window = getattr(spec, "sliding_window", None) or tokens
    return -(-min(tokens, int(window)) // int(spec.block_size))


class Scheduled(NamedTuple):
    """A step that was sent to be computed, and when. load: what it computes, kept of every step that reads a prompt and
    of some others; None of the rest."""

    load: StepLoad | None
    at: float


def grows(spec: Any) -> bool:  # noqa: ANN401
    """Whether a request holds ever more KV blocks of this kind of layer the longer it gets."""
    return isinstance(spec, AttentionSpec) and not getattr(spec, "sliding_window", None)


class PolicyScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler with our policy for who starts, who yields its slot, and who yields its memory."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    registry: CollectorRegistry = REGISTRY
    running: list[Request]
    max_num_scheduled_tokens: int
    max_num_running_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        require_supported_vllm()
        self._shares_cores = bool(current_platform.is_cpu())
        self._vllm_policy = SchedulingPolicy.FCFS
        super().__init__(*args, **kwargs)
        policy = policy_from(self.vllm_config.additional_config)
        self._lanes = TieredLanes(policy, reserve_from(self.vllm_config.additional_config))
        self._tally = FairnessTally()
        self._queue = PolicyQueue(self._lanes, self._tally, self.clock, self._cached_tokens)
        self._install_queue()
        if not self.scheduler_config.async_scheduling:
            self._be_synchronous()
        self._slots: int = getattr(self, "max_num_active_reqs", None) or self.max_num_running_reqs
        self._lanes.feed(self._slots)
        takes = inspect.signature(Scheduler._preempt_request).parameters
        self._preempt_options = {"drop_stale_output": self.requires_kv_delivery} if "drop_stale_output" in takes else {}
        self._kept = kept_in(self.kv_cache_manager.block_pool, self.vllm_config.cache_config.block_size)
        self._memory_bound = False
        self._yielded_memory = False
        # Where vLLM counts a look-up as a hit in its metrics, we do not look.
        self._looks_up = hasattr(self.kv_cache_manager, "record_prefix_cache_stats")
        self._prepare_for_flex()
        self._plan_memory(policy)
        self._reason = "reset"
        self._singled_out: Request | None = None
        self._answers: list[tuple[Request, EngineCoreOutput]] = []
        self._prepare_for_first_tokens()
        self._metrics = engine_metrics(self.registry)
        self._lanes_shown: set[str] = set()
        self._report_at = 0.0
        self._steps = 0
        self._describe(policy)

    def _prepare_for_flex(self) -> None:
        self._queue.objectives = objectives_from(self.vllm_config.additional_config)
        # A model whose state is kept at the ends of blocks may compute nothing of a prompt that has less than a block.
        aligned = getattr(self, "need_mamba_block_aligned_split", False)
        self._chunk_tokens: int = self.vllm_config.cache_config.block_size if aligned else 1
        self._slack = Slack()
        self._limit: StepLimit | None = None  # until there is a request that has an objective for its tokens
        self._headroom = Headroom()
        self._flex_room = 0  # tokens of flex prompts that the step has room for, those under way left out
        self._queue.takes_flex = self._takes_flex
        self._held: list[Request] = []
        self._displaced_flex: dict[str, int] = {}  # tokens that they had computed, by request
        self._under_way: dict[int, Scheduled] = {}
        self._updated_at = 0.0

    def _prepare_for_first_tokens(self) -> None:
        # Where steps overlap, what is said leaves with the one under way, and an empty one would be a gap behind it.
        # Several data-parallel ranks make their steps together: an empty one of one rank costs them all.
        parallel = self.vllm_config.parallel_config
        several = parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1
        self._overlaps_steps: bool = self.scheduler_config.async_scheduling or several
        self._was_empty = False
        self._takes_first_tokens = first_token.is_possible(self)
        if self.connector is not None and self._takes_first_tokens:
            matched = self.connector.get_num_new_matched_tokens
            self.connector.get_num_new_matched_tokens = first_token.without_first_token(matched)

    def _start_limiting(self) -> None:
        """From here on prompts are limited beside answers, if they can be cut."""
        config = self.scheduler_config
        if config.enable_chunked_prefill and not getattr(config, "disable_chunked_mm_input", False):
            self._limit = StepLimit(self._slack.model, self._chunk_tokens)
            self._queue.left = self._limit.ended

    def _plan_memory(self, policy: Policy) -> None:
        """Looks ahead at what the batch will hold, if the policy admits by that."""
        self._peak: FuturePeak | None = None
        self._queue.admits = None
        if policy.order.admission == "peak":
            specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
            growth = sum(1 / spec.block_size for spec in specs if grows(spec))
            self._peak = FuturePeak(policy.order.rest_tokens, growth)
            self._queue.admits = self._stays_within

    def _describe(self, policy: Policy) -> None:
        """What does not change while the engine runs, and the policy of its start: in metrics and in the log."""
        self._metrics.policy.labels(policy.name).set(1)
        self._metrics.slots.set(self._slots)
        self._metrics.step_tokens.set(self.max_num_scheduled_tokens)
        lora = self.lora_config
        self._metrics.adapters.set(0 if lora is None else lora.max_cpu_loras or lora.max_loras)
        model = self.vllm_config.model_config
        self._metrics.info.labels(str(model.dtype).removeprefix("torch.")).set(1)
        weights = weights_of(Path(model.model), 8 * model.dtype.itemsize, packed_bits_of(model.hf_config))
        if weights is not None:
            self._metrics.compression.set(weights.compression)
        gpus = 0 if current_platform.is_cpu() else self.vllm_config.parallel_config.world_size
        watch_meters(meters(gpus=gpus, environ=os.environ), self._metrics)
        logger.info("evenhand: policy %s, %d slots", policy.name, self._slots)
        self._warn_of_recomputation(policy)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            logger.info("evenhand: set PROMETHEUS_MULTIPROC_DIR to an empty folder to see its metrics in /metrics")

    def _warn_of_recomputation(self, policy: Policy) -> None:
        if policy.order.preemptions_per_s and not self.kv_cache_manager.enable_caching:
            logger.warning(
                "evenhand: this engine has no prefix cache, so a request that policy %s displaces computes its prompt "
                "and its answer so far again: fcfs and vtc displace nobody",
                policy.name,
            )

    def _install_queue(self) -> None:
        self.waiting = self._queue
        if hasattr(self, "skipped_waiting"):
            self.skipped_waiting = Deferred(self._queue)
        self._vllm_policy = SchedulingPolicy.PRIORITY

    def _be_synchronous(self) -> None:
        """What vLLM does where asynchronous scheduling is off: its plain `Scheduler` in place of `AsyncScheduler`."""
        self._update_after_schedule = MethodType(Scheduler._update_after_schedule, self)
        self._update_request_with_output = MethodType(Scheduler._update_request_with_output, self)

    @property
    def policy(self) -> SchedulingPolicy:
        """vLLM's own policy, which it reads when KV memory is short and it must choose a running request to preempt.

        Under PRIORITY that is the one with the largest `priority`; so ours is given it here, and not before: no work
        is done in a step that has memory enough.
        """
        if self._vllm_policy is SchedulingPolicy.PRIORITY:
            self._single_out(self._lanes.victim(self._queue.now, self._can_yield))
            if self._singled_out in self._held:  # it sits this step out, but its memory is needed
                self._held.remove(self._singled_out)
                self.running.append(self._singled_out)
        return self._vllm_policy

    @policy.setter
    def policy(self, _: SchedulingPolicy) -> None:
        """Set by the base class from --scheduling-policy, which we replace."""

    def _single_out(self, victim: Job | None) -> None:
        if self._singled_out is not None:
            self._singled_out.priority = 0
        self._singled_out = None if victim is None else self._queue.entries[victim.id].request
        if self._singled_out is not None:
            self._singled_out.priority = YIELDS_FIRST

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:  # noqa: ANN401
        if self._answers and not (self._overlaps_steps or self._was_empty):
            return self._empty_step(*args, **kwargs)
        self._was_empty = False
        if self._shares_cores and self._only_holds_kv():
            time.sleep(HELD_LOOK_S)
        queue = self._queue
        now = queue.now = self.clock()
        queue.barred.clear()
        queue.refused = None
        admits = len(self._lanes) > 0 and not self._is_paused() and not any((*args, *kwargs.values()))
        if admits:
            self._note_progress()
            if self._memory_bound or self._slots_taken() or self._flex_holds_memory(now):
                self._displace(now)
        self._reason, self._yielded_memory = "memory", False
        output = self._schedule_in_time(now, *args, admits=admits, **kwargs)
        self._reason = "reset"
        flex_tokens = self._flex_tokens(output)
        if flex_tokens:
            self._metrics.flex_tokens.inc(flex_tokens)
        self._lanes.stepped(now, output.total_num_scheduled_tokens - flex_tokens)
        self._note_starts(output, now)
        self._kept.after(output.total_num_scheduled_tokens, self._lanes.__contains__)
        self._memory_bound = admits and self._stopped_at_memory(output)
        self._steps += 1
        if now >= self._report_at:
            self._report(now)
        return output

    def _empty_step(self, *args: Any, **kwargs: Any) -> SchedulerOutput:  # noqa: ANN401
        """A step at whose end is said what need not wait until something has been computed, or KV asked for. Never two
        in a row, for those that run stand still in it."""
        self._was_empty = True
        step_tokens, self.max_num_scheduled_tokens = self.max_num_scheduled_tokens, 0
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = step_tokens

    def _flex_holds_memory(self, now: float) -> bool:
        """Whether the head lacks KV blocks, and a flex job of a lower tier could give it some."""
        if not self._lanes.running(Tier.FLEX):
            return False
        head = self._lanes.peek(now)
        if head is None or head.tier is Tier.FLEX:
            return False
        return self._lacks_blocks(self._queue.entries[head.id].request)

    def _schedule_in_time(self, now: float, *args: Any, admits: bool, **kwargs: Any) -> SchedulerOutput:  # noqa: ANN401
        """A step; a timed one where its length matters, to answers with an objective or for flex. admits: whether
        somebody waits who may start."""
        has_flex = self._lanes.has(Tier.FLEX)
        limit = None if self._limit is None else self._step_limit(self._limit, now)
        cap = self._prompt_cap(limit, now) if admits else None
        if has_flex:
            output = self._schedule_within_budget(cap, limit, now, *args, **kwargs)
        else:
            output = self._schedule_capped(cap, limit, *args, **kwargs)
        if has_flex or self._limit is not None:
            self._note_under_way(output, now, has_flex=has_flex)
        return output

    def _schedule_within_budget(
        self, cap: int | None, limit: Limit | None, now: float, *args: Any, **kwargs: Any
    ) -> SchedulerOutput:
        """A step in which flex does as much as fits beside the others.

        What does not fit is held aside: vLLM may leave running requests out of a step, as it does when tokens run out.
        Those that go on come last, so that others have the step's tokens first.
        """
        step_tokens, slots = self.max_num_scheduled_tokens, self.max_num_running_reqs
        active = getattr(self, "max_num_active_reqs", None)
        tokens = self._hold_flex_back(step_tokens, now)
        self.max_num_scheduled_tokens = min(step_tokens, tokens)
        self.max_num_running_reqs = slots - len(self._held)
        if active is not None:
            self.max_num_active_reqs = active - len(self._held)
        try:
            return self._schedule_capped(cap, limit, *args, **kwargs)
        finally:
            self.max_num_scheduled_tokens, self.max_num_running_reqs = step_tokens, slots
            if active is not None:
                self.max_num_active_reqs = active
            self.running.extend(self._held)
            self._held = []

    def _step_limit(self, by: StepLimit, now: float) -> Limit | None:
        """The bound on what prompts take of this step, so that the answers beside them keep their objective."""
        arrived, on_the_way = self._holding_kv()
        if not (self.running or arrived) or not (self._inflight_prefills or arrived or len(self._lanes)):
            return None
        batch = Batch(arrived=len(arrived))
        self._put_into(batch, chain(self.running, arrived))
        entries = self._queue.entries
        batch.expected += [entries[one.request_id].job for one in on_the_way if one.request_id in entries]
        if len(self._lanes):  # else all that run would be looked through for nobody
            self._put_waiting_into(batch)
        return by.of(
            batch,
            now,
            self.max_num_scheduled_tokens,
            under_way=self._last_under_way(),
            tokens_each=1 + self.num_spec_tokens,
        )

    def _put_waiting_into(self, batch: Batch) -> None:
        """Those that may start, in order of arrival, and those whose KV is elsewhere."""
        apart = hasattr(self, "kv_holding_waiting")
        for job in islice(self._lanes.waiting_jobs(), LOOKED_AT):
            if job.tier is Tier.FLEX and not self._lanes.is_due(job):
                continue
            if unread := job.restart_tokens:
                batch.waiting.append(Prompt(unread, job.cached_tokens))
            elif apart:
                batch.expected.append(job)
                batch.asks += 1
            else:  # older vLLMs keep it in our queue while its KV is on the way: it may start in this step
                batch.answers.append((job, 0))
                batch.arrived += 1

    def _holding_kv(self) -> tuple[list[Request], list[Request]]:
        """Requests that hold KV and wait before all others: those that start in this step, since it has come from
        another engine or is that of a session's last turn, and those whose KV is on the way."""
        holding = getattr(self, "kv_holding_waiting", None)
        if not holding:
            return [], []
        has_come, is_blocked = self.finished_recving_kv_req_ids, self._is_blocked_waiting_status
        arrived = [one for one in holding if one.request_id in has_come or not is_blocked(one.status)]
        return arrived, [one for one in holding if one.request_id not in has_come and is_blocked(one.status)]

    def _put_into(self, batch: Batch, requests: Iterable[Request]) -> None:
        """A session's later turn has no job. Prompts of flex that take what others leave are left out."""
        entries, several = self._queue.entries, 1 + self.num_spec_tokens
        for request in requests:
            entry = entries.get(request.request_id)
            if self._is_read(request):
                if entry is None or entry.job.tier is not Tier.FLEX or self._lanes.is_reserved(entry.job):
                    batch.prompts.append(Prompt(self._unread(request), request.num_computed_tokens))
                continue
            batch.context += request.num_computed_tokens
            if entry is None:
                batch.untracked += 1
            else:  # a step under way makes one token at least, however many are drafted in it
                job = entry.job
                batch.answers.append((job, job.output_tokens + -(-request.num_output_placeholders // several)))

    def _last_under_way(self) -> UnderWay | None:
        last = next(reversed(self._under_way.values()), None)
        if last is None:
            return None
        load = last.load or StepLoad()
        return UnderWay(max(last.at, self._updated_at), StepLoad(load.prompt_tokens, pairs=load.pairs))

    def _note_under_way(self, output: SchedulerOutput, now: float, *, has_flex: bool) -> None:
        """A step is sent to be computed: how long that takes is learned from it, or only from some of its kind."""
        if not output.total_num_scheduled_tokens:
            return
        sequences = len(output.num_scheduled_tokens) * (1 + self.num_spec_tokens)
        prompt_tokens = max(0, output.total_num_scheduled_tokens - sequences)
        learns = has_flex or (self._limit is not None and self._limit.learns_from(reads=prompt_tokens > 0))
        if len(self._under_way) > MOST_UNDER_WAY:
            self._under_way.clear()
        self._under_way[id(output)] = Scheduled(self._load_of(output) if learns else None, now)

    def _hold_flex_back(self, step_tokens: int, now: float) -> int:
        """Takes out of the batch what sits the next step out; returns the most tokens that the step may compute."""
        entries, lanes = self._queue.entries, self._lanes
        others: list[Request] = []
        kept: list[Request] = []
        decoding: list[Request] = []
        reading: list[Request] = []
        for request in self.running:
            entry = entries.get(request.request_id)
            if entry is None or entry.job.tier is not Tier.FLEX:
                others.append(request)
            elif lanes.is_reserved(entry.job):
                kept.append(request)
            else:
                (decoding if self._unread(request) <= 1 else reading).append(request)
        load = StepLoad()
        for request in (*others, *kept):
            self._add_load(load, request, min(step_tokens, self._unread(request)))
        wanted = lanes.wanted_tokens(step_tokens)
        load.prompt_tokens = min(step_tokens, load.prompt_tokens + wanted)
        contexts = [request.num_computed_tokens for request in decoding]
        before = reading[0].num_computed_tokens if reading else 0
        sequences, prompt_tokens = self._slack.room(load, contexts, step_tokens, self._tpots_of(others), before)
        going = decoding[:sequences]
        self._held = decoding[sequences:]
        reads = not wanted and prompt_tokens > 0
        (going if reads else self._held).extend(reading)
        self._flex_room = prompt_tokens - sum(map(self._unread, reading)) if reads else 0
        self._headroom.note(sum(self._blocks(one.num_tokens) for one in others), now)
        self._queue.flex_started.clear()
        self.running = others + kept + going
        made = (1 + int(self.num_spec_tokens)) * (load.sequences + sequences)
        return load.prompt_tokens + made + prompt_tokens

    def _tpots_of(self, others: Iterable[Request]) -> list[float]:
        """The objectives for the next tokens of those that make one; the engine's where nobody does."""
        of_engine, entries = self._queue.objectives.tpot_s, self._queue.entries
        known = [entries.get(one.request_id) for one in others if self._unread(one) <= 1]
        return [of_engine if one is None else one.job.objectives.tpot_s for one in known] or [of_engine]

    def _takes_flex(self, request: Request) -> bool:
        """Whether a flex request may start in this step.

        One prompt of flex at a time is read over several steps: of many that were begun each would hold memory, lose it
        to whoever arrives, and be read again. And it starts only in memory that others have not needed lately.
        """
        if not self.running and not self._held:
            return True
        if sum(map(self._unread, self._queue.flex_started)) >= self._flex_room:
            return False
        return not self._headroom.are_there or not self._lacks_blocks(request, beside=self._headroom.blocks)

    @staticmethod
    def _unread(request: Request) -> int:
        """Tokens to compute before its next one, that one's own position included."""
        return int(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens)

    @staticmethod
    def _add_load(load: StepLoad, request: Request, tokens: int) -> None:
        if tokens <= 1:
            load.sequences += 1
            load.context += request.num_computed_tokens
        else:
            load.add_prompt(tokens, request.num_computed_tokens)

    def _load_of(self, output: SchedulerOutput) -> StepLoad:
        """What a step computes that has just been put together."""
        load, requests, several = StepLoad(), self.requests, 1 + self.num_spec_tokens
        for name, tokens in output.num_scheduled_tokens.items():
            request = requests.get(name)
            if request is not None:
                if tokens <= several and request.num_output_tokens:
                    load.sequences += 1
                    load.context += request.num_computed_tokens
                else:
                    load.add_prompt(tokens, request.num_computed_tokens - tokens)
        return load

    def _time_step(self, output: SchedulerOutput, now: float) -> None:
        """A step has ended: it began when it was put together, or when the one before it ended."""
        scheduled = self._under_way.pop(id(output), None)
        if scheduled is None or scheduled.load is None:
            return
        seconds = now - max(scheduled.at, self._updated_at)
        if seconds > 0.0:
            self._slack.model.learn(scheduled.load, seconds)

    def _only_holds_kv(self) -> bool:
        """Whether all that is left is KV that another engine has not fetched yet.

        vLLM then steps without a pause to see whether it has, which took a core from those who do the fetching.
        """
        return self.connector is not None and len(self.requests) > 0 and not self.has_unfinished_requests()

    def _slots_taken(self) -> bool:
        return bool(len(self.running) + self.num_waiting_for_streaming_input >= self._slots)

    def _is_paused(self) -> bool:
        """Whether vLLM takes nobody from the line at present, so that making room would only empty the batch."""
        return bool(getattr(getattr(self, "_pause_state", None), "name", "UNPAUSED") != "UNPAUSED")

    def _note_progress(self) -> None:
        """Tells the policy how far prompts that are read over several steps have come."""
        for request in self._inflight_prefills:
            entry = self._queue.entries.get(request.request_id)
            if entry is not None and request.status == RequestStatus.RUNNING:
                self._lanes.read(entry.job, request.num_computed_tokens)

    def _can_yield(self, job: Job) -> bool:
        """Whether the job is in vLLM's batch; it is not while its KV blocks are on their way from another engine."""
        entry = self._queue.entries.get(job.id)
        return entry is not None and bool(entry.request.status == RequestStatus.RUNNING)

    def _displace(self, now: float) -> None:
        """Makes room for the heads of the line that the policy wants to run in place of those who do.

        As many as have tokens to compute in one step. Heads are held aside while the next one is looked for, and go
        back to the front of the line: it is vLLM that takes them. A head that vLLM would skip ends it.
        """
        tokens = self.max_num_scheduled_tokens
        heads: list[Job] = []
        while tokens > 0 and (swap := self._lanes.displacement(now, self._can_yield)) is not None:
            head, victim = swap
            across = victim.tier > head.tier
            request = self._queue.entries[head.id].request
            if self._is_blocked_waiting_status(request.status):
                break
            if head.tier is Tier.FLEX and not self._lanes.is_due(head) and (heads or not self._takes_flex(request)):
                break  # it would not be taken, and the slot would stay empty
            if across and not self._needs_room(head, len(heads)):
                break
            self._send_back(victim, now)
            if across:
                self._displace_for_memory(head, now)
            heads.append(self._lanes.pop(now))
            tokens -= max(1, head.restart_tokens)
            if self._memory_bound and not across:
                break  # whether what was freed is enough is known only when the head has started
        for head in reversed(heads):
            self._lanes.put_back(head, now)

    def _needs_room(self, head: Job, before: int) -> bool:
        """Whether there is no slot for the head behind so many others, or too little memory."""
        taken = len(self.running) + self.num_waiting_for_streaming_input + before
        return bool(taken >= self._slots) or self._lacks_blocks(self._queue.entries[head.id].request)

    def _displace_for_memory(self, head: Job, now: float) -> None:
        """Sends jobs of lower tiers back until the head has the memory that it needs."""
        request = self._queue.entries[head.id].request
        while self._lacks_blocks(request):
            swap = self._lanes.displacement(now, self._can_yield)
            if swap is None or swap[0] is not head or swap[1].tier <= head.tier:
                return
            self._send_back(swap[1], now)

    def _send_back(self, job: Job, now: float) -> None:
        victim = self._queue.entries[job.id].request
        self.running.remove(victim)
        self._reason = "policy"
        self._kept.displaced(job, filled(self.kv_cache_manager.get_blocks(victim.request_id).blocks))
        self._preempt_request(victim, now, **self._preempt_options)
        self._queue.barred.add(job)

    def _prompt_cap(self, limit: Limit | None, now: float) -> int | None:
        """Tokens that a prompt may take in this step, so that a better-ranked head starts in it; None: no cap."""
        if not self._inflight_prefills or self._memory_bound or self._slots_taken():
            return None
        reading = [
            (entry.job, request)
            for request in self._inflight_prefills
            if request.status == RequestStatus.RUNNING and (entry := self._queue.entries.get(request.request_id))
        ]
        head = self._lanes.outranks(now, [job for job, _ in reading])
        if head is None or self._is_blocked_waiting_status(self._queue.entries[head.id].request.status):
            return None
        unread = [max(0, request.num_tokens - request.num_computed_tokens) for _, request in reading]
        if limit is not None:
            cap = prompt_cap(limit.prompt_tokens, 0, unread, head.restart_tokens)
        else:
            decoding = (1 + self.num_spec_tokens) * (len(self.running) - len(reading))
            cap = prompt_cap(self.max_num_scheduled_tokens, decoding, unread, head.restart_tokens)
        return None if cap is None else max(cap, self._chunk_tokens)

    def _schedule_capped(self, cap: int | None, limit: Limit | None, *args: Any, **kwargs: Any) -> SchedulerOutput:  # noqa: ANN401
        """cap: most tokens of each prompt. limit: of all of them; those that are being read then come last."""
        config, step_tokens = self.scheduler_config, self.max_num_scheduled_tokens
        own = config.long_prefill_token_threshold
        if limit is not None:
            cap = limit.each_tokens if cap is None else min(cap, limit.each_tokens)
            self.max_num_scheduled_tokens = min(step_tokens, limit.step_tokens)
            self.running.sort(key=self._is_read)
        if cap is None or 0 < own <= cap:
            cap = own
        config.long_prefill_token_threshold = cap
        try:
            return super().schedule(*args, **kwargs)
        finally:
            config.long_prefill_token_threshold = own
            self.max_num_scheduled_tokens = step_tokens

    def _is_read(self, request: Request) -> bool:
        return self._unread(request) > 1

    def _flex_tokens(self, output: SchedulerOutput) -> int:
        """Of the tokens that a step computes, those of the flex tier."""
        if not self._lanes.running(Tier.FLEX):
            return 0
        entries = self._queue.entries
        return sum(
            tokens
            for name, tokens in output.num_scheduled_tokens.items()
            if (entry := entries.get(name)) is not None and entry.job.tier is Tier.FLEX
        )

    def _preempt_request(self, request: Request, timestamp: float, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._metrics.preemptions.labels(self._lanes.policy.name, self._reason).inc()
        self._yielded_memory |= self._reason == "memory"
        entry = self._queue.entries.get(request.request_id)
        if entry is not None and entry.job.tier is Tier.FLEX:
            self._metrics.flex_displaced.inc(request.num_computed_tokens)
            self._displaced_flex[request.request_id] = request.num_computed_tokens
        if self._peak is not None:
            self._peak.left()
        super()._preempt_request(request, timestamp, *args, **kwargs)

    def _note_starts(self, output: SchedulerOutput, now: float) -> None:
        if self._displaced_flex:
            self._note_flex_resumed(output)
        for start in output.scheduled_new_reqs:
            entry = self._queue.entries.get(start.req_id)
            if entry is not None and entry.request.num_preemptions == 0:
                self._lanes.computed(entry.job, start.num_computed_tokens, now)

    def _note_flex_resumed(self, output: SchedulerOutput) -> None:
        """Counts what displaced flex requests that run again did not find in the prefix cache."""
        for name in self._displaced_flex.keys() & output.num_scheduled_tokens.keys():
            found = self.requests[name].num_computed_tokens - output.num_scheduled_tokens[name]
            self._metrics.flex_recomputed.inc(max(0, self._displaced_flex.pop(name) - found))
        if len(self._displaced_flex) > len(self.requests):  # some have ended while they waited
            self._displaced_flex = {name: had for name, had in self._displaced_flex.items() if name in self.requests}

    def _stopped_at_memory(self, output: SchedulerOutput) -> bool:
        """Whether the head of the line did not start for want of KV blocks, and for nothing else.

        vLLM stops at a head for other reasons too (encoder budget, alignment, throttled prefills), and displacing
        somebody would not help it then; so the blocks that it needs are counted.
        """
        if self._queue.barred or output.total_num_scheduled_tokens >= self.max_num_scheduled_tokens:
            return False
        head = self._queue.refused
        if head is None and self._yielded_memory and self._queue:  # then vLLM looked at nobody who waits
            head = self._queue.peek_request()
        if head is not None:
            return self._lacks_blocks(head)
        return self._peak is not None and self._peak.holds_back(self._lanes.peek(self._queue.now))

    def _lacks_blocks(self, request: Request, *, beside: float | None = None) -> bool:
        """Whether the KV blocks that are free are too few for a request to start. beside: blocks that flex leaves free
        within the bounds of `HEADROOM`; the request is then looked at as a whole, and not for what one step computes.
        """
        manager = self.kv_cache_manager
        pool = manager.block_pool
        free = pool.get_num_free_blocks() - getattr(manager, "watermark_blocks", 0)
        if beside is not None:
            least, most = (int(share * pool.num_gpu_blocks) for share in HEADROOM)
            free -= min(max(int(beside), least), most)
            if free <= 0:  # whatever is cached of it: its last token is computed anew
                return True
        whole = beside is not None or getattr(self, "scheduler_reserve_full_isl", False)
        tokens = request.num_tokens if whole else min(request.num_tokens, self.max_num_scheduled_tokens)
        return all(wanted > free for wanted in self._wanted_blocks(request, tokens))

    def _blocks(self, tokens: int) -> int:
        """KV blocks of all kinds of layers for a request of so many tokens."""
        return sum(blocks_for(group.kv_cache_spec, tokens) for group in self.kv_cache_config.kv_cache_groups)

    def _wanted_blocks(self, request: Request, tokens: int) -> Iterator[int]:
        """KV blocks for so many of a request's tokens; then those without what others hold, which is dearer to find."""
        wanted = self._blocks(tokens)
        yield wanted
        if self._looks_up:
            cached = self.kv_cache_manager.get_computed_blocks(request)[0].blocks
            yield wanted - sum(1 for blocks in cached for block in blocks if block.ref_cnt and not block.is_null)

    def _stays_within(self, request: Request) -> bool:
        """Whether the batch is expected to fit into KV memory to its end with this request in it."""
        if self._peak is None or self._slots_taken() or self._is_blocked_waiting_status(request.status):
            return True
        entries, pool = self._queue.entries, self.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        room = free - getattr(self.kv_cache_manager, "watermark_blocks", 0)
        return self._peak.fits(
            entries[request.request_id].job,
            [
                self._running_job(running, entry.job)
                for running in self.running
                if (entry := entries.get(running.request_id)) is not None
            ],
            free=room,
            used=pool.num_gpu_blocks - 1 - free,
            wanted=lambda: self._wanted_blocks(request, request.num_tokens),
        )

    def _running_job(self, request: Request, job: Job) -> Running:
        wants = self._blocks(request.num_tokens)
        if request.num_computed_tokens + 1 >= request.num_tokens:
            return Running(job, wants, wants)
        has = sum(map(len, self.kv_cache_manager.get_blocks(request.request_id).blocks))
        return Running(job, has, max(has, wants))

    def _cached_tokens(self, request: Request) -> int:
        """Prompt tokens that the prefix cache holds as the request arrives, for policies that look at prompts."""
        if not self._looks_up or not self._lanes.policy.weighs_prompts:
            return 0
        return int(self.kv_cache_manager.get_computed_blocks(request)[1])

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        now = self.clock()
        if self._under_way:
            self._time_step(scheduler_output, now)
        self._updated_at = now
        entries, serve, limit = self._queue.entries, self._lanes.serve, self._limit
        for client in outputs.values():
            for output in client.outputs:
                entry = entries.get(output.request_id)
                if entry is not None:
                    serve(entry[1], len(output.new_token_ids), now)
                    if limit is not None and output.new_token_ids:
                        limit.made(entry[1], now)
        if self._answers:
            self._hand_out_answers(outputs)
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._queue.leave(request)
        if self._peak is not None:
            self._peak.left()
        told = super()._free_request(request, *args, **kwargs)
        transfer = told[0] if isinstance(told, tuple) else told
        if transfer and self._takes_first_tokens:
            first_token.tell(transfer, request)
        return told

    def _free_blocks(self, request: Request) -> None:
        """Later than `_free_request` where another engine is still to fetch them."""
        super()._free_blocks(request)
        if self._peak is not None:
            self._peak.left()

    def _handle_stopped_request(self, request: Request) -> bool:
        if request.resumable:
            self._queue.leave(request)
        return bool(super()._handle_stopped_request(request))

    def add_request(self, request: Request) -> None:
        xargs = xargs_of(request)
        if "evenhand_policy" in xargs:
            self._answer(request, self._switch(xargs))
            return
        token = None
        if self.connector is not None and self._takes_first_tokens:
            vocabulary = self.vllm_config.model_config.get_vocab_size()
            token = first_token.take(request, vocabulary=vocabulary, longest=self.max_model_len)
        super().add_request(request)
        entry = self._queue.entries.get(request.request_id)
        if self._limit is None and entry is not None and entry.job.objectives.tpot_s < math.inf:
            self._start_limiting()
        if token is not None:
            if self._limit is not None and entry is not None:
                self._limit.made_elsewhere(entry.job, self.clock())
            self._answers.append((request, first_token.output_of(request, token, log_stats=self.log_stats)))

    def _switch(self, xargs: Mapping[str, Any]) -> dict[str, str]:
        """Obeys an order to change the policy, or keeps the old one. Returns what to answer."""
        try:
            policy = build(str(xargs["evenhand_policy"]), options_from(xargs.get("evenhand_policy_options", ())))
        except ValueError as refusal:
            logger.warning("evenhand: policy %s stays: %s", self._lanes.policy.name, refusal)
            self._metrics.switches.labels("refused").inc()
            return {"error": str(refusal)}
        self._metrics.policy.labels(self._lanes.policy.name).set(0)
        self._lanes.switch(policy, self.clock())
        self._plan_memory(policy)
        self._metrics.policy.labels(policy.name).set(1)
        self._metrics.switches.labels("done").inc()
        logger.info("evenhand: policy %s from here on", policy.name)
        self._warn_of_recomputation(policy)
        return {"policy": policy.name}

    def has_requests(self) -> bool:
        return bool(self._answers) or bool(super().has_requests())

    def _answer(self, request: Request, answer: dict[str, str]) -> None:
        """Ends a request that was an order."""
        ended = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.STOP,
            kv_transfer_params={"evenhand": answer},
        )
        self._answers.append((request, ended))

    def _hand_out_answers(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What is said outside of steps; first, for a request's second token may be among what a step has made."""
        for request, answer in reversed(self._answers):
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.insert(0, answer)
            if answer.finish_reason is not None and self.finished_req_ids_dict is not None:
                self.finished_req_ids_dict[request.client_index].add(request.request_id)
        self._answers.clear()

    def _report(self, now: float) -> None:
        """Metrics, at most once in `REPORT_INTERVAL_S`."""
        self._report_at = now + REPORT_INTERVAL_S
        self._metrics.steps.inc(self._steps)
        self._steps = 0
        depth = self._lanes.depth()
        for lane in self._lanes_shown - depth.keys():
            self._metrics.waiting.labels(lane).set(0)
        for lane, count in depth.items():
            self._metrics.waiting.labels(lane).set(count)
        self._lanes_shown |= depth.keys()
        sample = self._tally.sample(now)
        for tenant, service in sample.service.items():
            self._metrics.service.labels(tenant).inc(max(0.0, service))
        self._metrics.gap.set(sample.gap)
        self._metrics.stall_s.set(sample.longest_stall_s)
        shadow = self._lanes.shadow
        if shadow is not None:
            self._metrics.completion_s.labels("policy").set(shadow.real_completions.mean)
            self._metrics.completion_s.labels("fcfs").set(shadow.completions.mean)
            self._metrics.promised_s.set(self._lanes.promised_wait_s)
