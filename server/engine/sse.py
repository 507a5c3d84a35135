"""Server-sent events as bytes: what they say of tokens. Pure."""

import re
from typing import NamedTuple

import orjson

from server.request.errors import EngineGone, ServiceError, refusal

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,15})')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,15})')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,15})')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":\[[\d,]*\]')
_BROKEN_OFF = rb'"finish_reason":"(?:abort|error)"'
_ABORTED = re.compile(_BROKEN_OFF)
_FAILURE = re.compile(rb'^data: (?=\{"error"|[^\n]*' + _BROKEN_OFF + rb")", re.MULTILINE)
USAGE_BYTES = 1024  # a usage object with all its details is shorter


class Usage(NamedTuple):
    """Tokens as an engine counts them; None where it does not say."""

    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


def usage_in(data: bytes) -> Usage | None:
    """What the usage objects in `data` tell, the later before the earlier; None if they tell nothing.

    A quote inside a JSON string is escaped, so the key cannot be forged by what a model says.
    """
    prompt, output, cached = None, None, None
    for found in _USAGE.finditer(data):
        told = data[found.start() : found.start() + USAGE_BYTES]
        prompt = _number(_PROMPT, told, prompt)
        output = _number(_OUTPUT, told, output)
        cached = _number(_CACHED, told, cached)
    return None if prompt is None and output is None else Usage(prompt, output, cached)


def _number(field: re.Pattern[bytes], told: bytes, before: int | None) -> int | None:
    match = field.search(told)
    return before if match is None else int(match.group(1))


def is_usage_only(event: bytes) -> bool:
    """Whether an event is the closing one that `stream_options.include_usage` asks for: usage and no choices."""
    return _USAGE.search(event) is not None and _NO_CHOICES.search(event) is not None


def without_usage(events: bytes) -> bytes:
    """Whole events with the usage-only ones taken out."""
    return b"".join(event + b"\n\n" for event in events.split(b"\n\n") if event and not is_usage_only(event))


def without_prompt_ids(events: bytes) -> bytes:
    """Events without the prompt's token ids, which vLLM sends with the first one where they are asked for."""
    return _PROMPT_IDS.sub(b'"prompt_token_ids":null', events)


def is_broken_off(answer: bytes) -> bool:
    """Whether an answer, or an event, says that the engine stopped in the middle of it: vLLM that is told to end gives
    what it has as if it were whole."""
    return _ABORTED.search(answer) is not None


def engine_failure_in(events: bytes) -> tuple[ServiceError | None, int]:
    """(what the engine says went wrong with it, where in `events` it says so); (None, 0) if it does not.

    An error that is the request's own fault is none of these: no other engine would do better.
    """
    for found in _FAILURE.finditer(events):
        body = events[found.end() :].partition(b"\n")[0]
        if body.startswith(b'{"error"'):
            error = refusal(_code_of(body), body)
            if error.refused_status >= 500:
                return error, found.start()
        else:
            return EngineGone("The engine stopped in the middle of the answer."), found.start()
    return None, 0


def _code_of(body: bytes) -> int:
    try:
        code = orjson.loads(body)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return 400
    return code if isinstance(code, int) and 400 <= code < 600 else 400
