"""When flex may start at a worker that cannot displace it: one prompt at a time, and none while another is read."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.pacing import FirstToken, Pacing


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(clock: Clock, looks: list[float], prompt_tokens: int = 100) -> tuple[Pacing, FirstToken]:
    pacing = Pacing()
    return pacing, FirstToken(pacing, prompt_tokens, clock, lambda: looks.append(clock.now))


def test_nothing_starts_while_a_first_token_is_awaited_and_the_line_looks_when_it_is_here() -> None:
    clock, looks = Clock(), list[float]()
    pacing, one = paced(clock, looks)
    two = FirstToken(pacing, 100, clock, lambda: looks.append(clock.now))
    assert pacing.wait_s(0.0, alone=False) == pacing.wait_s(0.0, alone=True) == inf
    clock.now = 0.2
    one.here()
    one.here()
    assert pacing.wait_s(0.2, alone=False) == inf and not looks
    two.never()
    assert pacing.wait_s(0.2, alone=False) == 0.0 and pacing.awaited == 0
    one.never()
    assert pacing.awaited == 0


def test_the_next_one_starts_once_the_last_has_probably_been_read() -> None:
    clock, looks = Clock(), list[float]()
    pacing, first = paced(clock, looks)
    clock.now = pacing.first_s
    first.here()
    assert looks == [clock.now]
    pacing.started(50, 10.0)
    short_s = pacing.wait_s(10.0, alone=False)
    assert 0.0 < short_s <= pacing.first_s
    assert pacing.wait_s(10.0 + pacing.first_s, alone=False) == 0.0
    pacing.started(int(8 * pacing.prompt_tokens), 20.0)
    assert pacing.wait_s(20.0, alone=False) == pytest.approx(8 * short_s, rel=0.01)


def test_where_nobody_else_is_flex_starts_faster_and_fills_its_places_at_once() -> None:
    pacing = Pacing()
    pacing.started(10, 1.0)
    assert 0.0 < pacing.wait_s(1.0, alone=True) < pacing.wait_s(1.0, alone=False)
    pacing.freed(alone=True)
    assert pacing.wait_s(1.0, alone=True) == 0.0 < pacing.wait_s(1.0, alone=False)
    pacing.started(10, 1.0)
    assert pacing.wait_s(1.0, alone=True) > 0.0
    pacing.freed(alone=True)
    pacing.freed(alone=False)  # somebody is here: what is free is not filled at one blow once they leave
    assert pacing.wait_s(1.0, alone=True) > 0.0


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.0, 100.0)), min_size=1))
def test_what_is_expected_lies_within_what_was_seen(seen: list[tuple[int, float]]) -> None:
    clock, pacing = Clock(), Pacing()
    for prompt_tokens, seconds in seen:
        first = FirstToken(pacing, prompt_tokens, clock, lambda: None)
        clock.now += seconds
        first.here()
        clock.now = 0.0
    assert 0.0 <= pacing.first_s <= max(0.1, *(seconds for _, seconds in seen))
    assert pacing.awaited == 0 and 0.0 < pacing.prompt_tokens <= max(512, *(tokens for tokens, _ in seen))
