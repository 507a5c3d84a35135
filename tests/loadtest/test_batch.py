from dataclasses import replace
from itertools import accumulate, count
from random import Random

import pytest

from loadtest.simulator.batch import ContinuousBatch
from loadtest.simulator.costmodel import CostModel
from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.objectives import Objectives
from scheduler.slack import StepLoad, StepModel
from scheduler.step_limit import Limit, StepLimit
from scheduler.tiers import TieredLanes

COST = CostModel(iteration_s=1.0, prefill_s_per_token=0.1, decode_s_per_sequence=0.01, max_seqs=2, max_batched_tokens=8)


def batch_of(cost: CostModel = COST, policy: str = "fcfs") -> ContinuousBatch:
    return ContinuousBatch(cost, TieredLanes(build(policy, {})))


def job(name: str, prompt_tokens: int = 4, *, arrived_at: float = 0.0) -> Job:
    return Job(name, "tenant", prompt_tokens, arrived_at)


def run(batch: ContinuousBatch, lengths: dict[Job, int], most_iterations: int = 1000) -> dict[str, float]:
    """Iterate until all jobs have their length; when each ended."""
    now, ended = 0.0, {}
    for _ in range(most_iterations):
        iteration = batch.schedule(now)
        if iteration is None:
            break
        now += iteration.duration_s
        for done in batch.complete(iteration, now):
            if done.output_tokens == lengths[done]:
                batch.finish(done, Outcome.DONE, now)
                ended[done.id] = now
    return ended


def test_an_idle_engine_has_no_iteration() -> None:
    assert batch_of().schedule(0.0) is None


def test_a_prefill_ends_with_the_first_token_and_takes_what_the_cost_model_says() -> None:
    batch = batch_of()
    first = job("a", 4)
    batch.add(first, 0.0)
    iteration = batch.schedule(0.0)
    assert iteration is not None
    assert iteration.duration_s == pytest.approx(1.0 + 0.4)
    assert batch.complete(iteration, 1.4) == [first]


def test_the_end_of_a_prompt_takes_longer_than_its_beginning_where_its_tokens_attend_to_each_other() -> None:
    batch = batch_of(replace(COST, attention_s_per_pair=0.5))
    batch.add(job("a", 16), 0.0)
    seconds = []
    for now in range(2):
        iteration = batch.schedule(float(now))
        assert iteration is not None
        seconds.append(iteration.duration_s)
        batch.complete(iteration, now + 1.0)
    assert seconds == [1.0 + 0.8 + 0.5 * 8 * 4, 1.0 + 0.8 + 0.5 * 8 * (8 + 4)]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    batch = batch_of()
    batch.add(job("a", 20), 0.0)
    chunks = []
    for now in range(3):
        iteration = batch.schedule(float(now))
        assert iteration is not None
        chunks.append((iteration.prefill_tokens, len(iteration.producing)))
        batch.complete(iteration, now + 1.0)
    assert chunks == [(8, 0), (8, 0), (4, 1)]


class OneTokenOfEach(StepLimit):
    def of(self, *_args: object, **_options: object) -> Limit:
        return Limit(1, 100, 1)


def test_a_step_that_computes_one_token_of_a_prompt_is_not_repeated_as_an_answers_is() -> None:
    batch = ContinuousBatch(COST, TieredLanes(build("fcfs", {})), OneTokenOfEach(StepModel()))
    batch.add(job("a", 20), 0.0)
    batch.schedule(0.0)
    second = batch.schedule(1.0)
    assert second is not None and not second.producing and not second.steady


def test_an_iteration_and_those_that_repeat_it_are_not_learned_as_one_that_took_as_long_as_all() -> None:
    limit = StepLimit(StepModel())
    batch = ContinuousBatch(CostModel(iteration_s=0.01), TieredLanes(build("fcfs", {})), limit)
    batch.add(job("a", 20), 0.0)
    now = 0.0
    for _ in range(200):
        iteration = batch.schedule(now)
        assert iteration is not None
        if iteration.steady:
            first = now + iteration.duration_s
            ends = list(accumulate(batch.durations_s(iteration, 10), initial=first))
            batch.repeat(iteration, ends[:4])
            batch.repeat(iteration, ends[4:-1])
            now = ends[-1]
        else:
            now += iteration.duration_s
        batch.complete(iteration, now)
    assert limit.model.is_known
    assert limit.model.predicted_s(StepLoad(0, 1, 1000)) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("tokens", [3, 10])
def test_answers_are_in_time_beside_long_prompts_though_steps_take_longer_than_expected_at_times(tokens: int) -> None:
    """What is planned to end just in time is late as often as not."""
    cost = CostModel(iteration_s=0.01, prefill_s_per_token=1e-4, max_seqs=8)
    batch = ContinuousBatch(cost, TieredLanes(build("fcfs", {})), StepLimit(StepModel()))
    draw, now, tpot_s = Random(7), 0.0, 0.04
    pace, arrived = Objectives(tpot_s=tpot_s), count()
    first_at: dict[Job, float] = {}
    taken_s: list[float] = []

    def add(prompt_tokens: int) -> None:
        batch.add(Job(f"{next(arrived)}", "t", prompt_tokens, now, objectives=pace), now)

    for turn in range(3000):
        if batch.waiting() + batch.running() < 4:
            add(4000 if turn % 2 else 10)
        iteration = batch.schedule(now)
        assert iteration is not None
        now += iteration.duration_s * draw.lognormvariate(0.0, 0.1)
        for one in batch.complete(iteration, now):
            first_at.setdefault(one, now)
            if one.output_tokens == tokens or one.prompt_tokens > 10:
                if one.output_tokens > 1:
                    taken_s.append((now - first_at[one]) / (one.output_tokens - 1))
                batch.finish(one, Outcome.DONE, now)
    judged = taken_s[len(taken_s) // 5 :]
    assert len(judged) > 20
    assert sum(one > tpot_s for one in judged) < 0.08 * len(judged)


def test_no_more_run_than_there_are_slots() -> None:
    batch = batch_of()
    for name in "abc":
        batch.add(job(name, 1), 0.0)
    batch.schedule(0.0)
    assert (batch.running(), batch.waiting()) == (2, 1)


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "vtc", "gittins"])
def test_every_job_ends_and_all_memory_comes_back_when_kv_is_short(policy: str) -> None:
    cost = CostModel(iteration_s=1.0, max_seqs=4, max_batched_tokens=64, kv_capacity_tokens=40, prefix_block_tokens=1)
    batch = batch_of(cost, policy)
    lengths = {job(str(at), 6 + at): 25 for at in range(8)}
    for one in lengths:
        batch.add(one, 0.0)
    ended = run(batch, lengths)
    assert len(ended) == 8
    assert batch.counts.preemptions > 0
    assert batch.kv_used_tokens == 0
    assert batch.counts.generation_tokens == 8 * 25


def test_a_preempted_job_is_computed_again_with_what_it_said() -> None:
    cost = CostModel(iteration_s=1.0, max_seqs=2, max_batched_tokens=64, kv_capacity_tokens=21, prefix_block_tokens=1)
    batch = batch_of(cost)
    lengths = {job("a", 8): 10, job("b", 8, arrived_at=0.1): 10}
    for one in lengths:
        batch.add(one, 0.0)
    run(batch, lengths)
    assert batch.counts.preemptions == 1
    assert batch.counts.prompt_tokens > 16


def test_an_aborted_job_gets_no_token_of_the_iteration_it_was_in() -> None:
    batch = batch_of()
    one = job("a")
    batch.add(one, 0.0)
    iteration = batch.schedule(0.0)
    assert iteration is not None
    batch.finish(one, Outcome.ABORTED, 0.5)
    assert batch.complete(iteration, 1.0) == []
    assert batch.kv_used_tokens == 0


def test_a_transferred_prompt_costs_no_prefill() -> None:
    cost = CostModel(iteration_s=1.0, prefill_s_per_token=1.0, transfer_s_per_token=0.01)
    batch = batch_of(cost)
    batch.add(job("a", 100), 0.0, transferred=True)
    iteration = batch.schedule(0.0)
    assert iteration is not None
    assert iteration.duration_s == pytest.approx(2.0)


def test_a_prompt_that_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="KV capacity"):
        batch_of(CostModel(kv_capacity_tokens=10)).add(job("a", 10), 0.0)


def test_a_short_job_displaces_a_long_one_under_mlfq() -> None:
    batch = batch_of(CostModel(iteration_s=0.1, max_seqs=1), "mlfq")
    long, short = job("long"), job("short", arrived_at=5.0)
    batch.add(long, 0.0)
    now = 0.0
    for _ in range(60):
        iteration = batch.schedule(now)
        assert iteration is not None
        now += iteration.duration_s
        batch.complete(iteration, now)
    batch.add(short, now)
    iteration = batch.schedule(now)
    assert iteration is not None
    assert [one.job for one in iteration.producing] == [short]
