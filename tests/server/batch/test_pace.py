"""When a batch is said to be late."""

from server.batch.pace import LEAST_S, MEMORY_S, Pace


def paced(per_s: float, total: int, window_s: float, seconds: int) -> Pace:
    """A batch that has gone on evenly for so many seconds of its window."""
    pace = Pace()
    for now in range(seconds + 1):
        pace.note(float(now), int(now * per_s), total, window_s - now)
    return pace


def test_a_batch_is_late_if_its_window_ends_first_at_its_pace() -> None:
    assert not paced(10.0, 10_000, window_s=1100.0, seconds=300).late
    late = paced(10.0, 10_000, window_s=900.0, seconds=300)
    assert late.late and late.left == 7000


def test_a_batch_that_does_not_move_is_late_and_one_that_has_just_begun_is_not() -> None:
    assert paced(0.0, 10, window_s=86400.0, seconds=300).late
    assert not paced(0.0, 10, window_s=86400.0, seconds=int(LEAST_S) - 1).late


def test_the_pace_is_that_of_the_last_minutes() -> None:
    pace = paced(1.0, 10_000, window_s=4000.0, seconds=600)
    assert pace.late
    for now in range(601, 601 + int(MEMORY_S)):
        pace.note(float(now), 600 + (now - 600) * 10, 10_000, 4000.0 - now)
    assert not pace.late
