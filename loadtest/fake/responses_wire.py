"""OpenAI's Responses API, as vLLM serves it, over the fake engine's answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from loadtest.fake.vllm_wire import Ask, Json, Said, WireRefusal, ask_chat, parse_body

_BEFORE_TEXT = 4  # events before the first delta


def ask_responses(body: Json, max_model_tokens: int) -> Ask:
    """A Responses request, or Refused. Instructions become the system's turn."""
    asked = body.get("input")
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not isinstance(turns, list) or not turns:
        raise WireRefusal(400, "Bad Request", "1 validation error:\n  Field required (input)", "input")
    if body.get("instructions"):
        turns = [{"role": "system", "content": body["instructions"]}, *turns]
    known: Json = {name: body[name] for name in ("vllm_xargs", "kv_transfer_params") if name in body}
    if body.get("max_output_tokens") is not None:
        known["max_tokens"] = body["max_output_tokens"]
    ask = ask_chat(known | {"messages": turns, "stream": body.get("stream", False)}, max_model_tokens)
    ask = replace(ask, metadata=body.get("metadata"), cuts=ask.stream and (body.get("top_logprobs") or 0) > 20)
    return ask if ask.max_tokens is not None else replace(ask, max_tokens=max_model_tokens - ask.prompt_tokens)


@dataclass(frozen=True, slots=True)
class ResponsesWire:
    """The bytes of one answer; every event carries its number."""

    request_id: str
    created: int
    model: str
    ask: Ask

    @property
    def _item_id(self) -> str:
        return f"msg_{self.request_id.removeprefix('resp_')}"

    def opening(self, choices: int) -> bytes:
        begun = self._response("in_progress", [], None)
        item = self._item("in_progress", [])
        return b"".join(
            (
                _event("response.created", 0, {"response": begun}),
                _event("response.in_progress", 1, {"response": begun}),
                _event("response.output_item.added", 2, {"output_index": 0, "item": item}),
                _event("response.content_part.added", 3, self._place() | {"part": _part("") | {"logprobs": []}}),
            )
        )

    def plain(self, index: int) -> tuple[bytes, bytes]:
        return b"", b""  # every delta has another number

    def token(self, index: int, text: str, finish: str | None, more: Json, made: int) -> bytes:
        if not text:
            return b""
        body = self._place() | {"delta": text, "logprobs": []}
        return _event("response.output_text.delta", _BEFORE_TEXT + made - 1, body)

    def closing(self, said: Sequence[Said]) -> bytes:
        text, number = said[0].text, _BEFORE_TEXT + len(said[0].ids) - (said[0].finish == "stop")
        whole = self._finished(said[0])
        item = whole["output"][0]
        return b"".join(
            (
                _event("response.output_text.done", number, self._place() | {"text": text, "logprobs": []}),
                _event("response.content_part.done", number + 1, self._place() | {"part": _part(text)}),
                _event("response.output_item.done", number + 2, {"output_index": 0, "item": item}),
                _event("response.completed", number + 3, {"response": whole}),  # vLLM's, whatever the status
            )
        )

    def failed(self, error: bytes) -> bytes:
        told = parse_body(error)["error"]
        broken = self._response("failed", [], None) | {"error": {"code": "server_error", "message": told["message"]}}
        return _event("response.failed", _BEFORE_TEXT, {"response": broken})

    def whole(self, said: Sequence[Said], transfer: Json | None) -> bytes:
        return orjson.dumps(self._finished(said[0]))

    def _finished(self, said: Said) -> Json:
        status = "incomplete" if said.finish == "length" else "completed"
        usage = {
            "input_tokens": self.ask.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(said.ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.ask.prompt_tokens + len(said.ids),
        }
        return self._response(status, [self._item("completed", [_part(said.text)])], usage)

    def _place(self) -> Json:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, content: Sequence[Json]) -> Json:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: Sequence[Json], usage: Json | None) -> Json:
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "background": False,
            "instructions": None,
            "metadata": self.ask.metadata,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "service_tier": "auto",
            "temperature": 0.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "max_output_tokens": self.ask.max_tokens,
            "usage": usage,
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _event(kind: str, number: int, body: Json) -> bytes:
    data = orjson.dumps({"type": kind, "sequence_number": number} | body)
    return f"event: {kind}\ndata: ".encode() + data + b"\n\n"
