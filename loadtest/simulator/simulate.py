"""A gateway's line and its workers in virtual time: the real policies, lanes and placement, the batch and cost model of
the fake engine, no clock, no network, no model. A discrete-event simulation, as Vidur's and SplitwiseSim's.

What it does not have: the gateway's and the network's own time. It knows how long an answer will be where the gateway
expects a typical one, and how full a worker's KV memory is counts only where prompts are read apart.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import accumulate
from math import inf
from typing import cast

from loadtest.call import IDLE_GAP, TRACE, TraceCall
from loadtest.records import Kept, Record, Sample
from loadtest.simulator.batch import ContinuousBatch, Iteration
from loadtest.simulator.costmodel import CostModel
from loadtest.traces.prompts import Prompts
from scheduler.catalog import build
from scheduler.hybrid import Planner, Visit
from scheduler.jobs import Job, Outcome
from scheduler.objectives import NO_OBJECTIVES, Objectives
from scheduler.placement import Aggregated, Disaggregated, Rules, place
from scheduler.policy import window_for
from scheduler.pools import Pools, WorkerLoad
from scheduler.prediction import Asked
from scheduler.routing import Affinity, Choice, TypicalRequest, block_beginnings
from scheduler.slack import StepModel
from scheduler.step_limit import StepLimit
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker

SAMPLE_S = 1.0
LONGEST_STRETCH = 64  # iterations in one event
_MODEL = ""
_MOST_PARTS = 1 << 10
_MOST_BLOCKS = 1 << 20  # of one prompt: keeps the ids of different calls apart


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated.

    workers: that answer. prefill_workers: others that only read prompts, as `rules` say when.
    gateway: a line before the workers, under the same policy; without one the first worker gets all.
    ahead: calls that the gateway gives a worker beyond its batch; None: as many as the policy wants.
    concurrency: a closed loop of so many calls, whose `at_s` is then not looked at.
    passes_on: by `rules`, the first token of a prompt that was read apart is given out before its KV has come.
    objectives: every worker may read and answer, by prediction, and bounds its steps by the answers in them;
        prefill_workers only prefer to read. None: `rules`.
    answer_chunk_tokens: of a step of those that prefer to answer then; None: as the cost model says.
    think: how long a conversation's turn waits after the answer before it, as `evenhand replay --think` says.
    """

    cost: CostModel
    policy: str = "fcfs"
    policy_options: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    prefill_workers: int = 0
    rules: Rules = Rules()
    passes_on: bool = True
    objectives: Objectives | None = None
    answer_chunk_tokens: int | None = None
    gateway: bool = True
    ahead: int | None = None
    concurrency: int | None = None
    think: str | float = TRACE


@dataclass(slots=True, eq=False)
class _Flight:
    """One call on its way. waits, runs, reads: the same request as the gateway's lanes, the engine's, and those of the
    worker that only reads its prompt see it; `reads` as long as it does. passed_on: its first token, if that worker
    made it. pending_tokens: counted at `worker`."""

    call: TraceCall
    due_s: float
    sent_s: float
    runs: Job
    waits: Job | None
    reads: Job | None = None
    worker: "_Worker | None" = None
    visit: Visit | None = None
    arrivals_s: list[float] = field(default_factory=list)
    uncharged: int = 0
    passed_on: int = 0
    pending_tokens: int = 0
    arriving_tokens: int = 0

    @property
    def left(self) -> int:
        """Output tokens to come."""
        return self.call.output_tokens - self.passed_on - self.runs.output_tokens

    def record(self, now: float) -> Record:
        call, arrivals = self.call, self.arrivals_s
        marks = [round((at - self.sent_s) * 1e6) for at in arrivals]
        return Record(
            id=call.id,
            tenant=call.tenant,
            due_s=round(self.due_s, 6),
            sent_s=round(self.sent_s, 6),
            e2e_s=round(now - self.sent_s, 6),
            prompt_tokens=call.prompt_tokens,
            output_tokens=len(arrivals),
            ttft_s=round(arrivals[0] - self.sent_s, 6),
            gaps_us=[later - earlier for earlier, later in zip(marks, marks[1:], strict=False)],
            asked_tokens=call.output_tokens,
            kind=call.kind,
            session=call.session,
            released_s=round(self.sent_s, 6) if self.sent_s > self.due_s else None,
            planned_tokens=call.prompt_tokens,
        )


@dataclass(slots=True, eq=False)
class _Stretch:
    """A steady iteration and those that repeat it. ends: when each ends; `done` of them are in the books."""

    iteration: Iteration
    ends: list[float]
    done: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """due: the number of the event that ends its iteration or its stretch; its events with other numbers are void."""

    load: WorkerLoad
    batch: ContinuousBatch
    busy: bool = False
    due: int = 0
    stretch: _Stretch | None = None


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of it: records as the client would have written them, samples of queue and memory, virtual seconds.

    prefix_hits: the share of all prompt tokens that were found in a worker's prefix cache.
    """

    kept: Kept
    samples: list[Sample]
    iterations: int
    prefix_hits: float = 0.0

    @property
    def records(self) -> list[Record]:
        """In the order in which they ended; of a very long run every n-th (`kept` says which)."""
        return self.kept.records


class Simulation:
    """One run.

    Iterations in which everybody decodes and nobody arrives or ends differ only in their length. They are simulated
    in stretches, one event for up to `longest_stretch` of them, and come out as they would one by one.
    """

    def __init__(
        self,
        plan: Plan,
        note: Callable[[Record], None] | None = None,
        *,
        longest_stretch: int = LONGEST_STRETCH,
        choice: type[Choice] = Choice,
    ) -> None:
        """note: called with each record as it ends. choice: how a worker is chosen, for comparison. ValueError for a
        policy or option that there is not."""
        self._longest_stretch = longest_stretch
        self._plan = plan
        self._choice = choice
        self._objectives = plan.objectives or NO_OBJECTIVES
        policy = build(plan.policy, plan.policy_options)
        self._line = TieredLanes(policy) if plan.gateway else None
        self._accounts = policy.shares is not None
        self._window = plan.cost.max_seqs + window_for(policy, plan.ahead)
        self._workers = self._made_workers(plan.workers, Role.DECODE if plan.prefill_workers else Role.BOTH)
        self._readers = self._made_workers(plan.prefill_workers, Role.PREFILL)
        self._by_id = {one.load.worker.id: one for one in (*self._workers, *self._readers)}
        self._pools = Pools(lambda worker: self._window)
        for one in self._by_id.values():
            self._pools.add(one.load, (_MODEL,))
        self._affinity = Affinity()
        self._typical = TypicalRequest()
        self.ttft_errors: list[float] = []  # predicted ÷ actual, of each request, where placement is by prediction
        self.handed_over = 0  # requests whose prompt one worker read and another one answered
        self._planner = None if plan.objectives is None else Planner(self.ttft_errors.append)
        self._flights: dict[str, _Flight] = {}
        self._charge: list[_Flight] = []
        self._events: list[tuple[float, int, _Worker | TraceCall, Iteration | None]] = []
        self._stretching: dict[_Worker, None] = {}
        self._seq = 0
        self._sample_at = 0.0
        self._iterations = 0
        self._sessions: dict[str, deque[TraceCall]] = {}
        self._note = note
        self._kept = Kept()
        self._samples: list[Sample] = []

    def _made_workers(self, number: int, role: Role) -> list[_Worker]:
        plan, cost = self._plan, self._plan.cost
        if plan.answer_chunk_tokens is not None and role is not Role.PREFILL:
            cost = replace(cost, max_batched_tokens=plan.answer_chunk_tokens)
        either = plan.objectives is not None
        return [
            _Worker(
                WorkerLoad(
                    Worker(
                        f"{role.value}-{at}",
                        "",
                        role,
                        cost.max_seqs,
                        plugin=True,
                        hands_over=either,
                        step_tokens=cost.max_batched_tokens,
                    ),
                    kv_tokens=float(cost.kv_capacity_tokens),
                ),
                ContinuousBatch(cost, TieredLanes(build(plan.policy, plan.policy_options)), _limit(self._objectives)),
            )
            for at in range(number)
        ]

    def run(self, calls: Iterable[TraceCall]) -> Simulated:
        """All calls to their ends. They come in order of `at_s`."""
        pending = iter(calls)
        if self._plan.concurrency:
            for call in _first(pending, self._plan.concurrency):
                self._arrive(call, 0.0)
            self._until(float("inf"), pending)
        else:
            for call in pending:
                self._until(call.at_s, None)
                self._arrive(call, call.at_s)
            self._until(float("inf"), None)
        if self._flights:
            raise RuntimeError(f"{len(self._flights)} requests cannot run: the cost model's KV holds none of them.")
        counts = [worker.batch.counts for worker in self._by_id.values()]
        hits = sum(count.prefix_hits for count in counts) / max(1, sum(count.prefix_queries for count in counts))
        return Simulated(self._kept, self._samples, self._iterations, hits)

    def _until(self, end_s: float, pending: Iterator[TraceCall] | None) -> None:
        events = self._events
        while events and events[0][0] <= end_s:
            now, number, worker, iteration = heappop(events)
            if isinstance(worker, TraceCall) or iteration is None:
                self._turn(cast(TraceCall, worker), now)
                continue
            if number != worker.due:
                continue
            self._end_stretch(worker)
            self._sample(now)
            ended = self._complete(worker, iteration, now)
            for call in _first(pending, ended) if pending is not None else ():
                self._arrive(call, now)
            self._advance(now)
            self._step(worker, now)

    def _arrive(self, call: TraceCall, now: float) -> None:
        """A call is due; it waits for the answer before it in its conversation, if that is not there."""
        if call.waits:
            if call.session in self._sessions:
                self._sessions[call.session].append(call)
                return
            self._sessions[call.session] = deque()
        self._turn(call, now)

    def _job(self, call: TraceCall, name: str, now: float) -> Job:
        """As an engine sees it, which is not told what the report calls its kind."""
        tokens, most = call.prompt_tokens, call.output_tokens
        return Job(name, call.tenant, tokens, now, max_tokens=most, objectives=self._objectives)

    def _turn(self, call: TraceCall, now: float) -> None:
        """A call is sent."""
        self._seq += 1
        name = f"{self._seq}"
        due_s = now if self._plan.concurrency else call.at_s
        flight = _Flight(
            call, due_s, now, self._job(call, name, now), self._job(call, name, now) if self._line is not None else None
        )
        self._flights[name] = flight
        if self._line is None or flight.waits is None:
            self._occupy(self._workers[0], flight, now)
        else:
            if len(self._line):
                self._charge_all(self._line, now)
            self._line.push(flight.waits, now)
            self._advance(now)

    def _advance(self, now: float) -> None:
        """Lets in whom the policy names while a worker has room, as the gateway's dispatcher does."""
        line = self._line
        if line is None or not len(line):
            return
        self._charge_all(line, now)
        while (job := line.peek(now)) is not None:
            room = self._room(job, now)
            if room is None:
                return
            line.pop(now)
            self._occupy(room[0], self._flights[job.id], now, room[1])

    def _charge_all(self, line: TieredLanes, now: float) -> None:
        """Charges what has been made, where the order of those that wait depends on it."""
        if self._accounts:
            self._settle(now)
        for flight in self._charge:
            if flight.uncharged and flight.waits is not None:
                line.serve(flight.waits, flight.uncharged, now)
                flight.uncharged = 0
        self._charge.clear()

    def _room(self, job: Job, now: float) -> tuple[_Worker, _Worker | None] | None:
        """Who answers, and who reads the prompt if that is another."""
        pools = self._pools.of(_MODEL)
        if all(pool.first() is None for pool in pools):
            return None
        if len(self._by_id) == 1:  # nothing to choose
            return self._workers[0], None
        prompt = block_beginnings(self._blocks(self._flights[job.id].call), self._plan.cost.prefix_block_tokens)
        known = self._affinity.known(prompt)
        if self._planner is not None:
            room = self._predicted(job, known, now)
        else:
            choice = self._choice(pools, self._typical.tokens, known=known)
            room = self._split(job, choice) if self._readers else self._whole(choice)
        for worker in room or ():
            if worker is not None:
                self._affinity.note(prompt, worker.load.worker.id)
        return room

    def _predicted(self, job: Job, known: Mapping[str, int], now: float) -> tuple[_Worker, _Worker | None] | None:
        """Where placement by prediction sends it."""
        plan = self._plan
        assert self._planner is not None and plan.objectives is not None
        asked = Asked(
            job.prompt_tokens,
            inf,
            plan.objectives,
            splittable=job.prompt_tokens >= plan.rules.min_prompt_tokens,
            waited_s=now - job.arrived_at,
        )
        visit = self._planner.place(asked, self._pools.of(_MODEL), known, now)
        if visit is None:
            return None
        self._flights[job.id].visit = visit
        writer = self._by_id[visit.writer.worker.id]
        return writer, self._by_id[visit.reader.worker.id] if visit.split else None

    def _whole(self, choice: Choice) -> tuple[_Worker, None] | None:
        load = choice.cheapest()
        return None if load is None else (self._by_id[load.worker.id], None)

    def _split(self, job: Job, choice: Choice) -> tuple[_Worker, _Worker | None] | None:
        match place(job.prompt_tokens, choice, self._plan.rules, splittable=True):
            case Disaggregated(prefill, decode):
                return self._by_id[decode.worker.id], self._by_id[prefill.worker.id]
            case Aggregated(load, _):
                return self._by_id[load.worker.id], None
        return None

    def _blocks(self, call: TraceCall) -> list[int]:
        """Ids of its prompt's full blocks, none where there is no prefix cache."""
        return call.prompt if isinstance(call.prompt, list) and self._plan.cost.prefix_block_tokens else []

    def _occupy(self, worker: _Worker, flight: _Flight, now: float, reader: _Worker | None = None) -> None:
        call = flight.call
        self._interrupt(worker, now)
        flight.worker = worker
        flight.pending_tokens = call.output_tokens + (call.prompt_tokens if reader is None else 0)
        worker.load.reserve(1, flight.pending_tokens)
        blocks = self._blocks(call)
        if reader is None:
            worker.batch.add(flight.runs, now, blocks=blocks)
            self._step(worker, now)
            return
        self._interrupt(reader, now)
        self.handed_over += 1
        flight.reads = self._job(call, flight.runs.id, now)
        reader.load.reserve(1, call.prompt_tokens)
        reader.batch.add(flight.reads, now, blocks=blocks)
        self._step(reader, now)

    def _hand_over(self, reader: _Worker, flight: _Flight, job: Job, now: float) -> None:
        """The prompt is read, and the first token made with it, which is given out at once if it is passed on. Who
        answers fetches the KV in an iteration of its own; an answer of one token it makes itself."""
        reader.batch.finish(job, Outcome.LENGTH, now)
        reader.load.release(1, flight.call.prompt_tokens)
        flight.reads = None
        flight.arriving_tokens = flight.call.prompt_tokens
        if flight.worker is not None:
            flight.worker.load.expect(flight.arriving_tokens)
        if flight.visit is not None:
            flight.visit.read(now)
        if flight.call.output_tokens > 1 and (self._plan.passes_on if flight.visit is None else flight.visit.passes_on):
            flight.passed_on = 1
            if flight.visit is not None:
                flight.visit.begins(now)
            self._made(flight, (now,))
        if flight.worker is not None:
            self._interrupt(flight.worker, now)
            flight.worker.batch.add(flight.runs, now, transferred=True, passed_on=flight.passed_on > 0)
            self._step(flight.worker, now)

    def _step(self, worker: _Worker, now: float) -> None:
        if worker.busy:
            return
        iteration = worker.batch.schedule(now)
        if iteration is None:
            return
        worker.busy = True
        end = now + iteration.duration_s
        more = self._repeats(worker, iteration)
        if more > 0:
            ends = list(accumulate(worker.batch.durations_s(iteration, more), initial=end))
            worker.stretch = _Stretch(iteration, ends)
            self._stretching[worker] = None
            end = ends[-1]
        self._expect(worker, iteration, end)

    def _expect(self, worker: _Worker, iteration: Iteration, end: float) -> None:
        self._seq += 1
        worker.due = self._seq
        heappush(self._events, (end, self._seq, worker, iteration))

    def _repeats(self, worker: _Worker, iteration: Iteration) -> int:
        """How many more iterations like this one follow for sure, unless one arrives: none of them ends an answer."""
        if not iteration.steady or (
            self._readers and self._planner is None
        ):  # placement on separate pools looks at how full each memory is
            return 0
        flights = [self._flights[entry.job.id] for entry in iteration.producing]
        if not all(flight.arrivals_s for flight in flights):  # the last token of a prompt is no answer's
            return 0
        left = min(flight.left for flight in flights)
        return min(left - 1, worker.batch.repeats(iteration), self._longest_stretch)

    def _settle(self, now: float) -> None:
        """Enters into the books what has been computed up to now in all stretches."""
        for worker in self._stretching:
            self._settle_one(worker, now)

    def _settle_one(self, worker: _Worker, now: float) -> None:
        stretch = worker.stretch
        if stretch is not None:
            ended = min(bisect_right(stretch.ends, now), len(stretch.ends) - 1)
            self._enter(worker, stretch, ended)

    def _enter(self, worker: _Worker, stretch: _Stretch, ended: int) -> None:
        """So many of a stretch's iterations have ended."""
        ends = stretch.ends[stretch.done : ended]
        if not ends:
            return
        stretch.done = ended
        self._iterations += len(ends)
        worker.batch.repeat(stretch.iteration, ends)
        for entry in stretch.iteration.producing:
            self._made(self._flights[entry.job.id], ends)

    def _end_stretch(self, worker: _Worker) -> None:
        """All but its last iteration are in the books afterwards; the last one is under way."""
        if worker.stretch is not None:
            self._enter(worker, worker.stretch, len(worker.stretch.ends) - 1)
            worker.stretch = None
            del self._stretching[worker]

    def _interrupt(self, worker: _Worker, now: float) -> None:
        """A call arrives: the iteration under way is the stretch's last."""
        stretch = worker.stretch
        if stretch is None:
            return
        self._settle_one(worker, now)
        worker.stretch = None
        del self._stretching[worker]
        self._expect(worker, stretch.iteration, stretch.ends[stretch.done])

    def _made(self, flight: _Flight, ends: Sequence[float]) -> None:
        """Output tokens came at these times."""
        flight.arrivals_s += ends
        if flight.waits is not None:
            if not flight.uncharged:
                self._charge.append(flight)
            flight.uncharged += len(ends)

    def _complete(self, worker: _Worker, iteration: Iteration, now: float) -> int:
        worker.busy = False
        self._iterations += 1
        ended = 0
        for job in worker.batch.complete(iteration, now):
            flight = self._flights[job.id]
            if job is flight.reads:
                self._hand_over(worker, flight, job, now)
                continue
            if flight.arriving_tokens:
                worker.load.expect(-flight.arriving_tokens)
                flight.arriving_tokens = 0
            if flight.visit is not None and len(flight.arrivals_s) < 2:
                tell = flight.visit.goes_on if flight.arrivals_s else flight.visit.begins
                tell(now)
            self._made(flight, (now,))
            if flight.left <= 0:
                self._end(worker, flight, now)
                ended += 1
        if self._readers:
            worker.load.observe(kv_usage=worker.batch.kv_usage())
        return ended

    def _end(self, worker: _Worker, flight: _Flight, now: float) -> None:
        worker.batch.finish(flight.runs, Outcome.DONE, now)
        if flight.visit is not None:
            flight.visit.over(now, now, len(flight.arrivals_s))
        worker.load.release(1, flight.pending_tokens)
        self._typical.learn(flight.call.prompt_tokens, flight.call.output_tokens)
        if self._line is not None and flight.waits is not None:
            if flight.uncharged:
                self._line.serve(flight.waits, flight.uncharged, now)
                flight.uncharged = 0
            self._line.finish(flight.waits, Outcome.DONE, now)
        del self._flights[flight.runs.id]
        record = flight.record(now)
        self._kept.add(record)
        if self._note is not None:
            self._note(record)
        if flight.call.waits:
            self._go_on(flight.call.session, now)

    def _go_on(self, session: str, now: float) -> None:
        """A conversation's next turn, if one waits, comes after the time to think."""
        waiting = self._sessions[session]
        if not waiting:
            del self._sessions[session]
            return
        call, think = waiting.popleft(), self._plan.think
        pause_s = think if isinstance(think, float) else call.idle_s if think == IDLE_GAP else 0.0
        if pause_s:
            self._seq += 1
            heappush(self._events, (now + pause_s, self._seq, call, None))
        else:
            self._turn(call, now)

    def _sample(self, now: float) -> None:
        if now < self._sample_at:
            return
        self._sample_at = now - now % SAMPLE_S + SAMPLE_S
        self._settle(now)
        batches = [worker.batch for worker in self._by_id.values()]
        waiting = sum(batch.waiting() for batch in batches) + (len(self._line) if self._line is not None else 0)
        kv_usage = sum(batch.kv_usage() for batch in batches) / len(batches)
        preemptions = sum(batch.counts.preemptions for batch in batches)
        running = sum(batch.running() for batch in batches)
        self._samples.append(Sample(round(now, 3), waiting, running, round(kv_usage, 4), preemptions))


def _limit(objectives: Objectives) -> StepLimit | None:
    """What an engine has its steps bounded by where there is an objective for tokens."""
    return None if objectives.tpot_s == inf else StepLimit(StepModel())


def _first(calls: Iterator[TraceCall], most: int) -> Iterator[TraceCall]:
    for _ in range(most):
        call = next(calls, None)
        if call is None:
            return
        yield call


def block_prompts(block_tokens: int) -> Prompts:
    """Prompts for a simulation: no tokens are needed, only the ids of their blocks, shared ones and own.

    block_tokens: of the engine's prefix cache (0 for none). A trace's larger blocks are cut to this size; of smaller
    ones the last that ends with one of these stands for all before it.
    """

    def make(call: int, tokens: int, blocks: Sequence[int], trace_tokens: int) -> list[int]:
        if not block_tokens:
            return []
        full = tokens // block_tokens
        shared = _resized(blocks, trace_tokens, block_tokens)[:full]
        first = -1 - call * _MOST_BLOCKS
        return shared + list(range(first, first - (full - len(shared)), -1))

    return make


def _resized(blocks: Sequence[int], from_tokens: int, to_tokens: int) -> list[int]:
    if from_tokens >= to_tokens:
        parts = from_tokens // to_tokens
        return [block * _MOST_PARTS + part for block in blocks for part in range(parts)]
    step = to_tokens // max(from_tokens, 1)
    return list(blocks[step - 1 :: step])
