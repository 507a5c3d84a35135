"""The target of a workload: URL, key and request body, for each of the four APIs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadtest.call import TraceCall
from loadtest.client.answer import text_in

APIS = ("completions", "chat", "responses", "messages")
_PATHS = {"completions": "completions", "chat": "chat/completions", "responses": "responses", "messages": "messages"}
_END = re.compile(r"(/v1)?(/(chat/completions|completions|responses|messages))?/*$")
_ANTHROPIC = "anthropic-version: 2023-06-01\r\n"
_OPEN_ANSWER_TOKENS = 1024  # Anthropic's API wants a limit


def base_url(url: str) -> str:
    """The server, however it was written: without /v1, without an endpoint's path."""
    return _END.sub("", url.strip())


@dataclass(frozen=True, slots=True)
class Target:
    """Where a workload goes, and how it is put.

    url: http(s)://host:port, with or without /v1. keys: API key by tenant; `key` for those without one.
    api: one of APIS; "" chooses chat for a call that has messages, and else completions.
    extra: fields added to every body. tenant_xargs: name the tenant in `vllm_xargs`, for an engine without a gateway.
    exact_length: ask for exactly the planned output length (`ignore_eos`), else let the model end earlier.
    timeout_s: how long a client waits for the whole answer.
    """

    url: str
    model: str = ""
    key: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    tenant_xargs: bool = False
    exact_length: bool = True
    api: str = ""
    timeout_s: float = 600.0

    def request(self, call: TraceCall, messages: Sequence[Mapping[str, Any]] | None = None) -> bytes:
        """The HTTP request of one call, whole. messages: in place of the call's own."""
        parts = urlsplit(base_url(self.url))
        api = self.api or ("chat" if call.messages else "completions")
        body = orjson.dumps(self._body(call, api, call.messages if messages is None else messages))
        head = (
            f"POST {parts.path}/v1/{_PATHS[api]} HTTP/1.1\r\n"
            f"host: {parts.netloc.rpartition('@')[2]}\r\n{self._authorization(call, api)}x-request-id: {call.id}\r\n"
            f"content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _authorization(self, call: TraceCall, api: str) -> str:
        key = self.keys.get(call.tenant, self.key)
        anthropic = api == "messages"
        headers = f"authorization: Bearer {key}\r\n" if key else ""
        return headers + (f"x-api-key: {key}\r\n" if key and anthropic else "") + (_ANTHROPIC if anthropic else "")

    def _body(self, call: TraceCall, api: str, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        body: dict[str, Any] = {"stream": True, "temperature": 0}
        if self.model:
            body["model"] = self.model
        body |= _BODIES[api](call, messages)
        if api in ("completions", "chat"):
            body["stream_options"] = {"include_usage": True}
            if call.output_tokens and self.exact_length:
                body["ignore_eos"] = True
        if self.tenant_xargs:
            body["vllm_xargs"] = {"evenhand_tenant": call.tenant, "evenhand_job": call.id}
        return body | dict(call.body) | dict(self.extra)


Messages = Sequence[Mapping[str, Any]]


def _said(call: TraceCall, messages: Messages) -> Messages:
    """A chat: the call's messages, or its text as a question."""
    if messages:
        return messages
    if not isinstance(call.prompt, str):
        raise ValueError("A chat needs text, and this call has token ids: give --api completions.")
    return [{"role": "user", "content": call.prompt}]


def _completions(call: TraceCall, messages: Messages) -> dict[str, Any]:
    said = "\n\n".join(text_in(one["content"]) for one in messages) if messages else call.prompt
    return {"prompt": said} | ({"max_tokens": call.output_tokens} if call.output_tokens else {})


def _chat(call: TraceCall, messages: Messages) -> dict[str, Any]:
    limit = {"max_tokens": call.output_tokens} if call.output_tokens else {}
    return {"messages": list(_said(call, messages))} | limit


def _responses(call: TraceCall, messages: Messages) -> dict[str, Any]:
    said = [{**one, "content": _response_content(one)} for one in _said(call, messages)]
    return {"input": said} | ({"max_output_tokens": call.output_tokens} if call.output_tokens else {})


def _response_content(message: Mapping[str, Any]) -> Any:
    content = message["content"]
    if not isinstance(content, list):
        return content
    kind = "output_text" if message["role"] == "assistant" else "input_text"
    return [_response_part(part, kind) for part in content if isinstance(part, dict)]


def _response_part(part: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    if part.get("type") == "image_url":
        return {"type": "input_image", "image_url": _image_url(part)}
    return {"type": kind, "text": part["text"]} if part.get("type") == "text" else part


def _messages(call: TraceCall, messages: Messages) -> dict[str, Any]:
    said = _said(call, messages)
    system = "\n\n".join(text_in(one["content"]) for one in said if one["role"] == "system")
    turns = [{**one, "content": _message_content(one["content"])} for one in said if one["role"] != "system"]
    body = {"messages": turns, "max_tokens": call.output_tokens or _OPEN_ANSWER_TOKENS}
    return body | ({"system": system} if system else {})


def _message_content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [_message_part(part) for part in content if isinstance(part, dict)]


def _message_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") != "image_url":
        return part
    url = _image_url(part)
    media, comma, data = url.partition(";base64,")
    if comma and media.startswith("data:"):
        return {"type": "image", "source": {"type": "base64", "media_type": media[5:], "data": data}}
    return {"type": "image", "source": {"type": "url", "url": url}}


def _image_url(part: Mapping[str, Any]) -> str:
    image = part.get("image_url")
    return str(image.get("url", "")) if isinstance(image, dict) else str(image or "")


_BODIES = {"completions": _completions, "chat": _chat, "responses": _responses, "messages": _messages}
