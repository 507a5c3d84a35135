from itertools import islice
from random import Random
from statistics import mean, pstdev

import pytest

from loadtest.traces.arrivals import gamma, on_off, parse_stages, poisson, staged, timed


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, second = (list(islice(poisson(3.0, Random(7)), 50)) for _ in range(2))
    assert first == second
    assert first != list(islice(poisson(3.0, Random(8)), 50))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_has_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    seen = gaps(list(islice(gamma(5.0, cv, Random(1)), 20_000)))
    assert mean(seen) == pytest.approx(0.2, rel=0.05)
    assert pstdev(seen) / mean(seen) == pytest.approx(cv, rel=0.1)


def test_poisson_is_as_bursty_as_chance() -> None:
    seen = gaps(list(islice(poisson(5.0, Random(1)), 20_000)))
    assert pstdev(seen) / mean(seen) == pytest.approx(1.0, rel=0.05)


def test_on_off_is_silent_while_it_is_off() -> None:
    times = list(islice(on_off(10.0, 5.0, 20.0, Random(1)), 500))
    assert all(at % 25.0 <= 5.0 for at in times)
    assert times == sorted(times)


def test_a_trace_passes_as_fast_as_it_is_scaled_and_never_goes_back() -> None:
    assert list(timed([0.0, 4.0, 3.0, 8.0], rate_scale=2.0)) == [0.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        next(poisson(rate, Random(1)))


def test_stages_have_the_requests_that_their_rates_want_and_then_end() -> None:
    stages = parse_stages("5:60,5-20:100,0:50,40:10")
    times = list(staged(stages, 1.0, Random(1)))
    assert times == sorted(times) and times[-1] < 220.0
    for begin_s, end_s, expected in ((0, 60, 300), (60, 160, 1250), (160, 210, 0), (210, 220, 400)):
        assert sum(begin_s <= at_s < end_s for at_s in times) == pytest.approx(expected, abs=4 * expected**0.5)
    early = sum(60 <= at_s < 110 for at_s in times)
    assert early < 0.5 * sum(60 <= at_s < 160 for at_s in times), "a ramp begins slowly"


@pytest.mark.parametrize("text", ["5", "a:1", "5:0", "-1:5", "5-x:3"])
def test_a_stage_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a stage"):
        parse_stages(text)
