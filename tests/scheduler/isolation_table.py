"""A light tenant beside a flood: `python -m tests.scheduler.isolation_table --traces FOLDER` prints a table of docs.

The light tenant offers a fifth of what an engine with 8 slots can do of workload C, the flood twice all of it. Both are
simulated on the counting clock; the light tenant's time to first token is compared with its own when it is alone.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from loadtest.simulator.batch import ContinuousBatch
from loadtest.traces.workload import shapes
from scheduler.catalog import build, choose
from scheduler.jobs import Job, Outcome
from scheduler.tiers import TieredLanes
from tests.scheduler.simulated import SLOTS, STEP_S, TOKENS_PER_STEP, Size, cost, p99

LIGHT, FLOOD = "light", "flood"
SCALE = 0.2
LIGHT_JOBS, FLOOD_JOBS = 100, 3000
POLICIES = ("vtc", "vtc:burst=10", "vtc:slots=shared", "vtc:burst=10:slots=shared")

Call = tuple[float, str, int, int]  # time, tenant, tokens of prompt and answer


def sizes(traces: Path, seed: int, count: int) -> list[Size]:
    """Of workload C."""
    drawn = islice(shapes("C", random.Random(seed), traces), count)
    return [(max(1, round(each.prompt_tokens * SCALE)), max(1, round(each.output_tokens * SCALE))) for each in drawn]


def sent(tenant: str, jobs: Sequence[Size], per_s: float, seed: int) -> Iterator[Call]:
    """At Poisson times."""
    rng, at = random.Random(seed), 0.0
    for prompt, output in jobs:
        at += rng.expovariate(per_s)
        yield at, tenant, prompt, output


@dataclass
class Run:
    """One engine's life until the light tenant's last request has ended."""

    batch: ContinuousBatch
    calls: Sequence[Call]
    now: float = 0.0
    coming: int = 0
    left: dict[Job, int] = field(default_factory=dict)
    light_ttft_s: dict[Job, float] = field(default_factory=dict)
    light_left: int = LIGHT_JOBS

    def to_the_end(self) -> float:
        """P99 of the light tenant's time to first token, in seconds."""
        while self.light_left:
            if not self.left:
                self.now = max(self.now, self.calls[self.coming][0])
            self._arrive()
            iteration = self.batch.schedule(self.now)
            assert iteration is not None
            self.now += iteration.duration_s
            for job in self.batch.complete(iteration, self.now):
                self._made(job)
        return p99(self.light_ttft_s.values())

    def _arrive(self) -> None:
        while self.coming < len(self.calls) and self.calls[self.coming][0] <= self.now:
            at, tenant, prompt, output = self.calls[self.coming]
            job = Job(str(self.coming), tenant, prompt, at)
            self.left[job] = output
            self.batch.add(job, self.now)
            self.coming += 1

    def _made(self, job: Job) -> None:
        if job.tenant == LIGHT:
            self.light_ttft_s.setdefault(job, self.now - job.arrived_at)
        if job.output_tokens == self.left[job]:
            del self.left[job]
            self.batch.finish(job, Outcome.DONE, self.now)
            self.light_left -= job.tenant == LIGHT


def run(policy: str, calls: Sequence[Call]) -> tuple[float, int]:
    """P99 of the light tenant's time to first token, and how many were displaced."""
    batch = ContinuousBatch(cost(STEP_S), TieredLanes(build(*choose(policy))))
    return Run(batch, calls).to_the_end(), batch.counts.displaced


def rows(traces: Path, seed: int) -> Iterator[tuple[str, float, int]]:
    """Policy, flooded by alone, displaced."""
    few, many = sizes(traces, seed, LIGHT_JOBS), sizes(traces, seed + 500, FLOOD_JOBS)
    seconds = sum(STEP_S * ((prompt + output) / TOKENS_PER_STEP + output / SLOTS) for prompt, output in few + many)
    per_s = (LIGHT_JOBS + FLOOD_JOBS) / seconds
    light = list(sent(LIGHT, few, 0.2 * per_s, seed + 2))
    flood = [call for call in sent(FLOOD, many, 2.0 * per_s, seed + 3) if call[0] <= light[-1][0]]
    alone_s, _ = run("vtc", light)
    for policy in POLICIES:
        flooded_s, displaced = run(policy, sorted(light + flood))
        yield policy, flooded_s / alone_s, displaced


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    parser.add_argument("--seeds", type=int, default=5, help="how many draws (default: %(default)s)")
    args = parser.parse_args()
    sys.stdout.write("| seed | policy | P99 TTFT: flooded ÷ alone | displaced |\n| --- | --- | --- | --- |\n")
    for seed in range(1, args.seeds + 1):
        for policy, ratio, displaced in rows(args.traces, seed):
            sys.stdout.write(f"| {seed} | {policy} | {ratio:.2f} | {displaced} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
