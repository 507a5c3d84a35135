import argparse
from pathlib import Path

import pytest

from loadtest.records import load
from loadtest.simulator import simulate_command

MOONCAKE = "".join(
    f'{{"timestamp": {at * 3000}, "input_length": 2048, "output_length": 20, "hash_ids": [0, 1, 2, {at + 3}]}}\n'
    for at in range(10)
)


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulate_command.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_trace_is_simulated_at_its_own_times_recorded_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "moon.jsonl"
    trace.write_text(MOONCAKE + "broken\n")
    argv = (str(trace), "--policy", "fcfs,mlfq:levels=4", "--workers", "2", "--out", str(tmp_path), "--ttft", "1")
    assert simulate_command.run(parsed(*argv, "--html", str(tmp_path / "page.html"))) == 0
    assert "TTFT, P99" in capsys.readouterr().out
    recorded = load(tmp_path / "mlfq:levels-4.jsonl")
    assert sorted(record.due_s for record in recorded.records) == [3.0 * at for at in range(10)]
    assert recorded.run is not None
    assert recorded.run.options["workers"] == "2"
    assert "line 11: not JSON" in recorded.run.skipped
    assert "in virtual time" in (tmp_path / "page.html").read_text()


def test_prefixes_that_a_trace_shares_are_found_in_the_simulated_cache(tmp_path: Path) -> None:
    trace = tmp_path / "moon.jsonl"
    trace.write_text(MOONCAKE)
    assert simulate_command.run(parsed(str(trace), "--out", str(tmp_path))) == 0
    first, *others = sorted(load(tmp_path / "fcfs.jsonl").records, key=lambda record: record.due_s)
    assert first.ttft_s is not None
    assert all(other.ttft_s is not None and other.ttft_s < first.ttft_s / 2 for other in others)


def test_a_cost_model_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost, wrong = tmp_path / "cost.json", tmp_path / "wrong.json"
    cost.write_text('{"iteration_s": 0.5, "prefix_block_tokens": 0}')
    wrong.write_text('{"speed": 9}')
    argv = ("S", "--limit", "5", "--out", str(tmp_path))
    assert simulate_command.run(parsed(*argv, "--cost-file", str(cost))) == 0
    assert all((record.ttft_s or 0.0) >= 0.5 for record in load(tmp_path / "fcfs.jsonl").records)
    assert simulate_command.run(parsed(*argv, "--cost-file", str(wrong))) == 2
    assert "wrong.json is no cost model" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(("argv", "told"), [(("none.csv",), "none.csv"), (("S", "--policy", "best"), "best")])
def test_what_cannot_be_simulated_says_so(argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate_command.run(parsed(*argv)) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
