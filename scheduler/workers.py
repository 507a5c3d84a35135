"""Workers as placement sees them: one vLLM engine behind its HTTP server, and its role."""

from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """Which half of a request a worker takes."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


UNKNOWN_STEP_TOKENS = 2048  # assumed likewise of its step; vLLM's own default on most machines
UNKNOWN_SLOTS = 256  # assumed of an engine that does not say how many sequences it runs at once


@dataclass(frozen=True, slots=True)
class Worker:
    """An engine that can be asked.

    id: unique in the fleet, e.g. "worker-0".
    url: where its HTTP server listens, e.g. "http://127.0.0.1:8101" (no trailing slash).
    slots: sequences that its batch holds (vLLM's max_num_seqs).
    plugin: whether our scheduler plug-in runs inside, so that tenant and service may travel with a request.
    hands_over: whether it has a KV connector that works both ways, so that it can take either half of a request; its
    role is a preference then.
    dtype: the number format in which it computes, e.g. "bfloat16"; empty where that is not known.
    step_tokens: tokens that one of its steps computes at most (vLLM's max_num_batched_tokens).
    gpus: how many it computes on, for what its time costs; 1 on a CPU too.
    token_ids: whether it tells the token ids of a stream (vLLM's `return_token_ids`), so that another can continue it.
    """

    id: str
    url: str
    role: Role = Role.BOTH
    slots: int = UNKNOWN_SLOTS
    plugin: bool = False
    token_ids: bool = False
    hands_over: bool = False
    dtype: str = ""
    step_tokens: int = UNKNOWN_STEP_TOKENS
    gpus: int = 1
