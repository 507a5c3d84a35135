"""vLLM's scheduler without a model: a step takes what a cost model says of what the scheduler has put into it.

Imports vLLM, which takes seconds.
"""

from pathlib import Path

from loadtest.bench.batch.work import Made, StepCount, Way
from loadtest.bench.plugin.driven import BLOCK_TOKENS, Rule, StepClock, build_scheduler, request
from loadtest.call import TraceCall
from loadtest.simulator.costmodel import CostModel


class ModelFreeEngine:
    """One scheduler, stepped on a clock that the cost model moves. folder: as `driven.model_folder` made it."""

    def __init__(self, folder: Path, way: Way, cost: CostModel) -> None:
        self.clock = StepClock()
        self.cost = cost
        self.scheduler = build_scheduler(
            folder,
            way.policy,
            clock=self.clock,
            slots=cost.max_seqs,
            step_tokens=cost.max_batched_tokens,
            blocks=cost.kv_capacity_tokens // BLOCK_TOKENS,
        )
        self.by_priority = way.priority
        if way.priority:
            self._by_priority()
        self.count = StepCount(self.scheduler)
        self.rule = Rule(self.scheduler)

    def _by_priority(self) -> None:
        """As `--scheduling-policy priority` starts it."""
        from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

        scheduler = self.scheduler
        scheduler.policy = SchedulingPolicy.PRIORITY
        scheduler.waiting = create_request_queue(scheduler.policy)
        for name in ("kv_holding_waiting", "skipped_waiting"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, create_request_queue(scheduler.policy))

    def now(self) -> float:
        return self.clock.now

    def skip_to(self, at_s: float) -> None:
        self.clock.now = max(self.clock.now, at_s)

    def add(self, call: TraceCall, *, flex: bool) -> None:
        tier = "flex" if flex else "default"
        made = request(call.id, [*map(int, call.prompt)], call.output_tokens, tenant=call.tenant, tier=tier)
        if self.by_priority:
            made.priority = int(flex)
        made.arrival_time = self.clock.now
        self.scheduler.add_request(made)

    def is_busy(self) -> bool:
        return bool(self.scheduler.has_requests())

    def waiting(self) -> int:
        return int(self.scheduler.get_request_counts()[1])

    def step(self) -> list[Made]:
        output = self.scheduler.schedule()
        result = self.rule.apply(output)
        if output.num_scheduled_tokens:
            count = self.count
            self.clock.now += self.cost.duration_s(count.prompt_tokens, count.sequences, count.context)
        told = self.scheduler.update_from_output(output, result)
        return [
            Made(each.request_id, len(each.new_token_ids), each.finish_reason is not None)
            for client in told.values()
            for each in client.outputs
        ]
