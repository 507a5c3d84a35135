"""vLLM 0.32's HTTP shapes, in pure functions: what a request asks for, and the bytes of every answer.

Field order, the explicit nulls and the wording of errors are those of vLLM's `entrypoints/openai`, so that what works
against this works against that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from loadtest.traces import hash_model

Json = dict[str, Any]  # a JSON object as it came: its values are whatever the client sent

DONE = b"data: [DONE]\n\n"
DEFAULT_COMPLETION_TOKENS = 16
_ANY_ID = 987_654_321  # stands where a token's id will


class WireRefusal(Exception):
    """A request that vLLM would refuse."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, kind, message, param)


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


@dataclass(frozen=True, slots=True)
class Ask:
    """What a generation request asks for, prompts already as token ids.

    max_tokens: None where the client left it open (chat: as much as the context holds).
    stream_interval: tokens of an event, but for the first one and the last. metadata: sent back on /v1/responses.
    cuts: vLLM 0.32 cuts this stream after its first events, and is well.
    extra: `vllm_xargs`. transfer: `kv_transfer_params`.
    """

    chat: bool
    prompts: list[list[int]]
    prompt_text: str
    max_tokens: int | None
    min_tokens: int = 0
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    ignore_eos: bool = False
    echo: bool = False
    logprobs: bool = False
    role: str = "assistant"
    stream_interval: int = 1
    metadata: Mapping[str, Any] | None = None
    cuts: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    transfer: Mapping[str, Any] | None = None

    @property
    def tenant(self) -> str:
        return str(self.extra.get("evenhand_tenant", "default"))

    def number(self, name: str) -> float | None:
        """A number of `vllm_xargs`, None if it is not there."""
        value = self.extra.get(name)
        if value is None:
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _invalid("vllm_xargs", f"{name} should be a number") from None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


def parse_body(body: bytes) -> Json:
    """The JSON object of a request, or Refused."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = (
            f"1 validation error:\n  {{'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: {error}'}}"
        )
        raise WireRefusal(400, "Bad Request", message) from error
    if not isinstance(parsed, dict):
        raise _invalid("body", "Input should be a valid dictionary or object to extract fields from")
    return parsed


def ask_chat(body: Json, max_model_tokens: int) -> Ask:
    """A chat request, or Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "Field required" if messages is None else "List should have at least 1 item")
    continue_final = bool(body.get("continue_final_message", False))
    add_prompt = body.get("add_generation_prompt", True)
    if continue_final and add_prompt:
        raise _invalid(
            "continue_final_message",
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        )
    turns = [_turn(message) for message in messages]
    text = hash_model.render_chat(turns, continue_final=continue_final)
    max_tokens = body.get("max_completion_tokens")
    if max_tokens is None:
        max_tokens = body.get("max_tokens")
    role = "assistant" if add_prompt else turns[-1][0]
    ask = _ask(body, chat=True, prompts=[hash_model.encode(text)], prompt_text=text, max_tokens=max_tokens, role=role)
    return _checked(ask, max_model_tokens)


def ask_completion(body: Json, max_model_tokens: int) -> Ask:
    """A completion request: prompt as text, texts, token ids or several lists of ids; or Refused."""
    prompt = body.get("prompt")
    if prompt is None or prompt == []:
        raise _invalid("prompt", "Either prompt or prompt_embeds must be provided and non-empty.")
    prompts = _prompts(prompt)
    text = prompt if isinstance(prompt, str) else ""
    max_tokens = body.get("max_tokens", DEFAULT_COMPLETION_TOKENS)
    ask = _ask(body, chat=False, prompts=prompts, prompt_text=text, max_tokens=max_tokens, role="")
    return _checked(ask, max_model_tokens)


def _prompts(prompt: object) -> list[list[int]]:
    if isinstance(prompt, str):
        return [hash_model.encode(prompt)]
    if isinstance(prompt, list):
        if all(isinstance(part, int) for part in prompt):
            return [_ids(prompt)]
        if all(isinstance(part, str) for part in prompt):
            return [hash_model.encode(part) for part in prompt]
        if all(isinstance(part, list) and part for part in prompt):
            return [_ids(part) for part in prompt]
    raise _invalid("prompt", "Input should be a valid string or list of token ids")


def _ids(ids: list[int]) -> list[int]:
    if max(ids) >= hash_model.VOCABULARY_SIZE or min(ids) < 0:
        raise WireRefusal(400, "BadRequestError", f"Token id {max(ids)} is out of vocabulary")
    return ids


def _turn(message: object) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _invalid("messages", "Input should be an object with a role")
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(isinstance(part, dict) and _is_remote(part) for part in content):
            # vLLM 0.32 answers 500 for whatever goes wrong while it fetches; this engine reaches nothing
            raise WireRefusal(500, "InternalServerError", "Cannot connect to host")
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return message["role"], str(content)


def _is_remote(part: Json) -> bool:
    """Whether a part of a message is a picture that is elsewhere."""
    picture = part.get("image_url")
    return isinstance(picture, dict) and str(picture.get("url")).startswith("http")


def _ask(body: Json, *, chat: bool, prompts: list[list[int]], prompt_text: str, max_tokens: object, role: str) -> Ask:
    stream = bool(body.get("stream", False))
    options = _mapping(body.get("stream_options"), "stream_options")
    if options and not stream:
        raise _invalid("stream_options", "Stream options can only be defined when `stream=True`.")
    include_usage = bool(options.get("include_usage", False))
    return Ask(
        chat=chat,
        prompts=prompts,
        prompt_text=prompt_text,
        max_tokens=_count(max_tokens, "max_tokens", least=1) if max_tokens is not None else None,
        min_tokens=_count(body.get("min_tokens", 0), "min_tokens", least=0),
        n=_count(body.get("n") or 1, "n", least=1),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=include_usage and bool(options.get("continuous_usage_stats", False)),
        return_token_ids=bool(body.get("return_token_ids", False)),
        ignore_eos=bool(body.get("ignore_eos", False)),
        echo=bool(body.get("echo", False)) and not chat,
        logprobs=bool(
            body.get("logprobs") or body.get("logprobs") == 0 and not chat and body.get("logprobs") is not False
        ),
        role=role,
        stream_interval=_count(body.get("stream_interval") or 1, "stream_interval", least=1),
        extra=_mapping(body.get("vllm_xargs"), "vllm_xargs"),
        transfer=_mapping(body["kv_transfer_params"], "kv_transfer_params") if body.get("kv_transfer_params") else None,
    )


def _mapping(value: object, param: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(param, "Input should be a valid dictionary")
    return value


def _count(value: object, param: str, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(param, "Input should be a valid integer")
    if value < least:
        raise WireRefusal(400, "BadRequestError", f"{param} must be at least {least}, got {value}.", param)
    return value


def _checked(ask: Ask, max_model_tokens: int) -> Ask:
    longest = max(len(prompt) for prompt in ask.prompts)
    if not all(ask.prompts):
        raise WireRefusal(400, "BadRequestError", "The decoder prompt cannot be empty")
    limit = f"This model's maximum context length is {max_model_tokens} tokens. However, "
    if ask.max_tokens is not None and longest + ask.max_tokens > max_model_tokens:
        message = (
            f"{limit}you requested {ask.max_tokens} output tokens and your prompt contains {longest} input tokens, for "
            f"a total of {longest + ask.max_tokens} tokens. Please reduce the length of the input prompt or the number "
            f"of requested output tokens."
        )
        raise WireRefusal(400, "BadRequestError", message, "input_tokens")
    if longest >= max_model_tokens:
        message = (
            f"{limit}your prompt contains {longest} input tokens, which exceeds this limit even without any output "
            f"tokens. Please reduce the length of the input prompt."
        )
        raise WireRefusal(400, "BadRequestError", message, "input_tokens")
    return ask


def _invalid(param: str, message: str) -> WireRefusal:
    return WireRefusal(400, "Bad Request", f"1 validation error:\n  {message} ({param})", param)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def event(body: Json) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Said:
    """One finished choice. prompt: which of the request's prompts it answers."""

    prompt: int
    ids: list[int]
    text: str
    finish: str


class Wire(Protocol):
    """One API's bytes for one answer: OpenAI's chat and completions below, Responses and Messages beside this file."""

    @property
    def request_id(self) -> str: ...

    @property
    def ask(self) -> Ask: ...

    def opening(self, choices: int) -> bytes:
        """What a stream begins with, before any token."""

    def plain(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after a token's text in a chunk with nothing but text; empty if chunks differ more.

        Built once per choice, so that a token costs no more than joining three pieces. What stands after it has a %d
        for the token's id where ids were asked for.
        """

    def token(self, index: int, text: str, finish: str | None, more: Json, made: int) -> bytes:
        """One token's chunk, empty if it has none. more: token_ids, logprobs or prompt_token_ids where asked for; made:
        tokens so far."""

    def closing(self, said: Sequence[Said]) -> bytes:
        """What a stream ends with, after its last token."""

    def failed(self, error: bytes) -> bytes:
        """What a stream ends with when the engine fails; error: OpenAI's error object."""

    def whole(self, said: Sequence[Said], transfer: Json | None) -> bytes:
        """The answer to a request that does not stream."""


@dataclass(frozen=True, slots=True)
class OpenAIWire:
    """/v1/chat/completions and /v1/completions."""

    request_id: str
    created: int
    model: str
    ask: Ask

    @property
    def _head(self) -> Json:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}

    def opening(self, choices: int) -> bytes:
        return b"".join(self._role_chunk(index) for index in range(choices)) if self.ask.chat else b""

    def _role_chunk(self, index: int) -> bytes:
        delta = {"role": self.ask.role, "content": ""}
        body = self._head
        body["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        if self.ask.continuous_usage:
            body["usage"] = usage(self.ask.prompt_tokens, 0)
        body["prompt_token_ids"] = self.ask.prompts[0] if self.ask.return_token_ids else None
        body["prompt_text"] = None
        return event(body)

    def plain(self, index: int) -> tuple[bytes, bytes]:
        ask = self.ask
        if ask.logprobs or ask.continuous_usage:
            return b"", b""
        marked = self.token(index, "\x00", None, {"token_ids": [_ANY_ID]} if ask.return_token_ids else {}, 0)
        before, after = marked.split(b"\\u0000")
        if ask.return_token_ids:
            after = after.replace(b"%", b"%%").replace(b"[%d]" % _ANY_ID, b"[%d]")
        return before, after

    def token(self, index: int, text: str, finish: str | None, more: Json, made: int) -> bytes:
        choice: Json = {"index": index}
        if self.ask.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = more.get("logprobs")
        choice["finish_reason"] = finish
        if finish is not None or not self.ask.chat:
            choice["stop_reason"] = None
        if not self.ask.chat:
            choice["prompt_token_ids"] = more.get("prompt_token_ids")
        choice["token_ids"] = more.get("token_ids")
        body = self._head
        body["choices"] = [choice]
        if self.ask.continuous_usage:
            body["usage"] = usage(self.ask.prompt_tokens, made)
        return event(body)

    def closing(self, said: Sequence[Said]) -> bytes:
        if not self.ask.include_usage:
            return DONE
        body = self._head
        body["choices"] = []
        body["usage"] = usage(self.ask.prompt_tokens, sum(len(one.ids) for one in said))
        return event(body) + DONE

    def failed(self, error: bytes) -> bytes:
        return b"data: " + error + b"\n\n" + DONE

    def whole(self, said: Sequence[Said], transfer: Json | None) -> bytes:
        ask = self.ask
        shape = _chat_choice if ask.chat else _text_choice
        body: Json = {
            "id": self.request_id,
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [shape(at, one, ask) for at, one in enumerate(said)],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(ask.prompt_tokens, sum(len(one.ids) for one in said)) | {"prompt_tokens_details": None},
            "kv_transfer_params": transfer,
        }
        if ask.chat:
            body["prompt_logprobs"] = None
            body["prompt_token_ids"] = ask.prompts[0] if ask.return_token_ids else None
        return orjson.dumps(body)


def _chat_choice(index: int, said: Said, ask: Ask) -> Json:
    message = {
        "role": ask.role,
        "content": said.text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(said.ids) if ask.logprobs else None,
        "finish_reason": said.finish,
        "stop_reason": None,
        "token_ids": said.ids if ask.return_token_ids else None,
    }


def _text_choice(index: int, said: Said, ask: Ask) -> Json:
    prompt = ask.prompts[said.prompt]
    text = (ask.prompt_text or hash_model.decode(prompt)) + said.text if ask.echo else said.text
    return {
        "index": index,
        "text": text,
        "logprobs": text_logprobs(said.ids) if ask.logprobs else None,
        "finish_reason": said.finish,
        "stop_reason": None,
        "token_ids": said.ids if ask.return_token_ids else None,
        "prompt_logprobs": None,
        "prompt_token_ids": prompt if ask.return_token_ids else None,
    }


def chat_logprobs(ids: list[int]) -> Json:
    """Every token with certainty: the model never hesitates."""
    texts = [hash_model.token_bytes(token) for token in ids]
    return {
        "content": [
            {"token": text.decode(errors="replace"), "logprob": 0.0, "bytes": list(text), "top_logprobs": []}
            for text in texts
        ]
    }


def text_logprobs(ids: list[int]) -> Json:
    texts = [hash_model.token_bytes(token).decode(errors="replace") for token in ids]
    offsets = [sum(len(text) for text in texts[:at]) for at in range(len(texts))]
    return {
        "text_offset": offsets,
        "token_logprobs": [0.0] * len(texts),
        "tokens": texts,
        "top_logprobs": [{text: 0.0} for text in texts],
    }
