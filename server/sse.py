"""Server-sent events as bytes: what they say of tokens. Pure."""

import re
from typing import NamedTuple

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,15})')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,15})')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d{1,15})')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_FIELDS = (_PROMPT, _OUTPUT, _CACHED)

USAGE_BYTES = 1024  # a usage object with all its details is shorter


class Usage(NamedTuple):
    """Tokens as an engine counts them; None where it does not say."""

    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


def usage_in(data: bytes) -> Usage | None:
    """What the last usage object in `data` tells, None without one.

    A quote inside a JSON string is escaped, so the key cannot be forged by what a model says.
    """
    start = -1
    for match in _USAGE.finditer(data):
        start = match.start()
    if start < 0:
        return None
    told = data[start : start + USAGE_BYTES]
    usage = Usage(*(int(found.group(1)) if (found := field.search(told)) else None for field in _FIELDS))
    return None if usage.prompt_tokens is None and usage.output_tokens is None else usage


def is_usage_only(event: bytes) -> bool:
    """Whether an event is the closing one that `stream_options.include_usage` asks for: usage and no choices."""
    return _USAGE.search(event) is not None and _NO_CHOICES.search(event) is not None


def without_usage(events: bytes) -> bytes:
    """Whole events with the usage-only ones taken out."""
    return b"".join(event + b"\n\n" for event in events.split(b"\n\n") if event and not is_usage_only(event))
