"""What the client reports against what the server did: scripted answers, in virtual time, to the microsecond."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from loadtest.call import TraceCall
from loadtest.client.client import Client, Manner
from loadtest.client.target import Target
from loadtest.records import Ending, Record, Recorded
from loadtest.report.report import summarize_run
from tests.loadtest.scripted import DONE, Script, Step, VirtualLoop, chat, ended, event, plain, usage

NEAR = {"abs": 2e-6}


def measured(
    script: Script, *, api: str = "chat", packet: int = 1 << 20, call: TraceCall | None = None
) -> tuple[Record, list[dict[str, Any]]]:
    """One call to a server of this script: its record, and the bodies that were sent."""
    bodies: list[dict[str, Any]] = []

    def answer(_path: str, body: dict[str, Any]) -> Script:
        bodies.append(body)
        return script

    def packets(data: bytes) -> Sequence[bytes]:
        return [data[at : at + packet] for at in range(0, len(data), packet)]

    loop = VirtualLoop(answer, packets)
    client = Client(Target("http://h", "m", api=api, timeout_s=60.0), clock=loop.time)
    loop.run(client.open_loop([call or TraceCall("c", 0.25, "t", "Hello", 1, 0)]))
    (record,) = client.records
    return record, bodies


def check(script: Script, record: Record) -> None:
    """Every figure against the truth."""
    assert (record.ending, record.ttft_s is None) == (script.ending, script.ttft_s is None), record.error
    if script.ttft_s is not None:
        assert record.ttft_s == pytest.approx(script.ttft_s, **NEAR)
    if script.ending is not Ending.OK:
        assert record.error
        return
    marks = script.marks_s
    assert [gap / 1e6 for gap in record.gaps_us] == pytest.approx(
        [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)], **NEAR
    )
    assert record.output_tokens == script.tokens
    assert record.e2e_s == pytest.approx(script.e2e_s, **NEAR)
    assert record.tpot_s == (pytest.approx(script.tpot_s, **NEAR) if script.tpot_s is not None else None)
    assert record.sent_s == pytest.approx(0.25, **NEAR)


def words(*tokens_at: tuple[float, int]) -> list[Step]:
    return [Step(at_s, chat({"content": "word " * tokens}), tokens) for at_s, tokens in tokens_at]


def call_of(name: str = "", arguments: str = "") -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"name": name, "arguments": arguments}}]}


SEVERAL = words((0.1, 1), (0.12, 1), (0.5, 1), (0.52, 1))  # a stall of 0.38 s

CHATS = {
    "plain, with a stall": SEVERAL,
    "a role alone comes first": [Step(0.01, chat({"role": "assistant"})), *SEVERAL],
    "a role with empty text comes first": [Step(0.01, chat({"role": "assistant", "content": ""})), *SEVERAL],
    "empty deltas keep the connection alive": [Step(0.03, chat({"content": ""})), Step(0.06, chat({})), *SEVERAL],
    "comments keep it alive": [Step(0.03, b": ping\n\n"), Step(0.3, b":\n\n"), *SEVERAL],
    "a role with the first text": [Step(0.1, chat({"role": "assistant", "content": "Hi"}), 1), *words((0.3, 1))],
    "a role with reasoning": [
        Step(0.05, chat({"role": "assistant", "reasoning_content": "Hm"}), 1),
        Step(0.07, chat({"reasoning": "so"}), 1),
        *SEVERAL,
    ],
    "a role with a tool's call": [
        Step(0.05, chat({"role": "assistant", "content": None, **call_of("search")}), 1),
        Step(0.06, chat(call_of(arguments=""))),
        Step(0.09, chat(call_of(arguments='{"q":')), 2),
    ],
    "a refusal": [Step(0.08, chat({"refusal": "No"}), 1), Step(0.09, chat({"refusal": "."}), 1)],
    "content in parts": [
        Step(0.04, chat({"content": []})),
        Step(0.05, chat({"content": [{"type": "text", "text": ""}]})),
        Step(0.1, chat({"content": [{"type": "text", "text": "Hi"}]}), 1),
        Step(0.2, chat({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]}), 1),
    ],
    "several tokens at once": words((0.1, 3), (0.2, 4), (0.3, 1)),
    "all tokens in one event": words((0.1, 8)),
    "no token at all": [],
    "a long tail after the last token": [*SEVERAL, Step(2.0, b": still here\n\n")],
}


@pytest.mark.parametrize("packet", [1, 7, 1 << 20], ids=["byte by byte", "7 bytes", "whole"])
@pytest.mark.parametrize("name", CHATS)
def test_a_chats_times_and_tokens_are_those_of_the_server(name: str, packet: int) -> None:
    steps = CHATS[name]
    last_s = max((step.at_s for step in steps), default=0.05)
    script = Script([*steps, *ended(last_s, sum(step.tokens for step in steps))])
    check(script, measured(script, packet=packet)[0])


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("packet", [1, 3, 1 << 20])
def test_events_are_read_as_the_standard_says(line_end: str, packet: int) -> None:
    def lines(text: str) -> bytes:
        return text.replace("\n", line_end).encode()

    first = json.dumps({"choices": [{"delta": {"content": "Hi"}}]})
    script = Script(
        [
            Step(0.05, b"\xef\xbb\xbf" + lines("retry: 10\n\n")),
            Step(0.1, lines(f"data: {first}\nid: 1\n\n"), 1),
            Step(0.2, lines('id: 2\ndata:{"choices": [\ndata:{"delta": {"content": "there"}}]}\n\n'), 1),
            Step(0.3, lines(chat({}, "stop").decode())),
            Step(0.3, lines(usage(1, 2).decode())),
            Step(0.4, lines(f"data: {DONE}\n")),  # and no blank line
        ]
    )
    record, _ = measured(script, packet=packet)
    check(script, record)


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    script = Script([*SEVERAL, *ended(0.6, 4)], chunked=False)
    check(script, measured(script)[0])


def test_without_usage_tokens_are_events_and_the_record_says_so() -> None:
    script = Script([*SEVERAL, Step(0.6, chat({}, "stop")), Step(0.6, event(DONE))])
    record, _ = measured(script)
    check(script, record)
    assert not record.counted


# The other APIs


def responses() -> Script:
    def typed(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    return Script(
        [
            Step(0.01, typed("response.created", response={"status": "in_progress"})),
            Step(0.02, typed("response.output_item.added", item={"type": "message", "content": []})),
            Step(0.05, typed("response.reasoning_text.delta", delta="Hm"), 1),
            Step(0.06, typed("response.output_text.delta", delta="")),
            Step(0.1, typed("response.output_text.delta", delta="Hello"), 1),
            Step(0.2, typed("response.function_call_arguments.delta", delta="{}"), 2),
            Step(0.3, typed("response.completed", response={"usage": {"input_tokens": 7, "output_tokens": 4}})),
        ]
    )


def messages() -> Script:
    def typed(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    begun = {"id": "m", "usage": {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 0}}
    return Script(
        [
            Step(0.01, typed("message_start", message=begun)),
            Step(0.02, typed("content_block_start", index=0, content_block={"type": "text", "text": ""})),
            Step(0.03, typed("ping")),
            Step(0.1, typed("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm"}), 1),
            Step(0.15, typed("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "x"})),
            Step(0.2, typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi"}), 1),
            Step(0.22, typed("content_block_start", content_block={"type": "tool_use", "name": "search"}), 1),
            Step(0.3, typed("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{}"}), 1),
            Step(0.4, typed("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 4})),
            Step(0.5, typed("message_stop")),
        ]
    )


@pytest.mark.parametrize(
    ("api", "script", "field"),
    [
        ("completions", plain(5, 0.1, 0.02, "completions"), "prompt"),
        ("responses", responses(), "input"),
        ("messages", messages(), "messages"),
    ],
    ids=["completions", "responses", "messages"],
)
@pytest.mark.parametrize("packet", [1, 1 << 20])
def test_every_api_is_asked_in_its_words_and_measured_by_content(
    api: str, script: Script, field: str, packet: int
) -> None:
    record, (body,) = measured(script, api=api, packet=packet)
    check(script, record)
    assert record.prompt_tokens == 7
    assert field in body


# Failures


@pytest.mark.parametrize("kept", range(len(ended(1.0, 4)) + len(SEVERAL) + 1))
def test_a_cut_is_told_wherever_it_comes(kept: int) -> None:
    steps = [*SEVERAL, *ended(1.0, 4)][:kept]
    whole = kept == len(SEVERAL) + 3
    if not steps:
        steps = [Step(0.05, b"")]
    script = Script(steps, cut=True, ending=Ending.OK if whole else Ending.TRUNCATED)
    check(script, measured(script)[0])


def test_a_cut_inside_an_event_is_a_cut_and_not_an_error_of_the_server() -> None:
    script = Script([*SEVERAL, Step(0.6, b'data: {"choices": [{"del')], cut=True, ending=Ending.TRUNCATED)
    record, _ = measured(script)
    check(script, record)
    assert "connection was lost inside the answer" in record.error


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        ([Step(0.6, usage(7, 4)), Step(0.6, event(DONE))], "without a finish reason"),
        ([Step(0.6, chat({}, "stop"))], "[DONE]"),
    ],
)
def test_what_is_missing_at_the_end_of_a_stream_is_named(tail: list[Step], told: str) -> None:
    script = Script([*SEVERAL, *tail], ending=Ending.TRUNCATED)
    record, _ = measured(script)
    check(script, record)
    assert told in record.error


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (Script([Step(0.1, b"no")], status=500, ending=Ending.FAILED), "no"),
        (Script([Step(0.1, b"")], status=502, ending=Ending.FAILED), "502"),
        (Script([Step(0.1, b"{}")], status=429, ending=Ending.LIMITED), "{}"),
        (Script([Step(0.1, b"key?")], status=401, ending=Ending.REFUSED), "key?"),
        (Script([*SEVERAL, Step(0.6, event({"error": {"message": "lost"}}))], ending=Ending.ERROR_EVENT), "lost"),
        (Script([*SEVERAL, Step(0.6, event("it broke", "error"))], ending=Ending.ERROR_EVENT), "it broke"),
        (Script([*SEVERAL, Step(0.6, event({"object": "error", "message": "bad"}))], ending=Ending.ERROR_EVENT), "bad"),
        (Script([*SEVERAL, *ended(0.6, 4, "abort")], ending=Ending.ERROR_EVENT), "abort"),
        (Script([Step(0.1, b'{"choices": []}')], headers="content-type: application/json\r\n", ending=Ending.FAILED),
         "in one piece"),
    ],
)  # fmt: skip
def test_every_failure_has_its_ending_and_its_reason(script: Script, told: str) -> None:
    record, _ = measured(script)
    check(script, record)
    assert told in record.error


# Whole runs


def test_a_runs_summary_follows_from_the_scripts_and_failures_are_in_no_time() -> None:
    scripts = [plain(11, 0.1, 0.02), plain(21, 0.3, 0.01), Script([Step(9.0, b"x")], status=500)]
    loop = VirtualLoop(lambda _, body: scripts[int(body["messages"][0]["content"])])
    client = Client(Target("http://h", "m", api="chat"), clock=loop.time)
    loop.run(client.open_loop([TraceCall(f"{at}", at * 0.5, "t", f"{at}", 1, 0) for at in range(3)]))
    run = summarize_run(Recorded.of(None, client.kept, []))
    assert run.endings == {"ok": 2, "failed": 1}
    assert (run.ttft.count, run.ttft.mean) == (2, pytest.approx(0.2, **NEAR))
    assert run.itl.p50 == pytest.approx(0.01, **NEAR)
    assert run.tpot.mean == pytest.approx(0.015, **NEAR)
    assert run.e2e.max == pytest.approx(0.5, **NEAR)
    assert run.duration_s == pytest.approx(10.0, **NEAR)
    assert run.output_tokens_per_s == pytest.approx(3.2, rel=1e-4)


def test_the_first_request_is_sent_on_time_and_so_are_all_others() -> None:
    loop = VirtualLoop(lambda *_: plain(3, 0.1, 0.02))
    client = Client(Target("http://h", "m", api="chat"), clock=loop.time)
    loop.run(client.open_loop([TraceCall(f"{at}", at * 0.001, "t", "Hi", 1, 0) for at in range(500)]))
    assert max(record.late_s for record in client.records) < 1e-5
    assert client.progress.lag_s.max < 1e-5


def turns(number: int, every_s: float, **fields: Any) -> list[TraceCall]:
    """A conversation whose turns are due so far apart."""
    said = []
    for turn in range(number):
        said += [{"role": "user", "content": f"q{turn}"}]
        yield_ = TraceCall(
            f"{turn}", turn * every_s, "t", "", 1, 0, session="s", waits=True, messages=tuple(said),
            answers=tuple(range(1, 2 * turn, 2)), last=turn == number - 1, **fields,
        )  # fmt: skip
        said += [{"role": "assistant", "content": f"traced{turn}"}]
        yield yield_


@pytest.mark.parametrize(
    ("manner", "sent_s", "released_s"),
    [
        # Answers take 0.5 s: the second turn, due at 0.2, waits for the first answer, the third for the second.
        (Manner(), [0.0, 0.5, 1.0], [None, 0.5, 1.0]),
        (Manner(think=2.0), [0.0, 2.5, 5.0], [None, 2.5, 5.0]),
        (Manner(think="idle-gap"), [0.0, 0.65, 1.3], [None, 0.65, 1.3]),
    ],
)
def test_a_turn_keeps_its_due_time_and_says_when_it_was_released(
    manner: Manner, sent_s: list[float], released_s: list[float | None]
) -> None:
    loop = VirtualLoop(lambda *_: plain(21, 0.1, 0.02))
    client = Client(Target("http://h", "m"), manner=manner, clock=loop.time)
    loop.run(client.open_loop(turns(3, 0.2, idle_s=0.15)))
    assert [record.due_s for record in client.records] == pytest.approx([0.0, 0.2, 0.4], **NEAR)
    assert [record.sent_s for record in client.records] == pytest.approx(sent_s, **NEAR)
    assert [record.released_s for record in client.records] == [
        at_s if at_s is None else pytest.approx(at_s, **NEAR) for at_s in released_s
    ]
    assert client.progress.lag_s.max < 1e-5, "to wait for an answer is not the client's own lateness"


@pytest.mark.parametrize(("own", "second"), [(True, "word0 word1 "), (False, "traced0")])
def test_later_turns_contain_the_servers_answers_or_the_traces(own: bool, second: str) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(_path: str, body: dict[str, Any]) -> Script:
        bodies.append(body)
        return plain(2, 0.1, 0.02)

    loop = VirtualLoop(answer)
    client = Client(Target("http://h", "m"), manner=Manner(own_answers=own), clock=loop.time)
    loop.run(client.open_loop(turns(3, 10.0)))
    assert [one["content"] for one in bodies[1]["messages"]] == ["q0", second, "q1"]
    assert len(bodies[2]["messages"]) == 5
    assert not client._sessions, "a conversation that has ended is forgotten"


def test_a_failed_answer_is_replaced_by_the_traces() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(_path: str, body: dict[str, Any]) -> Script:
        bodies.append(body)
        return Script([Step(0.1, b"no")], status=500)

    loop = VirtualLoop(answer)
    client = Client(Target("http://h", "m"), clock=loop.time)
    loop.run(client.open_loop(turns(2, 10.0)))
    assert [one["content"] for one in bodies[1]["messages"]] == ["q0", "traced0", "q1"]


def test_a_run_stops_at_its_duration_and_reports_nothing_of_its_warmup() -> None:
    loop = VirtualLoop(lambda *_: plain(3, 0.1, 0.02))
    client = Client(Target("http://h", "m", api="chat"), manner=Manner(duration_s=2.0, warmup_s=0.5), clock=loop.time)
    loop.run(client.open_loop(TraceCall(f"{at}", at * 0.1, "t", "Hi", 1, 0) for at in range(100)))
    assert client.progress.done == 20
    assert client.kept.totals.requests == 15


def test_too_many_errors_stop_a_run() -> None:
    loop = VirtualLoop(lambda *_: Script([Step(0.01, b"no")], status=500))
    client = Client(Target("http://h", "m", api="chat"), manner=Manner(most_errors=5), clock=loop.time)
    loop.run(client.open_loop(TraceCall(f"{at}", at * 0.1, "t", "Hi", 1, 0) for at in range(100)))
    assert client.progress.done == 6
    assert "more than 5 requests failed" in client.stopped


def test_a_closed_loop_keeps_so_many_on_their_way_and_is_late_for_none() -> None:
    loop = VirtualLoop(lambda *_: plain(11, 0.1, 0.01))
    client = Client(Target("http://h", "m", api="chat"), clock=loop.time)
    loop.run(client.closed_loop((TraceCall(f"{at}", 99.0 * at, "t", "Hi", 1, 0) for at in range(12)), 4))
    assert [record.sent_s for record in client.records] == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4, abs=1e-5)
    assert max(record.late_s for record in client.records) < 1e-5


def test_what_is_stopped_marks_what_is_on_its_way_as_unfinished() -> None:
    loop = VirtualLoop(lambda *_: plain(100, 0.1, 1.0))
    client = Client(Target("http://h", "m"), clock=loop.time)
    calls = [*turns(5, 0.1), *(TraceCall(f"x{at}", 1 + at * 0.1, "t", "Hi", 1, 0) for at in range(100))]
    loop.call_later(2.05, client.stop, "by SIGINT")
    loop.run(client.open_loop(calls))
    assert client.stopped == "by SIGINT"
    assert {record.ending for record in client.records} == {Ending.UNFINISHED}
    assert len(client.records) == 5 + 11
    assert replace(calls[0], id="x") != calls[0]


def test_a_run_that_was_stopped_before_it_began_sends_nothing() -> None:
    loop = VirtualLoop(lambda _path, _body: Script(SEVERAL))
    client = Client(Target("http://h", "m", api="chat"), clock=loop.time)
    client.stop("by SIGINT")
    loop.run(client.open_loop([TraceCall("c", 0.0, "t", "Hello", 1, 0)]))
    assert client.progress.sent == 0


def test_making_up_the_first_prompt_makes_no_request_late() -> None:
    loop = VirtualLoop(lambda _path, _body: Script(SEVERAL))

    class Slow(Target):
        def request(self, *call: Any, **how: Any) -> bytes:
            loop.pass_(0.05)
            return super().request(*call, **how)

    client = Client(Slow("http://h", "m", api="chat"), clock=loop.time)
    loop.run(
        client.open_loop([TraceCall("first", 0.0, "t", "Hello", 1, 0), TraceCall("next", 0.25, "t", "Hello", 1, 0)])
    )
    assert sorted(record.sent_s for record in client.records) == pytest.approx([0.0, 0.25], **NEAR)
