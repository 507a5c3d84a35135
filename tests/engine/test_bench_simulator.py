"""The simulator beside a real engine: on a clock that counts work it foretells every request."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest.bench.iterations.simulator_error import Foretold, chance, error, p99_error, ranking
from loadtest.bench.policies.policies_bench import Setting

pytestmark = pytest.mark.engine


def foretold(real: list[list[float]], told: list[float]) -> Foretold:
    return Foretold(np.array(real), np.array(real), np.array([told]), np.array([told]))


def test_errors_are_held_against_the_median_of_the_repetitions() -> None:
    real = np.array([[1.0, 2.0], [1.0, 4.0], [9.0, 2.0]])
    assert error(real, np.array([[1.1, 2.0]])) == pytest.approx(0.05)
    assert p99_error(np.array([[1.0] * 100]), np.array([[1.2] * 100])) == pytest.approx(0.2)
    assert chance(error, real[:1]) is None
    assert chance(error, np.array([[1.0], [1.0], [2.0]])) == pytest.approx(1 / 3)


def test_only_policies_that_every_repetition_tells_apart_are_ranked() -> None:
    results = {
        Setting("S", 8, 1.0, 2): {
            "good": foretold([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]),
            "bad": foretold([[2.0, 2.0], [3.0, 3.0]], [0.5, 0.5]),
            "unclear": foretold([[0.5, 0.5], [4.0, 4.0]], [9.0, 9.0]),
        }
    }
    assert all("in 0 of 1 pairs" in line for line in ranking(results))


@pytest.mark.slow
def test_on_a_clock_that_counts_work_every_request_is_foretold(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "deploy.cli", "bench", "simulator", "--clock", "work", "--workloads", "C"]
    argv += ["--policies", "fcfs,mlfq", "--limit", "24", "--slots", "2", "--length-scale", "0.05", "--context", "400"]
    argv += ["--loads", "2", "--repetitions", "1", "--out", str(tmp_path)]
    page = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=560).stdout
    assert "| C | 2 | fcfs | 0.0% | 0.0% | 0.0% | 0.0% |" in page
    assert "| C | 2 | mlfq | 0.0% | 0.0% | 0.0% | 0.0% |" in page
    assert "All 2: 0.0% of a request's E2E in the median" in page
