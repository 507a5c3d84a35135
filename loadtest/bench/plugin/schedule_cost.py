"""What the plug-in costs: time of vLLM's schedule() and update_from_output() under ours against stock, no model run.

python -m loadtest.bench.plugin.schedule_cost [--waiting 10000 100000] [--policies fcfs mlfq vtc gittins]

Both schedulers decode 256 requests, with the same requests waiting behind, and take turns in short blocks of steps so
that what else the machine does hits both. Shown is the median over blocks of ours divided by stock, and the medians.
The clock of the policies advances 20 ms a step, so displacements come at the rate that their cap allows.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from loadtest.bench.plugin.driven import StepClock, build_scheduler, model_folder, request, seed_block_hashes

RUNNING = 256
TENANTS = 50
STEPS_IN_BLOCK = 20
STEP_S = 0.02


@dataclass
class Timed:
    """One scheduler, and how long its last block of steps took, in microseconds a step."""

    scheduler: Any
    clock: StepClock
    schedule_us: list[float] = field(default_factory=list)
    update_us: list[float] = field(default_factory=list)

    def block(self) -> None:
        spent_schedule = spent_update = 0.0
        for _ in range(STEPS_IN_BLOCK):
            self.clock.now += STEP_S
            begun = time.perf_counter()
            output = self.scheduler.schedule()
            scheduled = time.perf_counter()
            result = one_token_each(output)
            computed = time.perf_counter()
            self.scheduler.update_from_output(output, result)
            spent_update += time.perf_counter() - computed
            spent_schedule += scheduled - begun
        self.schedule_us.append(spent_schedule / STEPS_IN_BLOCK * 1e6)
        self.update_us.append(spent_update / STEPS_IN_BLOCK * 1e6)


def one_token_each(output: SchedulerOutput) -> ModelRunnerOutput:
    """Every scheduled request made a token (prompts are short enough for one step)."""
    names = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def prepare(folder: Path, policy: str | None, waiting: int) -> Timed:
    """A scheduler with a full batch that has decoded a while, and `waiting` requests behind it."""
    clock = StepClock()
    scheduler = build_scheduler(folder, policy, slots=RUNNING, step_tokens=8192, blocks=200_000, clock=clock)
    timed = Timed(scheduler, clock)
    for index in range(RUNNING + waiting):
        name = f"r{index}"
        scheduler.add_request(request(name, 8 if index < RUNNING else 24, 5000, tenant=f"t{index % TENANTS}"))
    for _ in range(5):
        timed.block()
    timed.schedule_us.clear()
    timed.update_us.clear()
    return timed


def compare(folder: Path, policy: str, waiting: int, blocks: int) -> str:
    """One line of the table."""
    stock, ours = prepare(folder, None, waiting), prepare(folder, policy, waiting)
    gc.collect()
    gc.freeze()  # as vLLM's engine does once it has started
    for index in range(blocks):
        for timed in (stock, ours) if index % 2 else (ours, stock):
            timed.block()
    gc.unfreeze()
    cells = []
    for name in ("schedule_us", "update_us"):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        ratio = statistics.median(mine_us / their_us for mine_us, their_us in zip(mine, theirs, strict=True))
        cells.append(f"{statistics.median(theirs):8.0f} {statistics.median(mine):8.0f} {ratio:6.3f}")
    return f"{policy:8} {waiting:8} | {cells[0]} | {cells[1]}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 10_000, 100_000], help="requests in line")
    parser.add_argument("--policies", nargs="+", default=["fcfs", "mlfq", "vtc", "gittins"])
    parser.add_argument("--blocks", type=int, default=30, help=f"timed blocks of {STEPS_IN_BLOCK} steps")
    arguments = parser.parse_args()
    seed_block_hashes()
    say("                  | schedule(): stock, ours (us), ratio | update_from_output(): stock, ours (us), ratio")
    with tempfile.TemporaryDirectory() as folder:
        model_folder(Path(folder))
        for waiting in arguments.waiting:
            for policy in arguments.policies:
                say(compare(Path(folder), policy, waiting, arguments.blocks))


if __name__ == "__main__":
    main()
