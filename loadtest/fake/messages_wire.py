"""Anthropic's Messages API, as vLLM serves it, over the fake engine's answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from loadtest.fake.vllm_wire import Ask, Json, Said, WireRefusal, ask_chat, parse_body


def _stop_reason(finish: str) -> str:
    return "max_tokens" if finish == "length" else "end_turn"


def ask_messages(body: Json, max_model_tokens: int) -> Ask:
    """A Messages request, or Refused. The system prompt becomes the first turn."""
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    if not isinstance(body.get("max_tokens"), int):
        raise WireRefusal(400, "Bad Request", "1 validation error:\n  Field required (max_tokens)", "max_tokens")
    known: Json = {name: body[name] for name in ("max_tokens", "vllm_xargs", "kv_transfer_params") if name in body}
    messages = body.get("messages")
    turns = system + messages if isinstance(messages, list) and messages else messages
    return ask_chat(known | {"messages": turns, "stream": body.get("stream", False)}, max_model_tokens)


def anthropic_error(refused: bytes) -> bytes:
    """An error of ours in Anthropic's shape."""
    error = parse_body(refused)["error"]
    return orjson.dumps({"type": "error", "error": {"type": error["type"], "message": error["message"]}})


@dataclass(frozen=True, slots=True)
class MessagesWire:
    """The bytes of one answer."""

    request_id: str
    created: int
    model: str
    ask: Ask

    def opening(self, choices: int) -> bytes:
        message = self._message([], None, 0)
        block = {"type": "text", "text": ""}
        return _event({"type": "message_start", "message": message}) + _event(
            {"type": "content_block_start", "index": 0, "content_block": block}
        )

    def plain(self, index: int) -> tuple[bytes, bytes]:
        before, after = self._delta("\x00").split(b"\\u0000")
        return before, after

    def token(self, index: int, text: str, finish: str | None, more: Json, made: int) -> bytes:
        return self._delta(text) if text else b""

    def closing(self, said: Sequence[Said]) -> bytes:
        tokens = len(said[0].ids)
        delta = {"stop_reason": _stop_reason(said[0].finish), "stop_sequence": None}
        usage = {"input_tokens": self.ask.prompt_tokens, "output_tokens": tokens}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": usage})
            + _event({"type": "message_stop"})
        )

    def failed(self, error: bytes) -> bytes:
        return b"event: error\ndata: " + anthropic_error(error) + b"\n\n"

    def whole(self, said: Sequence[Said], transfer: Json | None) -> bytes:
        content = [{"type": "text", "text": said[0].text}]
        return orjson.dumps(self._message(content, _stop_reason(said[0].finish), len(said[0].ids)))

    def _delta(self, text: str) -> bytes:
        return _event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})

    def _message(self, content: Sequence[Json], stop_reason: str | None, output_tokens: int) -> Json:
        return {
            "id": self.request_id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": self.ask.prompt_tokens, "output_tokens": output_tokens},
        }


def _event(body: Json) -> bytes:
    return f"event: {body['type']}\ndata: ".encode() + orjson.dumps(body) + b"\n\n"
