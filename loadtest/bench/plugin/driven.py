"""A real vLLM scheduler without a model: what it schedules is "computed" by a rule, in step or one step behind.

The rule: a request's token at position p is a hash of its name and p. So any token that the scheduler loses, doubles or
puts in the wrong place shows up in the output.
"""

import json
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from scheduler.vllm.plugin import PolicyScheduler

BLOCK_TOKENS = 16
VOCABULARY = 1000
EOS = VOCABULARY - 1
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


class StepClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def model_folder(folder: Path) -> Path:
    """A folder that vLLM accepts as a model as long as its weights are not loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


def settings(folder: Path, *, slots: int, step_tokens: int, blocks: int, is_async: bool, ours: object) -> VllmConfig:
    """vLLM's configuration for a scheduler with `slots` places, `step_tokens` a step and `blocks` KV blocks."""
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=8192)
    scheduler = SchedulerConfig(
        max_num_seqs=slots,
        max_num_batched_tokens=step_tokens,
        max_model_len=8192,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        watermark=0.0,
    )
    cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True)
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
        additional_config={} if ours is None else {"evenhand": ours},
    )
    config.cache_config.num_gpu_blocks = blocks
    config.scheduler_config.async_scheduling = is_async  # the CPU platform has just switched it off
    return config


def build_scheduler(  # noqa: PLR0913 - what tests vary
    folder: Path,
    policy: str | None,
    options: dict[str, str] | None = None,
    *,
    slots: int = 4,
    step_tokens: int = 512,
    blocks: int = 1000,
    is_async: bool = False,
    clock: StepClock | None = None,
    objectives: Mapping[str, float] | None = None,
) -> Any:
    """Stock vLLM's scheduler if `policy` is None, else ours with a registry of its own (`.registry`)."""
    ours = None if policy is None else {"policy": policy, "options": options or {}, **(objectives or {})}
    config = settings(folder, slots=slots, step_tokens=step_tokens, blocks=blocks, is_async=is_async, ours=ours)
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=64, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    stock = AsyncScheduler if is_async else Scheduler
    made: Any = stock if policy is None else type("Driven", (PolicyScheduler,), {"registry": CollectorRegistry()})
    if clock is not None and policy is not None:
        made.clock = clock
    with set_current_vllm_config(config):
        return made(
            vllm_config=config,
            kv_cache_config=kv,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )


def seed_block_hashes() -> None:
    """What vLLM's engine does once, before any request."""
    init_none_hash(get_hash_fn_by_name("sha256"))


def request(
    name: str, prompt: int | Sequence[int], max_tokens: int, stop_token: int | None = None, **xargs: Any
) -> Request:
    """A request with this prompt, or with a generated one of this many tokens, and `xargs` as `vllm_xargs` with the
    prefix `evenhand_`."""
    stops = None if stop_token is None else [stop_token]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, stop_token_ids=stops)
    params.extra_args = {f"evenhand_{key}": value for key, value in xargs.items()}
    params.update_from_generation_config({}, EOS)
    return Request(
        request_id=name,
        prompt_token_ids=[token(name, -1 - at) for at in range(prompt)] if isinstance(prompt, int) else list(prompt),
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, get_hash_fn_by_name("sha256")),
    )


def token(name: str, position: int) -> int:
    """What the rule puts at a position."""
    return zlib.crc32(f"{name}/{position}".encode()) % (VOCABULARY - 1)


def expected(name: str, prompt_tokens: int, max_tokens: int) -> list[int]:
    """The answer that the rule gives to a request."""
    return [token(name, prompt_tokens + index) for index in range(max_tokens)]


class Rule:
    """In the model's place: makes a step's tokens when it is launched, as a runner with token ids of its own would."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._computed: dict[str, int] = {}

    def apply(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """A token for every sequence that has reached its last known one."""
        for gone in output.finished_req_ids:
            self._computed.pop(gone, None)
        for new in output.scheduled_new_reqs:
            self._computed[new.req_id] = new.num_computed_tokens
        for name, computed in zip(
            output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True
        ):
            self._computed[name] = computed
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            live = self._scheduler.requests[name]
            end = self._computed[name] + output.num_scheduled_tokens[name]
            known = live.num_tokens + live.num_output_placeholders - (1 if self._samples(live) else 0)
            sampled.append([token(name, end)] if end >= known else [])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    @staticmethod
    def _samples(live: Request) -> bool:
        """Whether the step just scheduled has already been given a placeholder (asynchronous scheduling only)."""
        return bool(live.num_output_placeholders)


class DrivenEngine:
    """Steps a scheduler as vLLM's EngineCore does: in step, or scheduling a step ahead of the output."""

    def __init__(
        self, scheduler: Any, *, is_async: bool = False, clock: StepClock | None = None, step_s: float = 0.01
    ) -> None:
        self.scheduler = scheduler
        self.answers: dict[str, list[int]] = {}
        self.finished: list[str] = []
        self.finished_at: dict[str, float] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self._flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._depth = 2 if is_async else 1
        self._clock = clock
        self._step_s = step_s
        self._rule = Rule(scheduler)
        self._prompts: dict[str, int] = {}

    def add(self, *requests: Request) -> None:
        for each in requests:
            self._prompts[each.request_id] = each.num_prompt_tokens
            self.scheduler.add_request(each)

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def step(self, computes_s: Callable[[SchedulerOutput], float] | None = None) -> SchedulerOutput | None:
        """Schedules if there is anything to do, and takes the oldest output once enough steps are in flight.

        computes_s: seconds by which the clock moves between the two, by what was scheduled.
        """
        if self._clock is not None:
            self._clock.now += self._step_s
        output = None
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._flight.append((output, self._rule.apply(output)))
            if self._clock is not None and computes_s is not None:
                self._clock.now += computes_s(output)
        if len(self._flight) >= self._depth or output is None or not output.total_num_scheduled_tokens:
            self._take(*self._flight.popleft())
        return output

    def run(self, steps: int = 20_000) -> None:
        """Until nothing is left to do."""
        for _ in range(steps):
            if not self.scheduler.has_requests() and not self._flight:
                return
            self.step()
        raise AssertionError(f"not done after {steps} steps: {self.scheduler.get_request_counts()}")

    def _take(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for client in self.scheduler.update_from_output(output, result).values():
            self._collect(client)

    def _collect(self, client: EngineCoreOutputs) -> None:
        for each in client.outputs:
            self.answers.setdefault(each.request_id, []).extend(each.new_token_ids)
            if each.finish_reason is not None:
                self.finished.append(each.request_id)
                if self._clock is not None:
                    self.finished_at[each.request_id] = self._clock.now
            if each.kv_transfer_params is not None:
                self.notes[each.request_id] = each.kv_transfer_params
