import argparse
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.simulator import advise
from loadtest.simulator.advise import fewest, slo


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    advise.add_arguments(parser)
    return parser.parse_args(argv)


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_fewest_that_are_enough_are_found_in_few_tries(needed: int, most: int) -> None:
    tried: list[int] = []

    def enough(number: int) -> bool:
        tried.append(number)
        return number >= needed

    assert fewest(enough, most) == (needed if needed <= most else None)
    assert len(tried) <= 18
    assert max(tried) <= most


def test_an_objective_is_written_in_one_word() -> None:
    assert (slo("ttft=1,tpot=0.1").ttft_s, slo("ttft=1,tpot=0.1").tpot_s) == (1.0, 0.1)
    assert slo("tpot=0.1").ttft_s == float("inf")
    with pytest.raises(ValueError, match="ttft=SECONDS"):
        slo("e2e=1")


def test_a_trace_gets_its_advice_and_the_curve_that_shows_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    argv = ("S", "--limit", "80", "--rate", "20", "--slots", "4", "--cost", "gpu-7b", "--policy", "fcfs,vtc",
            "--slo", "ttft=1", "--most-workers", "16", "--html", str(page))  # fmt: skip
    assert advise.run(parsed(*argv)) == 0
    *table, said = capsys.readouterr().out.strip().splitlines()
    assert "inside the objective." in said
    assert "need as many workers and cannot be told from it" in said, "with one tenant VTC is FCFS"
    assert " to " in said, "an interval over the seeds"
    workers = int(said.split(" on ")[1].split()[0])
    assert workers > 1
    assert any(f"{workers}: 9" in line or f"{workers}: 100%" in line for line in table)
    assert "Inside the objective, by workers" in page.read_text()
    assert said in page.read_text()


def test_when_nothing_is_enough_the_exit_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("S", "--limit", "40", "--rate", "50", "--slots", "2", "--policy", "fcfs", "--slo", "ttft=0.001")
    assert advise.run(parsed(*argv, "--most-workers", "2")) == 1
    assert "No policy keeps 90%" in capsys.readouterr().out


def test_without_an_objective_it_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert advise.run(parsed("S")) == 2
    assert "--slo ttft=1,tpot=0.1" in capsys.readouterr().err


def test_workers_are_divided_into_those_that_read_and_those_that_answer() -> None:
    assert advise.divisions(1) == [0]
    assert advise.divisions(2) == [0, 1]
    assert advise.divisions(12) == [0, 3, 4, 6, 8]


def test_where_reading_apart_pays_it_is_advised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, cost = tmp_path / "trace.jsonl", tmp_path / "cost.json"
    row = '"prompt_tokens": 1500, "output_tokens": 200'
    trace.write_text("".join(f'{{"at_s": {at * 0.4}, {row}}}\n' for at in range(60)))
    cost.write_text('{"iteration_s": 0.005, "prefill_s_per_token": 2e-4, "prefix_block_tokens": 0}')
    argv = (str(trace), "--policy", "fcfs", "--apart", "--cost-file", str(cost), "--slo", "ttft=1,tpot=0.008")
    assert advise.run(parsed(*argv)) == 0
    told = capsys.readouterr().out
    shares = {way: float(share) for way, share in re.findall(r"^(.*\S) +([\d.]+)%$", told, re.MULTILINE)}
    assert shares["1 only read prompts"] >= 90 > shares["all do both"]
    assert shares["1 prefer to read prompts, placed by prediction, steps of 512 tokens"] >= 90
    assert told.splitlines()[-1].startswith("fcfs on 2 workers, 1 ")


def test_what_is_tried_includes_tuned_engines_that_do_both() -> None:
    assert list(map(str, advise.ways(1, apart=False))) == ["all do both"]
    assert [str(way) for way in advise.ways(2, apart=True)] == [
        "all do both",
        "all do both, steps of 1024 tokens",
        "all do both, steps of 512 tokens",
        "1 only read prompts",
        "all do both, placed by prediction",
        "1 prefer to read prompts, placed by prediction, steps of 512 tokens",
    ]
