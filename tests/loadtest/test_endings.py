"""However a replay ends, it says what was measured, why it ended, and what is missing."""

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from loadtest.records import Ending, Record, Run, Writer, load, read, write
from loadtest.replay import measure, replay
from loadtest.report import report_command
from tests.loadtest.engines import engine_in_a_thread
from tests.loadtest.test_replay import parsed

ROW = '{"prompt_tokens": 20, "output_tokens": 5}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(ROW * 40)
    return path


@contextmanager
def when(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Acts from another thread as soon as something is true."""
    over = threading.Event()

    def watch() -> None:
        while not condition() and not over.is_set():
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_its_records_its_table_and_its_page(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "page.jsonl"
    with engine_in_a_thread(Faults(stall_after_tokens=2)) as engine:
        argv = (str(trace), "--url", engine.url, "--rate", "100", "--html", str(page))
        with when(lambda: len(engine.seen) >= 5, lambda: os.kill(os.getpid(), number)):
            assert replay.run(parsed(replay, *argv)) == status
    run, records = read(out)
    assert run is not None and run.interrupted and number.name in run.stopped
    assert 5 <= len(records) < 40
    assert {record.ending for record in records} == {Ending.UNFINISHED}
    said = capsys.readouterr().out
    assert said.startswith(f"Trust: INTERRUPTED (by {number.name}): {len(records)} requests unfinished")
    assert "TTFT p99" in said
    assert "INTERRUPTED" in page.read_text()
    assert report_command.run(parsed(report_command, str(out))) == 0
    assert "INTERRUPTED" in capsys.readouterr().out.partition("\n")[0]


def test_an_interrupted_run_is_gone_on_with(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    argv = (str(trace), "--rate", "200", "--out", str(out))
    with engine_in_a_thread(Faults(stall_after_tokens=2)) as engine:
        with when(lambda: len(engine.seen) >= 5, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert replay.run(parsed(replay, *argv, "--url", engine.url)) == 130
    with out.open("ab") as file:
        file.write(b'{"id": "cut in the')
    with engine_in_a_thread() as engine:
        assert replay.run(parsed(replay, *argv, "--url", engine.url, "--resume")) == 0
        assert len(engine.seen) == 40, "what had not ended is sent again"
        assert replay.run(parsed(replay, *argv, "--url", engine.url, "--resume")) == 0
        assert len(engine.seen) == 40, "nothing is missing now"
    run, records = read(out)
    assert sorted(record.id for record in records) == sorted(f"call-{at}" for at in range(40))
    assert {record.ending for record in records} == {Ending.OK}
    assert run is not None and not run.interrupted and run.resumed == 2


def test_the_records_of_an_earlier_run_are_not_overwritten(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.jsonl"
    with engine_in_a_thread() as engine:
        argv = (str(trace), "--url", engine.url, "--rate", "500", "--out", str(out))
        assert replay.run(parsed(replay, *argv)) == 0
        before = out.read_bytes()
        assert replay.run(parsed(replay, *argv)) == 2
        assert "give --resume, --force or another --out" in capsys.readouterr().err.replace("\n", " ")
        assert out.read_bytes() == before
        assert replay.run(parsed(replay, *argv, "--force")) == 0
        assert out.read_bytes() != before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence_and_what_was_measured_is_shown(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    with engine_in_a_thread() as engine:
        argv = (str(trace), "--url", engine.url, "--rate", "500", "--out", "/dev/full", "--html", str(page))
        assert replay.run(parsed(replay, *argv)) == measure.NOT_WRITTEN
    said = capsys.readouterr()
    assert "/dev/full cannot be written: No space left on device" in said.out
    assert "TTFT p99" in said.out
    assert "Traceback" not in said.out + said.err
    assert "to the first token" in page.read_text()


def test_what_a_full_disk_leaves_ends_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Writer(path) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            for at in range(2000):
                writer.write(Record(f"{at}", "t", 0.0, 0.0, 1.0, 100, 10, ttft_s=0.5, gaps_us=[1000] * 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.failed is not None
    loaded = load(path)
    assert 500 < len(loaded.records) < 2000
    assert not loaded.cut_off
    assert path.stat().st_size <= 100_000


def test_a_last_line_that_is_cut_off_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, [Record("a", "t", 0.0, 0.0, 1.0, 100, 10, ttft_s=0.5)], Run("u", "w", "now", requests=2))
    with path.open("ab") as file:
        file.write(b'{"id": "b", "tena')
    assert report_command.run(parsed(report_command, str(path))) == 0
    said = capsys.readouterr().out
    assert "the file of records ends inside a line" in said
    assert "1 of 2 requests reported" in said


def test_a_run_with_too_many_errors_stops_itself(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_in_a_thread(Faults(error_status=500)) as engine:
        argv = (str(trace), "--url", engine.url, "--rate", "200", "--max-errors", "3")
        assert replay.run(parsed(replay, *argv)) == measure.STOPPED
    assert "more than 3 requests failed" in capsys.readouterr().out.partition("\n")[0]


class _WantsKey(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ((), "requires an API key (HTTP 401): give --key KEY"),
        (("--key", "k", "--model", "m"), "does not accept the API key (HTTP 401): check --key"),
    ],
)
def test_a_wrong_key_is_not_a_server_that_is_down(
    key: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _WantsKey) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert replay.run(parsed(replay, "S", "--url", url, *key)) == 2
        server.shutdown()
        thread.join()
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert "running" not in said


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--rate-scale", "0"), "above 0"),
        (("--rate", "-3"), "above 0"),
        (("--rate", "nan"), "above 0"),
        (("--concurrency", "0"), "1 or more"),
        (("--concurrency", "-2"), "1 or more"),
        (("--length-scale", "0"), "above 0"),
        (("--limit", "0"), "1 or more"),
        (("--timeout", "-1"), "above 0"),
        (("--cv", "0"), "above 0"),
        (("--on-off", "30"), "not a number"),
        (("--stages", "5"), "RATE:SECONDS"),
        (("--think", "long"), "idle-gap"),
        (("--columns", "a=b"), "prompt=NAME"),
        (("--sweep", "5,1"), "LOW,HIGH"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_at_once(
    option: tuple[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(replay, "S", "--url", "http://127.0.0.1:1", *option)
    assert left.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("suffix", ["/v1", "/v1/", "/", "/v1/chat/completions"])
def test_a_url_may_be_written_with_its_path(trace: Path, suffix: str) -> None:
    with engine_in_a_thread() as engine:
        assert replay.run(parsed(replay, str(trace), "--url", engine.url + suffix, "--rate", "500")) == 0
        assert {seen.path for seen in engine.seen} == {"/v1/completions"}


# What is sent


def lengths(engine: FakeEngine) -> list[tuple[int, int]]:
    return [(len(seen.body["prompt"]), seen.body["max_tokens"]) for seen in engine.seen]


def test_nothing_is_cut_that_fits_and_what_must_be_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    rows = [(900, 100), (990, 10), (999, 1), (1500, 100), (10, 900), (600, 600)]
    path.write_text("".join(json.dumps({"prompt_tokens": p, "output_tokens": o}) + "\n" for p, o in rows))
    with engine_in_a_thread() as engine:
        argv = (str(path), "--url", engine.url, "--context", "1000", "--concurrency", "1", "--html", str(page))
        assert replay.run(parsed(replay, *argv)) == 0
        assert lengths(engine) == [*rows[:3], (900, 100), (10, 900), (500, 500)]
    told = "2 of 6 prompts cut to fit the context, mean 833 → 716 tokens; 1 of 6 answers cut to fit the context"
    assert told in capsys.readouterr().out.partition("\n")[0]
    assert told in page.read_text()
    run, _ = read(tmp_path / "page.jsonl")
    assert run is not None and run.fidelity is not None
    assert (run.fidelity.prompts_cut, run.fidelity.prompt_tokens, run.fidelity.sent_prompt_tokens) == (2, 4999, 4299)


CONVERSATIONS = [
    {"id": "a", "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is a river?"},
        {"from": "gpt", "value": "Water that flows."}, {"from": "human", "value": "And a lake?"},
        {"from": "gpt", "value": "Water that stays."},
    ]},
    {"id": "b", "conversations": [{"from": "human", "value": "Hi there!"}, {"from": "gpt", "value": "Hello."}]},
]  # fmt: skip


@pytest.mark.parametrize("answers", ["server", "trace"])
def test_a_traces_own_text_is_sent_as_the_conversation_that_it_is(tmp_path: Path, answers: str) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(CONVERSATIONS))
    with engine_in_a_thread() as engine:
        argv = (str(path), "--url", engine.url, "--rate", "100", "--answers", answers)
        assert replay.run(parsed(replay, *argv)) == 0
        bodies = [seen.body for seen in engine.seen]
        assert {seen.path for seen in engine.seen} == {"/v1/chat/completions"}
    bodies.sort(key=lambda body: len(body["messages"]))
    assert bodies[0]["messages"] == [{"role": "user", "content": "Hi there!"}]
    first, second = bodies[1]["messages"], bodies[2]["messages"]
    assert first == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a river?"}]
    assert second[:2] == first
    assert second[3] == {"role": "user", "content": "And a lake?"}
    assert (second[2]["content"] == "Water that flows.") == (answers == "trace")
    assert second[2]["role"] == "assistant" and second[2]["content"]


def test_a_conversation_can_be_sent_as_lengths_or_to_completions(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(CONVERSATIONS))
    with engine_in_a_thread() as engine:
        argv = (str(path), "--url", engine.url, "--concurrency", "1")
        assert replay.run(parsed(replay, *argv, "--prompts", "lengths")) == 0
        assert all(isinstance(seen.body["prompt"], list) for seen in engine.seen)
        engine.seen.clear()
        assert replay.run(parsed(replay, *argv, "--api", "completions", "--answers", "trace")) == 0
        assert engine.seen[0].body["prompt"] == "Be brief.\n\nWhat is a river?"


def test_chat_needs_no_tokenizer(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_in_a_thread() as engine:
        assert replay.run(parsed(replay, str(trace), "--url", engine.url, "--rate", "500", "--chat")) == 0
        (content,) = {len(seen.body["messages"][0]["content"].split()) for seen in engine.seen}
    assert content == 20
    assert "made-up text of the trace's lengths" in capsys.readouterr().out


def test_text_that_does_not_fit_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        json.dumps({"prompt": "word " * 2000, "output_tokens": 5}) + "\n" + '{"prompt": "Hi", "output_tokens": 5}'
    )
    with engine_in_a_thread() as engine:
        argv = (str(path), "--url", engine.url, "--concurrency", "1", "--context", "500")
        assert replay.run(parsed(replay, *argv)) == 0
        assert [seen.body["prompt"] for seen in engine.seen] == ["Hi"]
    assert "1 of 2 requests not sent, for their text does not fit the context" in capsys.readouterr().out


def test_images_tools_and_other_fields_of_a_traced_request_are_sent(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    body = {
        "model": "theirs", "max_tokens": 7, "temperature": 0.5, "tools": [{"type": "function"}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}],
    }  # fmt: skip
    path.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    with engine_in_a_thread() as engine:
        replay.run(parsed(replay, str(path), "--url", engine.url, "--concurrency", "1"))
        (sent,) = [seen.body for seen in engine.seen]
    assert sent["messages"] == body["messages"]
    assert (sent["tools"], sent["temperature"], sent["max_tokens"]) == (body["tools"], 0.5, 7)
    assert sent["model"] != "theirs"


def test_a_sweep_finds_the_rate_at_which_the_objective_breaks(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    with engine_in_a_thread() as engine:
        argv = (str(trace), "--url", engine.url, "--sweep", "200,400", "--limit", "20", "--html", str(page))
        with pytest.raises(SystemExit):
            parsed(replay, *argv, "--sweep", "x")
        assert replay.run(parsed(replay, *argv)) == 2
        assert "--sweep needs an objective" in capsys.readouterr().err
        assert replay.run(parsed(replay, *argv, "--ttft", "60")) == 0
        assert {path.name for path in tmp_path.glob("page@*")} == {"page@200.jsonl", "page@400.jsonl"}
    assert "up to the highest rate tried, 400 requests/s" in capsys.readouterr().out
    assert "Inside the objective, by rate" in page.read_text()
