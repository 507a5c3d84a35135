"""What happens to the workers, and when: a plan that follows from its seed alone."""

import random
from dataclasses import dataclass
from enum import Enum


class Blow(Enum):
    """What is done to a worker's process."""

    KILL = "kill"  # SIGKILL: connections are reset, a new process takes the address after a while
    STOP = "stop"  # SIGSTOP: connections stay open and nothing comes any more, then SIGCONT


@dataclass(frozen=True, slots=True)
class Event:
    """One blow. pause_s: after the last one has been mended. away_s: how long the worker is not there."""

    pause_s: float
    worker: int
    blow: Blow
    away_s: float


def plan(seed: int, workers: int, blows: int) -> list[Event]:
    """`blows` events over so many workers, one of which is away at a time. Every fourth is a stop."""
    dice = random.Random(seed)
    kinds = [Blow.STOP if number % 4 == 3 else Blow.KILL for number in range(blows)]
    dice.shuffle(kinds)
    return [Event(dice.uniform(0.05, 0.4), dice.randrange(workers), kind, dice.uniform(0.1, 0.5)) for kind in kinds]
