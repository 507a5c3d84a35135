"""What events say of tokens."""

import pytest

from server.engine.sse import Usage, is_usage_only, usage_in, without_usage


@pytest.mark.parametrize(
    "data, usage",
    [
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}', Usage(1, 2, None)),
        (b'{"usage" : {\n"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 3}}', Usage(1, 2, 3)),
        (b'{"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5, None, None)),
        (b'{"usage":{"input_tokens":5}} {"usage":{"output_tokens":6}}', Usage(5, 6, None)),
        (b'{"usage":{"completion_tokens":1}} {"usage":{"completion_tokens":6}}', Usage(None, 6, None)),
        (b'{"usage":null}', None),
        (b'{"text":"\\"usage\\":{\\"prompt_tokens\\":1}"}', None),
        (b'{"properties":{"usage":{"type":"object"}}}', None),
        (b"", None),
    ],
)
def test_usage_is_read_in_every_dialect_and_cannot_be_forged(data: bytes, usage: Usage | None) -> None:
    assert usage_in(data) == usage


def test_a_number_that_is_absurd_does_not_break_the_gateway() -> None:
    assert usage_in(b'{"usage":{"prompt_tokens":' + b"9" * 6000 + b"}}") is not None


def test_only_the_closing_usage_is_taken_out() -> None:
    token = b'data: {"choices":[{"x":1}],"usage":{"completion_tokens":1}}\n\n'
    null = b'data: {"choices":[],"usage":null}\n\n'
    last = b'data: {"choices": [ ],"usage":{"completion_tokens":1}}\n\n'
    assert not is_usage_only(token) and not is_usage_only(null) and is_usage_only(last)
    assert without_usage(token + null + last + b"data: [DONE]\n\n") == token + null + b"data: [DONE]\n\n"
