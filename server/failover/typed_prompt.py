"""The prompt of a request to /v1/responses or /v1/messages as chat messages, which vLLM's /tokenize renders.

vLLM makes chat messages of both itself (`entrypoints/openai/responses/utils.py`, `entrypoints/anthropic/serving.py`).
Here only what is plain text is taken; /v1/responses/render and /v1/messages/render, which would take everything, are
switched off in a vLLM that is started without `--enable-scale-out`.
"""

from typing import Any

import orjson

from server.failover.resume import CannotResume
from server.request.call import Call
from server.request.schemas import raw_members

Json = dict[str, Any]

_PARTS = ("text", "input_text", "output_text")
_ROLES = ("system", "developer", "user", "assistant")
_NOT_PROMPT = "x-anthropic-billing-header"  # a system text that begins with it is left out by vLLM


def chat_of(call: Call) -> Json:
    """The body for /tokenize. CannotResume where the prompt is not text alone, or ends with an unfinished answer."""
    members = {name: orjson.loads(bytes(raw)) for name, raw in raw_members(call.body).items()}
    if call.route.dialect == "messages":
        system, turns = _system_of(members.get("system")), members.get("messages")
    else:
        system, turns = members.get("instructions"), members.get("input")
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not (system is None or isinstance(system, str)):
        raise CannotResume("its prompt is not a list of messages")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_message(turn, inline_system=call.route.dialect == "responses") for turn in turns]
    if not messages or messages[-1]["role"] != "user":
        raise CannotResume("its prompt ends with an answer")
    asked: Json = {"model": call.model, "messages": messages, "add_generation_prompt": True}
    if members.get("chat_template_kwargs"):
        asked["chat_template_kwargs"] = members["chat_template_kwargs"]
    return asked


def _system_of(system: object) -> object:
    """Anthropic's system prompt as one text."""
    if not isinstance(system, list):
        return system
    return "".join(text for text in map(_text_of, system) if not text.startswith(_NOT_PROMPT))


def _message(turn: object, *, inline_system: bool) -> Json:
    roles = _ROLES if inline_system else _ROLES[2:]
    if not isinstance(turn, dict) or turn.get("role") not in roles or turn.get("type", "message") != "message":
        raise CannotResume("its prompt contains more than text messages")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [{"type": "text", "text": _text_of(part)} for part in content]
        content = parts[0]["text"] if len(parts) == 1 else parts
    if not content:
        raise CannotResume("its prompt has an empty message")
    return {"role": turn["role"], "content": content}


def _text_of(part: object) -> str:
    if isinstance(part, dict) and part.get("type") in _PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise CannotResume("its prompt is not text alone")
