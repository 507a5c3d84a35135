"""With true lengths it is the best order there is; without them it is honest about it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.catalog import build
from scheduler.jobs import Job
from scheduler.policies.srpt import Srpt
from tests.scheduler.workloads import Sizes, chat, code_and_chat, mean_jct_s, open_loop, simulate, with_reasoning


def told(sizes: Sizes, seed: int) -> list:  # type: ignore[type-arg]
    """Requests whose max_tokens is their length."""
    return [replace(request, max_tokens=request.output_tokens) for request in open_loop(sizes, 900, 1.2, seed)]


@pytest.mark.parametrize("sizes", [chat, code_and_chat, with_reasoning])
def test_no_policy_has_a_lower_mean_jct_where_lengths_are_known(sizes: Sizes) -> None:
    means = {
        name: mean_jct_s(simulate(build(name, {"patience_s": "inf"} if name != "fcfs" else {}), told(sizes, 1))[1])
        for name in ("fcfs", "mlfq", "gittins", "srpt")
    }
    assert min(means, key=means.__getitem__) == "srpt"


@given(st.integers(1, 3000), st.booleans())
def test_the_lane_holds_until_the_tokens_that_it_names(max_tokens: int, running: bool) -> None:
    order, made = Srpt(), 0
    while made < max_tokens:
        job = Job("", "t", 700, 0.0, max_tokens=max_tokens, output_tokens=made)
        spot = order.spot(job, running=running, boosted_at=None)
        assert spot.until > made
        job.output_tokens = min(spot.until, max_tokens) - 1
        if running:
            assert order.spot(job, running=True, boosted_at=None).lane == spot.lane
        made = spot.until


def test_who_does_not_say_a_length_goes_last() -> None:
    order = Srpt()
    silent, long = Job("", "t", 10, 0.0), Job("", "t", 10, 0.0, max_tokens=1_000_000)
    lanes = [order.spot(job, running=False, boosted_at=None).lane for job in (silent, long)]
    assert order.rank(lanes[0]) > order.rank(lanes[1])
    assert order.displaces(long, silent, lanes[1], lanes[0])
    assert not order.displaces(silent, long, lanes[0], lanes[1])


@pytest.mark.parametrize(("left", "prompt", "pays"), [(100, 10, True), (12, 10, False), (100, 50_000, False)])
def test_a_running_job_yields_only_where_its_recomputation_pays(left: int, prompt: int, pays: bool) -> None:
    order = Srpt()
    head = Job("", "t", 10, 0.0, max_tokens=10)
    victim = Job("", "t", prompt, 0.0, max_tokens=200, output_tokens=200 - left)
    lanes = (
        order.spot(head, running=False, boosted_at=None).lane,
        order.spot(victim, running=True, boosted_at=None).lane,
    )
    assert order.displaces(head, victim, *lanes) is pays


def test_whose_patience_ended_goes_first_for_a_while() -> None:
    order = Srpt()
    waited = Job("", "t", 10, 0.0, max_tokens=5000, output_tokens=7)
    spot = order.spot(waited, running=False, boosted_at=7)
    short = order.spot(Job("", "t", 1, 1.0, max_tokens=1), running=False, boosted_at=None)
    assert order.rank(spot.lane) < order.rank(short.lane)
    waited.output_tokens = spot.until
    assert order.rank(order.spot(waited, running=True, boosted_at=7).lane) > order.rank(short.lane)
