"""Parses streamed answers, event by event, in four dialects: chat, completions, responses and messages.

Content is text, reasoning, a part of a tool's call or a refusal, under any role. Empty deltas, roles alone, pings and
usage are none. A stream that fails in good form says so in an event or in its finish reason.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

# vLLM ends a stream in good form where its engine could not go on; its reason is the only sign.
_BAD_FINISHES = frozenset({"error", "abort"})
_MOST_WORDS = 500


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: Any = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    """OpenAI's names, and those of responses and Anthropic's messages."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Response(msgspec.Struct):
    usage: _Usage | None = None
    error: Any = None


class _Chunk(msgspec.Struct):
    """One event of any dialect. `type` is there in responses and messages only."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: Any = None
    message: Any = None
    type: str | None = None
    delta: Any = None
    item: Any = None
    content_block: Any = None
    response: _Response | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_usage = msgspec.json.Decoder(_Usage)


class ParsedAnswer:
    """What has come of one answer.

    finished: the model has ended it. terminated: so has the stream. error: that the stream itself told, "" for none.
    prompt_tokens, output_tokens: as the server counted them, None where it did not. text: its content, without
    reasoning, where `keep` was asked for.
    """

    __slots__ = ("error", "finished", "keep", "output_tokens", "parts", "prompt_tokens", "terminated")

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.parts: list[str] = []
        self.finished = False
        self.terminated = False
        self.error = ""
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def event(self, name: bytes, data: bytes) -> bool:
        """Takes one event; True if it brought content."""
        if data == b"[DONE]":
            self.terminated = True
            return False
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError as error:
            self.error = f"unreadable event: {error}" if name != b"error" else _words(data)
            return False
        if name == b"error" or chunk.error is not None or chunk.object == "error":
            self.error = _words(data if chunk.error is None else orjson.dumps(chunk.error))
            return False
        if chunk.type is not None and chunk.choices is None:
            return self._typed(chunk, data)
        self._count(chunk.usage)
        content = False
        for choice in chunk.choices or ():
            content = self._choice(choice) or content
        return content

    def _choice(self, choice: _Choice) -> bool:
        if choice.finish_reason:
            self.finished = True
            if choice.finish_reason in _BAD_FINISHES:
                self.error = f"the engine ended the answer: {choice.finish_reason}"
        if choice.delta is None:
            return self._said(choice.text)
        delta = choice.delta
        if not isinstance(delta, dict):
            return False
        return (
            self._said(delta.get("content"))
            or bool(text_in(delta.get("reasoning_content")) or text_in(delta.get("reasoning")))
            or bool(text_in(delta.get("refusal")))
            or _calls_tool(delta.get("tool_calls"))
            or _calls_tool([delta["function_call"]] if delta.get("function_call") else None)
            or bool(delta.get("audio"))
        )

    def _said(self, content: object) -> bool:
        if not content:
            return False
        if isinstance(content, str):
            if self.keep:
                self.parts.append(content)
            return True
        said = text_in(content)
        if self.keep and said:
            self.parts.append(answer_text(content))
        return bool(said)

    # Responses and messages: every event has a type.

    def _typed(self, chunk: _Chunk, data: bytes) -> bool:
        kind = chunk.type or ""
        if kind == "content_block_start":
            return _begins(chunk.content_block)
        if kind == "response.output_item.added":
            return _begins(chunk.item)
        if kind == "content_block_delta":
            return self._delta(chunk.delta)
        if kind.endswith(".delta"):
            return self._said(chunk.delta) if kind == "response.output_text.delta" else bool(text_in(chunk.delta))
        self._state(kind, chunk, data)
        return False

    def _state(self, kind: str, chunk: _Chunk, data: bytes) -> None:
        if kind in ("error", "response.failed"):
            failed = chunk.response.error if chunk.response is not None else None
            self.error = _words(data if failed is None else orjson.dumps(failed))
        elif kind in ("response.completed", "response.incomplete"):
            self.finished = self.terminated = True
            self._count(chunk.response.usage if chunk.response is not None else None)
        elif kind == "message_stop":
            self.terminated = True
        elif kind in ("message_start", "message_delta"):
            self._message(chunk)

    def _message(self, chunk: _Chunk) -> None:
        if isinstance(chunk.delta, dict) and chunk.delta.get("stop_reason"):
            self.finished = True
        usage = chunk.usage
        if isinstance(chunk.message, dict) and isinstance(chunk.message.get("usage"), dict):
            usage = _usage.decode(orjson.dumps(chunk.message["usage"]))
        self._count(usage)

    def _delta(self, delta: object) -> bool:
        if not isinstance(delta, dict):
            return False
        if self._said(delta.get("text")):
            return True
        return bool(delta.get("thinking") or delta.get("partial_json"))

    def _count(self, usage: _Usage | None) -> None:
        if usage is None:
            return
        output = usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        self.output_tokens = self.output_tokens if output is None else output
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens
        elif usage.input_tokens is not None:
            # Anthropic counts what it read from its cache, and what it put there, apart from the rest.
            cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
            self.prompt_tokens = usage.input_tokens + cached


def text_in(content: object) -> str:
    """All that a content says: a string, a part with text or thinking, or a list of such."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(text_in, content))
    if isinstance(content, dict):
        return "".join(text_in(content.get(name)) for name in ("text", "thinking", "refusal", "content"))
    return ""


def answer_text(content: object) -> str:
    """What a content says to the user: its text, without thinking."""
    if isinstance(content, str):
        return content
    parts: Iterable[Any] = content if isinstance(content, list) else [content]
    return "".join(text_in(part.get("text")) for part in parts if isinstance(part, dict))


def _calls_tool(calls: object) -> bool:
    """Whether a delta brings a part of a tool's call: its name or its arguments."""
    if not isinstance(calls, list):
        return False
    for call in calls:
        if not isinstance(call, dict):
            continue
        for part in (call, call.get("function"), call.get("custom")):
            if isinstance(part, dict) and (part.get("name") or part.get("arguments") or part.get("input")):
                return True
    return False


def _begins(block: object) -> bool:
    """Whether the beginning of a block or item is content: a tool's call has its name there, a text perhaps a part."""
    if not isinstance(block, dict):
        return False
    return bool(block.get("name") or block.get("text") or block.get("thinking") or block.get("arguments"))


def _words(data: bytes) -> str:
    return data.decode(errors="replace")[:_MOST_WORDS]
