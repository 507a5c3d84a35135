"""Serves the same mixed traffic under each policy in one engine, and writes down the answers.

python -m tests.engine.answers MODEL_FOLDER COMBINATION POLICY…      ("stock" alone: vLLM without the plug-in)
"""

import json
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from deploy.model.model import TINY_CONFIG
from loadtest.bench.iterations.in_process_engine import engine, preemptions, switch

_RANK = 8

Answers = dict[str, list[list[int]]]

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
)
# Chunked prefill and prefix caching are on in both; 20 blocks of 32 tokens cannot hold four of the long answers.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "memory_scarce": {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 20},
    "drafted_by_ngram": {
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 24,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    # One adapter at a time in a step: who needs the other is passed over, and first in line again.
    "two_adapters": {
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 24,
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 2,
        "max_lora_rank": 8,
    },
}


def adapter(folder: Path, number: int) -> LoRARequest:
    """A LoRA adapter for that model, seeded by its number and large enough to change every answer."""
    seeded = torch.Generator().manual_seed(number)
    width = int(TINY_CONFIG["hidden_size"])
    queries = int(TINY_CONFIG["num_attention_heads"]) * int(TINY_CONFIG["head_dim"])
    weights = {}
    for layer in range(int(TINY_CONFIG["num_hidden_layers"])):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(_RANK, width, generator=seeded) / width**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(queries, _RANK, generator=seeded)
    place = folder / f"adapter{number}"
    place.mkdir(exist_ok=True)
    save_file(weights, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest(place.name, number, str(place))


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    settings = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | more
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **settings)


def prompt(seed: int, tokens: int) -> dict[str, Any]:
    """Every third prompt shares its first half, up to 40 tokens; the end repeats a stretch, which ngram looks for."""
    own = [(seed * 7919 + index * 104_729) % 40_000 + 100 for index in range(tokens)]
    shared = [(seed % 3 * 31 + index * 17) % 40_000 + 100 for index in range(min(40, tokens // 2))]
    return {"prompt_token_ids": shared + own[len(shared) : tokens - 8] + own[len(shared) : len(shared) + 8]}


def traffic(tag: str, with_twice: bool) -> dict[int, list[tuple[str, dict[str, Any], SamplingParams]]]:
    """By step: long answers first, short ones into the full batch, JSON and two answers to one prompt among them."""
    tenant = {f"t{index}": {"evenhand_tenant": f"t{index}"} for index in range(3)}
    long = [(f"{tag}-long{i}", prompt(i, 50 + 30 * i), greedy(100, extra_args=tenant["t0"])) for i in range(6)]
    short = [(f"{tag}-short{i}", prompt(10 + i, 20 + 9 * i), greedy(4 + i, extra_args=tenant["t1"])) for i in range(10)]
    asked = greedy(60, structured_outputs=StructuredOutputsParams(json=SCHEMA), extra_args=tenant["t2"])
    shaped = [(f"{tag}-json{i}", prompt(30 + i, 25), asked) for i in range(3)]
    # The likeliest token said as `top_k`, because vLLM refuses n > 1 at temperature zero.
    twice = [(f"{tag}-twice", prompt(40, 33), greedy(20, n=2, temperature=1.0, top_k=1))] if with_twice else []
    return {0: long, 30: [*short[:5], *shaped[:2]], 60: [*short[5:], *twice], 90: shaped[2:]}


def serve(running: LLMEngine, tag: str, with_twice: bool, adapters: Sequence[LoRARequest]) -> Answers:
    """All answers but those of two requests that are aborted, one while it runs or waits and one early."""
    answers: Answers = {}
    coming = traffic(tag, with_twice)
    gone = {f"{tag}-long3", f"{tag}-short4"}
    # Each with one of the adapters: what vLLM 0.32 answers without one depends on a CPU on who else is in the batch.
    turns = cycle(adapters or [None])
    for step in range(5000):
        for name, text, params in coming.pop(step, []):
            running.add_request(name, text, params, lora_request=next(turns))
        if step in (35, 50):
            running.abort_request([f"{tag}-short4" if step == 35 else f"{tag}-long3"])
        for output in running.step():
            if output.finished and output.request_id not in gone:
                answers[output.request_id[len(tag) :]] = [list(each.token_ids) for each in output.outputs]
        if not coming and not running.has_unfinished_requests():
            return answers
    raise AssertionError(f"not done, still missing: {len(coming)} arrivals")


def main() -> None:
    folder, combination, *policies = sys.argv[1:]
    with_twice = combination != "drafted_by_ngram"  # vLLM 0.32 fails on a CPU when ngram meets top_k
    adapters = [adapter(Path(folder), number) for number in (1, 2)] if combination == "two_adapters" else []
    seen = {}
    with engine(Path(folder), None if policies == ["stock"] else "fcfs", **COMBINATIONS[combination]) as running:
        for policy in policies:
            if policy != "stock":
                switch(running, policy)
            seen[policy] = {"answers": serve(running, policy, with_twice, adapters), "preemptions": preemptions(policy)}
    sys.stdout.write("\n" + json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
