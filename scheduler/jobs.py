"""A job: all that a policy may know of a request."""

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a job left."""

    DONE = "done"  # reached its natural end: its length is a true sample
    LENGTH = "length"  # cut at max_tokens: a true sample too, since service ended there
    ABORTED = "aborted"  # the client left, or a deadline passed: the length is only a lower bound
    FAILED = "failed"  # the engine could not go on: only a lower bound


@dataclass(slots=True, eq=False)
class Job:
    """One request as the scheduler sees it.

    Identity never changes; `output_tokens` is kept by `Lanes.serve`, its one writer. Compared by identity.

    id: unique among the jobs that wait or run.
    tenant: who is charged.
    prompt_tokens: length of the prompt in tokens (an estimate at the gateway, exact in the engine).
    arrived_at: seconds on the owner's monotonic clock.
    max_tokens: upper bound of the output in tokens, 0 if unknown.
    weight: the tenant's share; service counts divided by it.
    kind: what is alike in length, e.g. "tools" or "json" ("" if unknown); Gittins learns per kind.
    output_tokens: tokens made so far.
    cached_tokens: prompt tokens that needed no computing (prefix cache).
    """

    id: str
    tenant: str
    prompt_tokens: int
    arrived_at: float
    max_tokens: int = 0
    weight: float = 1.0
    kind: str = ""
    output_tokens: int = 0
    cached_tokens: int = 0
