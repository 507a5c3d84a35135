"""Runs of `evenhand bench batch` on clocks that an engine's work moves, several processes at a time."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median

from loadtest.bench.batch.loads import BURST_PER_S, JOBS, OUTPUT_TOKENS, PEOPLE, Load, Size, azure
from loadtest.bench.batch.work import BATCH_ONLY, Outcome, Scenario, Way
from loadtest.bench.iterations.environment import ENVIRONMENT
from loadtest.call import TraceCall
from loadtest.simulator.costmodel import PRESETS

# Of a real engine: as large a part of what it can do as the bursts are of the engine that the cost model describes.
BURST_LOAD = 0.785
CPU_LENGTH = 0.25  # of prompts and answers on a CPU, whose steps are that much smaller
_CALIBRATIONS, _CALIBRATION_S = 3, 20.0  # runs that show what an engine can do, and most seconds of each


def _azure_without_end(rng: Random, size: Size) -> Iterator[TraceCall]:
    return chain.from_iterable(azure(rng, size) for _ in repeat(None))


_LOADS: Mapping[str, Load] = {**JOBS, "azure": _azure_without_end}
# Jobs that are as these interactive requests: with them an engine shows how many of those it could do.
WITHOUT_END: Mapping[str, str] = {"bursts": "short", "azure": "azure"}


@dataclass(frozen=True, slots=True)
class Run:
    """One way, with interactive requests and jobs by name. cost: preset of the cost model; "" for a real engine, whose
    seconds are those of a machine that takes `reference_s` for a certain piece of work."""

    people: str
    jobs: str
    way: Way
    seed: int
    size: Size
    cost: str = "gpu-7b"
    reference_s: float = 0.0

    @property
    def key(self) -> "Run":
        """What the outcome depends on."""
        people = self.people if self.way.people else ""
        return replace(self, people=people, jobs=self.jobs if self.way.batch else "")


def outcome(run: Run) -> Outcome:
    """Runs it, in this process."""
    people = list(PEOPLE[run.people](Random(f"{run.seed}:people"), run.size)) if run.way.people else []
    jobs = _LOADS[run.jobs](Random(f"{run.seed}:jobs"), run.size) if run.way.batch else iter(())
    sys.stderr.write(f"{run.way.name}, {run.people or 'nobody'}, {run.jobs or 'no'} jobs, seed {run.seed}\n")
    with tempfile.TemporaryDirectory() as folder:
        if not run.cost:
            from loadtest.bench.batch.cpu_engine import CpuEngine
            from loadtest.bench.iterations.in_process_engine import chaotic_model

            with CpuEngine.started(chaotic_model(Path(folder)), run.way, run.reference_s) as engine:
                return Scenario(engine, run.way, people, jobs, run.size.whole_s).run()
        from loadtest.bench.batch.scheduler_only import ModelFreeEngine
        from loadtest.bench.plugin.driven import model_folder, seed_block_hashes

        seed_block_hashes()
        free = ModelFreeEngine(model_folder(Path(folder)), run.way, PRESETS[run.cost])
        if run.way.share is not None:
            from loadtest.bench.batch.dispatched import dispatched

            return dispatched(free, people, jobs, run.way.share, run.size.whole_s)
        return Scenario(free, run.way, people, jobs, run.size.whole_s).run()


def _prepare() -> None:
    """In each process, before it imports anything heavy."""
    os.environ.update(ENVIRONMENT)


def outcomes(runs: Iterable[Run], processes: int, *, fresh: bool = False) -> Mapping[Run, Outcome]:
    """Of each run by its key. fresh: each in a process of its own, since a real engine leaves much behind.

    Processes are forked: this one has neither threads nor anything heavy."""
    wanted = list(dict.fromkeys(run.key for run in runs))
    if fresh:
        return {run: one for run in wanted for one in _in_processes([run], 1)}
    return dict(zip(wanted, _in_processes(wanted, processes), strict=True))


def _in_processes(runs: Sequence[Run], processes: int) -> list[Outcome]:
    with _forking(processes) as pool:
        return list(pool.map(outcome, runs))


def _forking(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("fork"), _prepare)


def _reference_s() -> float:
    from loadtest.bench.iterations.iterated import reference_s

    return reference_s()


@dataclass(frozen=True, slots=True)
class CpuScale:
    """What fits a real engine on this machine: arrivals and lengths, and the seconds on its clock."""

    size: Size
    reference_s: float

    @classmethod
    def measured(cls, size: Size) -> "CpuScale":
        """From what an engine does with jobs alone, in the median of a few runs."""
        with _forking(1) as pool:
            reference_s = pool.submit(_reference_s).result()
        small = replace(size, length=CPU_LENGTH)
        brief = replace(small, seconds=min(size.seconds, _CALIBRATION_S / 2), rounds=1)
        runs = [Run("", "short", BATCH_ONLY, seed, brief, "", reference_s) for seed in range(_CALIBRATIONS)]
        per_s = median(alone.batch_per_s for alone in outcomes(runs, 1, fresh=True).values())
        return cls(replace(small, rate=BURST_LOAD * per_s / (OUTPUT_TOKENS * CPU_LENGTH) / BURST_PER_S), reference_s)
