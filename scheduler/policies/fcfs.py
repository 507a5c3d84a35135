"""First come, first served: one lane, nobody is displaced."""

import math
from typing import Final

from scheduler.jobs import Job, Outcome
from scheduler.policy import NEVER, Lane, Spot

_SPOT = Spot((), NEVER)


class Fcfs:
    """Arrival order. A job that had to yield (KV shortage) returns to the front."""

    name: Final = "fcfs"
    patience_s: Final = math.inf
    stall_s: Final = math.inf
    preemptions_per_s: Final = 0
    tail: Final = math.inf
    admission: Final = "now"
    tokens_per_step: Final = 256.0
    epoch: Final = 0

    def fit(self, slots: int) -> None:
        """Nothing depends on it."""

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        """Nothing is known."""
        return 0.0

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        """One lane for all."""
        return _SPOT

    def rank(self, lane: Lane) -> float:
        """All equal."""
        return 0.0

    def label(self, lane: Lane) -> str:
        """The one lane."""
        return "all"

    def displaces(self, head: Job, victim: Job, head_lane: Lane, victim_lane: Lane) -> bool:
        """Never."""
        return False

    def learn(self, job: Job, outcome: Outcome) -> None:
        """Nothing to learn."""
