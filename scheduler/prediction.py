"""Placement by prediction: which engine reads a prompt and which one writes its answer, so that the fewest streams miss
their objectives.

Every engine may do both. Together on one engine is always among the choices, so a bad prediction costs what its error
is. TaiChi (arXiv 2508.01989) mixes both ways by preference; here each request is weighed by itself,
and what it is worth to all that engines take sides (`scheduler.sides`) is put in the scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple

from scheduler.forecast import LEAST_ROOM, EngineForecast, Misses, Pace, Reading, late, normal_below
from scheduler.objectives import Objectives

_TTFT_ERROR: Final = 0.15  # of a predicted time to first token, one standard deviation
# What a request's own times cost those that come after it, in misses for as long as its objectives: while it is there,
# it is in their way.
_SLOWNESS: Final = 0.8
# What decides among choices that are alike in this: answers close together and prompts where few answers are, so that
# whole engines stay free of one or the other; and a prompt that is handed over occupies two engines for a while.
_PACKED: Final = 1e-3
_BESIDE: Final = 3e-3  # for each answer beside which a prompt of typical length is read
_HANDED_OVER: Final = 0.02
# What it costs to write an answer at an engine that had better only read, in misses, where sides would save every
# request: they are taken once, for all that follow.
_SIDES: Final = 4.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. prompt_tokens: of the whole prompt. output_tokens: of its answer, at most or as expected.

    typical_prompt_tokens, typical_output_tokens: of the requests lately. splittable: it may be read by one engine and
    answered by another.
    waited_s: since its arrival. answers: sequences that it asks for. silent: nobody will see its first token.
    """

    prompt_tokens: int
    output_tokens: float
    objectives: Objectives
    typical_prompt_tokens: float = 0.0
    typical_output_tokens: float = 0.0
    splittable: bool = True
    waited_s: float = 0.0
    answers: int = 1
    silent: bool = False

    @property
    def context_tokens(self) -> float:
        return self.prompt_tokens + self.output_tokens / 2

    def typical_life_s(self, pace: Pace) -> float:
        """Of a typical answer at this pace."""
        return pace.tpot_s * max(2.0, self.output_tokens, self.typical_output_tokens)


class Prospect(NamedTuple):
    """An engine that has room, as one request sees it.

    rank: answers are packed where it is lowest; 0 to 1. had_better_read: and leave answers to others.
    cached_tokens: of this prompt.
    reads: it may read a prompt for another engine. fetches: it may answer what another has read. whole: it may do both.
    passes_on: as a reader it tells the first token, as a writer it gives out one that was told before it has the KV.
    """

    forecast: EngineForecast
    rank: float = 0.0
    cached_tokens: int = 0
    reads: bool = True
    fetches: bool = True
    whole: bool = True
    passes_on: bool = False
    had_better_read: bool = False

    def tokens(self, asked: Asked) -> int:
        """Of this prompt, those that are to be computed here."""
        return max(1, asked.prompt_tokens - self.cached_tokens)

    def prompt(self, asked: Asked) -> Reading:
        """The same, with their pairs."""
        return Reading.of(self.tokens(asked), self.cached_tokens)


class HandOver(NamedTuple):
    """What it takes from a prompt read at one engine to the answer at another: seconds, and more per prompt token.

    fetched: to the first token that is made with the prompt's KV. passed_on: to one that comes with the request. What
    depends on who made the first token (a seed, a schema) waits for the KV even if it is placed to be passed on.
    """

    fetched: Sequence[float]
    passed_on: Sequence[float]

    def fetched_s(self, tokens: int) -> float:
        return self.fetched[0] + self.fetched[1] * tokens

    def passed_on_s(self, tokens: int) -> float:
        return self.passed_on[0] + self.passed_on[1] * tokens


class Choice(NamedTuple):
    """reader, writer: indices of the prospects, equal where one does both. ttft_s, tpot_s: what the request will see.

    risk: streams that are expected to miss their objectives because of it, itself included. read_s: until the prompt
    has been read.
    passes_on: the reader's first token is given out before the KV is there; otherwise the writer makes it with the KV.
    """

    reader: int
    writer: int
    ttft_s: float
    tpot_s: float
    risk: float
    read_s: float
    passes_on: bool = False


def choose(
    asked: Asked, prospects: Sequence[Prospect], handover: HandOver, now: float, sides_worth: float = 0.0
) -> Choice | None:
    """The choice with the least risk; None if no prospect can do anything. O(n²) in the prospects: give it a few.

    sides_worth: that some of them only read (`scheduler.sides`).
    """
    reads_s = [prospect.forecast.first_token_s(prospect.prompt(asked), now) for prospect in prospects]
    elsewhere_s = (read_s for prospect, read_s in zip(prospects, reads_s, strict=True) if prospect.reads)
    comes_at = now + min(elsewhere_s, default=0.0)
    seen = [
        _Seen.of(asked, prospect, now, read_s, comes_at) for prospect, read_s in zip(prospects, reads_s, strict=True)
    ]
    best: Choice | None = None
    best_score = inf
    for r, reader in enumerate(seen):
        for w, writer in enumerate(seen):
            if not _possible(asked, prospects[r], prospects[w], same=r == w):
                continue
            preference = _preference(asked, prospects[r], prospects[w], sides_worth)
            for choice in _ways(asked, reader, writer, (r, w), handover):
                # Without the wait behind a first token that is passed on: withheld, what follows comes no earlier.
                slowness = choice.ttft_s / asked.objectives.ttft_s + writer.pace.tpot_s / asked.objectives.tpot_s
                score = choice.risk + _SLOWNESS * slowness + preference
                if score < best_score:
                    best, best_score = choice, score
    return best


def _possible(asked: Asked, reader: Prospect, writer: Prospect, *, same: bool) -> bool:
    return reader.whole if same else asked.splittable and reader.reads and writer.fetches


def _preference(asked: Asked, reader: Prospect, writer: Prospect, sides_worth: float) -> float:
    """What a pair of engines has against it, whatever becomes of this request. Lower is better."""
    handed_over = _HANDED_OVER * (reader is not writer)
    if asked.objectives.tpot_s == inf:  # nobody's tokens can be late, so no engine need be kept free for them
        return handed_over
    beside = reader.forecast.answers * min(1.0, reader.tokens(asked) / asked.typical_prompt_tokens)
    against_sides = _SIDES * sides_worth * writer.had_better_read
    return _PACKED * writer.rank + _BESIDE * beside + handed_over + against_sides


class _Seen(NamedTuple):
    """What one engine offers.

    ahead_s: until what is queued there has been read. read_s: to the prompt's end. wait_s: for memory, at once.
    wait_later_s: for memory when the prompt has been read elsewhere. pace: of the answer there. write_risk: that it
    misses its TPOT. misses: of the answers there. passes_on: as a prospect's.
    """

    ahead_s: float
    read_s: float
    wait_s: float
    wait_later_s: float
    pace: Pace
    write_risk: float
    misses: Misses
    passes_on: bool

    @classmethod
    def of(cls, asked: Asked, prospect: Prospect, now: float, read_s: float, comes_at: float) -> "_Seen":
        """read_s: to the prompt's end here. comes_at: when another engine will have read it, at the earliest."""
        forecast = prospect.forecast
        typical_s = forecast.cost.prompt_s(*Reading.of(asked.typical_prompt_tokens))
        output, context = max(2.0, asked.output_tokens), asked.context_tokens
        pace = forecast.pace(output, typical_s, now, more=1, context_tokens=context)
        life_s = asked.typical_life_s(pace)
        return cls(
            forecast.first_token_s(Reading(), now),
            read_s,
            forecast.memory_wait_s(context, life_s),
            forecast.memory_wait_s(context, life_s, comes_at=comes_at),
            pace,
            pace.late(asked.objectives.tpot_s),
            forecast.misses(prospect.prompt(asked), context, output, now),
            prospect.passes_on,
        )


def _ways(asked: Asked, reader: _Seen, writer: _Seen, at: tuple[int, int], handover: HandOver) -> Iterator[Choice]:
    if reader is writer:
        yield _together(asked, reader, at[0])
        return
    tokens, others = asked.prompt_tokens, reader.misses.reading + writer.misses.writing
    # What comes from elsewhere waits for memory, and for the prompts that are being read where it is to be answered.
    goes_on_s = max(max(reader.read_s, writer.wait_later_s) + handover.fetched_s(tokens), writer.ahead_s)
    if reader.passes_on and writer.passes_on and asked.output_tokens > 1:
        ttft_s = reader.read_s + handover.passed_on_s(tokens)
        stall_s = max(0.0, goes_on_s - ttft_s)
        stalled = _stalled(asked, writer.pace, stall_s)
        risk = _own(asked, ttft_s, 1.0 - (1.0 - writer.write_risk) * (1.0 - stalled)) + others
        tpot_s = writer.pace.tpot_s + stall_s / max(2.0, asked.output_tokens)
        yield Choice(*at, ttft_s, tpot_s, risk, reader.read_s, passes_on=True)
        if not stalled or asked.silent:  # withheld it would come later, and nothing sooner
            return
    risk = _own(asked, goes_on_s, writer.write_risk) + others
    yield Choice(*at, goes_on_s, writer.pace.tpot_s, risk, reader.read_s)


def pace_there(asked: Asked, writer: EngineForecast, now: float) -> Pace:
    """Of the answer to a request that the writer expects."""
    typical_s = writer.cost.prompt_s(*Reading.of(asked.typical_prompt_tokens))
    return writer.pace(max(2.0, asked.output_tokens), typical_s, now)


def is_passed_on(
    asked: Asked, elapsed_s: float, writer: EngineForecast, pace: Pace, handover: HandOver, now: float
) -> bool:
    """Whether a first token is better given out before the writer has the KV: asked anew when the prompt has been read,
    for by now the writer may be reading prompts itself. elapsed_s: since the choice. pace: as `pace_there`. The request
    stands in line at the writer."""
    limit_s, tokens = asked.objectives.tpot_s, asked.prompt_tokens
    passed_on_s = elapsed_s + handover.passed_on_s(tokens)
    memory_s = writer.memory_wait_s(0.0, asked.typical_life_s(pace))  # its own context is among those in line
    goes_on_s = elapsed_s + max(memory_s + handover.fetched_s(tokens), writer.first_token_s(Reading(), now))
    write_risk, stalled = pace.late(limit_s), _stalled(asked, pace, max(0.0, goes_on_s - passed_on_s))
    risk = _own(asked, passed_on_s, 1.0 - (1.0 - write_risk) * (1.0 - stalled))
    return risk <= _own(asked, goes_on_s, write_risk) + _PACKED


def _together(asked: Asked, seen: _Seen, at: int) -> Choice:
    ttft_s = max(seen.read_s, seen.wait_s + seen.read_s - seen.ahead_s)
    risk = _own(asked, ttft_s, seen.write_risk) + seen.misses.both
    return Choice(at, at, ttft_s, seen.pace.tpot_s, risk, ttft_s)


def _own(asked: Asked, ttft_s: float, write_risk: float) -> float:
    """That the request itself misses an objective."""
    late_first = normal_below(((asked.waited_s + ttft_s) / asked.objectives.ttft_s - 1.0) / _TTFT_ERROR)
    return 1.0 - (1.0 - late_first) * (1.0 - write_risk)


def _stalled(asked: Asked, pace: Pace, stall_s: float) -> float:
    """That an answer ends before it has made up for the wait between a first token that is passed on and the second."""
    limit_s = asked.objectives.tpot_s
    if limit_s == inf:
        return 0.0
    room_s = max(LEAST_ROOM * limit_s, limit_s - pace.tpot_s)
    return late(stall_s - room_s, 0.0, room_s, 0.0, max(2.0, asked.output_tokens))  # the second token's room is sure
