import argparse
import sys
from pathlib import Path

import pytest

from loadtest.bench.bench_target import BenchTarget, CannotStart, running
from loadtest.bench.policies import policies_bench
from loadtest.bench.policies.policies_bench import MEASURES, Setting, page_of, ratio_rows, saturation_per_s
from loadtest.records import Record, read
from loadtest.report.report import Summary, summarize

FAKE = f"{sys.executable} -m loadtest.fake.engine --port {{port}} --cost instant --max-seqs {{slots}}"


def summary(e2e_s: float) -> Summary:
    return summarize([Record("a", "t", 0.0, 0.0, e2e_s, 10, 5, ttft_s=e2e_s / 2, gaps_us=[1000] * 4)])


def test_ratios_are_taken_within_a_repetition_and_keep_their_spread() -> None:
    results = {
        Setting("S", 8, 1.0, 4): {
            "base": [summary(2.0), summary(8.0), summary(4.0)],
            "new": [summary(1.0), summary(2.0), summary(4.0)],
        }
    }
    rows = ratio_rows(results, MEASURES["mean JCT"])
    assert rows == [["workload", "slots", "load", "base", "new"], ["S", "8", "1", "4", "2.00 (1.00 to 4.00)"]]
    assert "## P99 longest gap" in page_of(results, MEASURES)


def test_saturation_is_the_rate_while_there_was_work_for_all() -> None:
    # Two at a time, one second each, and at the end one that is alone for ten.
    records = [Record(str(at), "t", 0.0, at // 2 * 1.0, 1.0, 10, 5) for at in range(20)]
    records.append(Record("long", "t", 0.0, 10.0, 10.0, 10, 5))
    assert saturation_per_s(records, 5) == pytest.approx(2.0)
    assert saturation_per_s(records, 10) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["nothing", "a=python -m server", "=python {port}"])
def test_a_target_is_a_url_or_a_command_with_a_port(text: str) -> None:
    with pytest.raises(ValueError, match="NAME=URL"):
        BenchTarget.parse(text)


def test_a_command_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    target = BenchTarget.parse(f"broken={sys.executable} -c 'print(\"no {{port}}\"); exit(3)'")
    with pytest.raises(CannotStart, match=r"code 3.*broken-8\.log"), running(target, {"slots": 8}, tmp_path, 20):
        pytest.fail("it cannot run")
    assert (tmp_path / "broken-8.log").read_text().startswith("no ")


@pytest.mark.slow
def test_two_targets_are_started_measured_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    policies_bench.add_arguments(parser)
    argv = ["--workloads", "C", "--loads", "0.5", "--slots", "4", "--repetitions", "2", "--limit", "12"]
    argv += [
        "--length-scale",
        "0.02",
        "--out",
        str(tmp_path),
        "--target",
        f"fcfs={FAKE}",
        "--target",
        f"vtc={FAKE} --policy vtc",
    ]
    assert policies_bench.run(parser.parse_args(argv)) == 0
    page = capsys.readouterr().out
    assert "| workload | slots | load | fcfs | vtc |" in page
    assert page.endswith("None.\n")
    _, first = read(tmp_path / "C-4-0.5-fcfs-0.jsonl")
    _, second = read(tmp_path / "C-4-0.5-vtc-0.jsonl")
    asked = [
        sorted((one.id, one.due_s, one.tenant, one.asked_tokens) for one in records) for records in (first, second)
    ]
    assert asked[0] == asked[1]
    assert (tmp_path / "policies.md").read_text() == page


def test_an_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    policies_bench.add_arguments(parser)
    assert policies_bench.run(parser.parse_args(["--target", "a=http://127.0.0.1:1", "--workloads", "Z"])) == 2
    assert "no workload Z" in capsys.readouterr().err
