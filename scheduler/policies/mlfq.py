"""Skip-join multi-level feedback queue: least attained service first (FastServe, arXiv 2305.05920, NSDI'26).

Only an engine that steps token by token can displace a running job. Where whole requests are handed out, as in a
gateway, the policy orders the line and no more.
"""

import math
from bisect import bisect_left
from typing import Final

from scheduler.jobs import Job, Outcome
from scheduler.policy import NEVER, Lane, Spot


class Mlfq:
    """Levels 0 (highest) to `levels - 1`, the quantum doubling from one to the next.

    A job joins at the first level whose quantum holds its prefill, cached tokens left out, and is demoted by one level
    once it has used more than its level's quantum there: its prefill in the first, one unit per decode step in all. A
    job whose patience ended joins level 0 at its end, with a fresh quantum. Only a job of a higher level displaces a
    running one.

    quantum_steps: quantum of level 0, in decode steps.
    levels: how many.
    prefill_tokens_per_step: prompt tokens whose prefill takes as long as one decode step.
    patience_s: a job unserved for so long is promoted. When more are promoted at once than the batch holds, they take
        turns, and the time unserved is no longer bounded by it.
    preemptions_per_s: cap on displacements, since each costs the victim's recomputation.
    tail: as for Gittins.
    """

    name = "mlfq"
    stall_s = math.inf
    admission: Final = "now"
    epoch = 0

    def __init__(
        self,
        quantum_steps: int = 16,
        levels: int = 6,
        prefill_tokens_per_step: int = 256,
        patience_s: float = 10.0,
        preemptions_per_s: int = 100,
        tail: float = math.inf,
    ) -> None:
        self.patience_s = patience_s
        self.tail = tail
        self.tokens_per_step = float(prefill_tokens_per_step)
        self.preemptions_per_s = preemptions_per_s
        self._prefill_tokens_per_step = prefill_tokens_per_step
        self._quanta_steps = [quantum_steps * 2**level for level in range(levels)]

    def fit(self, slots: int) -> None:
        """Nothing depends on it."""

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        """Nothing is known."""
        return 0.0

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        """The level follows from the prompt and the tokens made, so there is no state to keep per job."""
        last = len(self._quanta_steps) - 1
        if boosted_at is None:
            level, end = self._join(job)
        else:
            level, end = 0, boosted_at + self._quanta_steps[0] + 1
        while level < last and job.output_tokens >= end:
            level += 1
            end += self._quanta_steps[level] + 1
        return Spot((level,), NEVER if level == last else end)

    def _join(self, job: Job) -> tuple[int, int]:
        """The first level, and the output tokens at which its quantum is exceeded. The prefill makes the first."""
        prefill_steps = max(1.0, job.prefill_tokens / self._prefill_tokens_per_step)
        level = min(bisect_left(self._quanta_steps, prefill_steps), len(self._quanta_steps) - 1)
        return level, int(max(0.0, self._quanta_steps[level] - prefill_steps + 1)) + 1

    def rank(self, lane: Lane) -> float:
        """The level."""
        return lane[0]

    def label(self, lane: Lane) -> str:
        """The level's number."""
        return f"level{lane[0]}"

    def displaces(self, head: Job, victim: Job, head_lane: Lane, victim_lane: Lane) -> bool:
        """Across levels only."""
        return head_lane < victim_lane

    def learn(self, job: Job, outcome: Outcome) -> None:
        """Nothing to learn."""
