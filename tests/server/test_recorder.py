"""The recording tells when, how long and how it ended, and nothing of what was said; it never gets in the way."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from loadtest.traces.formats import Skipped, read
from scheduler.jobs import Job
from server.observe.recorder import BLOCK_BYTES, Recorder, RecordingBounds, prefix_hashes
from server.request.call import Call, Phase, Ticket
from server.request.schemas import CHAT, TOKENIZE
from server.request.tenants import Tenant
from tests.server.conftest import chat, eventually, over_fake
from tests.steps import lines_executed

WIDE = RecordingBounds(max_bytes=1 << 30, file_bytes=1 << 20)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ticket(clock: Clock, tenant: str = "acme", messages: object = "hello", tokens: int = 5) -> Ticket:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": messages}]}).encode()
    call = Call("id", CHAT, Tenant(tenant), "m", True, body, False, 40, 100, 1, "")
    done = Ticket(call, Job("1", tenant, 40, clock()), clock)
    clock.now += 0.25
    done.move(Phase.PREFILLING)
    clock.now += 0.5
    done.move(Phase.DECODING)
    clock.now += 1.0
    done.move(Phase.DONE)
    done.tokens = tokens
    return done


def recorded(folder: Path) -> list[dict[str, object]]:
    lines = [line for path in sorted(folder.glob("trace-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def record(folder: Path, *tickets: Ticket, clock: Clock | None = None, bounds: RecordingBounds = WIDE) -> Recorder:
    recorder = Recorder(folder, bounds, clock or Clock())
    recorder.start()
    for one in tickets:
        recorder.ended(one, "ok")
    recorder.stop()
    return recorder


def test_a_call_becomes_a_line_that_a_replay_reads(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(tmp_path, WIDE, clock)
    recorder.start()
    clock.now += 3.0
    recorder.ended(ticket(clock, messages="x" * 5000), "ok")
    recorder.stop()
    (line,) = recorded(tmp_path)
    assert (line["at_s"], line["queue_s"], line["ttft_s"], line["e2e_s"]) == (3.0, 0.25, 0.75, 1.75)
    assert (line["prompt_tokens"], line["output_tokens"], line["outcome"]) == (40, 5, "ok")
    (row,) = read(next(tmp_path.glob("trace-*.jsonl")))
    assert (row.prompt_tokens, row.output_tokens, row.tenant) == (40, 5, line["tenant"])
    assert len(row.prefix_hashes) == 5000 // BLOCK_BYTES


def test_nothing_of_tenant_or_content_is_kept(tmp_path: Path) -> None:
    secret = "the launch code is 0000 " * 100
    record(tmp_path, ticket(Clock(), tenant="acme-corp", messages=secret))
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"launch" not in written
    assert b"acme" not in written
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_pseudonyms_and_hashes_stay_the_same_over_restarts_and_differ_between_folders(tmp_path: Path) -> None:
    for folder in ("a", "a", "b"):
        record(tmp_path / folder, ticket(Clock(), messages="y" * 1000))
    first, again = recorded(tmp_path / "a")
    (other,) = recorded(tmp_path / "b")
    assert (first["tenant"], first["prefix_hashes"]) == (again["tenant"], again["prefix_hashes"])
    assert first["tenant"] != other["tenant"]
    assert not set(_hashes(first)) & set(_hashes(other))


def _hashes(line: dict[str, object]) -> list[int]:
    hashes = line["prefix_hashes"]
    assert isinstance(hashes, list)
    return hashes


def test_prompts_that_begin_alike_share_hashes_up_to_where_they_differ() -> None:
    begin = os.urandom(3 * BLOCK_BYTES)
    one, two = (prefix_hashes(begin + os.urandom(2 * BLOCK_BYTES), b"key") for _ in range(2))
    assert one[:3] == two[:3]
    assert not set(one[3:]) & set(two[3:])


def test_the_files_stay_within_their_bounds_and_the_newest_are_kept(tmp_path: Path) -> None:
    clock = Clock()
    tickets = [ticket(clock, tokens=at + 1) for at in range(400)]
    record(tmp_path, *tickets, clock=clock, bounds=RecordingBounds(max_bytes=20_000, file_bytes=4_000))
    sizes = [path.stat().st_size for path in tmp_path.glob("trace-*.jsonl")]
    assert len(sizes) > 2
    assert sum(sizes) <= 20_000
    assert max(sizes) <= 4_000
    kept = [line["output_tokens"] for line in recorded(tmp_path)]
    assert kept == list(range(401 - len(kept), 401))


def test_another_gateways_file_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "trace-000001.jsonl").write_text("theirs\n")
    record(tmp_path, ticket(Clock()))
    assert (tmp_path / "trace-000001.jsonl").read_text() == "theirs\n"
    assert (tmp_path / "trace-000002.jsonl").stat().st_size > 0


def test_a_full_disk_ends_the_recording_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path, WIDE, Clock())
    recorder._files._file = open("/dev/full", "wb")  # noqa: SIM115 - the recorder closes it
    recorder.start()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            recorder.ended(ticket(Clock()), "ok")
        recorder.stop()
        recorder.ended(ticket(Clock()), "ok")
    assert [one.message for one in caplog.records] == ["recording stopped, serving continues: No space left on device"]


def test_what_comes_faster_than_it_can_be_written_is_counted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, WIDE, Clock())  # its thread is not started: nothing is written
    large = ticket(Clock(), messages="z" * 200_000)
    for _ in range(200):
        recorder.ended(large, "ok")
    assert recorder.left_out == 200 - 16 * 1024 * 1024 // (len(large.call.body) + 512)


def test_noting_a_request_is_a_few_lines_however_long_it_is(tmp_path: Path) -> None:
    """It runs on the event loop: parsing and writing are the thread's."""
    recorder = Recorder(tmp_path, WIDE, Clock())
    short, long = (ticket(Clock(), messages="z" * length) for length in (6, 60_000))
    lines = [lines_executed(lambda: recorder.ended(one, "ok")) for one in (short, long)]  # noqa: B023
    assert lines[0] == lines[1] < 50, lines


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot record into"):
        Recorder(tmp_path / "file", WIDE, Clock())


def test_what_generates_nothing_is_no_traffic(tmp_path: Path) -> None:
    clock = Clock()
    one = ticket(clock)
    call = Call("id", TOKENIZE, Tenant("t"), "m", False, b"{}", False, 4, 0, 1, "")
    record(tmp_path, Ticket(call, one.job, clock))
    assert recorded(tmp_path) == []


async def test_a_gateway_records_what_it_serves_and_a_replay_can_read_it(tmp_path: Path) -> None:
    async with over_fake(record={"folder": tmp_path}) as (gateway, _):
        for at in range(3):
            reply = await gateway.ask("/v1/chat/completions", chat(max_tokens=4 + at, ignore_eos=True, stream=True))
            assert reply.status == 200
        assert (await gateway.ask("/v1/chat/completions", b"{}")).status == 400
        await eventually(lambda: len(recorded(tmp_path)) == 3, "three calls are recorded")
    skipped = Skipped()
    rows = list(read(tmp_path / "trace-000001.jsonl", skipped=skipped))
    assert [row.output_tokens for row in rows] == [4, 5, 6]
    assert len({row.tenant for row in rows}) == 1
    assert skipped.count == 0


async def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path: Path) -> None:
    async with over_fake() as (gateway, _):
        assert gateway.server.recorder is None


async def test_a_name_that_is_not_utf_8_does_not_end_the_recording(tmp_path: Path) -> None:
    odd = b'{"model":"fake","max_tokens":1,"messages":[{"role":"user","content":"a"}],"\xff":1}'
    async with over_fake(record={"folder": tmp_path}) as (gateway, _):
        await gateway.ask("/v1/chat/completions", odd)
        for _ in range(2):
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
    ended = [line["outcome"] for line in recorded(tmp_path)]
    assert ended.count("ok") >= 2


def test_what_cannot_be_recorded_is_told_and_the_next_request_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, told = Clock(), list[str]()
    recorder = Recorder(tmp_path, WIDE, clock, told.append)
    recorder.start()
    broken = ticket(clock)
    broken.tokens = object()  # type: ignore[assignment]  # it cannot be written as JSON
    recorder.ended(broken, "ok")
    recorder.ended(ticket(clock, tokens=3), "ok")
    recorder.stop()
    assert [line["output_tokens"] for line in recorded(tmp_path)] == [3]
    assert told == ["a request could not be recorded: TypeError"] and "Traceback" in caplog.text
