"""A real vLLM engine in this process, on a tiny model whose every token depends on all before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import EngineArgs, LLMEngine

from deploy.model import TINY_CONFIG, cache_folder, prepare_tiny

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the model is tiny, and other work may need the cores
}


def chaotic_model(folder: Path) -> Path:
    """The tiny config and tokenizer with large seeded weights.

    vLLM's dummy weights are so small that the answer is a cycle of two tokens, which would hide most mistakes.
    """
    tiny = prepare_tiny(cache_folder(), lambda _: None)
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (tiny / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    (folder / "config.json").write_text(config)
    save_file(_weights(vocabulary=49_152), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(vocabulary: int) -> dict[str, torch.Tensor]:
    seeded = torch.Generator().manual_seed(7)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=seeded) * (2.0 / columns**0.5)

    width, inner = int(TINY_CONFIG["hidden_size"]), int(TINY_CONFIG["intermediate_size"])
    queries = int(TINY_CONFIG["num_attention_heads"]) * int(TINY_CONFIG["head_dim"])
    keys = int(TINY_CONFIG["num_key_value_heads"]) * int(TINY_CONFIG["head_dim"])
    weights = {
        "model.embed_tokens.weight": torch.randn(vocabulary, width, generator=seeded),
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": normal(vocabulary, width),
    }
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(int(TINY_CONFIG["num_hidden_layers"])):
        for name, (rows, columns) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width)
    return weights


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
