"""The simulation keeps the books of real runs: nothing is lost, service takes the time the cost model says."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.call import TraceCall
from loadtest.report.report import Objective, summarize
from loadtest.simulator.batch import ContinuousBatch
from loadtest.simulator.costmodel import CostModel
from loadtest.simulator.simulate import Plan, Simulated, Simulation, block_prompts
from loadtest.traces import arrivals
from loadtest.traces.workload import Fit, Maker, parse_shares, shapes
from scheduler.catalog import POLICIES, build
from scheduler.jobs import Job, Outcome
from scheduler.objectives import Objectives
from scheduler.tiers import TieredLanes

COST = CostModel(
    iteration_s=0.01, prefill_s_per_token=1e-4, decode_s_per_sequence=1e-3, max_seqs=4, prefix_block_tokens=0
)


def call(name: str, at_s: float = 0.0, prompt: int = 100, output: int = 10, tenant: str = "t") -> TraceCall:
    return TraceCall(name, at_s, tenant, [], prompt, output)


def load(number: int, rate_per_s: float, workload: str = "C") -> Iterator[TraceCall]:
    maker = Maker(block_prompts(0), Fit(0.25), parse_shares("a=2,b=1"))
    times_s = arrivals.poisson(rate_per_s, Random(2))
    return islice(maker.calls(shapes(workload, Random(1)), times_s, Random(3)), number)


def simulated(plan: Plan, calls: list[TraceCall]) -> Simulated:
    return Simulation(plan).run(calls)


def test_a_call_alone_takes_what_the_cost_model_says() -> None:
    (record,) = simulated(Plan(COST), [call("a")]).records
    step_s = COST.iteration_s + COST.decode_s_per_sequence
    assert record.ttft_s == pytest.approx(COST.iteration_s + 100 * COST.prefill_s_per_token)
    assert record.e2e_s == pytest.approx(record.ttft_s + 9 * step_s, abs=1e-5)
    assert sum(record.gaps_us) == pytest.approx(9 * step_s * 1e6, abs=2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_call_ends_with_all_its_tokens_under_every_policy(policy: str, workers: int) -> None:
    calls = list(load(200, 4.0 * workers))
    seen = simulated(Plan(COST, policy, workers=workers), calls)
    assert sorted(record.id for record in seen.records) == sorted(one.id for one in calls)
    assert all(record.output_tokens == record.asked_tokens for record in seen.records)
    assert all(len(record.gaps_us) == record.output_tokens - 1 for record in seen.records)


def test_the_same_run_twice_is_the_same() -> None:
    first, second = (simulated(Plan(COST, "gittins", workers=2), list(load(150, 8.0))) for _ in range(2))
    assert (first.records, first.samples) == (second.records, second.samples)


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    workers=st.sampled_from([1, 3]),
    rate_per_s=st.sampled_from([1.0, 6.0, 20.0]),
    kv_tokens=st.sampled_from([700, 3000, 50_000]),
    concurrency=st.sampled_from([None, 5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_iterations_in_stretches_come_out_as_one_by_one(
    policy: str, workers: int, rate_per_s: float, kv_tokens: int, concurrency: int | None, seed: int
) -> None:
    draw, at_s, calls = Random(seed), 0.0, []
    for at in range(30):
        at_s += draw.expovariate(rate_per_s)
        calls.append(call(f"{at}", at_s, draw.randint(1, 400), draw.randint(1, 100), draw.choice("ab")))
    cost = replace(COST, attention_s_per_kv_token=1e-6, kv_capacity_tokens=kv_tokens, max_batched_tokens=128)
    plan = Plan(cost, policy, workers=workers, concurrency=concurrency)
    one_by_one = Simulation(plan, longest_stretch=0).run(calls)
    stretched = Simulation(plan).run(calls)
    assert (stretched.records, stretched.iterations) == (one_by_one.records, one_by_one.iterations)


def test_one_worker_without_a_gateway_is_the_batch_that_the_fake_engine_runs() -> None:
    calls = [call(f"{at}", 0.0, prompt=50 + at, output=5 + at) for at in range(12)]
    seen = {record.id: record.e2e_s for record in simulated(Plan(COST, gateway=False), calls).records}
    batch, now, ended = ContinuousBatch(COST, TieredLanes(build("fcfs", {}))), 0.0, dict[str, float]()
    jobs = {one.id: Job(one.id, "t", one.prompt_tokens, 0.0) for one in calls}
    want = {one.id: one.output_tokens for one in calls}
    first = calls[0].id
    batch.add(jobs[first], 0.0)
    iteration = batch.schedule(0.0)
    for one in calls[1:]:
        batch.add(jobs[one.id], 0.0)
    while iteration is not None:
        now += iteration.duration_s
        for job in batch.complete(iteration, now):
            if job.output_tokens >= want[job.id]:
                batch.finish(job, Outcome.DONE, now)
                ended[job.id] = now
        iteration = batch.schedule(now)
    assert seen == pytest.approx(ended, abs=1e-5)


def test_a_closed_loop_keeps_its_calls_on_their_way_and_sends_the_next_when_one_ends() -> None:
    calls = [call(f"{at}", output=10) for at in range(20)]
    seen = simulated(Plan(COST, concurrency=4), calls)
    ends = sorted(round(record.sent_s + record.e2e_s, 5) for record in seen.records)
    starts = sorted(round(record.sent_s, 5) for record in seen.records)
    assert starts[:4] == [0.0] * 4
    assert starts[4:] == ends[:16]


def test_more_workers_serve_more() -> None:
    calls = list(load(300, 30.0))
    one, four = (summarize(simulated(Plan(COST, workers=workers), calls).records) for workers in (1, 4))
    assert four.duration_s < one.duration_s / 2.5
    assert four.ttft.p99 < one.ttft.p99 / 2.5


def test_vtc_protects_the_light_tenant_as_in_a_real_run() -> None:
    heavy = [call(f"h{at}", at * 0.02, tenant="heavy") for at in range(400)]
    light = [call(f"l{at}", at * 0.4, tenant="light") for at in range(20)]
    calls = sorted(heavy + light, key=lambda one: one.at_s)
    waits = {}
    for policy in ("fcfs", "vtc"):
        summary = summarize(simulated(Plan(COST, policy), calls).records)
        waits[policy] = summary.by_tenant["light"].ttft.p50
    assert waits["vtc"] < waits["fcfs"] / 5


def test_queue_and_memory_are_sampled_in_virtual_seconds() -> None:
    seen = simulated(Plan(COST), list(load(300, 30.0)))
    assert [later.at_s - earlier.at_s for earlier, later in zip(seen.samples, seen.samples[1:], strict=False)] == (
        pytest.approx([1.0] * (len(seen.samples) - 1), abs=0.5)
    )
    assert max(sample.waiting or 0.0 for sample in seen.samples) > 50
    assert all(0.0 <= (sample.kv_usage or 0.0) <= 1.0 for sample in seen.samples)


def test_a_prompt_that_is_known_already_costs_less() -> None:
    cached = CostModel(0.01, 1e-3, 1e-3, max_seqs=4, prefix_block_tokens=16)
    prompts = block_prompts(16)
    shared = [TraceCall(f"{at}", at * 5.0, "t", prompts(at, 160, (7, 8, 9), 16), 160, 4) for at in range(2)]
    own = [TraceCall(f"{at}", at * 5.0, "t", prompts(at, 160, (), 16), 160, 4) for at in range(2)]
    first, second = simulated(Plan(cached), shared).records
    assert first.ttft_s is not None
    assert second.ttft_s == pytest.approx(first.ttft_s - 48 * 1e-3, abs=1e-5)
    alone = simulated(Plan(cached), own).records
    assert alone[0].ttft_s == alone[1].ttft_s == first.ttft_s


def test_a_call_that_can_never_run_is_told() -> None:
    small = CostModel(0.01, max_seqs=4, kv_capacity_tokens=64)
    with pytest.raises(ValueError, match="exceeds the KV capacity"):
        simulated(Plan(small), [call("a", prompt=100)])


def test_a_conversations_next_turn_waits_for_the_answer_before_it() -> None:
    first, second = (
        replace(call("a"), session="s", waits=True),
        TraceCall("b", 0.0, "t", [], 100, 10, session="s", waits=True),
    )
    records = {record.id: record for record in simulated(Plan(COST), [first, second]).records}
    assert records["b"].sent_s == pytest.approx(records["a"].e2e_s, abs=1e-5)


@pytest.mark.parametrize(("blocks", "trace_tokens"), [((5, 6), 32), ((1, 2, 3, 4, 5, 6, 7, 8), 8)])
def test_blocks_of_another_size_share_as_many_tokens(blocks: tuple[int, ...], trace_tokens: int) -> None:
    make = block_prompts(16)
    one, two = (make(at, 160, blocks, trace_tokens) for at in range(2))
    assert len(one) == len(two) == 10
    assert one[:4] == two[:4]
    assert not set(one[4:]) & set(two[4:])


def test_a_prompt_that_is_read_elsewhere_costs_its_transfer_where_it_is_answered() -> None:
    """Its first token does not wait for that, unless it is the only one."""
    cost = CostModel(0.01, 1e-3, 1e-3, transfer_s_per_token=1e-5, max_seqs=4, prefix_block_tokens=0)
    plan = Plan(cost, workers=1, prefill_workers=1)
    (record,) = simulated(plan, [call("a", prompt=500, output=5)]).records
    read_s = 0.01 + 500 * 1e-3
    fetch_s = 0.01 + 500 * 1e-5
    assert record.ttft_s == pytest.approx(read_s, abs=1e-5)
    assert record.output_tokens == 5 and record.gaps_us[0] == pytest.approx(1e6 * fetch_s, abs=10)
    (only,) = simulated(plan, [call("c", prompt=500, output=1)]).records
    assert only.ttft_s == pytest.approx(read_s + fetch_s, abs=1e-5) and only.output_tokens == 1
    (short,) = simulated(plan, [call("b", prompt=100)]).records  # below the rules' least: read where it is answered
    assert short.ttft_s == pytest.approx(0.01 + 100 * 1e-3, abs=1e-5)


def test_long_prompts_that_are_read_elsewhere_no_longer_hold_up_running_answers() -> None:
    cost = CostModel(0.005, 2e-4, 1e-4, transfer_s_per_token=1e-6, max_seqs=16, prefix_block_tokens=0)
    calls = [call(f"{at}", at * 0.4, prompt=1500, output=300) for at in range(80)]
    together, apart = (
        summarize(simulated(Plan(cost, workers=2 - readers, prefill_workers=readers), calls).records)
        for readers in (0, 1)
    )
    assert apart.requests == together.requests == 80
    assert apart.longest_gap.p99 < together.longest_gap.p99 / 5


@pytest.mark.parametrize("step_tokens", [512, 2048])
@pytest.mark.parametrize("every_s", [0.35, 0.4, 0.45])
def test_engines_that_do_both_take_sides_where_no_request_by_itself_gains_by_it(
    step_tokens: int, every_s: float
) -> None:
    """Prompts like clockwork: each engine would read every other one, and every answer be a little late for ever."""
    cost = CostModel(0.005, 2e-4, max_batched_tokens=step_tokens, prefix_block_tokens=0)
    calls = [call(f"{at}", at * every_s, prompt=1500, output=200) for at in range(200)]
    objective = Objective(1.0, 0.008)
    records = simulated(Plan(cost, workers=2, objectives=Objectives(1.0, 0.008)), calls).records
    assert sum(map(objective.met, records)) >= 190, "but for the first few, from which all is learned"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_call_ends_when_prompts_are_read_apart_too(policy: str) -> None:
    calls = list(load(200, 10.0))
    seen = simulated(Plan(COST, policy, workers=2, prefill_workers=2), calls)
    assert sorted(record.id for record in seen.records) == sorted(one.id for one in calls)
    assert all(record.output_tokens == record.asked_tokens for record in seen.records)


@pytest.mark.parametrize("policy", ["mlfq", "gittins"])
def test_what_a_preempting_policy_gains_in_the_engine_it_keeps_behind_the_gateway(policy: str) -> None:
    calls = list(load(300, 4.0, "R"))

    def mean_s(plan: Plan) -> float:
        return summarize(simulated(plan, calls).records).e2e.mean

    options = {"tail": "inf"}  # what the policy gains at most: its promise about first tokens would take part of it
    first_come, alone = mean_s(Plan(COST)), mean_s(Plan(COST, policy, options, gateway=False))
    assert alone < 0.8 * first_come, "the engine alone gains nothing that could be kept"
    assert mean_s(Plan(COST, policy, options)) == pytest.approx(alone, rel=0.02)
    assert mean_s(Plan(COST, policy, options, ahead=4)) > (alone + first_come) / 2, "a short window would do as well"
