"""The step-time model: learned from whatever an engine's streams show."""

from dataclasses import astuple
from random import Random

import pytest

from scheduler.step_cost import LinearFit, StepCost

TRUE = (0.02, 140e-6, 80e-6, 12e-9, 4e-6, 80e-9)


def spans(rng: Random, noise: float) -> list[tuple[float, tuple[float, ...]]]:
    """What streams of an engine with these costs show."""
    seen = []
    for _ in range(400):
        steps, running = rng.randint(4, 300), rng.randint(1, 60)
        read = rng.choice((0, rng.randint(100, 20_000)))
        row = (
            steps,
            read,
            steps * running,
            steps * running * rng.randint(100, 8000),
            rng.choice((0, rng.randint(100, 20_000))),
            read * rng.randint(50, 8000),
        )
        exact = sum(cost * value for cost, value in zip(TRUE, row, strict=True))
        seen.append((exact * rng.uniform(1 - noise, 1 + noise), row))
    return seen


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_far_from_those_assumed_are_found(noise: float) -> None:
    fit = StepCost.fit(StepCost())
    for seconds, row in spans(Random(1), noise):
        fit.learn(seconds, row)
    for seconds, row in spans(Random(2), 0.0):
        told = sum(cost * value for cost, value in zip(fit.coefficients, row, strict=True))
        assert told == pytest.approx(seconds, rel=0.01 + noise / 2)


def test_no_cost_is_below_zero_even_where_the_spans_say_so() -> None:
    fit = LinearFit((1.0, 1.0))
    for _ in range(20):
        fit.learn(1.0, (1.0, 0.0))
        fit.learn(0.5, (1.0, 1.0))
    assert min(fit.coefficients) >= 0.0
    assert 0.6 <= fit.coefficients[0] <= 0.8  # the best without the second


def test_what_is_new_counts_more_than_what_is_old() -> None:
    fit = LinearFit((1.0,))
    for seconds in (1.0, 2.0):
        for _ in range(3000):
            fit.learn(seconds, (1.0,))
    assert fit.coefficients[0] == pytest.approx(2.0, rel=0.01)


def test_before_anything_was_seen_the_assumption_holds_and_one_observation_outweighs_it() -> None:
    fit = StepCost.fit(StepCost())
    assert fit.coefficients == astuple(StepCost())
    fit.learn(4.0, (1.0, 1000.0, 0.0, 0.0, 0.0, 0.0))
    told = fit.coefficients[0] + 1000 * fit.coefficients[1]
    assert told == pytest.approx(4.0, rel=0.3)
