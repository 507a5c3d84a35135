"""What it is worth that engines take sides, by a fluid model; and what is asked of them."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.objectives import Objectives
from scheduler.sides import Offered, Offering, Sides, best_sides
from scheduler.step_cost import StepCost

COST = StepCost(0.005, 200e-6, 50e-6, 0.0, 0.0, 0.0)
OBJECTIVES = Objectives(1.0, 0.008)


def offered(rate: float, read_s: float = 0.3, output_tokens: float = 200.0) -> Offered:
    return Offered(rate, read_s, 1500.0, output_tokens)


def test_sides_are_worth_it_where_prompts_would_make_every_answer_a_little_late() -> None:
    """0.75 of one engine is reading: two that do both have 5 ms ÷ (1 - 0.375) = 8 ms a token, and by chance more."""
    sides = best_sides(offered(2.5), 2, COST, OBJECTIVES)
    assert sides.worth > 0.2 and sides.readers == 1


@pytest.mark.parametrize(
    ("what", "engines", "objectives"),
    [
        (offered(0.3), 2, OBJECTIVES),  # little to read
        (offered(2.5), 2, Objectives(1.0, 0.05)),  # answers have time
        (offered(2.5), 2, Objectives(1.0, inf)),
        (offered(2.5), 1, OBJECTIVES),
        (offered(4.0), 2, OBJECTIVES),  # one engine could not read all of it
        (offered(1.0, output_tokens=25_000.0), 2, OBJECTIVES),  # nor write all of it
        (offered(0.5, read_s=1.5), 2, OBJECTIVES),  # late whoever reads it
    ],
    ids=["little", "loose", "no_objective", "alone", "too_much_to_read", "too_much_to_write", "too_long"],
)
def test_sides_are_worth_little_or_nothing_elsewhere(what: Offered, engines: int, objectives: Objectives) -> None:
    assert best_sides(what, engines, COST, objectives).worth < 0.05


def test_sides_save_nobody_whose_prompt_alone_takes_too_long() -> None:
    assert best_sides(offered(0.1, read_s=1.05, output_tokens=5.0), 2, COST, Objectives(1.0, 0.006)).worth == 0.0


def test_as_many_engines_read_as_there_is_to_read() -> None:
    numbers = [best_sides(offered(rate), 8, COST, OBJECTIVES).readers for rate in (1.5, 6.0, 12.0)]
    assert numbers == sorted(numbers) and 1 <= numbers[0] < numbers[-1] < 8


def test_those_that_write_must_hold_all_answers_in_memory() -> None:
    """2.56 answers run at a time, with 1,600 tokens each."""
    assert best_sides(offered(2.5), 2, COST, OBJECTIVES, 6000.0) == best_sides(offered(2.5), 2, COST, OBJECTIVES)
    assert best_sides(offered(2.5), 2, COST, OBJECTIVES, 5000.0).worth == 0.0


def test_fewer_read_where_answers_need_the_memory_of_more() -> None:
    assert best_sides(offered(6.0), 8, COST, OBJECTIVES).readers == 4
    assert best_sides(offered(6.0), 8, COST, OBJECTIVES, 2800.0).readers == 3


def test_fewer_read_where_it_takes_those_that_write_long_to_fetch_what_they_have_read() -> None:
    slow = replace(COST, fetched_token_s=40e-6)
    assert best_sides(offered(9.0), 8, COST, OBJECTIVES).readers == 6
    assert best_sides(offered(9.0), 8, slow, OBJECTIVES).readers < 6


@given(
    st.floats(0.01, 100.0), st.floats(0.001, 10.0), st.floats(1.0, 1e4), st.integers(1, 50), st.floats(0.01, 10.0),
    st.floats(1e-3, 1.0),
)  # fmt: skip
def test_the_worth_is_a_share_and_somebody_always_writes(
    rate: float, read_s: float, output_tokens: float, engines: int, ttft_s: float, tpot_s: float
) -> None:
    sides = best_sides(offered(rate, read_s, output_tokens), engines, COST, Objectives(ttft_s, tpot_s))
    assert 0.0 <= sides.worth <= 1.0 and 0 <= sides.readers < engines
    assert engines > 1 or sides == Sides()


def test_what_is_asked_is_known_after_a_few_requests_and_forgets() -> None:
    offering, now = Offering(), 100.0
    assert offering.of(1500.0, 200.0) is None
    for _ in range(6):
        offering.note(0.3, 1, now)
        now += 0.5
    soon = offering.of(1500.0, 200.0)
    assert soon is not None and soon.rate == pytest.approx(2.0, rel=0.02) and soon.read_s == pytest.approx(0.3)
    for _ in range(600):  # five minutes of something else
        offering.note(0.1, 2, now)
        now += 0.5
    later = offering.of(1500.0, 200.0, owners=3)
    assert later is not None and later.rate == pytest.approx(3 * 4.0, rel=0.02), "answers, of all owners"
    assert later.read_s == pytest.approx(0.05, rel=0.02) and later.readers == pytest.approx(0.6, rel=0.02)


def test_a_pause_is_taken_for_a_pause_and_a_lull_for_a_lull() -> None:
    def rate_after(gap_s: float, times: int) -> float:
        offering, now = Offering(), 0.0
        for number in range(100 + times):
            offering.note(0.3, 1, now)
            now += 0.5 if number < 99 else gap_s
        known = offering.of(1500.0, 200.0)
        assert known is not None
        return known.rate

    assert rate_after(150.0, 1) > 0.8 * 2.0, "what came before it will come again"
    assert rate_after(4.0, 30) == pytest.approx(0.25, rel=0.2), "it is no pause if it goes on"


def test_requests_that_come_all_at_once_have_no_rate() -> None:
    offering = Offering()
    for _ in range(10):
        offering.note(0.3, 1, 7.0)
    assert offering.of(1500.0, 200.0) is None
