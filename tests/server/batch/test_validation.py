"""Which lines of an input file are accepted, and what is said of the others."""

import io
import json

import pytest

from server.batch.validation import MAX_ERRORS, MAX_LINE_BYTES, Checker


def line(custom_id: object = "a", **changes: object) -> bytes:
    request = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "x"},
    }
    return json.dumps(request | changes).encode() + b"\n"


def check(*lines: bytes, most: int = 100) -> tuple[list[tuple[int, str]], list[tuple[int | None, str, str | None]]]:
    """(number, custom_id) of what is right; (line, code, param) of what is wrong."""
    checker = Checker("/v1/completions", most, lambda model: model == "m")
    right = [(each.number, each.custom_id) for each in checker.lines(io.BytesIO(b"".join(lines)))]
    return right, [(error.line, error.code, error.param) for error in checker.errors]


def test_lines_are_found_where_they_stand() -> None:
    content = b"\n" + line("a") + b"   \n" + line("é") + line("c")[:-1]
    checker = Checker("/v1/completions", 10, lambda model: True)
    found = list(checker.lines(io.BytesIO(content)))
    assert [each.number for each in found] == [2, 4, 5]
    assert [json.loads(content[each.offset : each.offset + each.length])["custom_id"] for each in found] == [
        "a",
        "é",
        "c",
    ]


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{not json\n", "invalid_json_line", None),
        (b"[]\n", "invalid_request", None),
        (b"\xff\xfe\n", "invalid_json_line", None),
        (b'{"custom_id": "x"}\n', "invalid_request", None),
        (line(custom_id=7), "invalid_request", None),
        (line(custom_id=""), "invalid_custom_id", "custom_id"),
        (line(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/chat/completions"), "mismatched_endpoint", "url"),
        (line(body={"model": "m", "stream": True}), "stream_not_supported", "body.stream"),
        (line(body={"model": "other"}), "model_not_found", "body.model"),
        (line(body={}), "invalid_request", None),
        (b"[" * 100_000 + b"\n", "invalid_json_line", None),
    ],
)
def test_a_wrong_line_is_named_by_its_number(text: bytes, code: str, param: str | None) -> None:
    right, wrong = check(line("first"), text, line("last"))
    assert right == [(1, "first"), (3, "last")]
    assert [(number, param) for number, _, param in wrong] == [(2, param)] and wrong[0][1] in (code, "invalid_request")


def test_a_custom_id_is_used_once() -> None:
    assert check(line("a"), line("a"))[1] == [(2, "duplicate_custom_id", "custom_id")]


def test_an_empty_file_is_wrong() -> None:
    assert check(b"\n \n")[1] == [(None, "empty_file", None)]


def test_too_many_requests_end_the_reading() -> None:
    right, wrong = check(*[line(str(number)) for number in range(5)], most=3)
    assert len(right) == 3 and wrong == [(4, "too_many_requests", None)]


def test_reading_stops_after_many_errors() -> None:
    right, wrong = check(*[b"x\n"] * 100, line("a"))
    assert not right and len(wrong) == MAX_ERRORS


def test_a_line_without_an_end_is_not_read_whole() -> None:
    right, wrong = check(line("a"), b"x" * (MAX_LINE_BYTES + 5), line("b"))
    assert right == [(1, "a")] and wrong == [(2, "line_too_long", None)]
