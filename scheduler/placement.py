"""Where a request goes: whole to one worker, or its prompt to one and its answer to another (DistServe, Splitwise).

Pure: the decision is a function of a snapshot. That prompts are read apart only where it pays is Dynamo's conditional
disaggregation; that the least pending tokens choose within a pool, and both workers at once, is Splitwise's; the bound
on KV that waits to be fetched is DistServe's back-pressure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from scheduler.workers import Role, Worker


class Why(Enum):
    """Why a request is not split between two workers. Its value is the label in metrics."""

    UNFIT = "unfit"  # the endpoint has no hand-over, or the request wants several answers from one prompt
    NO_POOL = "no_pool"  # no prefill worker is up, or no decode worker
    SHORT_PROMPT = "short_prompt"
    CACHED_PREFIX = "cached_prefix"  # what the decode worker does not hold already is short
    PREFILL_BUSY = "prefill_busy"
    DECODE_BUSY = "decode_busy"  # no decode worker has room, but one that does both has
    BACK_PRESSURE = "back_pressure"  # as much KV as allowed is on its way to the decode workers already


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that is up, as one request sees it.

    role: what it does at present; one that does both may lean to a side.
    has_room: it may be given this request now.
    cost: what it has to compute before this request's first token, in tokens or whatever `Place`s are compared by.
    pending_tokens: still to be computed there for others.
    arriving_tokens: prompts of requests that it is to answer and whose KV has not reached it.
    cached_tokens: of this prompt, what its prefix cache is believed to hold.
    kv_usage: share of its KV cache in use, 0 to 1.
    """

    worker: Worker
    role: Role
    has_room: bool
    cost: float
    pending_tokens: int = 0
    arriving_tokens: int = 0
    cached_tokens: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class Rules:
    """When prompts are read apart.

    min_prompt_tokens: shorter prompts, cached part left out, are read where they are answered.
    busy_tokens: a prefill worker with more than this pending is not waited for.
    max_arriving_tokens: prompts on their way to one decode worker; a single prompt may be longer.
    full_kv: a prefill worker whose KV cache is used beyond this share holds prompts that nobody fetched yet.
    """

    min_prompt_tokens: int = 128
    busy_tokens: int = 8192
    max_arriving_tokens: int = 16384
    full_kv: float = 0.95


@dataclass(frozen=True, slots=True)
class Disaggregated:
    """One worker reads the prompt, another writes the answer."""

    prefill: Worker
    decode: Worker


@dataclass(frozen=True, slots=True)
class Aggregated:
    """One worker does both."""

    worker: Worker
    why: Why


_cost = attrgetter("cost")


def place(
    prompt_tokens: int, places: Sequence[Candidate], rules: Rules, *, splittable: bool
) -> Disaggregated | Aggregated | None:
    """Decides for one request; None if it has to wait until a worker has room.

    prompt_tokens: of the whole prompt. splittable: it is one answer to one prompt on an endpoint with a hand-over.
    """
    prefills = [each for each in places if each.role is Role.PREFILL]
    decodes = [each for each in places if each.role is Role.DECODE]
    # A prefill worker can answer as well; it has to where nobody else is left.
    whole = [each for each in places if each.role is not Role.PREFILL] or prefills
    if not splittable:
        return _together(whole, Why.UNFIT)
    if not (prefills and decodes):
        return _together(whole, Why.NO_POOL)
    decode = _cheapest(decodes)
    if decode is None:
        return _together(whole, Why.DECODE_BUSY)
    if prompt_tokens < rules.min_prompt_tokens:
        return _together(whole, Why.SHORT_PROMPT)
    if prompt_tokens - decode.cached_tokens < rules.min_prompt_tokens:
        return Aggregated(decode.worker, Why.CACHED_PREFIX)
    prefill = _cheapest(each for each in prefills if not _is_busy(each, rules))
    if prefill is None:
        return _together(whole, Why.PREFILL_BUSY)
    decode = _cheapest(each for each in decodes if _can_fetch(each, prompt_tokens, rules))
    if decode is None:
        # A decode worker that cannot take more KV cannot take the prompt either: only one that does both may.
        return _together([each for each in whole if each.role is Role.BOTH], Why.BACK_PRESSURE)
    return Disaggregated(prefill.worker, decode.worker)


def _is_busy(prefill: Candidate, rules: Rules) -> bool:
    return prefill.pending_tokens > rules.busy_tokens or prefill.kv_usage > rules.full_kv


def _can_fetch(decode: Candidate, prompt_tokens: int, rules: Rules) -> bool:
    arriving = decode.arriving_tokens
    return arriving == 0 or arriving + prompt_tokens <= rules.max_arriving_tokens


def _cheapest(places: Iterable[Candidate]) -> Candidate | None:
    return min((each for each in places if each.has_room), key=_cost, default=None)


def _together(places: Iterable[Candidate], why: Why) -> Aggregated | None:
    best = _cheapest(places)
    return None if best is None else Aggregated(best.worker, why)
