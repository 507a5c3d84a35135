"""What an engine's answer says, read where its API puts it and nowhere else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.answers import (
    Usage,
    UsageFinder,
    data_of,
    read_event,
    read_whole,
    with_fingerprint,
    without_prompt_ids,
)
from server.request.call import Dialect
from server.request.errors import EngineGone, Refused

OPENAI_USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
MARKERS = {"finish_reason": "abort", "usage": {"prompt_tokens": 1, "completion_tokens": 1}, "error": {"code": 500}}


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode()


@pytest.mark.parametrize(
    ("dialect", "answer", "usage"),
    [
        ("openai", {"choices": [{"finish_reason": "stop"}], "usage": OPENAI_USAGE}, Usage(9, 2, 3)),
        ("openai", {"data": [], "usage": {"prompt_tokens": 5, "total_tokens": 5}}, Usage(5, None, None)),
        ("openai", {"choices": [{"text": '"usage":{"prompt_tokens":1}', "usage": 1}], "usage": None}, None),
        ("openai", {"user": "usage", "usage": OPENAI_USAGE, "prompt_logprobs": [{"1": "usage"}]}, Usage(9, 2, 3)),
        ("responses", {"status": "completed", "user": "usage", "metadata": MARKERS}, None),
        (
            "responses",
            {"usage": {"input_tokens": 5000, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 1}}}
            | {"metadata": MARKERS, "user": "usage"},
            Usage(5000, 7, 1),
        ),
        (
            "messages",
            {"type": "message", "stop_reason": "end_turn"}
            | {"usage": {"input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 6}},
            Usage(8, 6, 3),
        ),
    ],
)
def test_usage_is_read_in_every_dialect_and_cannot_be_forged(
    dialect: Dialect, answer: dict[str, object], usage: Usage | None
) -> None:
    said = read_whole(dialect, json.dumps(answer).encode())
    assert said is not None and said.failure is None and said.usage == usage


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        ("openai", {"choices": [{"finish_reason": "stop"}, {"finish_reason": "abort"}]}),
        ("openai", {"choices": [{"finish_reason": "error"}]}),
        ("messages", {"type": "message", "content": []}),  # vLLM leaves the reason out when it aborts
        ("responses", {"status": "failed"}),
        ("responses", {"status": "cancelled"}),
    ],
)
def test_an_answer_that_an_engine_broke_off_is_a_failure(dialect: Dialect, answer: dict[str, object]) -> None:
    said = read_whole(dialect, json.dumps(answer).encode())
    assert said is not None and isinstance(said.failure, EngineGone)


@pytest.mark.parametrize("body", [b"", b"[]", b"oops", b'{"usage":{"prompt_tokens":"x"}}', b'{"choices":7}', b"\xff"])
@pytest.mark.parametrize("dialect", ["openai", "responses", "messages"])
def test_what_cannot_be_read_says_nothing(dialect: Dialect, body: bytes) -> None:
    said = read_whole(dialect, body)
    assert said is None or said.usage is None
    told = read_event(dialect, b"data: " + body)
    assert told.failure is None and told.usage is None and told.tokens <= 1


EVENTS: list[tuple[Dialect, bytes, dict[str, object]]] = [
    ("openai", b"data: [DONE]", {"last": True}),
    ("openai", b": keep-alive", {}),
    ("openai", event(choices=[{"delta": {"role": "assistant", "content": ""}}]), {"tokens": 0}),
    ("openai", event(choices=[{"delta": {"role": "assistant", "content": "Hi"}}]), {"tokens": 1}),
    ("openai", event(choices=[{"text": " the", "token_ids": [4, 5, 6]}]), {"tokens": 3, "exact": True}),
    ("openai", event(choices=[{"text": "", "token_ids": []}]), {"tokens": 0, "exact": True}),
    ("openai", event(choices=[{"text": "x" * 400}]), {"tokens": 100}),
    ("openai", event(choices=[], usage=OPENAI_USAGE), {"usage": Usage(9, 2, 3), "total": True, "closing": True}),
    ("openai", event(choices=[{"index": 2, "token_ids": [1], "prompt_token_ids": [1, 2]}]), {"prompts": ((2, 2),)}),
    ("openai", event(choices=[{"delta": {"content": "data: [DONE]\n\n"}}]), {"last": False, "tokens": 1}),
    ("openai", event(choices=[{"finish_reason": "stop", "token_ids": [2]}]), {"finishes": True, "tokens": 1}),
    ("messages", b"event: x\ndata: " + event(type="message_stop")[6:], {"last": True}),
    ("messages", event(type="content_block_delta", delta={"type": "text_delta", "text": "a"}), {"tokens": 1}),
    ("messages", event(type="content_block_delta", delta={"type": "signature_delta"}), {"tokens": 0}),
    (
        "messages",
        event(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 6}),
        {"usage": Usage(None, 6, None), "total": True},
    ),
    ("responses", event(type="response.output_text.delta", delta="usage"), {"tokens": 1}),
    (
        "responses",
        event(type="response.completed", response={"metadata": MARKERS, "usage": {"input_tokens": 1}}),
        {"last": True, "usage": Usage(1, None, None)},
    ),
]


@pytest.mark.parametrize(("dialect", "data", "said"), EVENTS)
def test_an_event_says_what_its_own_fields_say(dialect: Dialect, data: bytes, said: dict[str, object]) -> None:
    told = read_event(dialect, data)
    assert told.failure is None
    assert {name: getattr(told, name) for name in said} == said


@pytest.mark.parametrize(
    ("dialect", "data", "status"),
    [
        ("openai", event(error={"message": "EngineCore encountered an issue.", "code": 500}), 500),
        ("openai", event(error={"message": "too long", "code": 400, "type": "BadRequestError"}), 400),
        ("openai", event(error={"message": "?", "type": "invalid_request_error"}), 400),
        ("openai", event(error={"message": "?"}), 500),
        ("openai", event(error="CUDA error"), 500),
        ("messages", event(type="error", error={"type": "internal_error", "message": "x"}), 500),
        ("messages", event(type="error", error={"type": "invalid_request_error", "message": "x"}), 400),
        ("responses", event(type="response.failed", response={"error": {"code": "server_error", "message": "x"}}), 500),
        ("responses", event(type="response.failed", response={"error": {"code": "invalid_prompt"}}), 400),
        ("responses", event(type="error", code="server_error", message="x"), 500),
    ],
)
def test_an_error_in_a_stream_is_the_engine_s_unless_it_says_that_the_request_is_at_fault(
    dialect: Dialect, data: bytes, status: int
) -> None:
    failure = read_event(dialect, data).failure
    assert isinstance(failure, Refused) and failure.refused_status == status and failure.message


@pytest.mark.parametrize(
    ("dialect", "data"),
    [
        ("openai", event(choices=[{"finish_reason": "abort", "text": "x"}])),
        ("messages", event(type="message_delta", delta={"stop_reason": None})),
    ],
)
def test_a_stream_that_an_engine_aborted_is_broken_off(dialect: Dialect, data: bytes) -> None:
    assert isinstance(read_event(dialect, data).failure, EngineGone)


def test_data_of_several_lines_is_put_together() -> None:
    assert data_of(b'event: x\ndata: {"a":\ndata: 1}') == b'{"a":\n1}'


def test_prompt_ids_are_taken_out_where_they_are_and_nowhere_else() -> None:
    text = json.dumps('"prompt_token_ids":[1,2]')
    data = b'data: {"choices":[{"text":%b,"token_ids":[3]}],"prompt_token_ids":[1,2]}' % text.encode()
    shown = without_prompt_ids(data, read_event("openai", data))
    assert shown == b'data: {"choices":[{"text":%b,"token_ids":[3]}],"prompt_token_ids":null}' % text.encode()


def test_a_fingerprint_becomes_the_last_member() -> None:
    assert with_fingerprint(b'data: {"a":1}', 'f"p') == b'data: {"a":1,"system_fingerprint":"f\\"p"}'
    assert with_fingerprint(b"data: [DONE]", "f") == b"data: [DONE]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["usage", '"usage":{', "\\"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("usage"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(
    before=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    after=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    there=st.booleans(),
    ascii_only=st.booleans(),
    places=st.lists(st.integers(0, 10_000), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_the_usage_of_an_answer_that_is_not_held_is_found_wherever_it_is_cut(
    before: dict[str, object], after: dict[str, object], there: bool, ascii_only: bool, places: list[int]
) -> None:
    for others in (before, after):
        others.pop("usage", None)
    answer = {**before, **({"usage": OPENAI_USAGE} if there else {}), **after}
    data = json.dumps(answer, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    finder = UsageFinder()
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    for start, end in zip(ends, ends[1:], strict=False):
        finder.feed(data[start:end])
    assert finder.usage == (Usage(9, 2, 3) if there else None)
