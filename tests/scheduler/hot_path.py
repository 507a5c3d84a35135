"""What the lanes cost: `python -m tests.scheduler.hot_path` prints microseconds per call."""

import random
import sys
from collections.abc import Callable
from time import perf_counter

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes

POLICIES: tuple[tuple[str, dict[str, str]], ...] = (
    ("fcfs", {}),
    ("mlfq", {}),
    ("vtc", {}),
    ("gittins", {}),
    ("vtc", {"within": "gittins"}),
)
BATCH = 256


def microseconds(calls: int, work: Callable[[], object]) -> float:
    """Of one call, where `work` makes `calls` of them: the best of three."""
    best = float("inf")
    for _ in range(3):
        start = perf_counter()
        work()
        best = min(best, perf_counter() - start)
    return best / calls * 1e6


def taught(name: str, options: dict[str, str], rng: random.Random) -> Lanes:
    """Empty lanes under a policy that has seen 3,000 jobs end."""
    policy = build(name, options)
    for _ in range(3000):
        tokens = int(rng.lognormvariate(4, 1.5)) + 1
        policy.order.learn(Job("", f"t{rng.randrange(50)}", 100, 0.0, output_tokens=tokens), Outcome.DONE)
    return Lanes(policy)


def fill(lanes: Lanes, jobs: list[Job]) -> float:
    """Pushes all; microseconds for one."""
    start = perf_counter()
    for job in jobs:
        lanes.push(job, 0.0)
    return (perf_counter() - start) / len(jobs) * 1e6


def measure(name: str, options: dict[str, str], waiting: int, tenants: int) -> dict[str, float]:
    """Push, pop with finish, serve and an empty displacement, with so many jobs waiting and 256 running."""
    rng = random.Random(1)
    lanes = taught(name, options, rng)
    jobs = [Job(str(n), f"t{rng.randrange(tenants)}", rng.randrange(1, 2000), 0.0) for n in range(waiting + BATCH)]
    push = fill(lanes, jobs)
    batch = [lanes.pop(0.0) for _ in range(BATCH)]

    def serve() -> None:
        for _ in range(100):
            for job in batch:
                lanes.serve(job, 1, 0.0)

    def displacement() -> None:
        for _ in range(1000):
            lanes.displacement(0.0)

    def turnover() -> None:
        for _ in range(300):
            lanes.finish(batch.pop(0), Outcome.DONE, 0.0)
            batch.append(lanes.pop(0.0))

    return {
        "push": push,
        "serve": microseconds(100 * BATCH, serve),
        "displacement": microseconds(1000, displacement),
        "finish and pop": microseconds(300, turnover),
    }


def main() -> None:
    """Prints one line per policy for a small and a large line."""
    for waiting, tenants in ((1000, 100), (100_000, 10_000)):
        sys.stdout.write(f"{waiting} waiting, {tenants} tenants, {BATCH} running: microseconds per call\n")
        for name, options in POLICIES:
            costs = ", ".join(f"{call} {cost:.2f}" for call, cost in measure(name, options, waiting, tenants).items())
            sys.stdout.write(f"  {name} {' '.join(f'{key}={value}' for key, value in options.items())}: {costs}\n")


if __name__ == "__main__":
    main()
