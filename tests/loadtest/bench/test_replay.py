"""The measuring tools measured: every table is printed, and a client that fails is told."""

import argparse
from pathlib import Path

import pytest

from loadtest.bench import replay


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    return parser.parse_args([*argv, "--no-vllm", "--repetitions", "1", "--requests", "8", "--streams", "4"])


@pytest.mark.slow
def test_every_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.run(parsed("--lag-streams", "4", "--limit", "60", "--workers", "3")) == 0
    said = capsys.readouterr().out
    assert "| evenhand replay | " in said
    assert "| 4 | " in said and "At most 1 ms late: " in said
    assert "| 256 streams | " in said
    assert "| 3 workers, 8 on each | 60 | " in said


def test_what_a_failing_client_said_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such option"):
        replay.used(["sh", "-c", "echo no such option; exit 3"], tmp_path / "log")


def test_processor_time_of_a_client_counts_what_it_started(tmp_path: Path) -> None:
    busy = "python3 -c 'x = sum(range(6_000_000))'"
    assert replay.used(["sh", "-c", f"{busy}; {busy}"], tmp_path / "log").cpu_s > 0.1
