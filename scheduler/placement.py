"""Where a request goes: whole to one worker, or its prompt to one and its answer to another (DistServe, Splitwise).

Pure: the decision is a function of what is known at one moment. That prompts are read apart only where it pays is
Dynamo's conditional disaggregation; that the least pending tokens choose within a pool, and both workers at once, is
Splitwise's; the bound on KV that waits to be fetched is DistServe's back-pressure.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from scheduler.pools import WorkerLoad
from scheduler.workers import Role


class Why(Enum):
    """Why a request is not split between two workers. Its value is the label in metrics."""

    UNFIT = "unfit"  # the endpoint has no hand-over, or the request wants several answers from one prompt
    NO_POOL = "no_pool"  # no prefill worker is up, or no decode worker
    SHORT_PROMPT = "short_prompt"
    CACHED_PREFIX = "cached_prefix"  # what the decode worker does not hold already is short
    PREFILL_BUSY = "prefill_busy"
    DECODE_BUSY = "decode_busy"  # no decode worker has room, but one that does both has
    BACK_PRESSURE = "back_pressure"  # as much KV as allowed is on its way to the decode workers already


class Places(Protocol):
    """The workers that are up, as one request sees them.

    known: of its prompt, the tokens that a worker's prefix cache is believed to hold, by the worker's id.
    """

    @property
    def known(self) -> Mapping[str, int]: ...
    def has(self, role: Role) -> bool:
        """Whether a worker of this role is up, whether it has room or not."""

    def cheapest(self, roles: Collection[Role], fits: Callable[[WorkerLoad], bool] | None = None) -> WorkerLoad | None:
        """The best of these roles that has room and fits."""


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

    prefill: WorkerLoad
    decode: WorkerLoad


@dataclass(frozen=True, slots=True)
class Aggregated:
    """One worker does both."""

    worker: WorkerLoad
    why: Why


_READERS, _ANSWERERS, _ALL_ROUND = {Role.PREFILL}, {Role.DECODE}, {Role.BOTH}
_WHOLE = {Role.DECODE, Role.BOTH}


def place(prompt_tokens: int, places: Places, rules: Rules, *, splittable: bool) -> Disaggregated | Aggregated | None:
    """Decides for one request; None if it has to wait until a worker has room.

    prompt_tokens: of the whole prompt. splittable: it is one answer to one prompt on an endpoint with a hand-over.
    """
    if not splittable:
        return _together(places, Why.UNFIT)
    if not (places.has(Role.PREFILL) and places.has(Role.DECODE)):
        return _together(places, Why.NO_POOL)
    decode = places.cheapest(_ANSWERERS)
    if decode is None:
        return _together(places, Why.DECODE_BUSY)
    if prompt_tokens < rules.min_prompt_tokens:
        return _together(places, Why.SHORT_PROMPT)
    if prompt_tokens - places.known.get(decode.worker.id, 0) < rules.min_prompt_tokens:
        return Aggregated(decode, Why.CACHED_PREFIX)
    prefill = places.cheapest(_READERS, lambda load: not _is_busy(load, rules))
    if prefill is None:
        return _together(places, Why.PREFILL_BUSY)
    decode = places.cheapest(_ANSWERERS, lambda load: _can_fetch(load, prompt_tokens, rules))
    if decode is None:
        # A decode worker that cannot take more KV cannot take the prompt either: only one that does both may.
        both = places.cheapest(_ALL_ROUND)
        return None if both is None else Aggregated(both, Why.BACK_PRESSURE)
    return Disaggregated(prefill, decode)


def _is_busy(prefill: WorkerLoad, rules: Rules) -> bool:
    return prefill.pending_tokens > rules.busy_tokens or prefill.kv_usage > rules.full_kv


def _can_fetch(decode: WorkerLoad, prompt_tokens: int, rules: Rules) -> bool:
    arriving = decode.arriving_tokens
    return arriving == 0 or arriving + prompt_tokens <= rules.max_arriving_tokens


def _together(places: Places, why: Why) -> Aggregated | None:
    # A prefill worker can answer as well; it has to where nobody else is left.
    whole = _WHOLE if any(map(places.has, _WHOLE)) else _READERS
    best = places.cheapest(whole)
    return None if best is None else Aggregated(best, why)
