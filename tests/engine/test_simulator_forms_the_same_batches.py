"""The simulator's batch beside vLLM's real scheduler with our plug-in: step by step the same jobs make a token."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest.bench.plugin.driven import BLOCK_TOKENS, DrivenEngine, StepClock, build_scheduler, request
from loadtest.simulator.batch import ContinuousBatch, Iteration
from loadtest.simulator.costmodel import CostModel
from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.objectives import NO_OBJECTIVES, Objectives
from scheduler.slack import StepLoad, StepModel
from scheduler.step_limit import StepLimit
from scheduler.tiers import TieredLanes

pytestmark = pytest.mark.engine

SLOTS, STEP_TOKENS, STEP_S = 6, 128, 0.01
PLENTY, SCARCE = 1000, 24  # KV blocks
# With its promise Gittins displaces nobody in this traffic, and there would be little to compare.
OPTIONS = {"gittins": {"tail": "inf"}, "gittins by peak": {"tail": "inf", "admission": "peak", "min_samples": "20"}}


def work(seed: int) -> Iterator[list[tuple[str, int, int]]]:
    """By step: name, prompt tokens and answer tokens of those that arrive."""
    rng = random.Random(seed)
    coming = [(f"r{at}", rng.randint(1, 190), rng.choice([1, 3, 20, 150])) for at in range(80)]
    while coming:
        number = rng.choice([0, 0, 0, 1, 3])
        yield coming[:number]
        coming = coming[number:]


class Simulated:
    """The simulator's batch, stepped by hand."""

    def __init__(self, policy: str, blocks: int, limit: StepLimit | None = None) -> None:
        # One of vLLM's blocks is a placeholder.
        capacity_tokens = (blocks - 1) * BLOCK_TOKENS
        cost = CostModel(
            max_seqs=SLOTS,
            max_batched_tokens=STEP_TOKENS,
            kv_capacity_tokens=capacity_tokens,
            prefix_block_tokens=BLOCK_TOKENS,
            attention_s_per_kv_token=1e-6,
        )
        self.batch = ContinuousBatch(cost, TieredLanes(build(policy.split()[0], OPTIONS.get(policy, {}))), limit)
        self._lengths: dict[Job, int] = {}

    def add(
        self, name: str, prompt_tokens: int, output_tokens: int, now: float, objectives: Objectives = NO_OBJECTIVES
    ) -> None:
        tenant = f"t{int(name[1:]) % 3}"
        job = Job(name, tenant, prompt_tokens, now, max_tokens=output_tokens, objectives=objectives)
        self._lengths[job] = output_tokens
        self.batch.add(job, now)

    def step(self, now: float) -> set[str]:
        """Who made a token."""
        iteration = self.batch.schedule(now)
        return set() if iteration is None else self.complete(iteration, now)

    def complete(self, iteration: Iteration, now: float) -> set[str]:
        made = self.batch.complete(iteration, now)
        for job in made:
            if job.output_tokens == self._lengths[job]:
                self.batch.finish(job, Outcome.LENGTH, now)
        return {job.id for job in made}


def said(engine: DrivenEngine) -> dict[str, int]:
    return {name: len(tokens) for name, tokens in engine.answers.items()}


@pytest.mark.parametrize("blocks", [PLENTY, SCARCE])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "vtc", "gittins", "gittins by peak"])
def test_the_same_jobs_make_a_token_at_every_step(hollow_model: Path, policy: str, blocks: int) -> None:
    clock = StepClock()
    plugin = policy.split()[0]
    scheduler = build_scheduler(
        hollow_model, plugin, OPTIONS.get(policy), slots=SLOTS, step_tokens=STEP_TOKENS, blocks=blocks, clock=clock
    )
    engine, simulated = DrivenEngine(scheduler, clock=clock, step_s=STEP_S), Simulated(policy, blocks)
    coming = work(seed=3)
    steps = 0
    while len(engine.finished) < 80:
        for name, prompt_tokens, output_tokens in next(coming, ()):
            engine.add(request(name, prompt_tokens, output_tokens, tenant=f"t{int(name[1:]) % 3}"))
            simulated.add(name, prompt_tokens, output_tokens, clock.now)
        if not scheduler.has_requests():
            continue
        before = said(engine)
        output = engine.step()
        if output is None or not output.total_num_scheduled_tokens:
            continue  # it only sent somebody away, and the next step goes on from there
        steps += 1
        made = {name for name, tokens in said(engine).items() if tokens > before.get(name, 0)}
        assert simulated.step(clock.now) == made, f"step {steps}"
    preempted = sum(
        scheduler.registry.get_sample_value("evenhand_engine_preemptions_total", {"policy": plugin, "reason": reason})
        or 0
        for reason in ("policy", "memory")
    )
    assert simulated.batch.counts.preemptions == preempted
    assert (preempted > 0) == (blocks == SCARCE or plugin in ("mlfq", "gittins"))
    assert simulated.batch.kv_used_tokens == 0


@pytest.mark.parametrize("tenants", [{}, {"tpot_s": 0.012}], ids=["alike", "one tenant's own"])
@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "srpt"])
def test_so_they_do_where_answers_limit_the_prompts(hollow_model: Path, policy: str, tenants: dict[str, float]) -> None:
    clock, objectives = StepClock(), Objectives(tpot_s=0.006)
    named = {"tpot_s": objectives.tpot_s}
    scheduler = build_scheduler(
        hollow_model, policy, slots=SLOTS, step_tokens=STEP_TOKENS, blocks=PLENTY, clock=clock, objectives=named
    )
    limit = StepLimit(StepModel())
    engine, simulated = DrivenEngine(scheduler, clock=clock, step_s=0.0), Simulated(policy, PLENTY, limit)
    coming, limited = work(seed=3), 0
    while len(engine.finished) < 80:
        for name, prompt_tokens, output_tokens in next(coming, ()):
            number = int(name[1:]) % 3
            own = {} if number else tenants  # one tenant of three
            engine.add(request(name, prompt_tokens, output_tokens, tenant=f"t{number}", **own))
            simulated.add(name, prompt_tokens, output_tokens, clock.now, replace(objectives, **own))
        iteration = simulated.batch.schedule(clock.now)
        if iteration is None:
            continue
        before = said(engine)
        output = engine.step(lambda _, seconds=iteration.duration_s: seconds)
        while output is not None and not output.total_num_scheduled_tokens:
            output = engine.step()  # it only sent somebody away
        made = {name for name, tokens in said(engine).items() if tokens > before.get(name, 0)}
        assert simulated.complete(iteration, clock.now) == made
        assert scheduler.max_num_scheduled_tokens == STEP_TOKENS
        limited += iteration.prefill_tokens in range(64, STEP_TOKENS - SLOTS)
    assert limited > 10


def test_a_short_prompt_that_goes_first_starts_beside_a_long_one_where_answers_limit_both() -> None:
    limit = StepLimit(StepModel())
    for at in range(400):
        load = StepLoad(60 * (at % 3), at % 5, 40 * (at % 7))
        limit.model.learn(load, 0.009 + 60e-6 * load.prompt_tokens + 40e-6 * load.sequences)
    simulated = Simulated("srpt", PLENTY, limit)
    simulated.add("r0", 20, 100, 0.0, Objectives(tpot_s=0.0195))
    assert simulated.step(0.0) == {"r0"}
    simulated.add("r1", 2000, 5, 0.0)
    assert simulated.step(0.01) == {"r0"}
    simulated.add("r2", 20, 5, 0.01)
    assert simulated.step(0.02) == {"r0", "r2"}
