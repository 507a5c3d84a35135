"""One command from policies to a page, on fake engines that it starts itself and in virtual time."""

import argparse
from pathlib import Path

import pytest

from deploy import compare
from loadtest.records import load

QUICK = ("--limit", "60", "--repetitions", "2", "--slots", "4", "--length-scale", "0.05")


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(argv)


def test_fake_engines_are_started_compared_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--saturation", "60", *QUICK, "--repetitions", "1")
    argv = ("C", "--policies", "fcfs,vtc:predict=last5", "--out", str(tmp_path), *options)
    assert compare.run(parsed(*argv)) == 0
    said = capsys.readouterr().out
    assert "fcfs" in said.splitlines()[0]
    assert "vtc:predict last5" in said.splitlines()[0]
    page = (tmp_path / "page.html").read_text()
    assert "cost model quick: iteration_s 0.002" in page
    first = load(tmp_path / "C-4-1.1-fcfs-0.jsonl")
    second = load(tmp_path / "C-4-1.1-vtc:predict-last5-0.jsonl")
    assert first.samples
    assert sorted((one.id, one.due_s, one.tenant) for one in first.records) == sorted(
        (one.id, one.due_s, one.tenant) for one in second.records
    )


def test_in_virtual_time_a_trace_takes_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "my trace.jsonl"
    trace.write_text(
        "".join(
            f'{{"at_s": {at}, "tenant": "t{at % 3}", "prompt_tokens": 200, "output_tokens": {10 + at % 50}}}\n'
            for at in range(80)
        )
    )
    argv = (str(trace), "--engine", "simulated", "--policies", "fcfs,vtc,gittins", "--out", str(tmp_path), "--loads",
            "0.5,1.5", *QUICK)  # fmt: skip
    assert compare.run(parsed(*argv)) == 0
    assert "fcfs@0.5" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "Inside, by offered rate" in page and "2 repetitions" in page
    assert "my trace" in page
    assert {record.tenant for record in load(tmp_path / "my trace-4-1.5-vtc-1.jsonl").records} == {"t0", "t1", "t2"}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("C", "--policies", "fcfs,best"), "unknown policy 'best'"),
        (("C", "--policies", "vtc:speed=9"), "no option 'speed'"),
        (("nowhere.csv",), "no workload nowhere.csv"),
        (("C", "--loads", "fast"), "no LOAD"),
        (("C", "--cost-file", "cost.json"), "for --engine simulated"),
    ],
)
def test_what_cannot_be_compared_says_what_to_do(
    argv: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.run(parsed(*argv, "--out", str(tmp_path))) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_the_objective_follows_the_engine_unless_it_is_given() -> None:
    given = compare.objective(parsed("C", "--ttft", "2"), compare.PRESETS["quick"])
    own = compare.objective(parsed("C"), compare.PRESETS["instant"])
    assert given is not None
    assert (given.ttft_s, given.tpot_s) == (2.0, float("inf"))
    assert own is not None
    assert compare.objective(parsed("C", "--engine", "real"), compare.PRESETS["quick"]) is None
