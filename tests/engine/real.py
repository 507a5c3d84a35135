"""A real vLLM engine in this process, on a tiny model whose every token depends on all before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import EngineArgs, LLMEngine

from deploy.benchmarks.random_model import write
from deploy.model import TINY_CONFIG

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the model is tiny, and other work may need the cores
}


def chaotic_model(folder: Path) -> Path:
    """The tiny model with large seeded weights; returns the folder."""
    return write(folder, TINY_CONFIG)


@contextmanager
def engine(model: Path, policy: str | None, **arguments: Any) -> Iterator[LLMEngine]:
    """Stock vLLM if `policy` is None, else with the plug-in; shut down at the end. Run it with `ENVIRONMENT`."""
    ours: dict[str, Any] = {}
    if policy is not None:
        ours["scheduler_cls"] = "scheduler.vllm_plugin.PolicyScheduler"
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
