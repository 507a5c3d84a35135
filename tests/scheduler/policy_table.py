"""The policies in simulation: `python -m tests.scheduler.policy_table` prints the table of docs/policies.md."""

import sys
from collections.abc import Callable
from statistics import mean

from scheduler.catalog import build
from tests.scheduler.engine_model import Life
from tests.scheduler.workloads import (
    Sizes,
    chat,
    code_and_chat,
    mean_jct_s,
    mean_time_per_token_s,
    open_loop,
    simulate,
    with_reasoning,
)

WORKLOADS: dict[str, Sizes] = {"chat": chat, "code and chat": code_and_chat, "with 5 % reasoning": with_reasoning}
POLICIES = ("fcfs", "mlfq", "gittins")
SEEDS = (1, 2, 3)


def p99(values: list[float]) -> float:
    """The value below which 99 of 100 lie."""
    return sorted(values)[int(0.99 * len(values))]


def rows(jobs: int = 900, load: float = 1.2) -> list[tuple[str, str, float, float, float, float, float]]:
    """Workload, policy, FCFS / policy for mean JCT and mean time per token, P99 TTFT and P99 gap in s, preemptions."""
    table = []
    for label, sizes in WORKLOADS.items():
        runs = {
            name: [simulate(build(name, {}), open_loop(sizes, jobs, load, seed)) for seed in SEEDS] for name in POLICIES
        }

        def over_seeds(name: str, measure: Callable[[list[Life]], float], runs: dict = runs) -> float:  # type: ignore[type-arg]
            return mean(measure(lives) for _, lives in runs[name])

        for name in POLICIES:
            table.append(
                (
                    label,
                    name,
                    over_seeds("fcfs", mean_jct_s) / over_seeds(name, mean_jct_s),
                    over_seeds("fcfs", mean_time_per_token_s) / over_seeds(name, mean_time_per_token_s),
                    over_seeds(name, lambda lives: p99([life.first_token_at - life.request.at for life in lives])),
                    over_seeds(name, lambda lives: p99([life.longest_gap for life in lives])),
                    mean(engine.preemptions / jobs for engine, _ in runs[name]),
                )
            )
    return table


def main() -> None:
    """Prints the table for loads 1.2 and 0.9 as Markdown."""
    for load in (1.2, 0.9):
        sys.stdout.write(f"\nload {load}\n\n| lengths | policy | mean JCT | time per token | P99 TTFT | P99 gap |")
        sys.stdout.write(" preemptions per job |\n| --- | --- | --- | --- | --- | --- | --- |\n")
        for label, name, jct, per_token, ttft_s, gap_s, preemptions in rows(load=load):
            sys.stdout.write(f"| {label} | {name} | {jct:.2f} | {per_token:.1f} | {ttft_s:.1f} s | {gap_s:.1f} s |")
            sys.stdout.write(f" {preemptions:.2f} |\n")


if __name__ == "__main__":
    main()
