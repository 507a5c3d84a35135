"""What a client asks for, before it is sent."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a workload.

    at_s: when to send it, seconds since the start of the run.
    prompt: token ids (for /v1/completions), or text.
    output_tokens: how long the answer is to be, exactly; 0 leaves it to the model.
    session: the conversation it belongs to. after: the call whose answer it waits for, "" for none.
    kind: which application it belongs to ("chat", "code", …), for the report only.
    """

    id: str
    at_s: float
    tenant: str
    prompt: list[int] | str
    prompt_tokens: int
    output_tokens: int
    kind: str = ""
    session: str = ""
    after: str = ""
