"""The index that lengths give: against the definition, worked out by hand or by brute force."""

import random
from bisect import bisect_left, bisect_right

import pytest

from scheduler.policies.lengths import Lengths


def lengths_of(samples: list[int], window: int = 5000) -> Lengths:
    lengths = Lengths(window, 50)
    for tokens in samples:
        lengths.add(tokens, ended=True)
    return lengths


def index_by_definition(samples: list[int], age: int, prefill_steps: float = 0.0) -> float:
    alive = [tokens for tokens in samples if tokens > age]

    def rate(bound: int) -> float:
        return sum(s <= bound for s in alive) / (len(alive) * prefill_steps + sum(min(s, bound) - age for s in alive))

    return max(rate(bound) for bound in set(alive))


def two_kinds(count: int = 1000) -> list[int]:
    """Nine tenths last 10 tokens, one tenth 1,000."""
    return [10 if number % 10 else 1000 for number in range(count)]


def test_index_is_the_best_rate_over_all_quanta() -> None:
    lengths = lengths_of(two_kinds())
    assert lengths.index(0, 0.0) == pytest.approx(0.9 / 10, rel=0.01)
    assert lengths.index(10, 0.0) == pytest.approx(1 / 990)
    assert lengths.index(500, 0.0) == pytest.approx(1 / 500)


@pytest.mark.parametrize("age", [0, 3, 10, 40, 200])
@pytest.mark.parametrize("prefill_steps", [0.0, 5.0])
def test_index_of_many_lengths_is_near_the_definition(age: int, prefill_steps: float) -> None:
    rng = random.Random(2)
    samples = [int(rng.lognormvariate(4, 1)) + 1 for _ in range(4000)]
    estimate = lengths_of(samples).index(age, prefill_steps)
    assert estimate == pytest.approx(index_by_definition(samples, age, prefill_steps), rel=0.15)


def test_prefill_lowers_the_index() -> None:
    lengths = lengths_of(two_kinds())
    indices = [lengths.index(0, steps) for steps in (0.0, 1.0, 4.0, 100.0)]
    assert indices == sorted(indices, reverse=True)
    assert indices[1] == pytest.approx(0.9 / 11, rel=0.01)


def test_job_that_outlives_all_samples_keeps_the_index_of_the_last_supported_age() -> None:
    lengths = lengths_of(two_kinds())
    assert lengths.index(10**6, 0.0) == lengths.index(999, 0.0) > 0


def test_not_ready_before_enough_jobs_have_ended() -> None:
    lengths = Lengths(2000, 50)
    for _ in range(500):
        lengths.add(5, ended=False)
    for _ in range(49):
        lengths.add(10, ended=True)
    assert not lengths.ready
    assert lengths.add(10, ended=True)
    assert lengths.ready


def test_refits_ever_more_rarely_as_samples_grow() -> None:
    lengths = Lengths(2000, 50)
    refits = sum(lengths.add(number % 97 + 1, ended=True) for number in range(10_000))
    assert 60 < refits < 120


def test_jobs_that_were_cut_count_as_at_least_so_long_and_not_as_short() -> None:
    """Half of all jobs last 100 tokens, half 1,000, and a third of all are cut at 50."""
    cut, naive = Lengths(3000, 50), Lengths(3000, 50)
    truth = lengths_of([100, 1000] * 1500)
    for number in range(3000):
        tokens, ended = (50, False) if number % 3 == 0 else ((100, 1000)[number % 2], True)
        cut.add(tokens, ended=ended)
        naive.add(tokens, ended=True)
    for age in (0, 60, 150):
        assert cut.index(age, 0.0) == pytest.approx(truth.index(age, 0.0), rel=0.1)
    assert naive.index(0, 0.0) > 1.3 * truth.index(0, 0.0)


def test_old_lengths_are_forgotten() -> None:
    lengths = lengths_of([1000] * 500 + [10] * 400, window=400)
    assert lengths.index(0, 0.0) == pytest.approx(1 / 10, rel=0.1)


def test_samples_of_one_kind_hardly_ever_differ() -> None:
    def drawn(seed: int, count: int) -> Lengths:
        rng = random.Random(seed)
        return lengths_of([int(rng.expovariate(1 / 60)) + 1 for _ in range(count)])

    whole = drawn(0, 2000)
    assert sum(drawn(seed, 80).differs(whole) for seed in range(1, 101)) <= 4


@pytest.mark.parametrize("other", [[30] * 80, [90] * 80, [10, 110] * 40, [60] * 40 + [2000] * 40])
def test_other_lengths_or_another_spread_differ(other: list[int]) -> None:
    assert lengths_of(other).differs(lengths_of([50, 60, 70] * 300))
    assert lengths_of([50, 60, 70] * 300).differs(lengths_of(other))


@pytest.mark.parametrize("age", [0, 10, 40, 150])
def test_rest_is_that_of_those_that_were_as_long(age: int) -> None:
    rng = random.Random(3)
    samples = [int(rng.lognormvariate(4, 1)) + 1 for _ in range(2000)]
    lengths = lengths_of(samples)
    rests = sorted(tokens - age for tokens in samples if tokens > age)
    assert lengths.rest(age) == pytest.approx(sum(rests) / len(rests), rel=0.05)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        rest = lengths.rest(age, share)
        assert bisect_left(rests, rest) / len(rests) - 0.02 <= share <= bisect_right(rests, rest) / len(rests) + 0.02


def test_rest_of_one_that_is_longer_than_all_before_is_a_token_at_least() -> None:
    lengths = lengths_of(two_kinds())
    assert lengths.rest(10**6) >= 1.0
    assert lengths.rest(10**6, 0.5) >= 1.0
