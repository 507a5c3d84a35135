"""How long an engine's iteration takes and what fits into it: a linear model, as in Splitwise's simulator."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from scheduler.step_cost import pairs_of

_PLAIN_BLOCK_TOKENS = 16  # vLLM's default


@dataclass(frozen=True, slots=True)
class CostModel:
    """What an engine's iteration costs and what its batch holds.

    iteration_s: fixed seconds of an iteration (scheduling, launching kernels, reading the weights).
    prefill_s_per_token: seconds per prompt token computed.
    decode_s_per_sequence: seconds per sequence that makes one output token.
    attention_s_per_kv_token: seconds per KV token read by the decoding sequences.
    transfer_s_per_token: seconds per prompt token whose KV comes from a prefill worker instead of being computed.
    attention_s_per_pair: seconds per pair of a prompt token that is computed and one before it, to which it attends; so
        the end of a long prompt takes longer than its beginning.
    start_s_per_sequence: seconds more per sequence that comes into the batch, for reading its request and preparing it.
    max_seqs: batch slots (vLLM's --max-num-seqs).
    max_batched_tokens: tokens of one iteration, decode and prefill chunks together (--max-num-batched-tokens).
    kv_capacity_tokens: tokens whose keys and values fit into memory.
    prefix_block_tokens: of one block of the KV memory, which is what prefixes are shared in; 0 for no prefix cache.
    """

    iteration_s: float = 0.002
    prefill_s_per_token: float = 20e-6
    decode_s_per_sequence: float = 0.1e-3
    attention_s_per_kv_token: float = 0.0
    transfer_s_per_token: float = 0.0
    max_seqs: int = 256
    max_batched_tokens: int = 2048
    kv_capacity_tokens: int = 1 << 18
    prefix_block_tokens: int = 32
    start_s_per_sequence: float = 0.0
    attention_s_per_pair: float = 0.0

    def __post_init__(self) -> None:
        if min(self.max_seqs, self.max_batched_tokens, self.kv_capacity_tokens) < 1:
            raise ValueError("A cost model needs at least one slot, one batched token and one KV token.")
        if min(self.iteration_s, self.prefill_s_per_token, self.decode_s_per_sequence) < 0:
            raise ValueError("A cost model's times cannot be negative.")

    @classmethod
    def read(cls, path: Path) -> "CostModel":
        """From a JSON object with any of the fields. ValueError says what is wrong with it."""
        try:
            fields = orjson.loads(path.read_bytes())
            return cls(**fields)
        except (orjson.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is no cost model: {error}. `evenhand calibrate --out` writes one.") from error

    @property
    def block_tokens(self) -> int:
        """Of one block of KV memory, with a prefix cache or without."""
        return self.prefix_block_tokens or _PLAIN_BLOCK_TOKENS

    def duration_s(
        self,
        prefill_tokens: int,
        decode_sequences: int,
        kv_tokens: int,
        transfer_tokens: int = 0,
        started: int = 0,
        pairs: float = 0.0,
    ) -> float:
        """Seconds of an iteration that computes so much: linear in each of the six. pairs: as `attention_s_per_pair`
        counts them."""
        return (
            self.iteration_s
            + self.prefill_s_per_token * prefill_tokens
            + self.decode_s_per_sequence * decode_sequences
            + self.attention_s_per_kv_token * kv_tokens
            + self.transfer_s_per_token * transfer_tokens
            + self.start_s_per_sequence * started
            + self.attention_s_per_pair * pairs
        )

    def saturation_tokens_per_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Output tokens per second with every slot busy on requests of these mean lengths.

        The rate that workloads scale to.

        A slot's request costs its prefill once and a place in `output_tokens` decode iterations; KV shortage and
        scheduling gaps are left out, so this is an upper estimate.
        """
        held_tokens = prompt_tokens + output_tokens / 2
        seqs = max(1.0, min(self.max_seqs, self.kv_capacity_tokens / max(held_tokens, 1.0)))
        decode_s = (
            self.iteration_s + self.decode_s_per_sequence * seqs + self.attention_s_per_kv_token * seqs * held_tokens
        )
        attention_s = self.attention_s_per_pair * pairs_of(prompt_tokens)
        prefill_s = self.prefill_s_per_token * prompt_tokens + attention_s + self.start_s_per_sequence
        per_request_s = output_tokens * decode_s / seqs + prefill_s
        return output_tokens / per_request_s if per_request_s > 0 else float("inf")


# `instant` measures what is around the engine; `cpu-smollm2` follows the measured 14 tok/s alone, 94 tok/s at batch 32
# and 250 prompt tok/s of SmolLM2-135M on one AVX2 core; `gpu-7b` the published shape of a 7B model on one A100;
# `gpu-70b` is an assumption: ten times the weights on eight of them, at 60 % of the speed that division would give.
PRESETS: Mapping[str, CostModel] = {
    "instant": CostModel(0.0, 0.0, 0.0, max_seqs=1024, max_batched_tokens=1 << 16, kv_capacity_tokens=1 << 24),
    "quick": CostModel(),
    "cpu-smollm2": CostModel(0.0625, 4e-3, 8.7e-3, max_seqs=32, max_batched_tokens=2048, kv_capacity_tokens=1 << 15),
    "gpu-70b": CostModel(
        0.020, 125e-6, 80e-6, 12e-9, 4e-6, max_seqs=256, max_batched_tokens=2048, kv_capacity_tokens=900_000
    ),
    "gpu-7b": CostModel(
        0.009, 60e-6, 40e-6, 25e-9, 2e-6, max_seqs=256, max_batched_tokens=2048, kv_capacity_tokens=120_000
    ),
}
