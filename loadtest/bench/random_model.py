"""Llama models with large random weights: each token depends on all before it, so that mistakes show.

vLLM's dummy weights are so small that an answer is a cycle of two tokens, which would hide most.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from deploy.model.model import cache_folder, prepare_tiny

Weights = npt.NDArray[np.float32]


def write(folder: Path, shape: Mapping[str, int], seed: int = 7, says: Collection[int] = ()) -> Path:
    """Fills the folder: the bundled model's tokenizer, its config with this shape, seeded weights; returns it.

    says: token ids, the only ones that it ever chooses if it is greedy; any if there are none.
    """
    tiny = prepare_tiny(cache_folder(), lambda _: None)
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text()) | shape | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(_weights(config, np.random.default_rng(seed)))
    if says:
        others = np.ones(config["vocab_size"], bool)
        others[list(says)] = False
        weights["lm_head.weight"][others] = 0.0  # some token that it may say is always likelier than these
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights(config: Mapping[str, int], rng: np.random.Generator) -> Iterator[tuple[str, Weights]]:
    def normal(rows: int, columns: int, scale: float = 2.0) -> Weights:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", normal(vocabulary, width, scale=width**0.5)
    yield "model.norm.weight", np.ones(width, np.float32)
    yield "lm_head.weight", normal(vocabulary, width)
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", np.ones(width, np.float32)
