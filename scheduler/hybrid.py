"""Prompts and answers over engines that all do both: placement by prediction, and what it learns from how it went.

One implementation for the gateway and the simulator. Whoever owns the engines asks `Planner.place` where a request
goes, and tells the `Visit` that results what happens to it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from typing import Final

from scheduler.forecast import EngineForecast, Fleet, Stay
from scheduler.objectives import Objectives
from scheduler.pools import TYPICAL_TOKENS, Pool, WorkerLoad
from scheduler.prediction import Asked, Choice, HandOver, Prospect, choose, is_passed_on, pace_there
from scheduler.sides import Offering, Sides, best_sides
from scheduler.step_cost import LinearFit
from scheduler.workers import Role

LOOKS: Final = 4  # workers of each pool that are considered, least loaded first; as many on either side
_MOST_LOOKS: Final = 4 * LOOKS  # for which a pool is asked, in case that most are on one side
_MEMORY: Final = 500  # requests
_ASSUMED_HANDOVER: Final = HandOver((0.01, 1e-6), (0.005, 1e-7))
_NOBODY: Final = (inf, 0)  # behind all engines
_RANKS: Final = {Role.DECODE: 0.0, Role.BOTH: 1.0, Role.PREFILL: 2.0}


@dataclass(slots=True, eq=False)
class Visit:
    """One request at the engines that read its prompt and write its answer; the same one where it is not split.

    Tell it what happens, in this order or less: `read`, `begins`, `goes_on`, each once or more, and `over` once.
    asked: as it was placed. silent: its first token will not be seen, for it is answered in one piece or goes on with a
    stream. ttft_s: as predicted.
    can_pass_on: the writer can give out the first token that the reader made, before it has the KV. passes_on: it will;
    settled by `read`. goes_as_planned: that was not changed. memory_s: for how long typical answers would have made it
    wait for memory when its prompt had been read elsewhere. first_at: when its first token came.
    """

    reader: WorkerLoad
    writer: WorkerLoad
    planner: "Planner"
    asked: Asked
    ttft_s: float
    sent_at: float
    stay: Stay
    can_pass_on: bool = False
    passes_on: bool = False
    goes_as_planned: bool = True
    read_at: float | None = None
    memory_s: float = 0.0
    first_at: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.asked.prompt_tokens

    @property
    def silent(self) -> bool:
        return self.asked.silent

    @property
    def split(self) -> bool:
        return self.reader is not self.writer

    def read(self, now: float) -> None:
        """The reader has read the prompt."""
        if self.read_at is None:
            self.read_at = now
            self._at(self.reader).has_read(self, now)
            if self.split:
                self._arrives(now)

    def _arrives(self, now: float) -> None:
        """The writer is asked, the prompt having been read elsewhere."""
        asked, writer = self.asked, self._at(self.writer)
        writer.stands_in_line(self.stay)
        pace = pace_there(asked, writer, now)
        self.memory_s = writer.typical_memory_wait_s(0.0, asked.typical_life_s(pace))
        if self.can_pass_on and self.first_at is None and not self.silent:
            planned, elapsed_s = self.passes_on, now - self.sent_at
            self.passes_on = is_passed_on(asked, elapsed_s, writer, pace, self.planner.handover, now)
            self.goes_as_planned = self.passes_on == planned

    def gave_up(self, now: float) -> None:
        """The reader will not read the prompt: the writer does."""
        if self.split and self.read_at is None:
            self._at(self.reader).has_read(self, now, learn=False)
            writes = self._at(self.writer)
            writes.sends_prompt(self, self.prompt_tokens, now, self.planner.life_s, silent=self.silent)
            writes.reads_itself(self.stay)
            self.reader, self.can_pass_on, self.passes_on = self.writer, False, False

    def begins(self, now: float) -> None:
        """The answer's first token came."""
        if self.silent or self.first_at is not None:
            return
        self.first_at = now
        self._learn_way(self.planner.passed_on if self.passes_on else self.planner.fetched, now)
        self.read(now)
        if not self.passes_on:
            self._runs(now)
        if self.goes_as_planned:
            self.planner.note_error(self.ttft_s / max(1e-6, now - self.sent_at))

    def goes_on(self, now: float) -> None:
        """Its second token came: if the first was passed on, this is the first that the writer made."""
        if self.passes_on and self.first_at is not None and self.stay.began_at is None:
            self._learn_way(self.planner.fetched, now)
            self.stay.waited_s = now - self.first_at
            self._runs(now)

    def _learn_way(self, fit: LinearFit, now: float) -> None:
        if self.split and self.read_at is not None:
            seconds, planner = now - self.read_at, self.planner
            waited_s = seconds - planner.handover.fetched_s(self.prompt_tokens)
            if fit is planner.fetched and self.memory_s and waited_s > 0.0:
                self._at(self.writer).learn_memory_wait(waited_s, self.memory_s)
            else:
                fit.learn(seconds, (1.0, float(self.prompt_tokens)))

    def _runs(self, now: float) -> None:
        self._at(self.writer).begins(self.stay, now, fetched_tokens=self.prompt_tokens if self.split else 0)

    def over(self, now: float, last_at: float = 0.0, tokens: int = 0) -> None:
        """The request is over. last_at, tokens: of a stream, when its last token came and how many there were."""
        if self.read_at is None:
            self._at(self.reader).has_read(self, now, learn=False, was_read=tokens > 0)
        written = 0 if self.silent else tokens - self.passes_on
        self._at(self.writer).ended(self.stay, now, last_at, written)
        if tokens:
            self.planner.learn(self.prompt_tokens, tokens / self.stay.answers)

    @staticmethod
    def _at(load: WorkerLoad) -> EngineForecast:
        assert load.forecast is not None  # it was placed there by its forecast
        return load.forecast


@dataclass(slots=True)
class Planner:
    """Places one model's requests.

    note_error: is told predicted ÷ actual time to first token of each request. life_s: of a typical answer.
    prompt_tokens, output_tokens: of a request, in the mean over the last `_MEMORY` or so. Lengths have long tails, and
    what a stall costs per token follows from them: a shorter memory makes the choices restless.
    fleet: what its engines have shown together. sharers: owners that ask them for as much each, this one included.
    offering: what this one asks of them.
    fetched, passed_on: what `HandOver` says, as it was.
    """

    note_error: Callable[[float], None]
    life_s: float = 5.0
    prompt_tokens: float = TYPICAL_TOKENS / 2
    output_tokens: float = TYPICAL_TOKENS / 2
    learned: int = 0
    sharers: Callable[[], int] = lambda: 1
    offering: Offering = field(default_factory=Offering)
    fleet: Fleet = field(default_factory=Fleet)
    fetched: LinearFit = field(default_factory=lambda: LinearFit(_ASSUMED_HANDOVER.fetched))
    passed_on: LinearFit = field(default_factory=lambda: LinearFit(_ASSUMED_HANDOVER.passed_on))
    _order: list[WorkerLoad] = field(default_factory=list)  # engines that can take sides, by `_rank`
    _order_of: tuple[tuple[Pool, int], ...] = ()

    @property
    def handover(self) -> HandOver:
        """As learned so far."""
        return HandOver(self.fetched.coefficients, self.passed_on.coefficients)

    def learn(self, prompt_tokens: int, output_tokens: float) -> None:
        """A request is over."""
        self.learned += 1
        share = max(1.0 / (self.learned + 1), 1.0 / _MEMORY)
        self.prompt_tokens += share * (prompt_tokens - self.prompt_tokens)
        self.output_tokens += share * (output_tokens - self.output_tokens)

    def place(
        self, asked: Asked, pools: Sequence[Pool], known: Mapping[str, int], now: float, avoid: str = ""
    ) -> Visit | None:
        """Where a request goes, reserved in the forecasts; None if no worker has room.

        known: of its prompt, the tokens that a worker probably has cached, by the worker's id. avoid: a worker's id.
        """
        output_tokens = min(asked.output_tokens, self.output_tokens)
        asked = replace(
            asked,
            output_tokens=output_tokens,
            typical_prompt_tokens=self.prompt_tokens,
            typical_output_tokens=self.output_tokens,
        )
        sides, first_reader = self._sides(pools, asked.objectives)
        loads = sorted(self._considered(pools, known, avoid, first_reader), key=_rank)
        prospects = [
            self._prospect(load, at / len(loads), known, had_better_read=_rank(load) >= first_reader)
            for at, load in enumerate(loads)
        ]
        choice = choose(asked, prospects, self.handover, now, sides.worth)
        if choice is None:
            return None
        self.life_s = max(0.1, choice.tpot_s * asked.output_tokens)
        return self._reserved(asked, loads, prospects, choice, now)

    def _reserved(
        self, asked: Asked, loads: Sequence[WorkerLoad], prospects: Sequence[Prospect], choice: Choice, now: float
    ) -> Visit:
        reader, writer = loads[choice.reader], loads[choice.writer]
        reads, writes = prospects[choice.reader], prospects[choice.writer]
        stay = writes.forecast.expects(
            asked.context_tokens * asked.answers,
            asked.answers,
            asked.objectives.tpot_s,
            due_at=now + choice.ttft_s,
            comes_at=now + choice.read_s,
        )
        if asked.silent:
            writes.forecast.begins(stay, now)
        can_pass_on = reads.passes_on and writes.passes_on and reader is not writer and asked.output_tokens > 1
        visit = Visit(
            reader, writer, self, asked, choice.ttft_s, now, stay, can_pass_on=can_pass_on, passes_on=choice.passes_on
        )
        self.offering.note(reads.forecast.cost.prompt_s(*reads.prompt(asked)), asked.answers, now)
        silent, cached_tokens = asked.silent and not visit.split, reads.cached_tokens
        reads.forecast.sends_prompt(
            visit, reads.tokens(asked), now, self.life_s, cached_tokens=cached_tokens, silent=silent
        )
        if not visit.split:
            writes.forecast.reads_itself(stay)
        return visit

    def _sides(self, pools: Sequence[Pool], objectives: Objectives) -> tuple[Sides, tuple[float, int]]:
        """Of those engines that can take sides, and the place in their order of the first that had better only read."""
        known_of = tuple((pool, pool.changes) for pool in pools)
        if known_of != self._order_of:
            loads = (load for pool in pools for load in pool.workers.values())
            self._order = sorted((load for load in loads if load.worker.hands_over), key=_rank)
            self._order_of = known_of
        offered = self.offering.of(self.prompt_tokens, self.output_tokens, owners=self.sharers())
        if offered is None or not self._order:
            return Sides(), _NOBODY
        kv_tokens = self._order[0].kv_tokens  # the first one answers, whatever the sides
        sides = best_sides(offered, len(self._order), self.fleet.cost, objectives, kv_tokens)
        return sides, _rank(self._order[-sides.readers]) if sides.worth else _NOBODY

    @staticmethod
    def _considered(
        pools: Sequence[Pool], known: Mapping[str, int], avoid: str, first_reader: tuple[float, int]
    ) -> Iterator[WorkerLoad]:
        """The owners of the prompt's beginnings, and the least loaded of each pool, on either side."""
        seen: set[str] = {avoid}
        for pool in pools:
            for owner in known:
                load = pool.workers.get(owner)
                if load is not None and load.free > 0 and owner not in seen:
                    seen.add(owner)
                    yield load
            looks = [LOOKS, LOOKS] if first_reader < _NOBODY else [LOOKS, 0]
            for load in islice(pool.in_order(), _MOST_LOOKS):
                side = _rank(load) >= first_reader
                if looks[side] and load.worker.id not in seen:
                    seen.add(load.worker.id)
                    looks[side] -= 1
                    yield load
                if not any(looks):
                    break

    def _prospect(self, load: WorkerLoad, rank: float, known: Mapping[str, int], *, had_better_read: bool) -> Prospect:
        worker, role = load.worker, load.worker.role
        if load.forecast is None:
            load.forecast = EngineForecast(fleet=self.fleet)
        forecast = load.forecast
        forecast.look_around()
        forecast.chunk_tokens = worker.step_tokens
        forecast.kv_tokens = load.kv_tokens
        forecast.limits_steps = worker.plugin
        forecast.others = load.others
        either = worker.hands_over
        return Prospect(
            forecast,
            rank,
            known.get(worker.id, 0),
            reads=either or role is Role.PREFILL,
            fetches=either or role is Role.DECODE,
            whole=either or role is not Role.PREFILL,
            passes_on=worker.plugin,
            had_better_read=had_better_read,
        )


def _rank(load: WorkerLoad) -> tuple[float, int]:
    """Where answers are packed first: at workers that prefer them, then in the order of joining."""
    return _RANKS[load.worker.role], load.number
