"""Ways to run a batch beside interactive requests in one engine, on a clock that only the engine's work moves."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from loadtest.bench.table import quantile
from loadtest.call import TraceCall

BACKLOG = 32  # requests of a batch that wait in the engine
DRAIN_S = 600.0  # for interactive requests that are not answered when the last has come


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a batch beside others. people, batch: what there is of the two.

    policy: of our scheduler, None for stock vLLM; priority: vLLM's own scheduling by priority. cap: most requests of
    the batch at a time, waiting ones included; None: as many as find room, and a backlog. share: the gateway's line
    stands before the engine, and gives flex so much of the slots (`tiers.flex_share`).
    """

    name: str
    policy: str | None = None
    priority: bool = False
    people: bool = True
    batch: bool = True
    cap: int | None = None
    share: float | None = None


ALONE = Way("interactive alone", batch=False)
OURS_ALONE = Way("interactive alone, our scheduler", policy="fcfs", batch=False)
BATCH_ONLY = Way("batch alone, stock vLLM", people=False)
TIERS = Way("service tiers", policy="fcfs")
PRIORITY = Way("vLLM `priority`", priority=True)


def behind_gateway(share: float) -> Way:
    """Lines of the Batch API, over an engine without our scheduler."""
    return Way(f"gateway over stock vLLM, flex_share {share:g}", share=share)


def capped(cap: int) -> Way:
    """So many of the batch at a time, which is what a client can do without any help."""
    return Way(f"vLLM, {cap} of the batch at a time", cap=cap)


class Made(NamedTuple):
    """What one step made for one request."""

    name: str
    tokens: int
    over: bool


class WorkEngine(Protocol):
    """An engine that is stepped."""

    count: "StepCount"

    def now(self) -> float: ...
    def skip_to(self, at_s: float) -> None:
        """Nothing happens until then."""

    def add(self, call: TraceCall, *, flex: bool) -> None: ...
    def step(self) -> list[Made]: ...
    def is_busy(self) -> bool: ...
    def waiting(self) -> int:
        """Requests without a slot."""


class StepCount:
    """What the steps of a scheduler compute. flex: names of the batch's requests. prompt_tokens, sequences, context: of
    the last step. computed, again: tokens of the batch in all, and those that had been computed before."""

    def __init__(self, scheduler: Any) -> None:
        self.flex: set[str] = set()
        self.prompt_tokens = self.sequences = self.context = 0
        self.computed = self.again = 0
        self._reached: dict[str, int] = {}
        self._scheduler = scheduler
        self._schedule = scheduler.schedule
        scheduler.schedule = self._counted

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self.prompt_tokens = self.sequences = self.context = 0
        for name, tokens in output.num_scheduled_tokens.items():
            live = self._scheduler.requests[name]
            end = live.num_computed_tokens  # the scheduler has already moved it on
            if tokens == 1 and live.num_output_tokens:
                self.sequences += 1
                self.context += end
            else:
                self.prompt_tokens += tokens
            if name in self.flex:
                reached = self._reached.get(name, 0)
                self.computed += tokens
                self.again += max(0, min(end, reached) - (end - tokens))
                self._reached[name] = max(end, reached)
        return output

    def forget(self, name: str) -> None:
        """The request is over."""
        self.flex.discard(name)
        self._reached.pop(name, None)


@dataclass(slots=True)
class Sent:
    """One interactive request. at: when each of its tokens came."""

    due_s: float
    at: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. firsts, gaps: seconds of the interactive requests to the first token, and between two tokens.
    people_tokens, batch_tokens: output tokens within `seconds`. again: share of the batch's computed tokens that had
    been computed before."""

    firsts: Sequence[float]
    gaps: Sequence[float]
    people_tokens: int
    batch_tokens: int
    seconds: float
    again: float

    @property
    def ttft_p99_s(self) -> float:
        return quantile(self.firsts, 0.99) if self.firsts else 0.0

    @property
    def gap_p99_s(self) -> float:
        return quantile(self.gaps, 0.99) if self.gaps else 0.0

    @property
    def people_per_s(self) -> float:
        return self.people_tokens / self.seconds

    @property
    def batch_per_s(self) -> float:
        return self.batch_tokens / self.seconds


def outcome_of(
    people: Sequence[Sent], people_tokens: int, batch_tokens: int, seconds: float, count: "StepCount", now: float
) -> Outcome:
    """Of a run that ends now. A request without a token has waited for one until now."""
    firsts = [(sent.at[0] if sent.at else now) - sent.due_s for sent in people]
    gaps = [b - a for sent in people for a, b in zip(sent.at, sent.at[1:], strict=False)]
    again = count.again / count.computed if count.computed else 0.0
    return Outcome(firsts, gaps, people_tokens, batch_tokens, seconds, again)


class Scenario:
    """One way over one list of arrivals and endless jobs. Tokens count for `seconds`; then the interactive requests
    that are left are waited for beside the batch, so that none is left out because it was slow."""

    def __init__(
        self, engine: WorkEngine, way: Way, people: Sequence[TraceCall], jobs: Iterable[TraceCall], seconds: float
    ) -> None:
        self.engine = engine
        self.way = way
        self.seconds = seconds
        self.coming = deque(people if way.people else ())
        self.jobs = _renamed(jobs)
        self.people: dict[str, Sent] = {}
        self.unanswered = 0
        self.held = 0  # of the batch
        self.people_tokens = self.batch_tokens = 0

    def run(self) -> Outcome:
        engine, begun = self.engine, self.engine.now()
        while self._goes_on(engine.now() - begun):
            self._feed(begun)
            if not engine.is_busy():
                engine.skip_to(begun + (self.coming[0].at_s if self.coming else self.seconds))
                continue
            for made in engine.step():
                self._take(made, within=engine.now() - begun <= self.seconds)
        return self._outcome()

    def _goes_on(self, past_s: float) -> bool:
        return past_s < self.seconds or (past_s < self.seconds + DRAIN_S and bool(self.unanswered or self.coming))

    def _feed(self, begun: float) -> None:
        """What has arrived by now; and of the batch as much as keeps the engine supplied."""
        while self.coming and begun + self.coming[0].at_s <= self.engine.now():
            call = self.coming.popleft()
            self.people[call.id] = Sent(begun + call.at_s)
            self.unanswered += 1
            self.engine.add(call, flex=False)
        while self.way.batch and self._wants_more():
            call = next(self.jobs)
            self.held += 1
            self.engine.count.flex.add(call.id)
            self.engine.add(call, flex=True)

    def _wants_more(self) -> bool:
        return self.engine.waiting() < BACKLOG if self.way.cap is None else self.held < self.way.cap

    def _take(self, made: Made, *, within: bool) -> None:
        sent = self.people.get(made.name)
        if sent is None:
            self.batch_tokens += made.tokens if within else 0
            if made.over:
                self.held -= 1
                self.engine.count.forget(made.name)
            return
        self.people_tokens += made.tokens if within else 0
        sent.at.extend([self.engine.now()] * made.tokens)
        self.unanswered -= made.over

    def _outcome(self) -> Outcome:
        people, engine = list(self.people.values()), self.engine
        return outcome_of(people, self.people_tokens, self.batch_tokens, self.seconds, engine.count, engine.now())


def _renamed(calls: Iterable[TraceCall]) -> Iterator[TraceCall]:
    for number, call in enumerate(calls):
        yield replace(call, id=f"batch-{number}")
