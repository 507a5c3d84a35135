"""Leaning, as a table and over time."""

import pytest

from scheduler.balance import Swing, lean
from scheduler.workers import Role

BOTH, PREFILL, DECODE = Role.BOTH, Role.PREFILL, Role.DECODE
SWING = Swing(start=0.8, stop=0.3)


@pytest.mark.parametrize(
    ("leaning", "prefill_load", "decode_load", "expected"),
    [
        (BOTH, 0.0, 0.0, BOTH),
        (BOTH, 0.79, 0.79, BOTH),
        (BOTH, 0.8, 0.5, PREFILL),
        (BOTH, 0.5, 0.8, DECODE),
        (BOTH, 0.9, 0.9, BOTH),
        (PREFILL, 0.4, 0.5, PREFILL),
        (PREFILL, 0.3, 0.5, BOTH),
        (PREFILL, 0.9, 0.8, BOTH),
        (DECODE, 0.5, 0.4, DECODE),
        (DECODE, 0.5, 0.3, BOTH),
        (DECODE, 0.8, 0.9, BOTH),
    ],
)
def test_a_worker_leans_to_the_side_that_is_short(
    leaning: Role, prefill_load: float, decode_load: float, expected: Role
) -> None:
    assert lean(leaning, prefill_load, decode_load, SWING) is expected


@pytest.mark.parametrize("demand", [0.81, 1.0, 1.5])
def test_joining_a_side_of_one_is_no_reason_to_leave_it(demand: float) -> None:
    """Its own coming halves the load, and under a steady demand it stays."""
    leaning = lean(BOTH, demand, 0.0, Swing())
    assert leaning is PREFILL
    for _ in range(10):
        leaning = lean(leaning, demand / 2, 0.0, Swing())
        assert leaning is PREFILL
