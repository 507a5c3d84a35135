"""Real vLLM engines on a tiny model, on a clock of their own CPU time. Imports vLLM, which takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from vllm import LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from loadtest.bench.batch.work import Made, StepCount, Way
from loadtest.bench.iterations.in_process_engine import engine
from loadtest.bench.iterations.iterated import EngineClock, Steadied
from loadtest.call import TraceCall
from scheduler.vllm.plugin import PolicyScheduler

SLOTS, STEP_TOKENS, BLOCK_TOKENS = 32, 512, 32
CONTEXT_TOKENS = 512
WARM_UP = 12  # requests, each with a longer prompt
KV_BLOCKS = 117  # as scarce as in the cost model of a GPU: a full batch wants a quarter more


class CpuEngine:
    """One engine in this process. Time passes while it computes, and at no other time."""

    def __init__(self, running: LLMEngine, clock: EngineClock) -> None:
        self._running = running
        self._clock = clock
        self._scheduler: Any = running.engine_core.engine_core.scheduler
        self.count = StepCount(self._scheduler)
        self._now = clock()

    @classmethod
    @contextmanager
    def started(cls, model: Path, way: Way, reference_s: float) -> Iterator[Self]:
        """reference_s: of the piece of work by which the machine's speed is judged."""
        clock = Steadied(reference_s)
        PolicyScheduler.clock = staticmethod(clock)
        settings: dict[str, Any] = {
            "max_model_len": CONTEXT_TOKENS,
            "max_num_seqs": SLOTS,
            "max_num_batched_tokens": STEP_TOKENS,
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": KV_BLOCKS,
        }
        if way.priority:
            settings["scheduling_policy"] = "priority"
        with engine(model, way.policy, **settings) as running:
            started = cls(running, clock)
            started._warm_up()
            yield started

    def _warm_up(self) -> None:
        """An engine's first batches are slower than all later ones."""
        for number in range(WARM_UP):
            prompt = [1000 + number] * (number + 1) * BLOCK_TOKENS
            self.add(TraceCall(f"warm-{number}", 0.0, "people", prompt, len(prompt), 16), flex=False)
        while self.is_busy():
            self.step()
        self._running.reset_prefix_cache()

    def now(self) -> float:
        return self._now

    def skip_to(self, at_s: float) -> None:
        self._clock.skip_to(at_s)
        self._now = max(self._now, at_s)

    def add(self, call: TraceCall, *, flex: bool) -> None:
        extra = {"evenhand_tenant": call.tenant, "evenhand_tier": "flex" if flex else "default"}
        params = SamplingParams(
            temperature=0.0, max_tokens=call.output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, extra_args=extra,
        )  # fmt: skip
        with self._clock.standing():
            self._running.add_request(call.id, {"prompt_token_ids": call.prompt}, params, priority=int(flex))

    def is_busy(self) -> bool:
        return bool(self._running.has_unfinished_requests())

    def waiting(self) -> int:
        return int(self._scheduler.get_request_counts()[1])

    def step(self) -> list[Made]:
        outputs = self._running.step()
        self._now = self._clock()
        with self._clock.standing():
            return [Made(each.request_id, len(each.outputs[0].token_ids), each.finished) for each in outputs]
