"""Policies inside real engines: the same requests to all, the same figures again on a clock that counts work."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.policies_bench import Draws, add_workload_arguments
from loadtest.records import read
from tests.engine import isolation


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


@pytest.mark.engine
@pytest.mark.slow
def test_every_engine_gets_the_same_calls_and_the_clock_counts_their_steps(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "deploy.cli", "bench", "iterations", "--workloads", "C", "--policies", "fcfs,mlfq"]
    argv += ["--step-ms", "10", "--limit", "24", "--slots", "2", "--length-scale", "0.05", "--context", "400"]
    argv += ["--loads", "2", "--repetitions", "1", "--shares", "a=1,b=1", "--out", str(tmp_path)]
    page = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=250).stdout
    assert "| C | 2 | 2 |" in page and "A step takes 10 ms" in page
    stock, fcfs, mlfq = (
        sorted(read(next(tmp_path.glob(f"C-2-[!0]*-{name}-0.jsonl")))[1], key=lambda record: record.id)
        for name in ("stock", "fcfs", "mlfq")
    )
    for records in (stock, fcfs, mlfq):
        assert [(one.id, one.due_s) for one in records] == [(one.id, one.due_s) for one in stock]
        assert all(one.output_tokens == one.asked_tokens for one in records)
    # First come, first served is what stock vLLM does: on a clock that counts, to the microsecond.
    assert [one.e2e_s for one in fcfs] == pytest.approx([one.e2e_s for one in stock])
    assert [one.e2e_s for one in mlfq] != pytest.approx([one.e2e_s for one in stock])
