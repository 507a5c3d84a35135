"""Turns a Llama-architecture GGUF file into a Hugging Face folder: weights, config, tokenizer and chat template.

Run it as a program of its own (`python -m deploy.model.gguf_folder FILE.gguf FOLDER`), so that its memory and imports
go away with it. It needs neither torch nor transformers: the GGUF itself says everything that the folder has to hold.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deploy.model.model import STORED_DTYPE

Weights = npt.NDArray[np.float32]

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GENERATION_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a token that marks structure and is never text
PRE_TOKENIZER = "smollm"


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; KeyError for a tensor unknown to Llama."""
    if gguf_name in TOP_TENSORS:
        return TOP_TENSORS[gguf_name]
    _, layer, tensor, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.{suffix}"


def unpermuted(rows: Weights, heads: int) -> Weights:
    """Undoes llama.cpp's row order for rotary embeddings: it pairs neighbours, Hugging Face pairs halves.

    `rows` is (heads · head_dim, hidden).
    """
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def metadata(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def weights(reader: GGUFReader, heads: int, kv_heads: int) -> Iterator[tuple[str, Weights]]:
    """Every tensor of the file as float32, under its Hugging Face name and in its row order."""
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            values = unpermuted(values, heads)
        elif ".attn_k." in tensor.name:
            values = unpermuted(values, kv_heads)
        yield hugging_face_name(tensor.name), values


def bfloat16(values: Weights) -> npt.NDArray[np.uint16]:
    """The upper halves of the float32 `values`, rounded to the nearest, ties to even; NumPy has no such type."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def config(meta: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """`config.json`: the rope settings stand there in the form of transformers 4 and of 5; either reads the folder."""
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    rope_theta = float(meta["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": STORED_DTYPE,
        "torch_dtype": STORED_DTYPE,
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        # The file holds it as float32: written back with the digits that float32 really has.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": meta["llama.vocab_size"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits digits one by one, which is what `smollm` means as a GGUF pre-tokenizer."""
    if meta["tokenizer.ggml.pre"] != PRE_TOKENIZER:
        raise ValueError(
            f"this file's pre-tokenizer is {meta['tokenizer.ggml.pre']!r}; only {PRE_TOKENIZER!r} is known"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in meta["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return made


def tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def generation_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens, and how to sample where a request does not say: a small model rambles at temperature 1.

    The values are those that SmolLM2's authors give for chat.
    """
    tokens = {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in GENERATION_TOKENS.items()}
    return {**tokens, "do_sample": True, "temperature": 0.2, "top_p": 0.9}


def convert(gguf_file: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Writes the folder's files into `folder`, which exists; `progress(done, total)` counts tensors.

    Raises OSError when the disk does not take them, ValueError or KeyError for a file of another architecture.
    """
    reader = GGUFReader(gguf_file)
    meta = metadata(reader)
    if meta["general.architecture"] != "llama":
        raise ValueError(f"this file's architecture is {meta['general.architecture']!r}; only 'llama' is known")
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for name, values in weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]):
        tensors[name] = bfloat16(values)
        progress(len(tensors), len(reader.tensors))
    specs = {
        name: TensorSpec(dtype=STORED_DTYPE, shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
        for name, bits in tensors.items()
    }
    serialize_file(specs, folder / "model.safetensors", metadata={"format": "pt"})
    made = tokenizer(meta)
    made.save(str(folder / "tokenizer.json"))
    for file, content in {
        "config.json": config(meta, tied="lm_head.weight" not in tensors),
        "generation_config.json": generation_config(meta),
        "tokenizer_config.json": tokenizer_config(meta),
    }.items():
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """One line `done total` on stdout per tensor, for the program that started this one."""
    gguf_file, folder = arguments
    try:
        convert(Path(gguf_file), Path(folder), lambda done, total: print(done, total, flush=True))  # noqa: T201
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
