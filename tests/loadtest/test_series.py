import numpy as np
import pytest

from loadtest.records import Record
from loadtest.report import series


def record(sent_s: float, e2e_s: float, gaps_us: list[int] | None = None, tokens: int = 3) -> Record:
    gaps = [100_000, 100_000] if gaps_us is None else gaps_us
    return Record("a", "t", sent_s, sent_s, e2e_s, 10, tokens, ttft_s=0.5, gaps_us=gaps)


def test_in_flight_counts_what_was_sent_and_has_not_ended() -> None:
    flying = series.in_flight([record(0.0, 2.0), record(1.0, 2.0)], np.array([0.5, 1.5, 2.5, 3.5]))
    assert flying.tolist() == [1, 2, 1, 0]


def test_every_token_has_its_time() -> None:
    assert series.token_times_s([record(1.0, 0.8)]).tolist() == pytest.approx([1.5, 1.6, 1.7])


def test_tokens_that_shared_a_chunk_are_all_counted() -> None:
    times = series.token_times_s([record(0.0, 1.0, tokens=9)])
    assert times.size == 9
    assert (times[0], times[-1]) == (pytest.approx(0.5), pytest.approx(0.7))


def test_an_answer_in_one_piece_comes_when_it_ends() -> None:
    assert series.token_times_s([record(0.0, 2.0, gaps_us=[], tokens=4)]).tolist() == [2.0] * 4


def test_a_rate_is_counted_over_what_there_is_of_its_window() -> None:
    rates = series.rate(np.arange(0.0, 10.0, 0.1), np.linspace(0.0, 10.0, 11), 2.0)
    assert rates[1:-1] == pytest.approx(np.full(9, 10.0), abs=1.0)
    assert rates[0] == pytest.approx(10.0, abs=1.5)


def test_a_window_without_requests_is_no_number() -> None:
    shares = series.windowed([record(0.0, 1.0)], np.array([0.0, 50.0]), 2.0, lambda some: float(len(some)))
    assert shares[0] == 1.0
    assert np.isnan(shares[1])
