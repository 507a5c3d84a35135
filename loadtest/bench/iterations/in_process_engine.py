"""A real vLLM engine in this process, on a tiny model whose every token depends on all before it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client import REGISTRY
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from deploy.model.model import TINY_CONFIG
from loadtest.bench.random_model import write


def chaotic_model(folder: Path) -> Path:
    """The tiny model with large seeded weights; returns the folder."""
    return write(folder, TINY_CONFIG)


@contextmanager
def engine(model: Path, policy: str | None, **arguments: Any) -> Iterator[LLMEngine]:
    """Stock vLLM if `policy` is None, else with the plug-in; shut down at the end. Run it with `ENVIRONMENT`."""
    ours: dict[str, Any] = {}
    if policy is not None:
        ours["scheduler_cls"] = "scheduler.vllm.plugin.PolicyScheduler"
        ours["additional_config"] = {"evenhand": {"policy": policy}}
    settings = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 448,
        "max_num_seqs": 4,
        "block_size": 32,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    started = LLMEngine.from_engine_args(EngineArgs(**settings | ours | arguments))
    try:
        yield started
    finally:
        started.engine_core.shutdown()


def switch(running: LLMEngine, policy: str, options: Mapping[str, str] = MappingProxyType({})) -> None:
    """The order that a gateway sends."""
    running.reset_prefix_cache()
    pairs = [f"{name}={value}" for name, value in options.items()]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"evenhand_policy": policy, "evenhand_policy_options": pairs},
    )
    running.add_request(f"to-{policy}", {"prompt_token_ids": [1]}, params)
    (answer,) = running.step()
    assert answer.kv_transfer_params == {"evenhand": {"policy": policy}}


def preemptions(policy: str) -> dict[str, float]:
    """How many there have been, by reason."""
    name = "evenhand_engine_preemptions_total"
    reasons = ("policy", "memory")
    return {reason: REGISTRY.get_sample_value(name, {"policy": policy, "reason": reason}) or 0 for reason in reasons}
