"""What it is worth that some engines only read prompts and the others only write answers.

No single request shows it: each one that reads its prompt beside answers which are late anyway harms nobody, and so
engines that all do both may stay so, and every answer late. Here both ways are compared for all requests at once, by
how busy engines would be with what is asked of them (a fluid model, as DistServe and Splitwise plan by).
"""

from dataclasses import dataclass
from functools import partial
from math import ceil, exp, inf
from typing import Final, NamedTuple

from scheduler.forecast import MEMORY_S, Pace
from scheduler.objectives import Objectives
from scheduler.step_cost import StepCost

_BUSY: Final = (0.5, 0.6, 0.67, 0.75, 0.85)  # shares of their time for which engines that only read are tried
_KNOWN: Final = 4  # answers after which a rate is known
_PAUSE_S: Final = 5.0  # more of the time between two requests does not count: what is asked when it is over is expected
_MOST_HELD: Final = 0.8  # of its KV cache, by the answers that run in the mean: they come at random
_MOST_HELD_UP: Final = 0.95  # of its time, that an engine that writes answers spends on prompts


class Offered(NamedTuple):
    """What is asked of a model's engines.

    rate: answers a second. read_s: seconds of reading for each. prompt_tokens, output_tokens: of each.
    """

    rate: float
    read_s: float
    prompt_tokens: float
    output_tokens: float

    @property
    def context_tokens(self) -> float:
        """That an answer attends to, in the mean over its tokens."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def readers(self) -> float:
        """Engines that are busy all the time if they do nothing but read it."""
        return self.rate * self.read_s


@dataclass(slots=True)
class Offering:
    """What was asked in the last half minute or so: sums that fade."""

    _noted_at: float | None = None
    _seconds: float = 0.0
    _answers: float = 0.0
    _read_s: float = 0.0

    def note(self, read_s: float, answers: int, now: float) -> None:
        """A request comes whose prompt takes so long to read. The first one only starts the clock."""
        if self._noted_at is not None:
            fades = exp(-min(_PAUSE_S, now - self._noted_at) / MEMORY_S)
            self._seconds = fades * self._seconds + MEMORY_S * (1.0 - fades)
            self._answers = fades * self._answers + answers
            self._read_s = fades * self._read_s + read_s
        self._noted_at = now

    def of(self, prompt_tokens: float, output_tokens: float, *, owners: int = 1) -> Offered | None:
        """None before anything is known. owners: as many ask the same engines for as much each."""
        if self._answers < _KNOWN or self._seconds <= 0.0:
            return None
        rate, read_s = owners * self._answers / self._seconds, self._read_s / self._answers
        return Offered(rate, read_s, prompt_tokens, output_tokens)


class Sides(NamedTuple):
    """Some engines only read prompts, and the others only write answers.

    worth: of all requests, the share that meets its objectives so, and would not if all engines did the same; 0 to 1.
    readers: how many engines read.
    """

    worth: float = 0.0
    readers: int = 0


def best_sides(offered: Offered, engines: int, cost: StepCost, objectives: Objectives, kv_tokens: float = inf) -> Sides:
    """Those with which the fewest requests would miss these objectives. kv_tokens: that an engine's KV cache holds.

    A request's own are asked for, whatever those of others: where tight ones had better not be answered beside prompts,
    loose ones may be.
    """
    if engines < 2 or objectives.tpot_s == inf:
        return Sides()
    missed_by = partial(_missed, offered, cost, objectives, kv_tokens)
    alike = missed_by(engines, engines, each_s=offered.read_s)
    fetch_s = cost.fetched_token_s * offered.prompt_tokens
    tried = {min(engines - 1, max(1, ceil(offered.readers / busy))) for busy in _BUSY}
    missed, readers = min((missed_by(number, engines - number, each_s=fetch_s), number) for number in tried)
    return Sides(max(0.0, alike - missed), readers)


def _missed(
    offered: Offered,
    cost: StepCost,
    objectives: Objectives,
    kv_tokens: float,
    readers: int,
    writers: int,
    *,
    each_s: float,
) -> float:
    """Of the requests, the share that misses an objective; all of them where writers lack the time or the memory.

    each_s: for which each request's prompt holds up the answers of a writer, read there or fetched."""
    busy, held_up = offered.readers / readers, offered.rate * each_s / writers
    room_s = objectives.ttft_s - offered.read_s
    if busy >= 1.0 or held_up >= _MOST_HELD_UP or room_s <= 0.0:
        return 1.0
    # Little's law: as many answers run as come while one is written, and a step takes longer with each.
    steps_each = offered.rate * offered.output_tokens / writers / (1.0 - held_up)
    answer_s = cost.sequence_s + cost.context_token_s * offered.context_tokens
    if steps_each * answer_s >= 1.0:
        return 1.0
    step_s = cost.fixed_s / (1.0 - steps_each * answer_s)
    if steps_each * step_s * offered.context_tokens >= _MOST_HELD * kv_tokens:
        return 1.0
    stall_s = step_s * held_up / (1.0 - held_up)  # for each token
    pace = Pace(step_s + stall_s, (stall_s * each_s / offered.output_tokens) ** 0.5)
    # A queue's tail, in heavy traffic (M/D/1).
    waits = busy * exp(-2.0 * (1.0 - busy) * room_s / offered.read_s) if offered.read_s else 0.0
    return 1.0 - (1.0 - pace.late(objectives.tpot_s)) * (1.0 - waits)
