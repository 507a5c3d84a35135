from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.records import Record, Recorded, Run, write
from loadtest.report import report
from loadtest.report.comparison import MEASURES, Measure, Ratio, Side, ratio, sides


def record(name: str, e2e_s: float, due_s: float = 0.0) -> Record:
    return Record(name, "t", due_s, due_s, e2e_s, 10, 5, ttft_s=e2e_s / 2, gaps_us=[1000] * 4, asked_tokens=5)


def side(name: str, *runs: list[Record]) -> Side:
    return Side(name, [Recorded(None, run, []) for run in runs], [report.summarize(run) for run in runs])


def measure(name: str) -> Measure:
    return next(one for one in MEASURES if one.name == name)


def test_better_is_above_one_whichever_way_a_measure_points() -> None:
    slow, fast = side("slow", [record("a", 2.0)]), side("fast", [record("a", 1.0)])
    assert ratio(measure("E2E, mean"), slow, fast) == Ratio(2.0)
    assert ratio(measure("output tokens/s"), slow, fast) == Ratio(pytest.approx(2.0))


def test_with_repetitions_a_ratio_is_taken_within_each_and_its_range_is_told() -> None:
    base = side("base", [record("a", 2.0)], [record("a", 8.0)], [record("a", 4.0)])
    other = side("other", [record("a", 1.0)], [record("a", 2.0)], [record("a", 4.0)])
    assert ratio(measure("E2E, mean"), base, other) == Ratio(2.0, 1.0, 4.0)


def run_of(rng: Random, factor: float) -> list[Record]:
    return [record(str(at), factor * rng.uniform(0.5, 1.5), due_s=float(at)) for at in range(400)]


def test_one_run_each_gets_an_interval_that_holds_the_truth() -> None:
    found = ratio(measure("E2E, mean"), side("a", run_of(Random(1), 1.0)), side("b", run_of(Random(1), 0.5)))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 2.0 <= found.high
    assert found.clear
    alike = ratio(measure("E2E, mean"), side("a", run_of(Random(1), 1.0)), side("b", run_of(Random(2), 1.0)))
    assert alike is not None
    assert not alike.clear


def test_a_short_run_has_no_interval() -> None:
    found = ratio(measure("E2E, mean"), side("a", [record("a", 1.0)] * 30), side("b", [record("a", 1.0)] * 30))
    assert found == Ratio(1.0)


def test_what_was_not_measured_has_no_ratio() -> None:
    assert ratio(measure("inside objective"), side("a", [record("a", 1.0)]), side("b", [record("a", 1.0)])) is None


def test_files_are_named_by_themselves_or_by_the_caller(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.jsonl", [record("a", 1.0)], Run("u", "w", "now"))
    read = sides([str(tmp_path / "one.jsonl"), f"vtc={tmp_path}/two.jsonl", f"vtc={tmp_path}/three.jsonl"])
    assert [(one.name, len(one.runs)) for one in read] == [("one", 1), ("vtc", 2)]


def test_a_window_without_requests_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [record("a", 1.0)])
    with pytest.raises(ValueError, match=r"a\.jsonl has no request"):
        sides([str(tmp_path / "a.jsonl")], from_s=10.0)


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=30), st.sampled_from(["TTFT, P99", "E2E, median"]))
def test_percentiles_are_those_of_the_summary(values: list[float], name: str) -> None:
    one = measure(name)
    records = [record("a", value) for value in values]
    seen = np.array([found for each in records if one.of is not None and (found := one.of(each)) is not None])
    assert one.statistic(seen) == pytest.approx(one.pick(report.summarize(records)))
