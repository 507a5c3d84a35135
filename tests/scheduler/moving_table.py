"""What moving interrupted requests could gain: `python -m tests.scheduler.moving_table --traces FOLDER`.

Two engines under Gittins, each request placed where fewer are. Nobody is moved. For each interruption the table looks
for the first moment, before the request goes on where it is, at which the other engine has a free slot and nobody in
line, and takes the time from then on, less what computing all its tokens again takes, for the gain. It leaves out that
a moved request would slow the other engine down, so it is what moving could gain at most.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from loadtest.simulator.batch import ContinuousBatch, Iteration
from scheduler.catalog import build, choose
from scheduler.jobs import Job, Outcome
from scheduler.tiers import TieredLanes
from tests.scheduler.no_regret import STEP_S, sizes
from tests.scheduler.simulated import SLOTS, TOKENS_PER_STEP, Size, arrivals, cost

LOADS = (0.7, 0.9, 1.2)
POLICIES = ("gittins", "gittins:tail=inf")


@dataclass
class Engine:
    """One engine, and its iteration under way, which ends `now`. interrupted: who waits to go on."""

    batch: ContinuousBatch
    now: float = 0.0
    under_way: Iteration | None = None
    interrupted: set[Job] = field(default_factory=set)

    def load(self) -> int:
        return self.batch.running() + self.batch.waiting()


@dataclass
class Pair:
    """Two engines and all that happens on them. gains_s: of the interruptions that a move would have shortened."""

    engines: tuple[Engine, Engine]
    lengths: Mapping[str, int]
    ends_s: list[float] = field(default_factory=list)
    interruptions: int = 0
    gains_s: list[float] = field(default_factory=list)
    room_from: dict[Job, float] = field(default_factory=dict)

    def arrive(self, job: Job) -> None:
        engine = min(self.engines, key=Engine.load)
        engine.batch.add(job, job.arrived_at)
        if engine.under_way is None:
            engine.now = max(engine.now, job.arrived_at)
            self._begin(engine)

    def step(self, engine: Engine) -> None:
        """Ends the iteration that is under way, and begins the next."""
        assert engine.under_way is not None
        for job in engine.batch.complete(engine.under_way, engine.now):
            if job.output_tokens == self.lengths[job.id]:
                engine.batch.finish(job, Outcome.DONE, engine.now)
                self.ends_s.append(engine.now - job.arrived_at)
        self._begin(engine)

    def _begin(self, engine: Engine) -> None:
        lanes, started_at = engine.batch.lanes, engine.now
        before = set(lanes.running_jobs())
        engine.under_way = engine.batch.schedule(started_at)
        other = self.engines[engine is self.engines[0]]
        for job in before:
            if job in lanes:
                self.interruptions += 1
                engine.interrupted.add(job)
                if other.load() < SLOTS:
                    self.room_from[job] = started_at
        for job in [job for job in engine.interrupted if job not in lanes]:
            engine.interrupted.remove(job)
            self._settle(job, started_at)
        if engine.load() < SLOTS:
            for job in other.interrupted:
                self.room_from.setdefault(job, started_at)
        if engine.under_way is not None:
            engine.now += engine.under_way.duration_s

    def _settle(self, job: Job, resumed_at: float) -> None:
        room_at = self.room_from.pop(job, None)
        if room_at is not None:
            gain_s = resumed_at - room_at - STEP_S * job.context_tokens / TOKENS_PER_STEP
            if gain_s > 0.0:
                self.gains_s.append(gain_s)


def run(policy: str, jobs: Sequence[Size], times: Sequence[float], others: Sequence[Size]) -> Pair:
    """Serves all of them."""
    pair = Pair(
        (_engine(policy, others), _engine(policy, others)), {f"{at}": made for at, (_, made) in enumerate(jobs)}
    )
    coming = 0
    while coming < len(jobs) or any(engine.under_way for engine in pair.engines):
        busy = [engine for engine in pair.engines if engine.under_way is not None]
        first = min(busy, key=lambda engine: engine.now) if busy else None
        if first is None or (coming < len(jobs) and times[coming] <= first.now):
            pair.arrive(Job(f"{coming}", "t", jobs[coming][0], times[coming]))
            coming += 1
        else:
            pair.step(first)
    return pair


def _engine(policy: str, others: Sequence[Size]) -> Engine:
    built = build(*choose(policy))
    for prompt, made in others:
        built.order.learn(Job("", "t", prompt, 0.0, output_tokens=made), Outcome.DONE)
    return Engine(ContinuousBatch(cost(STEP_S), TieredLanes(built)))


def lines(names: Sequence[str], seed: int, traces: Path) -> Iterator[str]:
    """The table as Markdown."""
    yield "| policy | lengths | load | interruptions | of these a move would shorten | mean JCT, at most better by |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    for policy in POLICIES:
        for name in names:
            jobs, others = sizes(name, traces, seed)
            for load in LOADS:
                pair = run(policy, jobs, arrivals(jobs, 2 * load, seed + 77, STEP_S), others)
                share = len(pair.gains_s) / max(1, pair.interruptions)
                gain = sum(pair.gains_s) / len(jobs) / mean(pair.ends_s)
                yield f"| `{policy}` | {name} | {load:g} | {pair.interruptions} | {share:.1%} | {gain:.2%} |"


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    for line in lines(("C", "R", "Azure chat"), args.seed, args.traces):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
