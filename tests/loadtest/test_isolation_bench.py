"""A light tenant is measured alone and beside a flood, and what it waited in vain counts."""

import argparse
import sys
from pathlib import Path

import pytest

from loadtest import isolation_bench
from loadtest.isolation_bench import light_ttft
from loadtest.records import Ending, Record, read

FAKE = f"{sys.executable} -m loadtest.fake_engine --port {{port}} --cost instant --max-seqs {{slots}}"


def test_only_the_light_tenant_is_judged_and_a_request_without_a_token_counts_as_waited() -> None:
    records = [
        Record("a", "light", 0.0, 0.0, 3.0, 10, 5, ttft_s=1.0),
        Record("b", "light", 0.0, 0.0, 9.0, 10, 0, ending=Ending.TIMEOUT),
        Record("c", "flood", 0.0, 0.0, 70.0, 10, 5, ttft_s=60.0),
    ]
    assert light_ttft(records).count == 2
    assert light_ttft(records).max == 9.0


def test_the_light_tenant_sends_the_same_calls_alone_and_beside_the_flood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    isolation_bench.add_arguments(parser)
    argv = ["--workloads", "C", "--slots", "4", "--repetitions", "1", "--limit", "6", "--length-scale", "0.02"]
    argv += ["--saturation", "200", "--out", str(tmp_path), "--target", f"vtc={FAKE} --policy vtc"]
    assert isolation_bench.run(parser.parse_args(argv)) == 0
    assert "| vtc |" in capsys.readouterr().out
    _, alone = read(tmp_path / "isolation-vtc-0-0.jsonl")
    _, flooded = read(tmp_path / "isolation-vtc-10-0.jsonl")

    def light(records: list[Record]) -> list[tuple[str, float, int]]:
        return sorted((one.id, one.due_s, one.asked_tokens) for one in records if one.tenant == "light")

    assert light(list(alone)) == light(list(flooded))
    assert len(light(list(alone))) == len(alone) == 6
    assert len(flooded) > 30
