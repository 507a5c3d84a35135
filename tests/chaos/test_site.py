"""Redis dies, all is restarted, ten times too much is asked for: short runs of what `python -m tests.chaos` does.

What hangs on how fast the machine is at this moment is measured by those runs, and not here.
"""

import pytest

from server.batch.runner import LEASE_S
from tests.chaos.__main__ import RUNS, main
from tests.chaos.batch import BatchChaos
from tests.chaos.churn import Churn
from tests.chaos.figures import Figure, table
from tests.chaos.overload import Overload
from tests.chaos.redis import GOAL_S, SYNC_S, RedisChaos
from tests.chaos.rolling import Rolling
from tests.chaos.soak import Soak, slope_per_h

pytestmark = pytest.mark.slow


async def test_redis_may_die_again_and_again() -> None:
    report = await RedisChaos(seed=1, restarts=2).run()
    assert not report.wrong, report.wrong[:3]
    assert len(report.exchanges) == 2 and max(report.exchanges) <= GOAL_S / SYNC_S
    assert report.admitted <= report.most
    assert 0.55 < report.shares["two"] < 0.75


async def test_everything_is_restarted_in_turn_and_no_client_notices() -> None:
    report = await Rolling(seed=1, rounds=1, clients=8, lame_duck_s=6.0).run()
    assert not report.seen.wrong, report.seen.wrong[:3]
    assert not report.problems
    assert report.restarts == {"gateways": 2, "workers": 3}
    assert report.seen.asked > 20 and report.kept > 5


async def test_ten_times_too_much_is_survived_and_who_waits_as_told_gets_in() -> None:
    report = await Overload(10.0, 8.0, "fcfs", peak_s=4.0).run()
    assert not report.broken, report.broken[:3]
    assert {told.status for told in report.flood + report.patient} == {200, 429}
    assert report.came_back["in"] >= 10 and not report.came_back["refused"]


async def test_two_gateways_share_a_batch_and_are_killed() -> None:
    report = await BatchChaos(seed=1, kills=4, lines=800, gateways=2).run()
    assert report.status == "completed" and report.during > 0, table(report.figures())
    assert not report.missing and not report.doubled and not report.wrong, table(report.figures())


async def test_two_gateways_with_a_bucket_share_a_batch_and_are_killed() -> None:
    report = await BatchChaos(seed=2, kills=4, lines=600, gateways=2, bucket=True).run()
    assert report.status == "completed" and report.during > 0, table(report.figures())
    assert not report.missing and not report.doubled and not report.wrong, table(report.figures())


async def test_a_batch_pauses_while_redis_is_away_and_no_line_runs_twice() -> None:
    report = await BatchChaos(seed=1, kills=0, lines=400, gateways=2, away_s=LEASE_S + 1.0).run()
    assert all(figure.met for figure in report.figures()), table(report.figures())
    assert sum(report.by_gateway) == 400, report.by_gateway


async def test_a_soak_of_seconds_counts_as_its_clients_do() -> None:
    figures = await Soak(seed=2, run_s=12.0, per_s=4.0, blow_s=4.0, settle_s=90.0).run()
    missed = [figure for figure in figures if not figure.met and "slope" not in figure.what]
    assert not missed, table(missed)


async def test_workers_join_and_leave_every_second_and_no_client_notices() -> None:
    figures = await Churn(seed=1, run_s=60.0, per_s=4.0, restart_s=25.0, count=64, settle_s=90.0).run()
    missed = [figure for figure in figures if not figure.met and "slope" not in figure.what]
    assert not missed, table(missed)


def test_a_slope_is_what_it_grows_by_in_an_hour() -> None:
    assert slope_per_h([(float(s), 5.0 + 2.0 * s) for s in range(10)]) == pytest.approx(7200.0)


def test_a_missed_goal_is_said() -> None:
    assert "≤ 5: **missed**" in table([Figure("this", "6", "≤ 5", met=False)])


def test_all_runs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in RUNS)
