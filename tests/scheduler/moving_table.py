"""What moving interrupted answers to another engine brings: `python -m tests.scheduler.moving_table --traces FOLDER`.

Two simulated engines under Gittins, and requests placed on them as the gateway does. An answer that was interrupted is
moved once it has waited for as long as computing its tokens again takes, if the other engine has a free slot, nobody in
line and KV memory for it. A moved answer is a new request there, its prompt all that it has so far, as when a worker
fails. Each run is done with and without moving, with engines that are alike and with one that has a quarter of the
other's slots, or little KV memory: for two requests of mean size, or for the largest one where that needs more.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from loadtest.simulator.batch import ContinuousBatch, Iteration
from loadtest.simulator.costmodel import CostModel
from scheduler.catalog import build, choose
from scheduler.jobs import Job, Outcome
from scheduler.pools import Pools, WorkerLoad
from scheduler.routing import Choice, TypicalRequest
from scheduler.tiers import TieredLanes
from scheduler.workers import Worker
from tests.scheduler.no_regret import STEP_S, short_of_memory, sizes
from tests.scheduler.simulated import SLOTS, TOKENS_PER_STEP, Size, arrivals, cost, p99

LOADS = (0.9, 1.2)
WORKLOADS = ("S", "C", "R")
WHOLE = cost(STEP_S)


@dataclass(slots=True, eq=False)
class Answer:
    """One request. job: as the engine sees it that has it. last_s: when its latest token came, at first its arrival."""

    job: Job
    length: int
    arrived_s: float
    last_s: float
    made: int = 0
    gap_s: float = 0.0
    interrupted: bool = False
    engine: "Engine | None" = None

    @property
    def again_s(self) -> float:
        """What computing all its tokens again takes."""
        return STEP_S * self.job.context_tokens / TOKENS_PER_STEP


@dataclass(eq=False)
class Engine:
    """One engine, and its iteration under way, which ends `now`. waiting: the interrupted, and since when."""

    load: WorkerLoad
    batch: ContinuousBatch
    now: float = 0.0
    under_way: Iteration | None = None
    waiting: dict[Answer, float] = field(default_factory=dict)

    def has_room_for(self, answer: Answer) -> bool:
        """Whether it would start at once, and has memory for what it will be at least."""
        batch = self.batch
        free = batch.cost.kv_capacity_tokens - batch.kv_used_tokens
        return not batch.waiting() and batch.running() < batch.cost.max_seqs and free > answer.job.context_tokens + 64


class Pair:
    """Two engines and all that happens on them."""

    def __init__(self, policy: str, costs: Sequence[CostModel], taught: Sequence[Size], *, moves: bool) -> None:
        self.moving = moves
        self.moves = 0
        self.answers: dict[Job, Answer] = {}
        self.done: list[tuple[Answer, float]] = []
        self._typical = TypicalRequest()
        self._pools = Pools(lambda worker: 1 << 30)
        self.engines = [self._engine(f"{at}", policy, one, taught) for at, one in enumerate(costs)]
        self._by_id = {engine.load.worker.id: engine for engine in self.engines}

    def _engine(self, name: str, policy: str, engine_cost: CostModel, taught: Sequence[Size]) -> Engine:
        built = build(*choose(policy))
        for prompt, made in taught:
            built.order.learn(Job("", "t", prompt, 0.0, output_tokens=made), Outcome.DONE)
        load = WorkerLoad(Worker(name, "", slots=engine_cost.max_seqs))
        self._pools.add(load, ("",))
        return Engine(load, ContinuousBatch(engine_cost, TieredLanes(built)))

    def run(self, jobs: Sequence[Size], times: Sequence[float]) -> None:
        """Serves all of them."""
        coming = 0
        while coming < len(jobs) or any(engine.under_way for engine in self.engines):
            busy = [engine for engine in self.engines if engine.under_way is not None]
            first = min(busy, key=lambda engine: engine.now) if busy else None
            if first is None or (coming < len(jobs) and times[coming] <= first.now):
                prompt, length = jobs[coming]
                at = times[coming]
                answer = Answer(Job(f"{coming}", "t", prompt, at), length, at, at)
                load = Choice(self._pools.of(""), self._typical.tokens).cheapest()
                assert load is not None
                self._give(answer, self._by_id[load.worker.id], at)
                coming += 1
            else:
                self._step(first)

    def _give(self, answer: Answer, engine: Engine, now: float) -> None:
        answer.engine = engine
        self.answers[answer.job] = answer
        engine.load.reserve(1, answer.job.prompt_tokens + answer.length - answer.made)
        engine.batch.add(answer.job, now)
        if engine.under_way is None:
            engine.now = max(engine.now, now)
            self._begin(engine)

    def _leave(self, answer: Answer, outcome: Outcome, now: float) -> None:
        engine, job = answer.engine, answer.job
        assert engine is not None
        engine.waiting.pop(answer, None)
        engine.load.release(1, job.prompt_tokens + answer.length - answer.made + job.output_tokens)
        engine.batch.finish(job, outcome, now)
        del self.answers[job]

    def _step(self, engine: Engine) -> None:
        """Ends the iteration that is under way, and begins the next."""
        assert engine.under_way is not None
        now = engine.now
        for job in engine.batch.complete(engine.under_way, now):
            answer = self.answers[job]
            if answer.made:
                answer.gap_s = max(answer.gap_s, now - answer.last_s)
            answer.last_s = now
            answer.made += 1
            if answer.made == answer.length:
                self._leave(answer, Outcome.DONE, now)
                self._typical.learn(job.prompt_tokens, answer.length)
                self.done.append((answer, now - answer.arrived_s))
        if self.moving:
            self._move(now)
        self._begin(engine)

    def _begin(self, engine: Engine) -> None:
        now, lanes = engine.now, engine.batch.lanes
        before = list(lanes.running_jobs())
        engine.under_way = engine.batch.schedule(now)
        for job in before:
            answer = self.answers[job]
            if job in lanes and answer.made:
                answer.interrupted = True
                engine.waiting[answer] = now
        for answer in [answer for answer in engine.waiting if answer.job not in lanes]:
            del engine.waiting[answer]
        engine.load.observe(kv_usage=engine.batch.kv_usage())
        if engine.under_way is not None:
            engine.now = now + engine.under_way.duration_s

    def _move(self, now: float) -> None:
        for source, target in (self.engines, self.engines[::-1]):
            for answer, since in list(source.waiting.items()):
                if now - since >= answer.again_s and target.has_room_for(answer):
                    self.moves += 1
                    old = answer.job
                    self._leave(answer, Outcome.ABORTED, now)
                    answer.job = Job(f"{old.id}+", "t", old.context_tokens, now)
                    self._give(answer, target, now)


def pairs_of(jobs: Sequence[Size]) -> Mapping[str, tuple[CostModel, CostModel]]:
    """Two engines with memory enough; with few slots in one; with little memory in one; and with few of both."""
    few = SLOTS // 4
    return {
        "alike": (WHOLE, WHOLE),
        "one has few slots": (WHOLE, replace(WHOLE, max_seqs=few)),
        "one has little memory": (WHOLE, short_of_memory(jobs, few, SLOTS)),
        "few slots, little memory": (WHOLE, short_of_memory(jobs, few, few)),
    }


def saturation(costs: Sequence[CostModel], jobs: Sequence[Size]) -> float:
    """Requests per second that the two can do."""
    pair = Pair("fcfs", costs, (), moves=False)
    pair.run(jobs, [0.0] * len(jobs))
    return len(jobs) / max(engine.now for engine in pair.engines)


def lines(seed: int, traces: Path) -> Iterator[str]:
    """The table as Markdown."""
    yield (
        "| lengths | engines | load | interrupted | P99 of their longest gap, s: stay, move "
        "| moves a minute | mean JCT, s: stay, move | P99 JCT, s: stay, move |"
    )
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name in WORKLOADS:
        jobs, others = sizes(name, traces, seed)
        unit = arrivals(jobs, 1.0, seed + 77, STEP_S)
        for engines, costs in pairs_of(jobs).items():
            per_s = saturation(costs, jobs)
            for load in LOADS:
                scale = len(jobs) / unit[-1] / (load * per_s)
                cells = _cells(costs, jobs, [at * scale for at in unit], others)
                yield f"| {name} | {engines} | {load:g} | {cells}"


def _cells(costs: Sequence[CostModel], jobs: Sequence[Size], times: Sequence[float], others: Sequence[Size]) -> str:
    pairs = [Pair("gittins", costs, others, moves=moves) for moves in (False, True)]
    for pair in pairs:
        pair.run(jobs, times)
    gaps = [p99([answer.gap_s for answer, _ in pair.done if answer.interrupted] or [0.0]) for pair in pairs]
    stay, move = ([jct_s for _, jct_s in pair.done] for pair in pairs)
    interrupted = sum(answer.interrupted for answer, _ in pairs[0].done)
    minutes = max(engine.now for engine in pairs[1].engines) / 60
    return (
        f"{interrupted} | {gaps[0]:.1f}, {gaps[1]:.1f} | {pairs[1].moves / minutes:.0f} | "
        f"{mean(stay):.2f}, {mean(move):.2f} | {p99(stay):.1f}, {p99(move):.1f} |"
    )


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    for line in lines(args.seed, args.traces):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
