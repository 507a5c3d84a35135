"""`evenhand bench disaggregation`: what is asked, how goodput is taken, what is simulated."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from math import inf
from pathlib import Path
from random import Random
from statistics import mean

import pytest
from rich.console import Console

from loadtest.bench import disaggregation_simulated
from loadtest.bench.disaggregation import ROLES, TOGETHER, stopping
from loadtest.bench.disaggregation_load import (
    CONTEXT_TOKENS,
    MEAN_PROMPT_TOKENS,
    WORKERS,
    Idle,
    goodputs,
    means_of,
    mixes,
    ratio_of,
)
from loadtest.bench.disaggregation_simulated import Engine, SimulatedSide, divided, simulated
from loadtest.bench.random_model import write
from loadtest.call import TraceCall
from loadtest.records import Record

IDLE = Idle(ttft_s=0.2, tpot_s=0.01)
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip


def record(ttft_s: float, tpot_s: float) -> Record:
    gaps_us = [round(tpot_s * 1e6)] * 10
    return Record("r", "t", 0.0, 0.0, ttft_s + 10 * tpot_s, 100, 11, ttft_s=ttft_s, gaps_us=gaps_us)


def test_made_up_lengths_have_the_mean_prompt_that_they_should() -> None:
    (lengths,) = mixes(None, Random(1)).values()
    assert len(lengths) == 2000
    assert mean(shape.prompt_tokens for shape in lengths) == pytest.approx(MEAN_PROMPT_TOKENS, rel=0.1)
    assert max(shape.prompt_tokens for shape in lengths) <= CONTEXT_TOKENS


def test_all_sides_have_as_many_engines() -> None:
    for options in (TOGETHER, *ROLES.values()):
        assert sum(int(count) for count in options[1::2]) == WORKERS


def test_goodput_is_for_each_worker_and_grows_as_the_objective_loosens() -> None:
    slow, quick = record(0.5, 0.02), record(0.5, 0.012)
    late = record(1.5, 0.012)
    runs = [(1.0, [quick] * 10), (2.0, [quick] * 9 + [slow]), (4.0, [slow] * 10), (8.0, [late] * 10)]
    assert goodputs(runs, IDLE.objectives()) == pytest.approx([1.0, 2.0, 2.0], abs=0.35)
    tight, middle, loose = goodputs(runs, IDLE.objectives())
    assert tight == 1.0 < middle <= loose < 4.0, "2/s is 1/s for each of two; late ones count under no objective"


def test_means_that_a_zero_would_make_are_not_given() -> None:
    assert means_of([0.5, 2.0]) == "geometric mean 1.00, least 0.50"
    assert means_of([0.0, 2.0]) == "geometric mean not defined, least 0.00"
    assert (ratio_of(1.0, 2.0), ratio_of(0.0, 0.0), ratio_of(1.0, 0.0)) == (0.5, 1.0, inf)


def test_calls_stop_when_they_should() -> None:
    call = TraceCall("c", 0.0, "t", [1], 1, 1)
    assert list(stopping(repeat(call), time.monotonic() - 1)) == []
    assert next(stopping(repeat(call), time.monotonic() + 60)) is call


@pytest.mark.slow
def test_what_is_simulated_says_so_and_compares_with_the_better_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disaggregation_simulated, "REQUESTS", 20)
    monkeypatch.setattr(disaggregation_simulated, "SIMULATED_LOADS", (0.02, 0.6, 1.2))
    with ThreadPoolExecutor(1) as processes:
        told = simulated(mixes(None, Random(1)), "gpu-7b", 2, Console(quiet=True), processes)
    assert told.startswith("Simulated, not measured")
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if "TPOT ≤" in line]
    assert len(rows) == 3
    for _, both, apart, hybrid, ratio, *_ in rows:
        best = max(float(both.split()[0]), float(apart.split()[0]))
        assert float(ratio) == pytest.approx(float(hybrid) / best, rel=0.1) if best else float(ratio) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu-7b", "cpu-bench"])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["tight", "middle", "loose"])
def test_placement_by_prediction_is_as_good_as_any_fixed_choice(
    at: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of `--slo-ttft` and `--slo-tpot`, in virtual time: within a few percent of the best of engines that
    do both, with each step size, and of fixed roles, at whichever objective."""
    monkeypatch.setattr(disaggregation_simulated, "REQUESTS", 250)
    monkeypatch.setattr(disaggregation_simulated, "SIMULATED_LOADS", tuple(at / 10 for at in range(1, 18)))
    engine, drawn = Engine.named(name), mixes(None, Random(1))["made up (C)"]
    lengths, idle = engine.asked(drawn), engine.idle(drawn)
    objective = idle.objectives()[at]
    *fixed, predicted = [
        SimulatedSide.of(lengths, idle, objective, plan).goodput for plan in divided(engine, WORKERS, objective)
    ]
    assert predicted >= 0.95 * max(fixed)


def test_random_weights_have_the_shape_that_was_asked_for_and_follow_from_their_seed(tmp_path: Path) -> None:
    for name in ("one", "again"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, TINY)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert TINY.items() <= config.items() and config["tie_word_embeddings"] is False
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again")]
    assert weights[0] == weights[1] and len(weights[0]) > 2 * 4 * 64 * config["vocab_size"]
