"""Server-sent events as bytes: what of a stream is whole, and what the count of tokens is. Pure."""

import re

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d+)')
_OUTPUT = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d+)')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"\s*:\s*(\d+)')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def usage_in(data: bytes) -> tuple[int, int, int] | None:
    """(prompt, output, cached) tokens that the last usage object in `data` tells, None without one.

    A quote inside a JSON string is escaped, so the key cannot be forged by what a model says.
    """
    starts = [match.start() for match in _USAGE.finditer(data)]
    if not starts:
        return None
    tail = data[starts[-1] :]
    prompt, output, cached = _PROMPT.search(tail), _OUTPUT.search(tail), _CACHED.search(tail)
    return (
        int(prompt.group(1)) if prompt else 0,
        int(output.group(1)) if output else 0,
        int(cached.group(1)) if cached else 0,
    )


def is_usage_only(event: bytes) -> bool:
    """Whether an event is the closing one that `stream_options.include_usage` asks for: usage and no choices."""
    return b'"usage"' in event and _NO_CHOICES.search(event) is not None


def without_usage(events: bytes) -> bytes:
    """Whole events with the usage-only ones taken out."""
    return b"".join(event + b"\n\n" for event in events.split(b"\n\n") if event and not is_usage_only(event))
