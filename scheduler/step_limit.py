"""How many tokens of prompts a step reads beside answers, so that their next tokens come in time.

Sarathi-Serve (Agrawal et al., OSDI 2024) bounds every step by a fixed chunk. Here the bound follows from the answers
that run: one that is ahead of its objective may be held up by a large step, one that is not may not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from math import inf
from typing import Final, NamedTuple

from scheduler.batching import equal_share
from scheduler.jobs import Job, Tier
from scheduler.slack import StepLoad, StepModel

LOOKED_AT: Final = 32  # prompts that wait, in order of arrival: other orders may start one first that is not looked at
_LEAST_TOKENS: Final = 16  # of prompts in a step: they always go on
_WORTH_WHILE: Final = 0.4  # of the time per token: an objective that leaves prompts less would stop them
LONGEST_STEP: Final = 1.2  # times the time per token, however far ahead answers are
LONGEST_LATE: Final = 2.4  # times the same, for an answer that will be late
_EARLY: Final = 0.15  # of the time per token, by which tokens come before they are due: some steps take longer
_CATCH_UP: Final = 5  # tokens in which an answer that is late is to be in time again; who needs more is given up
_EACH: Final = 8  # steps without a prompt of which one is learned from


class Prompt(NamedTuple):
    """A prompt that is not read yet. unread: tokens that are to be computed, behind `before` others."""

    unread: int
    before: int = 0


@dataclass(slots=True)
class Batch:
    """What runs as the next step is put together.

    answers: jobs that make a token in it, and how many each has made by then. context: KV tokens that all sequences
    attend to that make one. prompts: those that are being read, in their order, without those of flex that take what
    others leave. waiting: those that may start, at most `LOOKED_AT`. expected: jobs that start after this step, when
    their KV has come from elsewhere.
    untracked: sequences that make a token and belong to no job. arrived: of all that make one, those that start with
    this step, after the prompts that are being read: their KV has come. asks: of those expected, whose KV is asked for
    in this step, if it has a token left.
    """

    answers: list[tuple[Job, int]] = field(default_factory=list)
    context: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    waiting: list[Prompt] = field(default_factory=list)
    expected: list[Job] = field(default_factory=list)
    untracked: int = 0
    arrived: int = 0
    asks: int = 0

    def paces(self) -> Iterator[float]:
        """The time per token that each answer is to keep, those that are expected among them."""
        for job in chain((job for job, _ in self.answers), self.expected):
            yield job.objectives.tpot_s


class UnderWay(NamedTuple):
    """The step that runs while the next one is put together: when it began, and what it computes of prompts."""

    began_at: float
    load: StepLoad


class Limit(NamedTuple):
    """Most tokens of prompts that a step computes, most of all that it computes, and most of a single prompt."""

    prompt_tokens: int
    step_tokens: int
    each_tokens: int


class StepLimit:
    """One engine's bound on prompts. The owner tells it which job makes a token and which one ends, and has `model`
    learn how long steps take, in its own seconds. chunk_tokens: the fewest tokens of a prompt that the engine computes
    in a step.
    """

    def __init__(self, model: StepModel, chunk_tokens: int = 1) -> None:
        self.model = model
        self._chunk_tokens = chunk_tokens
        self._least_tokens = max(_LEAST_TOKENS, chunk_tokens)
        self._first_at: dict[Job, float] = {}
        self._unlearned = 0

    def made(self, job: Job, now: float) -> None:
        """A job made a token, its first one perhaps."""
        if job not in self._first_at:
            self._first_at[job] = now

    def made_elsewhere(self, job: Job, now: float) -> None:
        """A job's first token is given out that another engine made: what this one makes starts with the second."""
        self._first_at[job] = now + job.objectives.tpot_s

    def ended(self, job: Job) -> None:
        """It makes no more of them. Nothing if it made none."""
        self._first_at.pop(job, None)

    def learns_from(self, *, reads: bool) -> bool:
        """Whether a step that reads prompts, or does not, is worth the time to learn from it: every one that does,
        and now and then one that does not."""
        self._unlearned = 0 if reads or self._unlearned >= _EACH - 1 else self._unlearned + 1
        return not self._unlearned

    def of(
        self,
        batch: Batch,
        now: float,
        step_tokens: int,
        *,
        under_way: UnderWay | None = None,
        tokens_each: int = 1,
    ) -> Limit | None:
        """The bound of the next step, None for no other than `step_tokens`.

        under_way: what the engine does first. tokens_each: that an answer takes of a step.
        """
        if not (batch.prompts or batch.waiting):
            return None
        base_s = self._base_s(batch)
        if base_s is None:
            return None
        begins_at = now
        if under_way is not None:
            prompts_s = self.model.predicted_s(under_way.load) - self.model.empty_s
            begins_at = max(now, under_way.began_at + base_s + prompts_s)
        others = tokens_each * (len(batch.answers) + batch.untracked + batch.asks)
        wanted = max(self._least_tokens, self._for_answers(batch, begins_at, base_s))
        starts = batch.arrived or batch.asks
        if starts:  # an engine goes on with prompts before it starts anybody: they leave these their tokens
            wanted = min(wanted, max(self._least_tokens, step_tokens - others))
        elif wanted + others >= step_tokens:
            return None
        tokens = int(wanted)
        if not starts:
            return Limit(tokens, tokens + others, tokens)
        each = max(self._chunk_tokens, equal_share(tokens, [one.unread for one in batch.prompts]))
        return Limit(tokens, min(tokens + others, step_tokens), each)

    def _base_s(self, batch: Batch) -> float | None:
        """Seconds of a step without prompts, None where there is no reason to limit them."""
        model = self.model
        if not (batch.answers or batch.expected) or not model.is_known:
            return None
        base_s = model.predicted_s(StepLoad(0, len(batch.answers) + batch.untracked, batch.context))
        least_s = least_pace_s(base_s)
        return base_s if any(least_s <= tpot_s < inf for tpot_s in batch.paces()) else None

    def _for_answers(self, batch: Batch, begins_at: float, base_s: float) -> float:
        """Tokens of prompts with which every answer that can have its next token in time does, and none waits for it
        longer than `LONGEST_STEP` and `LONGEST_LATE` say. Without answers there is no bound.
        """
        # An answer that is expected makes its token in the step behind this one, beside a few tokens of prompts.
        least_s = self.model.prompt_s(self._least_tokens, 0)
        this_one, next_one = begins_at + base_s, begins_at + 2.0 * base_s + least_s
        room_s = min(
            self._room_s(batch.answers, this_one, base_s),
            self._room_s(zip(batch.expected, repeat(0)), next_one, base_s),
        )
        return self._tokens_within(room_s, chain(batch.prompts, batch.waiting))

    def _tokens_within(self, room_s: float, prompts: Iterable[Prompt]) -> float:
        """How many tokens are read in that time, of one prompt after the other."""
        if room_s == inf:
            return inf
        tokens = 0.0
        for prompt in prompts:
            whole_s = self.model.prompt_s(prompt.unread, prompt.before)
            if whole_s > room_s:
                return tokens + self.model.tokens_within(room_s, prompt.before)
            tokens += prompt.unread
            room_s -= whole_s
        return tokens + self.model.tokens_within(room_s, 0)

    def _room_s(self, answers: Iterable[tuple[Job, int]], in_time: float, base_s: float) -> float:
        """Seconds by which a step may be longer than `base_s`, if without that their tokens come at `in_time`.

        Token n + 1 is due `n` times the objective after the first one. An answer that is a little late is not held up
        until it has caught up. One that is later may be held up for longer, and one whose objective leaves prompts
        little for as long as they like: it would stop them, and never catch up.
        """
        first_at, least_s, room_s = self._first_at, least_pace_s(base_s), inf
        for job, made in answers:
            first, tpot_s = first_at.get(job), job.objectives.tpot_s
            if first is None or tpot_s < least_s or job.tier is Tier.FLEX:
                continue
            until_s = first + tpot_s * (made - _EARLY) - in_time
            if until_s >= _CATCH_UP * (base_s - tpot_s):
                room_s = min(room_s, max(0.0, until_s), LONGEST_STEP * tpot_s - base_s)
            elif tpot_s < inf:
                room_s = min(room_s, LONGEST_LATE * tpot_s - base_s)
        return room_s


def least_pace_s(base_s: float) -> float:
    """The tightest time per token that leaves prompts what is worth while, where a step without them takes `base_s`."""
    return base_s / (1.0 - _WORTH_WHILE)
