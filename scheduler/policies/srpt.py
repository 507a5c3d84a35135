"""Shortest remaining processing time first, for clients whose `max_tokens` is the length that they will get.

Optimal in mean response time where lengths are known (Schrage 1968): the bound for what a policy that learns can reach,
and a choice for batch jobs and extraction, whose answers have a fixed form. A `max_tokens` that is only a limit makes
it an order by that limit, and no more.
"""

import math
from typing import Literal

from scheduler.jobs import Job, Outcome
from scheduler.policy import NEVER, Lane, Spot

_TIE = 1.1  # remaining work within this ratio is one rank
_BOOST_STEPS = 64  # what a job whose patience ended may run before it is ranked by its rest again
_BOOSTED: Lane = (-1,)
_UNKNOWN: Lane = (10_000,)


class Srpt:
    """A job's lane is its remaining work in decode steps, in buckets; prefill comes on top for a job that waits.

    prefill_tokens_per_step: prompt tokens whose prefill takes as long as one decode step.
    hysteresis: the victim's rest must be this many times the head's work and its own recomputation.
    patience_s: a job unserved for so long goes first, for 64 decode steps, and displaces one that came after it.
    stall_s: the same for a displaced job whose answer has begun.
    preemptions_per_s: cap on displacements.
    tail, admission: as for Gittins.
    """

    name = "srpt"
    epoch = 0

    def __init__(
        self,
        prefill_tokens_per_step: int = 256,
        hysteresis: float = 1.3,
        patience_s: float = 60.0,
        stall_s: float = math.inf,
        preemptions_per_s: int = 100,
        tail: float = math.inf,
        admission: Literal["now", "peak"] = "now",
    ) -> None:
        self.patience_s = patience_s
        self.stall_s = stall_s
        self.tail = tail
        self.admission: Literal["now", "peak"] = admission
        self.tokens_per_step = float(prefill_tokens_per_step)
        self.preemptions_per_s = preemptions_per_s
        self._prompt_tokens = self.tokens_per_step
        self._hysteresis = max(hysteresis, _TIE)

    def fit(self, slots: int) -> None:
        """A prompt holds up every slot, so to one of them it counts as many times as there are."""
        self._prompt_tokens = self.tokens_per_step / slots + 1.0 if slots else self.tokens_per_step

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        """What `max_tokens` leaves, in all cases."""
        return float(max(1, job.max_tokens - job.output_tokens)) if job.max_tokens else 0.0

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        """The lane by what is left; jobs without `max_tokens` come last."""
        made = job.output_tokens
        if boosted_at is not None and made < boosted_at + _BOOST_STEPS:
            return Spot(_BOOSTED, boosted_at + _BOOST_STEPS)
        if not job.max_tokens:
            return Spot(_UNKNOWN, NEVER)
        rest = max(1, job.max_tokens - made)
        if not running or not made:
            tokens = job.unread_tokens if running else job.restart_tokens
            return Spot((_bucket(rest + self._steps(tokens)),), made + 1)
        bucket = _bucket(rest)
        return Spot((bucket,), max(made + 1, math.floor(job.max_tokens - _TIE**bucket) + 1))

    def rank(self, lane: Lane) -> float:
        """The bucket."""
        return lane[0]

    def label(self, lane: Lane) -> str:
        """The remaining decode steps, by powers of eight."""
        if lane == _BOOSTED:
            return "boosted"
        if lane == _UNKNOWN:
            return "unknown"
        return f"to{8 ** (1 + int(lane[0] * math.log(_TIE, 8) + 1e-9))}"

    def displaces(self, head: Job, victim: Job, head_lane: Lane, victim_lane: Lane) -> bool:
        """Whether the swap pays, the victim's recomputation included."""
        if victim_lane == _BOOSTED:
            return False
        if head_lane == _BOOSTED:
            return victim.arrived_at > head.arrived_at
        if head_lane == _UNKNOWN:
            return False
        if victim_lane == _UNKNOWN:
            return True
        asked = head.max_tokens - head.output_tokens + self._steps(head.restart_tokens + victim.context_tokens)
        rest = victim.max_tokens - victim.output_tokens + self._steps(victim.unread_tokens)
        return self._hysteresis * max(asked, 1.0) < rest

    def learn(self, job: Job, outcome: Outcome) -> None:
        """Nothing to learn."""

    def _steps(self, tokens: int) -> float:
        return tokens / self._prompt_tokens


def _bucket(steps: float) -> int:
    return int(math.log(max(steps, 1.0), _TIE) + 1e-9)
