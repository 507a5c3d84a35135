"""Policies inside real engines: the same requests to all, the same figures again on a clock that counts work."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.bench.iterations import isolation, iterations
from loadtest.bench.policies.policies_bench import Draws, add_workload_arguments
from loadtest.records import Record, read


def draws() -> Draws:
    parser = argparse.ArgumentParser()
    add_workload_arguments(parser)
    return Draws.of(parser.parse_args(["--workloads", "C", "--length-scale", "0.05", "--context", "400"]))


def test_the_light_tenant_sends_the_same_calls_alone_and_beside_the_flood() -> None:
    alone = isolation.calls_of(draws(), "C", 2.0, 0.0, 3, 20)
    flooded = isolation.calls_of(draws(), "C", 2.0, 10.0, 3, 20)
    assert [call for call in flooded if call.tenant == isolation.LIGHT] == alone
    assert 100 < len(flooded) - len(alone) < 400
    assert len({call.id for call in flooded}) == len(flooded)
    assert [call.at_s for call in flooded] == sorted(call.at_s for call in flooded)


def bench(out: Path, *options: str) -> str:
    """The page of a small comparison; its records are in `out`."""
    argv = [sys.executable, "-m", "deploy.cli", "bench", "iterations", "--workloads", "C", "--out", str(out)]
    argv += ["--step-ms", "10", "--limit", "24", "--slots", "2", "--length-scale", "0.05", "--context", "400"]
    argv += ["--loads", "2", "--repetitions", "1", "--shares", "a=1,b=1", *options]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=280).stdout


def records_of(out: Path, name: str) -> list[Record]:
    return sorted(read(next(out.glob(f"C-2-[!0]*-{name}-0.jsonl")))[1], key=lambda record: record.id)


@pytest.mark.engine
@pytest.mark.slow
def test_every_engine_gets_the_same_calls_and_the_clock_counts_their_steps(tmp_path: Path) -> None:
    page = bench(tmp_path, "--policies", "fcfs,mlfq")
    assert "| C | 2 | 2 |" in page and "A step takes 10 ms" in page
    stock, fcfs, mlfq = (records_of(tmp_path, name) for name in ("stock", "fcfs", "mlfq"))
    for records in (stock, fcfs, mlfq):
        assert [(one.id, one.due_s) for one in records] == [(one.id, one.due_s) for one in stock]
        assert all(one.output_tokens == one.asked_tokens for one in records)
    # First come, first served is what stock vLLM does: on a clock that counts, to the microsecond.
    assert [one.e2e_s for one in fcfs] == pytest.approx([one.e2e_s for one in stock])
    assert [one.e2e_s for one in mlfq] != pytest.approx([one.e2e_s for one in stock])
    bench(tmp_path / "counted", "--policies", "fcfs,mlfq", "--without-model")
    assert records_of(tmp_path / "counted", "stock") == stock
    assert records_of(tmp_path / "counted", "mlfq") == mlfq


def test_without_a_model_there_is_no_cpu_time_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    iterations.add_arguments(parser)
    assert iterations.run(parser.parse_args(["--without-model"])) == 2
    assert "give --step-ms too" in capsys.readouterr().err
