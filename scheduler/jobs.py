"""A job: all that a policy may know of a request."""

from dataclasses import dataclass
from enum import Enum, IntEnum

from scheduler.objectives import NO_OBJECTIVES, Objectives


class Tier(IntEnum):
    """What a request is promised beside others; the smaller goes first. `scheduler/tiers.py` says how."""

    label: str  # as OpenAI's `service_tier` names it

    PRIORITY = 0
    DEFAULT = 1
    FLEX = 2

    def __init__(self, value: int) -> None:
        self.label = self._name_.lower()


class Outcome(Enum):
    """How a job left."""

    DONE = "done"  # reached its natural end: its length is a true sample
    LENGTH = "length"  # cut at max_tokens: a true sample too, since service ended there
    ABORTED = "aborted"  # the client left, or a deadline passed: the length is only a lower bound
    FAILED = "failed"  # the engine could not go on: only a lower bound


@dataclass(slots=True, eq=False)
class Job:
    """One request as the scheduler sees it.

    Identity never changes; the last three fields are kept by `Lanes`, their one writer. Compared by identity.

    id: unique among the jobs that wait or run.
    tenant: who is charged.
    prompt_tokens: length of the prompt in tokens (an estimate at the gateway, exact in the engine).
    arrived_at: seconds on the owner's monotonic clock.
    max_tokens: upper bound of the output in tokens, 0 if unknown.
    weight: the tenant's share; service counts divided by it.
    kind: what is alike in length, e.g. "tools" or "json" ("" if unknown); Gittins learns per kind.
    tier: its service tier.
    objectives: what its answer's times are to be.
    remote_tokens: prompt tokens whose KV another engine computed, and charged; computed here only if it is lost.
    output_tokens: tokens made so far.
    cached_tokens: prompt tokens that needed no computing (prefix cache).
    read_tokens: prompt tokens in KV so far while the prompt is read chunk by chunk, 0 where nobody says.
    """

    id: str
    tenant: str
    prompt_tokens: int
    arrived_at: float
    max_tokens: int = 0
    weight: float = 1.0
    kind: str = ""
    tier: Tier = Tier.DEFAULT
    objectives: Objectives = NO_OBJECTIVES
    remote_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    read_tokens: int = 0

    def charged_tokens(self, *, cached_free: bool) -> int:
        """Prompt tokens that count as service here; not those that another engine computed."""
        free_tokens = max(self.remote_tokens, self.cached_tokens if cached_free else 0)
        return max(0, self.prompt_tokens - free_tokens)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens to compute at the first start: neither cached nor computed by another engine."""
        return max(0, self.prompt_tokens - max(self.cached_tokens, self.remote_tokens))

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens still to compute before the first output token; 0 once there is one."""
        return 0 if self.output_tokens else max(0, min(self.prefill_tokens, self.prompt_tokens - self.read_tokens))

    @property
    def restart_tokens(self) -> int:
        """Tokens to compute before the next output token if the job starts now, its own KV lost if it had any."""
        return self.prompt_tokens + self.output_tokens if self.output_tokens else self.unread_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens to compute again after the job has been displaced, if nothing of it stays cached."""
        return self.prompt_tokens + self.output_tokens
