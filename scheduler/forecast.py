"""One engine's work as whoever sends it requests knows it, and what a request would meet there.

The owner reports events in its own seconds: a prompt was sent, its first token came, an answer ended. From them follow
the time to the first token of one more prompt, the time per token of what runs, and what the engine's steps cost.
"""

from dataclasses import dataclass, field
from itertools import islice, takewhile
from math import erf, exp, hypot, inf, sqrt
from typing import Final, NamedTuple

from scheduler.step_cost import LinearFit, StepCost, pairs_of
from scheduler.step_limit import LONGEST_LATE, LONGEST_STEP, least_pace_s

MEMORY_S: Final = 30.0  # how far back what is asked, and an engine's habit to read prompts, is looked at
_TPOT_ERROR: Final = 0.05  # of a predicted time per token, one standard deviation
_MOST_SHARE: Final = 0.9  # of its time, that an engine is ever taken to spend on prompts
_FULL: Final = 0.9  # of the KV cache
_LONG_STEPS: Final = 64  # an answer of as many tokens or more says how long a step takes; a shorter one says it roughly
_SHORTEST_S: Final = 1e-3  # first tokens that come closer together were made by one step
_CERTAINLY_LIMITED: Final = 1.05  # times as many steps as the engine's chunks make necessary
_LEARN: Final = 0.05  # of what an observation says about the longest steps
_KEPT: Final = 0.98  # of what was seen of waits for memory, at each one
_WAITS_ASSUMED_S: Final = 1.0  # of waits for memory that were typical, before any was seen
_MOST_WAITS: Final = 8.0  # times a typical wait: who waited for longer did not do so for memory alone
_LOOKED_AT: Final = 16  # answers of an engine; of more, each k-th
LEAST_ROOM: Final = 0.05  # of a limit: what an answer is taken to have left where steps alone take longer


class Reading(NamedTuple):
    """Of prompts: tokens to compute, and pairs of these and of tokens before them."""

    tokens: float = 0.0
    pairs: float = 0.0

    def plus(self, other: "Reading", times: float = 1.0) -> "Reading":
        return Reading(self.tokens + times * other.tokens, self.pairs + times * other.pairs)

    def since(self, earlier: "Reading") -> "Reading":
        """What has come on top; not below nothing, for what was begun may have been given up."""
        return Reading(max(0.0, self.tokens - earlier.tokens), max(0.0, self.pairs - earlier.pairs))

    @classmethod
    def of(cls, tokens: float, cached_tokens: float = 0.0) -> "Reading":
        return cls(tokens, pairs_of(tokens, cached_tokens))


@dataclass(slots=True, eq=False)
class Stay:
    """What a forecast notes of one request's answers, from `expects` to `ended`.

    context_tokens: of its prompt and half of its answer, once for each of `answers`. tpot_limit_s: objective for each.
    due_at: when its first token is expected. comes_at: when its prompt is expected to have been read. began_at: when
    the first token came that was made here, None before.
    queued: all prompts that were sent to the engine up to its own; None if its own is read elsewhere. waited_s: from a
    first token that was passed on to `began_at`.
    read, sequences, contexts, fetched: the engine's sums when it began.
    """

    context_tokens: float
    answers: int = 1
    tpot_limit_s: float = inf
    due_at: float = 0.0
    comes_at: float = 0.0
    began_at: float | None = None
    queued: Reading | None = None
    waited_s: float = 0.0
    read: Reading = Reading()
    sequences: float = 0.0
    contexts: float = 0.0
    fetched: float = 0.0


class Pace(NamedTuple):
    """Seconds per token of an answer: what is expected, and by how much it may deviate (one standard deviation)."""

    tpot_s: float
    deviation_s: float

    def late(self, limit_s: float) -> float:
        """The probability that the answer takes more per token."""
        if limit_s == inf:
            return 0.0
        return normal_below((self.tpot_s - limit_s) / hypot(self.deviation_s, _TPOT_ERROR * limit_s))


def normal_below(deviations: float) -> float:
    """The probability that a normal variable is below so many standard deviations."""
    return 0.5 * (1.0 + erf(deviations / sqrt(2.0)))


class Misses(NamedTuple):
    """Answers of an engine that are expected to miss their limits if it also reads a prompt, writes an answer, or does
    both, and would not miss them otherwise."""

    reading: float
    writing: float
    both: float


@dataclass(slots=True, eq=False)
class Fleet:
    """What all engines of a model have shown together. longest_step: how long a step with prompts and answers takes at
    most, in times per token that these answers may take. memory_waits: how long requests wait for memory, as a multiple
    of what typical answers would make them wait: long ones hold more of it, and longer.
    """

    costs: LinearFit = field(default_factory=lambda: StepCost.fit(StepCost()))
    longest_step: float = LONGEST_STEP
    memory_waits: float = 1.0
    _waited_s: float = 0.0
    _typical_s: float = 0.0

    @property
    def cost(self) -> StepCost:
        """Of a step, at an engine like the others."""
        return StepCost.of(self.costs)

    def learn_longest(self, step: float) -> None:
        """One was seen."""
        self.longest_step += _LEARN * (min(LONGEST_LATE, max(1.0, step)) - self.longest_step)

    def learn_memory_wait(self, waited_s: float, typical_s: float) -> None:
        """A request waited for memory, where typical answers would have made it wait for `typical_s`."""
        self._waited_s = _KEPT * self._waited_s + min(waited_s, _MOST_WAITS * typical_s)
        self._typical_s = _KEPT * self._typical_s + typical_s
        self.memory_waits = (_WAITS_ASSUMED_S + self._waited_s) / (_WAITS_ASSUMED_S + self._typical_s)


class EngineForecast:
    """One engine.

    chunk_tokens: most tokens of one step (vLLM's max_num_batched_tokens). kv_tokens: that its KV cache holds. fleet:
    of all engines of the model, for what this one has not shown: one that only writes answers shows little of what
    prompts cost.
    limits_steps: beside answers with a limit it reads prompts in smaller pieces (`StepLimit`).
    running, coming: answers that are being written, and those whose prompts are still to be read or fetched.
    others: answers that run here for others than the owner.
    """

    def __init__(
        self,
        *,
        chunk_tokens: int = 2048,
        kv_tokens: float = inf,
        assumed: StepCost = StepCost(),  # noqa: B008
        fleet: Fleet | None = None,
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self.kv_tokens = kv_tokens
        self.cost = assumed
        self._fleet = fleet or Fleet(StepCost.fit(assumed))
        self._fit = StepCost.fit(assumed, self._fleet.costs)
        self._taken: tuple[float, ...] = ()
        self.limits_steps = False
        self.others = 0
        self.running = 0
        self.coming = 0
        self._limited: dict[Stay, None] = {}  # of those that run or will, the ones with a limit
        self._running_context = 0.0
        self._coming_context = 0.0
        self._in_line_context = 0.0  # of it, what those need that are at the engine already
        self._on_the_way: dict[Stay, None] = {}  # of those that will run, the ones whose prompt is read elsewhere
        self._unread: dict[object, Reading] = {}
        self._silent: set[object] = set()  # of these, prompts whose first token nobody will see
        self._all_unread = Reading()
        self._reading_since = 0.0
        self._read_at_once = Reading()
        self._stall_s = self._stall_at = 0.0
        self._share = self._share_at = 0.0
        self.sent = self._read = Reading()  # of all prompts that were ever sent or read here
        self._begun_memo: tuple[float, Reading] | None = None
        self._fetched_tokens = 0.0
        self._sequence_s = self._context_s = self._summed_at = 0.0  # integrals over time of what runs
        self._running_limited = (0.0, 0.0)  # of those that run, the ones with a limit, and the sum of their limits

    # What happens

    def sends_prompt(
        self, key: object, tokens: int, now: float, life_s: float, *, cached_tokens: int = 0, silent: bool = False
    ) -> None:
        """A prompt is sent here of which so many tokens are to be computed. life_s: of a typical answer.

        cached_tokens: those before them.
        silent: nobody will say when it has been read: it is taken to be once the one behind it is, or the time is up.
        """
        if not self._unread:
            self._reading_since = now
        prompt = self._unread[key] = Reading.of(tokens, cached_tokens)
        if silent:
            self._silent.add(key)
        self._all_unread = self._all_unread.plus(prompt)
        self.sent = self.sent.plus(prompt)
        self._begun_memo = None
        seconds = self.cost.prompt_s(*prompt)
        self._stall_s = self._recent_stall_s(now, life_s) + seconds
        self._stall_at = now
        self._share = self.read_share(now) + seconds / MEMORY_S
        self._share_at = now

    def has_read(self, key: object, now: float, *, learn: bool = True, was_read: bool = False) -> None:
        """Its first token came; or, without `learn`, nobody will see it. Nothing if it was read before.

        was_read: where nobody saw it, the request was answered all the same.
        """
        if key not in self._unread:
            return
        unseen = list(takewhile(lambda before: before is not key, self._unread)) if learn and self._silent else []
        prompt = self._drop(key)
        if not learn:
            self._read = self._read.plus(prompt) if was_read else self._read
            return
        for before in unseen:
            if before in self._silent:
                prompt = prompt.plus(self._drop(before))
        self._read = self._read.plus(prompt)
        at_once = self._read_at_once = self._read_at_once.plus(prompt)
        elapsed_s = now - self._reading_since
        if elapsed_s < _SHORTEST_S:
            return
        if self._running_context + self._coming_context > _FULL * self.kv_tokens:  # it may have waited for memory
            self._reading_since, self._read_at_once = now, Reading()
            return
        if not self._learn_limit(elapsed_s, at_once):
            steps = max(1.0, self._chunks(at_once) if self.running else -(-at_once.tokens // self.chunk_tokens))
            sequences, context = steps * self.running, steps * self._running_context
            self._learn(elapsed_s, (steps, at_once.tokens, sequences, context, 0.0, at_once.pairs))
        self._reading_since = now
        self._read_at_once = Reading()

    def _learn_limit(self, elapsed_s: float, prompts: Reading) -> bool:
        """Where answers made the steps smaller, nobody knows how many there were: that tells how long the longest ones
        are, and nothing of what prompts cost. Whether it was so."""
        limited, limits_s = self._running_limited
        if not limited:
            return False
        step_s, prompts_s = self._step_s(), self.cost.prompt_s(*prompts)
        if self._steps(prompts, step_s) <= _CERTAINLY_LIMITED * max(1.0, self._chunks(prompts)):
            return False
        steps = max(1.0, (elapsed_s - prompts_s) / step_s)
        self._fleet.learn_longest((prompts_s / steps + step_s) * limited / limits_s)
        return True

    def _drop(self, key: object) -> Reading:
        prompt = self._unread.pop(key)
        self._all_unread = self._all_unread.plus(prompt, -1.0) if self._unread else Reading()
        self._silent.discard(key)
        self._begun_memo = None
        return prompt

    def expects(
        self,
        context_tokens: float,
        answers: int = 1,
        tpot_limit_s: float = inf,
        *,
        due_at: float = 0.0,
        comes_at: float = 0.0,
    ) -> Stay:
        """A request's answers will be written here, from `due_at` on. context_tokens: of all of them. comes_at: when
        its prompt will have been read."""
        self.coming += answers
        self._coming_context += context_tokens
        stay = Stay(context_tokens, answers, tpot_limit_s, due_at, comes_at)
        self._on_the_way[stay] = None
        if tpot_limit_s < inf:
            self._limited[stay] = None
        return stay

    def reads_itself(self, stay: Stay) -> None:
        """The prompt before these answers, which was sent just now, is read here too."""
        stay.queued = self.sent
        self.stands_in_line(stay)

    def stands_in_line(self, stay: Stay) -> None:
        """The engine has the request: who comes after it waits behind it for memory."""
        if stay in self._on_the_way:
            del self._on_the_way[stay]
            self._in_line_context += stay.context_tokens

    def begins(self, stay: Stay, now: float, *, fetched_tokens: int = 0) -> None:
        """The first token that was made here came. Nothing if it has begun before. fetched_tokens: of its prompt, from
        another engine."""
        if stay.began_at is not None:
            return
        self._sum(now)
        self._begun_memo = None
        self._fetched_tokens += fetched_tokens
        self._leaves_line(stay)
        self.running += stay.answers
        self._running_context += stay.context_tokens
        self._count_limited(stay, stay.answers)
        stay.began_at, stay.read, stay.fetched = now, self._computed(now), self._fetched_tokens
        stay.sequences, stay.contexts = self._sequence_s, self._context_s

    def ended(self, stay: Stay, now: float, last_at: float = 0.0, tokens: int = 0) -> None:
        """It is over. last_at, tokens: when its last token came and how many there were, where that is known."""
        self._limited.pop(stay, None)
        if stay.began_at is None:
            self._leaves_line(stay)
            return
        self._sum(now)
        self._begun_memo = None
        self.running -= stay.answers
        self._running_context -= stay.context_tokens
        self._count_limited(stay, -stay.answers)
        seconds, stayed_s = last_at - stay.began_at, now - stay.began_at
        if tokens > 4 and seconds > 0.0:
            steps = tokens - 1
            per_s = steps / stayed_s
            read = self._computed(now).since(stay.read)
            self._learn(
                seconds,
                (
                    steps,
                    read.tokens,
                    (self._sequence_s - stay.sequences) * per_s,
                    (self._context_s - stay.contexts) * per_s,
                    self._fetched_tokens - stay.fetched,
                    read.pairs,
                ),
                min(1.0, steps / _LONG_STEPS),
            )

    def _leaves_line(self, stay: Stay) -> None:
        self.coming -= stay.answers
        self._coming_context -= stay.context_tokens
        if stay in self._on_the_way:
            del self._on_the_way[stay]
        else:
            self._in_line_context -= stay.context_tokens

    def _count_limited(self, stay: Stay, more: int) -> None:
        if stay.tpot_limit_s < inf:
            answers, limits_s = self._running_limited
            left = answers + more
            self._running_limited = (left, limits_s + more * stay.tpot_limit_s) if left else (0.0, 0.0)

    def _learn(self, seconds: float, row: tuple[float, ...], weight: float = 1.0) -> None:
        self._fleet.costs.learn(seconds, row, weight)
        if self._fit.learn(seconds, row, weight):
            self._take(self._fit)

    def _take(self, fit: LinearFit) -> None:
        self._taken = fit.coefficients
        self.cost = StepCost.of(fit)
        self._begun_memo = None

    def look_around(self) -> None:
        """As long as nothing was seen here, the engine is taken to be as the others of its fleet."""
        costs = self._fleet.costs
        if not self._fit.seen and self._taken is not costs.coefficients:
            self._take(costs)

    def _sum(self, now: float) -> None:
        elapsed_s = now - self._summed_at
        self._sequence_s += self.running * elapsed_s
        self._context_s += self._running_context * elapsed_s
        self._summed_at = now

    # What would be

    @property
    def answers(self) -> int:
        """That run here or will."""
        return self.running + self.coming

    def unread(self, now: float) -> Reading:
        """Of the prompts here, what is still to be computed; what has been done of the first is estimated from the
        time."""
        return self._all_unread.plus(self._begun(now), -1.0)

    def _begun(self, now: float) -> Reading:
        """Of the prompt that is being read, what is computed by now."""
        if not self._unread:
            return Reading()
        if self._begun_memo is not None and self._begun_memo[0] == now:
            return self._begun_memo[1]
        tokens = pairs = 0.0
        for key, prompt in self._unread.items():
            tokens += prompt.tokens
            pairs += prompt.pairs
            if key not in self._silent:
                break
        whole_s = self._read_s(Reading(tokens, pairs))
        share = min(1.0, (now - self._reading_since) / whole_s) if whole_s > 0.0 else 0.0
        begun = Reading(share * tokens, share * pairs)
        self._begun_memo = now, begun
        return begun

    def _computed(self, now: float) -> Reading:
        """Of prompts, what was ever computed here."""
        return self._read.plus(self._begun(now))

    def _step_s(self) -> float:
        """Of a step that reads no prompt, beside what runs now."""
        return self.cost.decode_s(self.running + self.others, self._running_context)

    def _read_s(self, prompts: Reading) -> float:
        """To compute so much of prompts beside the answers that run."""
        step_s = self._step_s()
        return self.cost.prompt_s(*prompts) + self._steps(prompts, step_s) * step_s

    def _chunks(self, prompts: Reading) -> float:
        return prompts.tokens / max(1.0, self.chunk_tokens - self.running)

    def _steps(self, prompts: Reading, step_s: float) -> float:
        """In which so much is computed: more of them where they may not be long, for the sake of the answers in them.

        They come in pieces of whatever size, so parts of a step count as such.
        """
        steps = self._chunks(prompts)
        limited, limits_s = self._running_limited
        if not (self.limits_steps and limited):
            return steps
        tpot_s = limits_s / limited
        if tpot_s < least_pace_s(step_s):  # then steps have no limit
            return steps
        return max(steps, self.cost.prompt_s(*prompts) / (self._fleet.longest_step * tpot_s - step_s))

    def first_token_s(self, prompt: Reading, now: float) -> float:
        """Until a prompt that is sent now, and of which so much is to be computed, has been read."""
        step_s = self._step_s()
        # Of the step that runs, half is left; the last chunk is not full, but its step costs as much beside it.
        rest_s = 0.5 * step_s if self.running else 0.0
        return rest_s + self._read_s(self.unread(now)) + max(self._read_s(prompt), step_s + self.cost.prompt_s(*prompt))

    def memory_wait_s(self, tokens: float, life_s: float, *, comes_at: float = -inf) -> float:
        """Until so many tokens of KV are free. The engine gives memory in order of arrival.

        life_s: of a typical answer.
        comes_at: when the request's prompt has been read elsewhere: it is behind those that come before it.
        """
        return self.typical_memory_wait_s(tokens, life_s, comes_at=comes_at) * self._fleet.memory_waits

    def typical_memory_wait_s(self, tokens: float, life_s: float, *, comes_at: float = -inf) -> float:
        """The same if answers were typical: as much comes free in the life of one as all of them hold."""
        if self._running_context + self._coming_context + tokens <= self.kv_tokens:
            return 0.0
        held = self._running_context + self._in_line_context
        if comes_at > -inf:
            held += sum(stay.context_tokens for stay in self._on_the_way if stay.comes_at <= comes_at)
        missing = held + tokens - self.kv_tokens
        if missing <= 0.0 or held < 1.0:
            return 0.0
        return missing / min(held, self.kv_tokens) * life_s

    def learn_memory_wait(self, waited_s: float, typical_s: float) -> None:
        """As `Fleet.learn_memory_wait`."""
        self._fleet.learn_memory_wait(waited_s, typical_s)

    def read_share(self, now: float) -> float:
        """Of the last half minute or so, the share in which prompts were read here."""
        return self._share * exp((self._share_at - now) / MEMORY_S) if self._share else 0.0

    def _recent_stall_s(self, now: float, life_s: float) -> float:
        return self._stall_s * exp((self._stall_at - now) / life_s) if self._stall_s else 0.0

    def pace(
        self, output_tokens: float, prompt_s: float, now: float, *, more: int = 0, context_tokens: float = 0.0
    ) -> Pace:
        """Per token of an answer of `output_tokens` that runs here, if so much comes on top.

        Prompts hold answers up: those read within an answer's life, or as many as the engine's habit says, whichever
        is more, but none by more than a whole chunk for each token. They come at random, so the deviation is that of a
        Poisson process whose events take `prompt_s` each. more, context_tokens: answers that join, and their context.
        """
        cost = self.cost
        held = self._running_context + self._coming_context + context_tokens
        step_s = cost.decode_s(self.answers + self.others + more, held)
        life_s = step_s * output_tokens
        share = min(_MOST_SHARE, self.read_share(now))
        usual_s = life_s * share / (1.0 - share)
        stall_s = min(max(self._recent_stall_s(now, life_s), usual_s), self._chunk_s(self._all_unread) * output_tokens)
        return Pace(step_s + stall_s / output_tokens, (usual_s * prompt_s) ** 0.5 / output_tokens)

    def _chunk_s(self, prompts: Reading) -> float:
        """What the largest chunk of such prompts adds to a step."""
        tokens = max(1, self.chunk_tokens - self.running)
        before = max((each.pairs / each.tokens for each in (self._read, prompts) if each.tokens), default=tokens / 2)
        return self.cost.prompt_s(tokens, tokens * before)

    def misses(self, prompt: Reading, context_tokens: float, left: float, now: float) -> Misses:
        """What one more prompt with so much to compute, and one more answer with so much context, do to the answers
        that run here.

        Each is judged by how it stands: by the tokens that it has, as far as time tells, and by what has held it up.
        One that will be late anyway has nothing to lose, and one that has got far can wait. One that is still to begin
        is held up by the prompts behind its own, or by what is not read when it comes from elsewhere. How long they
        will be is not known: the tokens that are left are exponential, `left` in the mean.
        """
        if not self._limited:
            return Misses(0.0, 0.0, 0.0)
        cost = self.cost
        held = self._running_context + self._coming_context
        step_s = cost.decode_s(self.answers + self.others, held)
        slower_s = cost.sequence_s + cost.context_token_s * context_tokens  # each step, with one more answer
        unread, computed = self.unread(now), self._computed(now)
        queue_s, read_s = cost.prompt_s(*unread), cost.prompt_s(*prompt)
        chunk_s = self._chunk_s(unread.plus(prompt))
        crowded = left / (self.answers + 1)  # tokens until one of them has ended
        each = -(-len(self._limited) // _LOOKED_AT)
        reading = writing = both = 0.0
        for stay in islice(self._limited, 0, None, each):
            least_s = LEAST_ROOM * stay.tpot_limit_s
            room_s = max(least_s, stay.tpot_limit_s - step_s)
            less_room_s = max(least_s, room_s - slower_s)
            slow_s = (slower_s - (room_s - less_room_s)) * crowded  # what there is no room for
            behind_s, ahead_s, with_it_s = 0.0, queue_s, queue_s + read_s
            if stay.began_at is None:
                ahead_s, with_it_s = self._held_up(stay, queue_s, read_s, now)
            else:
                stalled_s = cost.prompt_s(*computed.since(stay.read))
                behind_s = stay.waited_s + stalled_s - room_s * max(0.0, now - stay.began_at - stalled_s) / step_s
            if behind_s + with_it_s + slow_s <= 0.0:
                continue
            before = late(behind_s, ahead_s, room_s, chunk_s, left)
            answers = stay.answers * each
            reading += answers * (late(behind_s, with_it_s, room_s, chunk_s, left) - before)
            writing += answers * (late(behind_s, ahead_s + slow_s, less_room_s, chunk_s, left) - before)
            both += answers * (late(behind_s, with_it_s + slow_s, less_room_s, chunk_s, left) - before)
        return Misses(reading, writing, both)

    def _held_up(self, stay: Stay, queue_s: float, read_s: float, now: float) -> tuple[float, float]:
        """Seconds for which an answer that is still to begin will be held up by what is to be read here, and with a
        prompt of `read_s` more."""
        if stay.queued is not None:
            ahead_s = min(queue_s, self.cost.prompt_s(*self.sent.since(stay.queued)))
            return ahead_s, ahead_s + read_s
        until_s = max(0.0, stay.due_at - now)
        return max(0.0, queue_s - until_s), max(0.0, queue_s + read_s - until_s)


def late(behind_s: float, stall_s: float, room_s: float, chunk_s: float, left: float) -> float:
    """The probability that an answer misses its limit.

    behind_s: what has held it up, less what it was allowed until now. stall_s: what will hold it up, by `chunk_s` per
    token at most. room_s: what it is allowed for each token that is left. left: their number in the mean; it is taken
    to be exponential.
    """
    most = (behind_s + stall_s) / room_s  # with more tokens left than these it makes up for everything
    if most <= 0.0:
        return 0.0
    if chunk_s <= room_s:  # it loses nothing any more
        if behind_s <= 0.0:
            return 0.0
        if chunk_s < room_s:
            most = min(most, behind_s / (room_s - chunk_s))
        return 1.0 - exp(-most / left)
    least = max(0.0, -behind_s / (chunk_s - room_s))  # with fewer it ends before it is behind
    return max(0.0, exp(-least / left) - exp(-most / left))
