"""Whoever comes back at the time that was told finds a place; and no tenant holds the places of all."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.reservations import KEPT_S, Reservations

PACE = 10.0


def test_who_comes_back_in_time_finds_a_place_once() -> None:
    promises = Reservations(most=5)
    after_s = promises.make("acme", PACE, 100.0)
    assert after_s == pytest.approx(0.1)
    assert not promises.redeem("acme", 100.05), "too early"
    assert promises.due(100.11) == 1
    assert not promises.redeem("other", 100.11), "it is not its own"
    assert promises.redeem("acme", 100.11)
    assert not promises.redeem("acme", 100.12) and promises.due(100.12) == 0


def test_a_place_that_nobody_comes_for_is_free_again() -> None:
    promises = Reservations(most=5)
    after_s = promises.make("acme", PACE, 100.0)
    late = 100.0 + after_s + KEPT_S
    assert promises.due(late - 0.01) == 1 and promises.due(late) == 0
    assert not promises.redeem("acme", late)
    assert promises.make("acme", PACE, late) == pytest.approx(0.1)


def test_times_are_as_far_apart_as_places_come_free() -> None:
    promises = Reservations(most=100)
    told = [promises.make(f"tenant-{number}", PACE, 100.0) for number in range(20)]
    assert [round(after_s, 6) for after_s in told] == [round((number + 1) / PACE, 6) for number in range(20)]


def test_one_tenant_leaves_half_to_others_and_each_gets_one() -> None:
    promises = Reservations(most=40)
    for _ in range(1000):
        last = promises.make("heavy", PACE, 100.0)
    assert promises._held["heavy"] == 20
    assert last == pytest.approx(21 / PACE), "without a place of its own it is told the time after the last"
    for number in range(100):
        assert promises.make(f"light-{number}", PACE, 100.0) <= (21 + number) / PACE + 1e-9
    assert promises.due(100.0 + 25 / PACE) == 25
    assert promises.redeem("light-0", 100.0 + 25 / PACE)


def test_where_nobody_may_wait_nothing_is_promised() -> None:
    promises = Reservations(most=0)
    assert promises.make("acme", PACE, 100.0) == pytest.approx(0.1)
    assert not promises.redeem("acme", 100.2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_nothing_is_kept_of_promises_that_are_over(seed: int, most: int) -> None:
    dice, promises, now = random.Random(seed), Reservations(most), 100.0
    owed: dict[str, int] = {}
    for _ in range(300):
        now += dice.expovariate(PACE)
        tenant = f"tenant-{dice.randrange(4)}"
        if dice.random() < 0.5:
            promises.make(tenant, PACE, now)
            owed[tenant] = owed.get(tenant, 0) + 1
        elif promises.redeem(tenant, now):
            owed[tenant] -= 1
            assert owed[tenant] >= 0, "no more is redeemed than was promised"
        assert 0 <= promises.due(now) <= promises._total <= most + len(promises._held)
        assert promises._total == sum(promises._held.values())
    assert promises.due(now + 1000.0 + KEPT_S) == 0
    assert not (promises._due or promises._held or promises._coming or promises._kept)
