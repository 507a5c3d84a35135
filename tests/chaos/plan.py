"""What happens to the workers, and when: a plan that follows from its seed alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product


class Blow(Enum):
    """What is done to a worker's process."""

    KILL = "kill"  # SIGKILL: connections are reset, a new process takes the address after a while
    STOP = "stop"  # SIGSTOP: connections stay open and nothing comes any more, then SIGCONT
    TERM = "term"  # SIGTERM: vLLM aborts what it runs, and ends; a new process takes the address


class Part(Enum):
    """Which of a worker's processes is struck."""

    ALL = "all of it"
    SERVER = "API server"
    CORE = "EngineCore"
    COMPUTES = (
        "computes"  # what a GPU's fault or the out-of-memory killer ends: vLLM's Worker, or EngineCore without one
    )


@dataclass(frozen=True, slots=True)
class Event:
    """One blow. pause_s: after the last one has been mended. away_s: how long the worker is not there."""

    pause_s: float
    worker: int
    blow: Blow
    away_s: float
    part: Part = Part.ALL


FOUR = (Blow.KILL, Blow.KILL, Blow.KILL, Blow.STOP)


def plan(
    seed: int, workers: int, blows: int, kinds_in_turn: Sequence[Blow] = FOUR, parts: Sequence[Part] = (Part.ALL,)
) -> list[Event]:
    """`blows` events over so many workers, one of which is away at a time; as many of each kind to each part, in any
    order."""
    dice = random.Random(seed)
    every = list(product(kinds_in_turn, parts))
    kinds = [every[number % len(every)] for number in range(blows)]
    dice.shuffle(kinds)
    return [
        Event(dice.uniform(0.05, 0.4), dice.randrange(workers), kind, dice.uniform(0.1, 0.5), part)
        for kind, part in kinds
    ]
