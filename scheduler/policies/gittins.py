"""Gittins order: serves the job likeliest to end soon for the work it still asks, learned from completed lengths.

The index of a job that has made `a` tokens is the largest, over b > a, of P(S <= b | S > a) / E[min(S, b) - a | S > a]
(Gittins 1979; optimal mean response time without knowing lengths in M/G/1, Aalto, Ayesta and Righter 2009). Where
lengths are alike the index grows with age and the order is first come, first served; where they are heavy-tailed it
is least attained service; the quanta in between follow from the samples.

The unit of work is a decode step. Output is learned; prefill is known, and comes on top for a job that waits: its
prompt, and after a preemption its output so far too. `displaces` adds the victim's recomputation to the work that the
head asks, for that is what the swap costs.
"""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from scheduler.jobs import Job, Outcome
from scheduler.policies.lengths import Lengths
from scheduler.policy import Lane, Spot

_AGES = [0, 1, 2, 3, 4, 5, 6, 8] + [round(8 * 2 ** (step / 3)) for step in range(1, 46)]
_TIE = 1.6  # indices within this ratio are one rank: a smaller difference is noise
_BOOST_STEPS = 64  # what a job whose patience ended may run before it is ranked by its index again
_BOOSTED: Lane = (-1, 0, 0)
_MOST_CLASSES = 1024
_FRESH = 0.02  # of what is known of prompts after one more
_BY_PROMPT = 3  # so many of a job's classes, the first ones, look at its prompt's length

_ClassKey = tuple[str | float, ...]


@dataclass(eq=False)
class Gittins:
    """Learns the lengths of each class of jobs; a job's lane is (class, outstanding prefill, age), both in buckets.

    A class is what is thought alike in length: tenant, kind, `max_tokens` (by powers of two) and the prompt's length
    (by half octaves); while it has too few samples, its parent stands in: without the tenant, without the kind, then
    the same without the prompt, then all. With too few in all, the order is first come, first served. Outcomes that
    end early (aborted, failed) count as "at least so long" only.

    prefill_tokens_per_step: prompt tokens whose prefill takes as long as one decode step.
    hysteresis: the head displaces a running job only if its index is this many times higher.
    patience_s: a job unserved for so long goes first, for 64 decode steps, and displaces one that came after it; under
        overload they take turns.
    stall_s: the same for a displaced job whose answer has begun.
    preemptions_per_s: cap on displacements.
    min_samples: completed jobs that a class needs.
    window: how many of the latest jobs a class remembers.
    max_tokens: "use", or "ignore" where clients set it without a thought of the length.
    tail: jobs wait no longer for their first token than 99 of 100 would have under first come, first served, times
        this; see `Lanes.stepped`. Infinity promises nothing.
    admission: "now", or "peak" to start a job only if the batch is expected never to outgrow its memory with it; see
        `FuturePeak`.
    """

    prefill_tokens_per_step: int = 256
    hysteresis: float = 1.6
    patience_s: float = 60.0
    stall_s: float = math.inf
    preemptions_per_s: int = 100
    min_samples: int = 50
    window: int = 2000
    max_tokens: Literal["use", "ignore"] = "use"
    tail: float = 0.8
    admission: Literal["now", "peak"] = "now"
    name: ClassVar[str] = "gittins"

    def __post_init__(self) -> None:
        self.tokens_per_step = float(self.prefill_tokens_per_step)
        self.epoch = 0
        self._prompt_tokens = self.tokens_per_step
        self._numbers = 1
        self._all = Lengths(self.window, self.min_samples)
        self._classes: OrderedDict[_ClassKey, int] = OrderedDict()
        self._lengths: dict[int, Lengths] = {0: self._all}
        self._unlike: set[int] = set()  # classes that differ from their parents
        self._indices: dict[Lane, float] = {}
        self._usual_steps = 0.0  # of a prompt
        self._usual: Lane = (0, 0, 0)

    def fit(self, slots: int) -> None:
        """A prompt holds up every slot, so to one of them it counts as many times as there are."""
        self._prompt_tokens = self.tokens_per_step / slots + 1.0 if slots else self.tokens_per_step

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        """As those of its class that were as long, and no more than `max_tokens` leaves where that counts."""
        lengths = self._lengths.get(self._class_of(job), self._all)
        if not lengths.ready:
            return 0.0
        rest = lengths.rest(job.output_tokens, share)
        if job.max_tokens and self.max_tokens == "use":
            rest = min(rest, max(1.0, job.max_tokens - job.output_tokens))
        return rest

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        """The lane by class, outstanding prefill and age."""
        made = job.output_tokens
        if boosted_at is not None and made < boosted_at + _BOOST_STEPS:
            return Spot(_BOOSTED, boosted_at + _BOOST_STEPS)
        age = min(bisect_right(_AGES, made), len(_AGES) - 1)
        prefill = _bucket(self._steps(job.unread_tokens if running else job.restart_tokens))
        return Spot((self._class_of(job), prefill, age - 1), _AGES[age])

    def rank(self, lane: Lane) -> float:
        """How many times `_TIE` the index is below that of the usual new job, so that what is alike ties."""
        if lane == _BOOSTED:
            return -math.inf
        if not self._all.ready:
            return 0.0
        return -round(math.log(self._index(lane) / self._index(self._usual), _TIE))

    def label(self, lane: Lane) -> str:
        """How many tokens the job has made, by powers of eight."""
        if lane == _BOOSTED:
            return "boosted"
        age = _AGES[lane[2]]
        return "new" if age == 0 else f"from{8 ** int(math.log(age, 8) + 1e-9)}"

    def displaces(self, head: Job, victim: Job, head_lane: Lane, victim_lane: Lane) -> bool:
        """Whether the swap pays, the victim's recomputation included."""
        if victim_lane == _BOOSTED or not self._all.ready:
            return False
        if head_lane == _BOOSTED:
            return victim.arrived_at > head.arrived_at  # it was overtaken; else it only waits for its turn
        rank = self.rank(head_lane)
        if rank >= self.rank(victim_lane) or rank >= self.rank(self.spot(victim, running=False, boosted_at=None).lane):
            return False
        steps = self._steps(head.restart_tokens + victim.context_tokens)
        asked = (head_lane[0], _bucket(steps), head_lane[2])
        return self._index(asked) > self.hysteresis * self._index(victim_lane)

    def learn(self, job: Job, outcome: Outcome) -> None:
        """Notes the length in the job's class and in all its parents."""
        ended = outcome in (Outcome.DONE, Outcome.LENGTH)
        if not job.output_tokens:
            return
        self._usual_steps += _FRESH * (self._steps(job.prompt_tokens) - self._usual_steps)
        numbers = [*map(self._number, self._chain(job)), 0]
        for at, number in enumerate(numbers):
            if self._lengths[number].add(job.output_tokens, ended=ended):
                self.epoch += 1
                self._indices.clear()
                self._usual = (0, _bucket(self._usual_steps), 0)
                parents = numbers[at + 1 : _BY_PROMPT] + numbers[-2:] if at < _BY_PROMPT else numbers[at + 1 :]
                self._compare(number, parents)

    def _compare(self, number: int, parents: Sequence[int]) -> None:
        """Sets whether the class is unlike the nearest of its parents that has samples enough."""
        parent = next((parent for parent in parents if self._lengths[parent].ready), None)
        if parent is not None and self._lengths[number].differs(self._lengths[parent]):
            self._unlike.add(number)
        else:
            self._unlike.discard(number)

    def _number(self, key: _ClassKey) -> int:
        number = self._classes.get(key)
        if number is not None:
            self._classes.move_to_end(key)
            return number
        if len(self._classes) >= _MOST_CLASSES:
            forgotten = self._classes.popitem(last=False)[1]
            del self._lengths[forgotten]
            self._unlike.discard(forgotten)
        number = self._classes[key] = self._numbers
        self._numbers += 1
        self._lengths[number] = Lengths(self.window, self.min_samples)
        return number

    def _class_of(self, job: Job) -> int:
        for key in self._chain(job):
            number = self._classes.get(key)
            if number is not None and number in self._unlike:
                return number
        return 0

    def _index(self, lane: Lane) -> float:
        index = self._indices.get(lane)
        if index is None:
            number, prefill, age = lane
            lengths = self._lengths.get(number, self._all)
            steps = 0.0 if prefill == 0 else 0.75 * 2**prefill
            index = self._indices[lane] = lengths.index(_AGES[age], steps)
        return index

    def _chain(self, job: Job) -> tuple[_ClassKey, ...]:
        """The job's class and its parents, without the one of all."""
        bound = job.max_tokens.bit_length() if self.max_tokens == "use" else -1
        parents: tuple[_ClassKey, ...] = ((job.tenant, job.kind, bound), (job.kind, bound), (bound,))
        octave = _half_octave(job.prompt_tokens)
        return (*((*key, octave) for key in parents), *parents)

    def _steps(self, tokens: int) -> float:
        return tokens / self._prompt_tokens


def _half_octave(tokens: int) -> float:
    """Prompts whose lengths differ by a factor of less than 1.41, as a class key that no `max_tokens` can be."""
    return int(2 * math.log2(max(1, tokens))) + 0.5


def _bucket(steps: float) -> int:
    """Powers of two: 0 for less than one step, then 1 for less than two, 2 for less than four."""
    return int(steps).bit_length()
