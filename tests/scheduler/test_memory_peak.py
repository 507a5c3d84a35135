"""The peak of KV memory to come: against a batch that is lived through step by step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.catalog import build
from scheduler.jobs import Job, Outcome
from scheduler.memory_peak import FuturePeak, Running, peak_blocks

JOBS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12)


def lived_through(jobs: Iterable[tuple[int, int]]) -> float:
    """Every job takes one block more a step until it ends, and then none."""
    left = list(jobs)
    most = 0
    while left:
        most = max(most, sum(blocks for _, blocks in left))
        left = [(rest - 1, blocks + 1) for rest, blocks in left if rest > 0]
    return most


@given(JOBS)
def test_the_peak_is_that_of_a_batch_lived_through(jobs: list[tuple[int, int]]) -> None:
    assert peak_blocks(jobs, 1.0) == lived_through(jobs)


@given(JOBS, st.tuples(st.integers(0, 60), st.integers(0, 40)))
def test_one_more_job_adds_no_less_than_it_holds_and_no_more_than_it_will_hold(
    jobs: list[tuple[int, int]], one: tuple[int, int]
) -> None:
    before = peak_blocks(jobs, 1.0)
    after = peak_blocks([*jobs, one], 1.0)
    assert max(before, sum(one)) <= after <= before + sum(one)


@dataclass
class Batch:
    """Jobs whose answers get as long as is said; asked: whose rest was asked for."""

    lengths: dict[Job, int] = field(default_factory=dict)
    asked: list[Job] = field(default_factory=list)

    def job(self, prompt_tokens: int, length: int, made: int = 0) -> Job:
        job = Job(str(len(self.lengths)), "t", prompt_tokens, 0.0, output_tokens=made)
        self.lengths[job] = length
        return job

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        self.asked.append(job)
        return float(self.lengths[job] - job.output_tokens)

    def fits(self, peak: FuturePeak, head: Job, running: list[Job], size: int, shared: int = 0) -> bool:
        """Blocks are of one token; of each prompt so many are the same."""
        has = [job.prompt_tokens + job.output_tokens for job in running]
        used = sum(has) - shared * max(0, len(running) - 1)
        return peak.fits(
            head,
            [Running(job, blocks, blocks) for job, blocks in zip(running, has, strict=True)],
            free=size - used,
            used=used,
            wanted=lambda: (head.prompt_tokens, head.prompt_tokens - (shared if running else 0)),
        )


def test_a_job_waits_if_memory_will_not_do_although_it_does_now() -> None:
    batch = Batch()
    running, head = batch.job(10, length=50), batch.job(10, length=50)
    assert batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, [running], size=120)
    assert not batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, [running], size=119)


def test_who_ends_early_leaves_its_memory_to_the_others() -> None:
    """Together they will hold 60 + 30 at the end of the second one, and 80 later; never 110."""
    batch = Batch()
    running, head = batch.job(10, length=70, made=30), batch.job(10, length=10)
    assert batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, [running], size=80)
    assert not batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, [running], size=79)


def test_an_empty_batch_takes_whoever_comes() -> None:
    batch = Batch()
    assert batch.fits(FuturePeak(batch.rest_tokens, 1.0), batch.job(100, length=1000), [], size=10)


def test_where_nothing_is_known_of_lengths_only_what_is_held_now_counts() -> None:
    batch = Batch()
    peak = FuturePeak(lambda job, share=None: 0.0, 1.0)
    running, head = batch.job(60, length=0), batch.job(40, length=0)
    assert batch.fits(peak, head, [running], size=100)
    assert not batch.fits(peak, head, [running], size=99)


def test_blocks_that_prompts_share_are_counted_once() -> None:
    """Three prompts of 100 tokens, of which 90 are the same, hold 120 and grow by 20 each."""
    batch = Batch()
    running, head = [batch.job(100, length=20) for _ in range(2)], batch.job(100, length=20)
    assert batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, running, size=180, shared=90)
    assert not batch.fits(FuturePeak(batch.rest_tokens, 1.0), head, running, size=179, shared=90)


def test_the_rest_of_a_prompt_that_is_being_read_counts() -> None:
    batch = Batch()
    reading, head = batch.job(100, length=1), batch.job(10, length=1)
    for size, fits in ((112, True), (111, False)):
        running = [Running(reading, 20, 100)]
        peak = FuturePeak(batch.rest_tokens, 1.0)
        assert peak.fits(head, running, free=size - 20, used=20, wanted=lambda: (10,)) is fits


def test_who_was_held_back_is_looked_at_again_when_somebody_has_left() -> None:
    batch = Batch()
    peak = FuturePeak(batch.rest_tokens, 1.0)
    running, head = [batch.job(40, length=40) for _ in range(2)], batch.job(10, length=40)
    assert not batch.fits(peak, head, running, size=180)
    asked = len(batch.asked)
    assert not batch.fits(peak, head, running, size=180)
    assert len(batch.asked) == asked
    assert batch.fits(peak, batch.job(5, length=5), running, size=180)
    peak.left()
    assert batch.fits(peak, head, running[:1], size=180)


def test_an_expectation_is_asked_for_anew_as_an_answer_grows() -> None:
    batch = Batch()
    peak = FuturePeak(batch.rest_tokens, 1.0)
    running = batch.job(10, length=1000)
    for made in range(500):
        running.output_tokens = made
        batch.fits(peak, batch.job(1, length=1), [running], size=10_000)
    assert 20 < batch.asked.count(running) < 60


def test_lengths_of_a_batch_differ_as_those_that_are_known() -> None:
    """100 jobs of 10 or 1,000 tokens: memory need not hold 100 of the mean, nor 100 of the longest."""
    peak = FuturePeak(lambda job, share=None: 10.0 if share is not None and share < 0.9 else 1000.0, 1.0)
    running = [Running(Job(f"{number}", "t", 1, 0.0), 1, 1) for number in range(99)]
    head = Job("head", "t", 1, 0.0)
    fits = []
    for size in (5_000, 20_000):
        peak.left()
        fits.append(peak.fits(head, running, free=size - 99, used=99, wanted=lambda: (1,)))
    assert fits == [False, True]


@pytest.mark.parametrize("policy", ["gittins", "srpt"])
def test_policies_that_know_lengths_take_the_option_and_others_do_not(policy: str) -> None:
    assert build(policy, {}).order.admission == "now"
    assert build(policy, {"admission": "peak"}).order.admission == "peak"
    assert build("vtc", {"within": policy, "admission": "peak"}).order.admission == "peak"
    with pytest.raises(ValueError, match="now, peak"):
        build(policy, {"admission": "later"})
    with pytest.raises(ValueError, match="admission"):
        build("mlfq", {"admission": "peak"})


def test_gittins_expects_no_more_than_max_tokens_allows_where_clients_mean_it() -> None:
    for choice, most in (("use", 20.0), ("ignore", 400.0)):
        order = build("gittins", {"max_tokens": choice}).order
        for _ in range(200):
            order.learn(Job("", "t", 1, 0.0, max_tokens=1000, output_tokens=400), Outcome.DONE)
        assert order.rest_tokens(Job("", "t", 1, 0.0, max_tokens=20)) == most
