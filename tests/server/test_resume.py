"""What another worker is asked, so that it goes on exactly where the first one stopped."""

import json

import pytest

from server.failover.resume import CannotResume, clean_length, closing, continuation, fit_to_resume
from server.request.schemas import CHAT, COMPLETIONS
from server.request.transcript import Chunk, TranscriptProgress
from tests.server.calls import call_of

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def progress(*chunks: tuple[list[int], str]) -> TranscriptProgress:
    told = "".join(text for _, text in chunks)
    return TranscriptProgress(HEAD, [1, 2, 3], [Chunk(ids, text) for ids, text in chunks], told)


def call(route: object = CHAT, **fields: object) -> object:
    messages = {"messages": [{"role": "user", "content": "Hi"}]} if route is CHAT else {"prompt": "Hi"}
    return call_of(json.dumps({"model": "m", "stream": True, **messages, **fields}).encode(), route)


def test_the_prompt_is_token_ids_and_what_has_done_its_work_is_left_out() -> None:
    asked = call(temperature=0, seed=7, max_tokens=10, min_tokens=4, truncate_prompt_tokens=5, documents=[])
    plan = continuation(asked, progress(([10], "a"), ([11], "b")), [10, 11], "ab")
    body = json.loads(plan.body)
    assert plan.path == b"/v1/completions"
    assert body["prompt"] == [1, 2, 3, 10, 11]
    assert body["max_tokens"] == 8 and body["min_tokens"] == 2
    assert body["temperature"] == 0 and body["seed"] == 7
    assert body["stream_options"] == {"include_usage": True}
    assert not {"messages", "truncate_prompt_tokens", "documents"} & set(body)


@pytest.mark.parametrize(
    ("route", "fields", "left"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_completion_tokens": 9, "max_tokens": 3}, 7),
        (COMPLETIONS, {}, 14),
        (COMPLETIONS, {"max_tokens": None}, None),
        (COMPLETIONS, {"max_tokens": 100}, 98),
    ],
)
def test_as_many_tokens_are_asked_for_as_were_left(route: object, fields: dict[str, object], left: int | None) -> None:
    body = json.loads(continuation(call(route, **fields), progress(([10], "a"), ([11], "b")), [10, 11], "ab").body)
    assert body["max_tokens"] == left


@pytest.mark.parametrize(
    ("chunks", "stops", "length"),
    [
        ([([1], "a"), ([2], "b")], False, 2),
        ([([1], "a"), ([2], "")], False, 1),  # half a character, or a special token
        ([([1], ""), ([2], "")], False, 0),
        ([], False, 0),
        ([([1], "a"), ([2, 3], "bc")], False, None),  # whether 3 has said all it has to say is not known
        ([([1], "a"), ([2], "b")], True, None),  # "b" may be held back in part
    ],
)
def test_tokens_count_as_received_when_all_their_text_is(
    chunks: list[tuple[list[int], str]], stops: bool, length: int | None
) -> None:
    assert clean_length([Chunk(ids, text) for ids, text in chunks], stops=stops) == length


UNFIT = [
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"structured_outputs": {"regex": "a+"}},
    {"response_format": {"type": "json_object"}},
    {"logprobs": True},
    {"bad_words": ["x"]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
]
FIT = [
    {"presence_penalty": 0, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "echo": None},
    {"temperature": 1.3, "top_p": 0.9, "stop": ["x"], "repetition_penalty": 1.1, "logit_bias": {"5": 1}},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None},
        ]
    },
]


@pytest.mark.parametrize("fields", UNFIT, ids=str)
def test_what_concerns_the_answer_as_a_whole_cannot_be_continued(fields: dict[str, object]) -> None:
    with pytest.raises(CannotResume):
        fit_to_resume(call(**fields), progress(([10], "a")))


@pytest.mark.parametrize("fields", FIT, ids=str)
def test_what_means_the_same_for_the_rest_can(fields: dict[str, object]) -> None:
    fit_to_resume(call(**fields), progress(([10], "a")))


def test_without_token_ids_or_with_more_than_text_nothing_is_continued() -> None:
    unknown = TranscriptProgress(HEAD, None, [Chunk(None, "a")], "a")
    reasoned = TranscriptProgress(HEAD, [1], [Chunk([2], "a")], "a", only_text=False)
    for said in (unknown, reasoned):
        with pytest.raises(CannotResume):
            fit_to_resume(call(), said)


def test_a_stream_is_closed_with_the_usage_that_was_asked_for() -> None:
    said = progress(([10], "a"), ([11, 2], "b"))
    shown = closing(call(stream_options={"include_usage": True}), said)
    usage, done = shown.removesuffix(b"\n\n").split(b"\n\n")
    assert json.loads(usage[6:])["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert done == b"data: [DONE]"
    assert closing(call(), said) == b"data: [DONE]\n\n"
    said.said_done = True
    assert closing(call(), said) == b""
