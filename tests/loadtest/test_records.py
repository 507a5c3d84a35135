from pathlib import Path

import pytest

from loadtest.records import Ending, Record, Run, Writer, read, write

RECORD = Record("a", "t", 0.5, 0.501, 2.0, 10, 5, ttft_s=1.0, gaps_us=[250000] * 4, kind="chat", retry_after_s=None)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.jsonl"
    failed = Record("b", "t", 1.0, 1.0, 0.1, 10, 0, ending=Ending.LIMITED, status=429, retry_after_s=2.0)
    run = Run("http://x", "S", "2026-01-01T00:00:00Z", 10.0, lag_p99_s=0.001)
    write(path, [RECORD, failed], run)
    assert read(path) == (run, [RECORD, failed])


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [RECORD])
    path.write_bytes(path.read_bytes() + b'\n{"id": 3}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl:3 is not a record"):
        read(path)


def test_a_writer_writes_only_while_it_is_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with"):
        Writer(tmp_path / "x").write(RECORD)


def test_time_per_output_token_leaves_out_the_first() -> None:
    assert RECORD.tpot_s == pytest.approx(0.25)
    assert Record("a", "t", 0, 0, 1.0, 1, 1, ttft_s=0.5).tpot_s is None
