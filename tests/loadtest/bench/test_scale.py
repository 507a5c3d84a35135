"""The tables of `evenhand bench scale`, and that a few workers are enough to choose from."""

from argparse import Namespace
from random import Random

from loadtest.bench.full_scan import FullScan
from loadtest.bench.scale import placement
from loadtest.bench.scale.replicas import made_up
from loadtest.bench.scale.scale import TABLES, table
from scheduler.routing import Choice


def test_a_row_shows_medians_and_ratios_to_the_first_row_of_the_same_repetition() -> None:
    def row(cpu_us: float) -> dict[str, float]:
        return {"cpu_us": cpu_us, "per_s": 1.0, "idle": 0.0, "mb": 50.0}

    runs = {1: [row(50.0), row(100.0)], 1000: [row(55.0), row(120.0)]}
    last = table("workers", runs, TABLES["workers"][2]).splitlines()[-1]
    assert "| 1,000 | 87.5 (55.0–120.0) | 1.15 (1.10–1.20) |" in last


def test_requests_of_a_simulated_fleet_go_where_a_full_scan_sends_them() -> None:
    args = Namespace(workers=40, load=0.9, length_scale=1 / 16)
    calls = placement.placed_calls(made_up(Random(0))[:300], args)
    assert placement.simulated(calls, 40, FullScan) == placement.simulated(calls, 40, Choice)
