import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from loadtest.records import read
from loadtest.replay import replay
from loadtest.report import report_command
from tests.loadtest.engines import engine_in_a_thread


def parsed(module: object, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(argv)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with engine_in_a_thread() as engine:
        yield engine


TRACE = "".join(
    f'{{"at_s": {at / 50}, "tenant": "t{at % 2}", "prompt_tokens": 20, "output_tokens": 5}}\n' for at in range(30)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE + "broken\n")
    return path


def test_a_trace_is_replayed_recorded_and_reported(
    engine: FakeEngine, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    code = replay.run(parsed(replay, str(trace), "--url", engine.url, "--out", str(out), "--rate-scale", "4"))
    said = capsys.readouterr().out
    assert code == 0
    assert "1 row skipped (line 31: not JSON)" in said
    run, records = read(out)
    assert run is not None
    assert run.target == engine.url
    assert len(records) == 30
    assert {(record.tenant, record.output_tokens) for record in records} == {("t0", 5), ("t1", 5)}
    assert max(record.due_s for record in records) == pytest.approx(29 / 200)
    page = tmp_path / "page.md"
    assert report_command.run(parsed(report_command, str(out), "--out", str(page))) == 0
    assert "| TTFT p99 |" in page.read_text()
    assert "## out: tenants" in page.read_text()


def test_a_workload_needs_no_file(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("S", "--url", engine.url, "--limit", "20", "--rate", "200", "--length-scale", "0.05", "--shares", "a=3,b")
    assert replay.run(parsed(replay, *argv)) == 0
    assert "of demand" in capsys.readouterr().out


def test_a_replay_makes_its_page_itself(engine: FakeEngine, trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    argv = (str(trace), "--url", engine.url, "--rate-scale", "8", "--html", str(page), "--ttft", "1")
    assert replay.run(parsed(replay, *argv)) == 0
    assert "service by tenant" in page.read_text()
    assert len(read(tmp_path / "page.jsonl")[1]) == 30


def test_closed_loop_needs_no_times(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 20, "output_tokens": 5}\n' * 10)
    assert replay.run(parsed(replay, str(path), "--url", engine.url, "--concurrency", "3")) == 0


def test_each_tenant_of_a_tenant_file_sends_its_key(engine: FakeEngine, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants:\n- {name: a, keys: [key-a]}\n- {name: b, keys: [key-b, old]}\n")
    argv = ("S", "--url", engine.url, "--limit", "20", "--rate", "500", "--tenants", str(tenants))
    assert replay.run(parsed(replay, *argv, "--length-scale", "0.05")) == 0
    assert {seen.headers["authorization"] for seen in engine.seen} == {"Bearer key-a", "Bearer key-b"}


def test_failures_are_told_and_the_exit_code_says_so(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_in_a_thread(Faults(error_status=500)) as engine:
        assert replay.run(parsed(replay, str(trace), "--url", engine.url, "--rate-scale", "10")) == 1
    said = capsys.readouterr().out
    assert "30 failed" in said
    assert "First failure: failed" in said


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("S", "--url", "http://127.0.0.1:1"), "Is it running"),
        (("nothing.csv", "--url", "http://127.0.0.1:1", "--model", "m"), "nothing.csv"),
        (("S", "--url", "http://127.0.0.1:1", "--model", "m", "--extra", "[]"), "--extra must be"),
        (("S", "--url", "http://127.0.0.1:1", "--model", "m", "--shares", "a=b"), "NAME=SHARE"),
    ],
)
def test_what_cannot_begin_says_what_to_do(
    argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay.run(parsed(replay, *argv)) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_a_trace_without_times_asks_for_a_rate(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 20, "output_tokens": 5}\n')
    assert replay.run(parsed(replay, str(path), "--url", engine.url)) == 2
    assert "--rate" in capsys.readouterr().err


def test_a_report_of_no_records_says_which_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("nonsense\n")
    assert report_command.run(parsed(report_command, str(path))) == 2
    assert "x.jsonl:1 is not a record" in capsys.readouterr().err


def test_rows_that_come_in_the_order_of_their_ends_are_sent_in_that_of_their_arrivals(
    engine: FakeEngine, tmp_path: Path
) -> None:
    path, out = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    rows = [(9.3, 7), (9.0, 5), (9.1, 6)]
    path.write_text("".join(f'{{"at_s": {at}, "prompt_tokens": 20, "output_tokens": {n}}}\n' for at, n in rows))
    assert replay.run(parsed(replay, str(path), "--url", engine.url, "--out", str(out))) == 0
    _, records = read(out)
    sent = sorted((record.due_s, record.output_tokens) for record in records)
    assert sent == [(0.0, 5), (pytest.approx(0.1), 6), (pytest.approx(0.3), 7)]
