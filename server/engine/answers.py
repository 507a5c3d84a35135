"""What an engine's answer says about itself: tokens, usage, how it ended, errors, each read where its API puts it.

Answers carry words of clients and models: `metadata` on /v1/responses, log-probabilities, tool arguments. So nothing
is searched for. An answer is JSON; it is decoded, and only a field in its own place counts.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import orjson

from server.request.call import Dialect
from server.request.errors import EngineGone, Refused, ServiceError, refusal

_ONE_TOKEN_BYTES = 24  # a longer text is most likely several tokens
BYTES_PER_TOKEN = 4
_BROKEN_OFF = ("abort", "error")  # vLLM that is told to end gives what it has as if it were whole
_ABSENT = msgspec.Raw(b"")


class Usage(NamedTuple):
    """Tokens as an engine counts them; None where it does not say. prompt_tokens includes the cached ones."""

    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


class Said(NamedTuple):
    """What one event of a stream says, or a whole answer.

    tokens: output tokens it carries. exact: the engine told their ids, else `tokens` is an estimate from the text.
    usage: the engine's own count. total: that count is the whole request's, not one of its choices'.
    prompts: (choice, tokens of its prompt) where prompt token ids came along; prompt_ids: those ids as JSON.
    failure: what the engine says went wrong. last: nothing comes after it. closing: it carries usage and no choice.
    finishes: it ends a choice. fingerprint: `system_fingerprint`.
    response: it carries the response object of /v1/responses; see `as_published`.
    """

    tokens: int = 0
    exact: bool = False
    usage: Usage | None = None
    total: bool = False
    prompts: tuple[tuple[int, int], ...] = ()
    prompt_ids: tuple[bytes, ...] = ()
    failure: ServiceError | None = None
    last: bool = False
    closing: bool = False
    finishes: bool = False
    fingerprint: str = ""
    response: bool = False


NOTHING = Said()
_RESPONSE = Said(response=True)
_ONE = Said(tokens=1)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """The usage object of every API: OpenAI's two, and Anthropic's, whose input excludes what the cache had."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    text: msgspec.Raw = _ABSENT
    delta: msgspec.Raw = _ABSENT
    token_ids: msgspec.Raw = _ABSENT
    prompt_token_ids: msgspec.Raw = _ABSENT


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None


class _Chunk(msgspec.Struct):
    """An event of chat or completions."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    prompt_token_ids: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT
    system_fingerprint: str | None = None


class _Message(msgspec.Struct):
    usage: _Usage | None = None


class _TypedDelta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _MessageEvent(msgspec.Struct):
    """An event of /v1/messages."""

    type: str = ""
    message: _Message | None = None
    usage: _Usage | None = None
    delta: _TypedDelta | None = None
    error: msgspec.Raw = _ABSENT


class _Response(msgspec.Struct):
    status: str | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _ABSENT


class _ResponseEvent(msgspec.Struct):
    """An event of /v1/responses."""

    type: str = ""
    delta: msgspec.Raw = _ABSENT
    response: _Response | None = None


class _Ended(msgspec.Struct):
    finish_reason: str | None = None


class _WholeChoices(msgspec.Struct):
    choices: list[_Ended] | None = None
    usage: _Usage | None = None


class _WholeMessage(msgspec.Struct):
    type: str = ""
    stop_reason: str | None = None
    usage: _Usage | None = None


class _ErrorCode(msgspec.Struct):
    code: int | str | None = None
    type: str | None = None


_read_usage = msgspec.json.Decoder(_Usage).decode
_read_chunk = msgspec.json.Decoder(_Chunk).decode
_read_delta = msgspec.json.Decoder(_Delta).decode
_read_message_event = msgspec.json.Decoder(_MessageEvent).decode
_read_response_event = msgspec.json.Decoder(_ResponseEvent).decode
_read_choices = msgspec.json.Decoder(_WholeChoices).decode
_read_message = msgspec.json.Decoder(_WholeMessage).decode
_read_response = msgspec.json.Decoder(_Response).decode
_read_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_error = msgspec.json.Decoder(_ErrorCode).decode

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def usage_of(told: _Usage | None) -> Usage | None:
    """An engine's usage object in one shape; None if it tells nothing."""
    if told is None:
        return None
    details = told.prompt_tokens_details or told.input_tokens_details
    if told.prompt_tokens is not None or told.input_tokens is None:
        prompt = told.prompt_tokens
    else:
        prompt = told.input_tokens + (told.cache_read_input_tokens or 0) + (told.cache_creation_input_tokens or 0)
    output = told.completion_tokens if told.completion_tokens is not None else told.output_tokens
    cached = told.cache_read_input_tokens if details is None else details.cached_tokens
    return None if prompt is None and output is None else Usage(prompt, output, cached)


def tokens_of_prompt(usage: object) -> int | None:
    """The tokens of a prompt by a usage object that is decoded already."""
    try:
        told = usage_of(msgspec.convert(usage, _Usage))
    except msgspec.ValidationError:
        return None
    return None if told is None else told.prompt_tokens


def tokens_in(text_bytes: int) -> int:
    """Estimated output tokens of a text of this many bytes, where the engine sends no token ids."""
    return 1 if text_bytes <= _ONE_TOKEN_BYTES else round(text_bytes / BYTES_PER_TOKEN)


def data_of(event: bytes) -> bytes:
    """An event's data, as the specification of server-sent events has it; empty if it has none."""
    at = event.find(b"data:")
    if (at == 0 or event[at - 1 : at] == b"\n") and event.find(b"\n", at) < 0:
        return event[at + 5 :].strip()
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))


def read_event(dialect: Dialect, event: bytes) -> Said:
    """What an event says. One that cannot be read counts as one token and says nothing else."""
    data = data_of(event)
    if not data:
        return NOTHING
    if data == b"[DONE]":
        return Said(last=True)
    try:
        return _EVENTS[dialect](data)
    except _UNREADABLE:
        return _ONE


def _chunk(data: bytes) -> Said:
    chunk = _read_chunk(data)
    if chunk.error is not _ABSENT and bytes(chunk.error) != b"null":
        return Said(failure=_error(data, bytes(chunk.error)))
    choices = chunk.choices or ()
    if any(choice.finish_reason in _BROKEN_OFF for choice in choices):
        return Said(failure=EngineGone("The engine stopped in the middle of the answer."))
    made = [_length(choice.token_ids) for choice in choices]
    told = [_prompt(0, chunk.prompt_token_ids), *(_prompt(choice.index, choice.prompt_token_ids) for choice in choices)]
    prompts = [prompt for prompt in told if prompt is not None]
    return Said(
        sum(_made_without_ids(choice) if count < 0 else count for choice, count in zip(choices, made, strict=True)),
        bool(made) and min(made) >= 0,
        usage_of(chunk.usage),
        not choices,
        tuple((index, count) for index, count, _ in prompts),
        tuple(ids for _, _, ids in prompts),
        closing=not choices and chunk.usage is not None,
        finishes=any(choice.finish_reason for choice in choices),
        fingerprint=chunk.system_fingerprint or "",
    )


def _length(ids: msgspec.Raw) -> int:
    """How many a list of integers holds, -1 if it is none."""
    told = bytes(ids)
    if not told.startswith(b"["):
        return -1
    return told.count(b",") + 1 if len(told) > 2 else 0


def _prompt(index: int, ids: msgspec.Raw) -> tuple[int, int, bytes] | None:
    count = _length(ids)
    return None if count < 0 else (index, count, bytes(ids))


def _made_without_ids(choice: _Choice) -> int:
    if choice.delta is _ABSENT:
        return tokens_in(len(bytes(choice.text)) - 2)
    delta = _read_delta(choice.delta)
    if delta.role and not delta.content and not choice.finish_reason:
        return 0  # it says who speaks
    return tokens_in(len(delta.content.encode()) if delta.content else len(bytes(choice.delta)))


def _message_event(data: bytes) -> Said:
    event = _read_message_event(data)
    match event.type:
        case "message_start":
            return Said(usage=usage_of(event.message.usage) if event.message is not None else None)
        case "content_block_delta" if event.delta is not None and event.delta.type != "signature_delta":
            delta = event.delta
            tokens = tokens_in(len((delta.text + delta.thinking + delta.partial_json).encode()))
            return _ONE if tokens == 1 else Said(tokens)
        case "message_delta":
            if event.delta is not None and event.delta.stop_reason is None:
                return Said(failure=EngineGone("The engine stopped in the middle of the answer."))
            if _is_empty(event.usage):
                return Said(failure=EngineGone("The engine ended the answer before its first token."))
            return Said(usage=usage_of(event.usage), total=True)
        case "message_stop":
            return Said(last=True)
        case "error":
            return Said(failure=_error(data, bytes(event.error)))
    return NOTHING


def _response_event(data: bytes) -> Said:
    event = _read_response_event(data)
    if event.type.endswith(".delta"):
        tokens = tokens_in(len(bytes(event.delta)) - 2)
        return _ONE if tokens == 1 else Said(tokens)
    if event.type == "error":
        return Said(failure=_error(data, data))
    response = event.response
    if response is not None and _made_nothing(response):
        return Said(failure=EngineGone("The engine ended the answer before its first token."))
    if response is not None and event.type in ("response.completed", "response.incomplete"):
        return Said(usage=usage_of(response.usage), total=True, last=True, response=True)
    if response is not None and event.type == "response.failed":
        error = bytes(response.error)
        return Said(failure=_error(b'{"error":%b}' % (error or b"null"), error))
    return _RESPONSE if response is not None and event.type else NOTHING


_EVENTS: Mapping[Dialect, Callable[[bytes], Said]] = {
    "openai": _chunk,
    "messages": _message_event,
    "responses": _response_event,
}

# Types and codes by which engines say that the request is at fault, where they give no status.
_FAULT_OF_REQUEST = re.compile("(?i)bad_?request|invalid|not_?found|unprocessable|too_large|permission|authentication")


def _error(body: bytes, error: bytes) -> Refused:
    """An error in the middle of a stream. Without a status it is the engine's, unless its type says otherwise."""
    try:
        told = _read_error(error)
    except _UNREADABLE:
        told = _ErrorCode()
    if isinstance(told.code, int) and 400 <= told.code < 600:
        status = told.code
    else:
        words = f"{told.type or ''} {told.code or ''}"
        status = 400 if _FAULT_OF_REQUEST.search(words) else 500
    return refusal(status, body)


def read_whole(dialect: Dialect, body: bytes) -> Said | None:
    """What a whole answer says; None if it cannot be read."""
    try:
        return _WHOLE[dialect](body)
    except _UNREADABLE:
        return None


def _whole_choices(body: bytes) -> Said:
    answer = _read_choices(body)
    return _ended(answer.usage, any(choice.finish_reason in _BROKEN_OFF for choice in answer.choices or ()))


def _whole_message(body: bytes) -> Said:
    answer = _read_message(body)
    return _ended(answer.usage, answer.type == "message" and answer.stop_reason is None)


def _whole_response(body: bytes) -> Said:
    answer = _read_response(body)
    broken_off = answer.status in ("failed", "cancelled") or _made_nothing(answer)
    return _ended(answer.usage, broken_off)._replace(response=answer.status is not None)


def _made_nothing(response: _Response) -> bool:
    return response.status == "completed" and _is_empty(response.usage)


def _is_empty(usage: _Usage | None) -> bool:
    """vLLM 0.32 calls an answer complete that it aborted before the first token, as it does with requests that arrive
    while it is shutting down. Without even the token that ends an answer there is none."""
    return usage is not None and usage.output_tokens == 0


def _ended(usage: _Usage | None, broken_off: bool) -> Said:
    failure = EngineGone("The engine stopped in the middle of the answer.") if broken_off else None
    return Said(usage=usage_of(usage), total=True, failure=failure)


_WHOLE: Mapping[Dialect, Callable[[bytes], Said]] = {
    "openai": _whole_choices,
    "messages": _whole_message,
    "responses": _whole_response,
}


def without_prompt_ids(event: bytes, said: Said) -> bytes:
    """The event without the token ids of prompts, which vLLM sends where they are asked for."""
    for ids in said.prompt_ids:
        event = event.replace(b'"prompt_token_ids":' + ids, b'"prompt_token_ids":null')
    return event


# What the specifications of OpenAI and Open Responses want in every response: members that vLLM 0.32 leaves out, and
# those that it sends as null although they may not be.
_NULL = msgspec.Raw(b"null")
_ABSENT_MEMBERS = {
    "completed_at": _NULL,
    "error": _NULL,
    "incomplete_details": _NULL,
    "instructions": _NULL,
    "max_output_tokens": _NULL,
    "max_tool_calls": _NULL,
    "metadata": _NULL,
    "previous_response_id": _NULL,
    "prompt_cache_key": _NULL,
    "reasoning": _NULL,
    "safety_identifier": _NULL,
    "store": msgspec.Raw(b"false"),
    "usage": _NULL,
}
_NEVER_NULL = {
    "frequency_penalty": msgspec.Raw(b"0.0"),
    "presence_penalty": msgspec.Raw(b"0.0"),
    "text": msgspec.Raw(b'{"format":{"type":"text"}}'),
    "top_logprobs": msgspec.Raw(b"0"),
}


def published_response(response: bytes) -> bytes:
    """A response object with all members that OpenAI's specification has. `response` is one JSON object."""
    members = _read_members(response)
    for name, value in _ABSENT_MEMBERS.items():
        members.setdefault(name, value)
    for name, value in _NEVER_NULL.items():
        if bytes(members.get(name, _NULL)) == b"null":
            members[name] = value
    return msgspec.json.encode(members)


def as_published(event: bytes) -> bytes:
    """An event of /v1/responses with its whole response, and by its right name: vLLM 0.32 calls the end of an answer
    that reached its length `response.completed`."""
    members = _read_members(data_of(event))
    kind = msgspec.json.decode(members["type"], type=str)
    if kind == "response.completed" and _read_response(members["response"]).status == "incomplete":
        kind = "response.incomplete"
    members["type"] = msgspec.Raw(msgspec.json.encode(kind))
    members["response"] = msgspec.Raw(published_response(members["response"]))
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(members)


def with_fingerprint(event: bytes, fingerprint: str) -> bytes:
    """The event with `system_fingerprint`, unless it is not one JSON object."""
    return event[:-1] + b',"system_fingerprint":' + orjson.dumps(fingerprint) + b"}" if event.endswith(b"}") else event


_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRUCTURE = re.compile(rb'["{}\[\]]')
_LONGEST_USAGE_BYTES = 64 * 1024
_BACKSLASH = 0x5C
_USAGE = b'usage"'  # a member's name, with the quote that ends it


class UsageFinder:
    """Finds the usage of an answer that is too long to be held: follows its JSON piece by piece, wherever it is cut."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_name", "_told", "_usage")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self._name = b""  # the latest string at the first level: a member's name when an object follows it
        self._told: bytearray | None = None
        self._usage: bytes | None = None

    @property
    def usage(self) -> Usage | None:
        """The usage object at the first level of what was fed; None if there was none."""
        try:
            return None if self._usage is None else usage_of(_read_usage(self._usage))
        except _UNREADABLE:
            return None

    def feed(self, data: bytes) -> None:
        """The next piece."""
        at = 0
        while at < len(data):
            at = self._string(data, at) if self._in_string else self._outside(data, at)

    def _string(self, data: bytes, at: int) -> int:
        """Goes on inside a string; returns where it stopped."""
        if self._escaped:
            self._escaped = False
            stop = at + 1
        else:
            found = _IN_STRING.match(data, at)
            stop = at if found is None else found.end()
            if stop < len(data):
                self._escaped = data[stop] == _BACKSLASH  # the piece ends with it
                self._in_string = self._escaped
                stop += 1
        if self._told is not None:
            self._told += data[at:stop]
        elif self._depth == 1 and len(self._name) < len(_USAGE):
            self._name += data[at:stop]
        return stop

    def _outside(self, data: bytes, at: int) -> int:
        """Goes on between strings, up to the next one or the next bracket; returns where it stopped."""
        found = _STRUCTURE.search(data, at)
        stop = len(data) if found is None else found.end()
        mark = b"" if found is None else found.group()
        if mark == b"{" and self._depth == 1 and self._name == _USAGE:
            self._told, at = bytearray(), stop - 1
        if self._told is not None and len(self._told) < _LONGEST_USAGE_BYTES:
            self._told += data[at:stop]
        if mark == b'"':
            self._in_string, self._name = True, b""
        elif mark in (b"{", b"["):
            self._depth += 1
        elif mark:
            self._depth -= 1
            if self._depth == 1 and self._told is not None:
                self._usage, self._told = bytes(self._told), None
        return stop
