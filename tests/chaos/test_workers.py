"""Workers die and freeze under load, and no client can tell. `make soak` does more of it, with other seeds."""

import os

import pytest

from tests.chaos.plan import plan
from tests.chaos.workers import Chaos

TIMES = int(os.environ.get("EVENHAND_SOAK", "1"))


@pytest.mark.parametrize("seed", range(1, 2 if TIMES == 1 else 11))
@pytest.mark.slow
async def test_no_answer_is_lost_or_changed_while_workers_die_and_freeze(seed: int) -> None:
    report = await Chaos(seed, blows=4 if TIMES == 1 else 20).run()
    assert not report.seen.wrong, report.seen.wrong[:3]
    assert report.seen.answers["right"] >= 20
    assert report.kinds["stop"] >= 1 and report.kinds["kill"] >= 3
    assert report.failovers["failed"] == 0 and report.failovers["resumed"] >= 1


def test_a_plan_follows_from_its_seed() -> None:
    assert plan(7, 3, 8) == plan(7, 3, 8) != plan(8, 3, 8)
    assert {event.worker for event in plan(7, 3, 30)} == {0, 1, 2}
