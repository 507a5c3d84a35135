"""A real engine in this process, fed on a clock that is its own CPU time, or one that counts its work."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any, Self

import torch
from vllm import LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from loadtest.bench.iterations.in_process_engine import engine, preemptions, switch
from loadtest.bench.plugin.driven import Rule
from loadtest.call import TraceCall
from loadtest.records import Record, Run, Writer
from loadtest.simulator.costmodel import CostModel
from scheduler.jobs import Job, Outcome
from scheduler.vllm.plugin import PolicyScheduler


class EngineClock:
    """Seconds of CPU that the engine used, and the pauses in which it had nothing to do."""

    def __init__(self) -> None:
        self._offset_s = -thread_time()

    def __call__(self) -> float:
        return self._offset_s + thread_time()

    def skip_to(self, at_s: float) -> None:
        """Nothing happens until then."""
        self._offset_s += max(0.0, at_s - self())

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What is done meanwhile takes no time: it is not the engine's work."""
        begun = thread_time()
        try:
            yield
        finally:
            self._offset_s -= thread_time() - begun


class Steadied(EngineClock):
    """CPU seconds of a machine that is always equally fast.

    A core that it shares with others is half as fast for seconds at a time, by CPU time too. So a piece of work that is
    always the same is done between steps, and seconds count by how long that takes now.

    usual_s: what that piece takes on the machine whose seconds these are. Clocks of several processes agree if they
    are given the same.
    """

    def __init__(self, usual_s: float) -> None:
        self._now_s = 0.0
        self._usual_s = usual_s
        self._slowness = reference_s() / usual_s
        self._read_s = thread_time()

    def __call__(self) -> float:
        read_s = thread_time()
        self._now_s += (read_s - self._read_s) / self._slowness
        self._read_s = read_s
        return self._now_s

    def skip_to(self, at_s: float) -> None:
        self._now_s = max(self(), at_s)

    @contextmanager
    def standing(self) -> Iterator[None]:
        self()
        try:
            yield
        finally:
            self._slowness += _FRESH * (_reference_s() / self._usual_s - self._slowness)
            self._read_s = thread_time()


_REFERENCES = 500
_FRESH = 0.15  # of what is known about the machine's speed after one more reference
_LEFT, _RIGHT = torch.ones(8, 128), torch.ones(128, 4096)


def reference_s() -> float:
    """What the piece of work takes now, in the median of many."""
    return median(_reference_s() for _ in range(_REFERENCES))


def _reference_s() -> float:
    """CPU seconds of some Python and some arithmetic, as a step of a tiny model has both."""
    begun_s = thread_time()
    sum(number * number for number in range(1500))
    for _ in range(2):
        torch.mm(_LEFT, _RIGHT)
    return thread_time() - begun_s


@dataclass(frozen=True, slots=True)
class CorePace:
    """What a step takes on a clock that counts work: the same on any machine, however busy.

    step_s: seconds of a step as such. tokens_per_step: tokens computed that take as long again.
    """

    step_s: float
    tokens_per_step: float

    def seconds(self, tokens: int) -> float:
        """Of one step that computes so many tokens."""
        return self.step_s * (1.0 + tokens / self.tokens_per_step)


class Count(EngineClock):
    """Seconds by what the engine has computed."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def skip_to(self, at_s: float) -> None:
        self._now_s = max(self._now_s, at_s)

    @contextmanager
    def standing(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class Served:
    """One request on its way. at: when each of its tokens came."""

    call: TraceCall
    sent_s: float
    at: list[float] = field(default_factory=list)

    def record(self, begun_s: float) -> Record:
        sent_s, at = self.sent_s, self.at
        return Record(
            id=self.call.id, tenant=self.call.tenant, due_s=self.call.at_s, sent_s=sent_s - begun_s,
            e2e_s=at[-1] - sent_s, prompt_tokens=self.call.prompt_tokens, output_tokens=len(at),
            ttft_s=at[0] - sent_s, gaps_us=[round((b - a) * 1e6) for a, b in zip(at, at[1:], strict=False)],
            asked_tokens=self.call.output_tokens, kind=self.call.kind,
        )  # fmt: skip


def _leave_out_the_model(running: LLMEngine) -> None:
    """Every step's tokens come from a rule: on a clock that counts work, nothing depends on which tokens they are."""
    core = running.engine_core.engine_core
    rule = Rule(core.scheduler)

    def execute_model(output: SchedulerOutput, non_block: bool) -> Future[ModelRunnerOutput]:
        made: Future[ModelRunnerOutput] = Future()
        made.set_result(rule.apply(output))
        return made

    core.model_executor.execute_model = execute_model


class IteratedEngine:
    """Runs lists of calls, one list after the other."""

    def __init__(self, running: LLMEngine, clock: EngineClock, pace: CorePace | None, *, plugin: bool) -> None:
        self._running = running
        self._clock = clock
        self._pace = pace
        self._plugin = plugin
        self._scheduler = running.engine_core.engine_core.scheduler
        self._tokens = 0
        self._count_tokens()

    @classmethod
    @contextmanager
    def started(
        cls, model: Path, pace: CorePace | None, *, plugin: bool, slots: int, context: int,
        kv_tokens: int | None = None, clock: EngineClock | None = None, with_model: bool = True,
    ) -> Iterator[Self]:  # fmt: skip
        """`context` in tokens. kv_tokens: None for all slots at that length. pace: None for CPU time, by `clock`."""
        clock = clock or (EngineClock() if pace is None else Count())
        PolicyScheduler.clock = staticmethod(clock)
        settings = {
            "max_model_len": context,
            "max_num_seqs": slots,
            "num_gpu_blocks_override": (kv_tokens or slots * context) // 32,
        }
        with engine(model, "fcfs" if plugin else None, **settings) as running:
            if not with_model:
                _leave_out_the_model(running)
            yield cls(running, clock, pace, plugin=plugin)

    def _count_tokens(self) -> None:
        schedule = self._scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._tokens += output.total_num_scheduled_tokens
            return output

        self._scheduler.schedule = counted

    def run(self, calls: Sequence[TraceCall], asked: Mapping[str, Any], taught: Sequence[TraceCall]) -> dict[str, Any]:
        """rate None: all at once. Returns the figures of the run; its records go to the file `out`."""
        name, *options = (asked["policy"] or "").split(":")
        if self._plugin:
            self.switch(name, dict(option.split("=", 1) for option in options), taught)
        self._running.reset_prefix_cache()
        tokens, preempted = self._tokens, self._preempted(name)
        begun_s = self._clock()
        served, starved_s = self._serve(
            calls, at_once=asked["rate"] is None, begun_s=begun_s, watched="" if asked["flood"] is None else "light"
        )
        made = sum(len(one.at) for one in served)
        ideal = made + sum(one.call.prompt_tokens - 1 for one in served)
        if asked["out"]:
            with Writer(Path(asked["out"])) as writer:
                for one in (one for one in served if one.at):
                    writer.write(one.record(begun_s))
                writer.finish(Run("engine", asked["workload"], "", round(self._clock() - begun_s, 3)))
        return {
            "out": asked["out"],
            "saturation_per_s": len(calls) / (starved_s - begun_s),
            "preemptions": self._preempted(name) - preempted,
            "recomputed": (self._tokens - tokens) / ideal - 1.0,
        }

    def serve(self, calls: Sequence[TraceCall], *, at_once: bool) -> tuple[list[Record], float]:
        """Runs all calls to completion under the current policy, from an empty prefix cache; also returns the calls per
        second while calls were always available."""
        self._running.reset_prefix_cache()
        begun_s = self._clock()
        served, starved_s = self._serve(calls, at_once=at_once, begun_s=begun_s, watched="")
        return [one.record(begun_s) for one in served], len(calls) / (starved_s - begun_s)

    def limits(self) -> CostModel:
        """What fits into its batch and its memory, at a cost that is not known; one block of KV holds nothing."""
        config = self._running.vllm_config
        scheduler, cache = config.scheduler_config, config.cache_config
        return CostModel(
            max_seqs=scheduler.max_num_seqs, max_batched_tokens=scheduler.max_num_batched_tokens,
            kv_capacity_tokens=(cache.num_gpu_blocks - 1) * cache.block_size, prefix_block_tokens=cache.block_size,
        )  # fmt: skip

    def _serve(
        self, calls: Sequence[TraceCall], *, at_once: bool, begun_s: float, watched: str
    ) -> tuple[list[Served], float]:
        """All calls to their end, and when the line was empty for the first time after the last arrival.

        watched: the tenant whose calls all must end; the others are then dropped. "" for all of them.
        """
        running, clock = self._running, self._clock
        coming, served = list(reversed(calls)), {}
        starved_s = 0.0
        awaited = sum(call.tenant == watched for call in calls) if watched else -1
        while coming or running.has_unfinished_requests():
            if coming and not running.has_unfinished_requests() and not at_once:
                clock.skip_to(begun_s + coming[-1].at_s)
            while coming and (at_once or begun_s + coming[-1].at_s <= clock()):
                call = coming.pop()
                with clock.standing():
                    self._add(call)
                served[call.id] = Served(call, begun_s if at_once else begun_s + call.at_s)
            tokens = self._tokens
            outputs = running.step()
            if self._pace is not None:
                clock.skip_to(clock() + self._pace.seconds(self._tokens - tokens))
            now = clock()
            with clock.standing():
                for output in outputs:
                    one = served[output.request_id]
                    one.at.extend([now] * len(output.outputs[0].token_ids))
                    awaited -= output.finished and one.call.tenant == watched
                if not awaited:
                    self._drop(served)
                    break
            if not coming and not starved_s and not self._scheduler.get_request_counts()[1]:
                starved_s = now
        return list(served.values()), starved_s

    def _drop(self, served: Mapping[str, Served]) -> None:
        self._running.abort_request([name for name, one in served.items() if len(one.at) < one.call.output_tokens])
        while self._running.has_unfinished_requests():
            self._running.step()

    def _add(self, call: TraceCall) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=call.output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, extra_args={"evenhand_tenant": call.tenant},
        )  # fmt: skip
        self._running.add_request(call.id, {"prompt_token_ids": call.prompt}, params)

    def switch(self, name: str, options: Mapping[str, str], taught: Sequence[TraceCall]) -> None:
        """Another policy from here on, that knows the lengths of these calls as if it had served them."""
        switch(self._running, name, options)
        learn = self._scheduler._lanes.policy.order.learn
        for call in taught:
            tokens = call.output_tokens
            job = Job(call.id, call.tenant, call.prompt_tokens, 0.0, max_tokens=tokens, output_tokens=tokens)
            learn(job, Outcome.DONE)

    def _preempted(self, name: str) -> int:
        return int(preemptions(name)["policy"]) if self._plugin else 0
