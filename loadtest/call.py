"""A request of a load test, before it is sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a conversation's turn waits for after the answer before it: its time in the trace, or the user's pause there.
TRACE, IDLE_GAP = "trace", "idle-gap"


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One request of a workload.

    at_s: when to send it, seconds since the start of the run.
    prompt: token ids (for /v1/completions), or text. messages: a chat in place of it.
    output_tokens: how long the answer is to be, exactly; 0 leaves it to the model.
    session: the conversation it belongs to. waits: for the answer to the call before it in its session.
    last: no further turn follows. answers: places in `messages` of the answers to the session's earlier calls.
    idle_s: how long the trace's user waited between the answer before and this turn.
    kind: which application it belongs to ("chat", "code", …), for the report only. body: further fields to send.
    """

    id: str
    at_s: float
    tenant: str
    prompt: list[int] | str
    prompt_tokens: int
    output_tokens: int
    kind: str = ""
    session: str = ""
    waits: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[int, ...] = ()
    last: bool = False
    idle_s: float = 0.0
    body: Mapping[str, Any] = field(default_factory=dict)
