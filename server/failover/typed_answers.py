"""Streams of typed events, /v1/responses and /v1/messages: what a client has of one, and the events that complete it.

The events are those of vLLM 0.32: `response.completed` ends an answer that was cut at its length, too.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import orjson

from server.engine.answers import Usage, as_published, data_of, tokens_of_prompt
from server.request.call import Dialect
from server.request.transcript import Transcript

Json = dict[str, Any]


class AnswerEnd(NamedTuple):
    """How an answer ended. length: at its limit. stop: which stop text ended it. usage: of the whole request."""

    length: bool
    stop: str | None
    usage: Usage


class TypedAnswer(ABC):
    """One answer as its client knows it: `read` takes events that the client has, the other methods write new ones.

    opening: the message or response that the first event carries, as yet empty. announced: a part of the answer has
    begun. only_text: there is nothing in it but one text. text_ended: the client was told that the text is complete.
    finish_told: why it ended, too. ended: the client has the last event. next_number: of the next event, where events
    are numbered. prompt_tokens: as the first worker counts them, None if it has not said.
    """

    next_number: int | None = None
    prompt_tokens: int | None = None

    def __init__(self) -> None:
        self.opening: Json | None = None
        self.texts: list[str] = []
        self.announced = self.text_ended = self.finish_told = self.ended = False
        self.only_text = True

    @property
    def text(self) -> str:
        """The text that the client has."""
        return "".join(self.texts)

    @abstractmethod
    def read(self, event: Json) -> None:
        """One more event of the client's."""

    @abstractmethod
    def delta(self, text: str) -> bytes:
        """The events that add `text`."""

    @abstractmethod
    def closing(self, end: AnswerEnd) -> bytes:
        """The events that the client still needs after the last text."""

    @abstractmethod
    def retold(self, event: Json) -> bytes:
        """An event of a worker that begins the answer anew; nothing for one that the client has."""

    def _written(self, event: Json) -> bytes:
        self.read(event)
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


class Message(TypedAnswer):
    """An answer of Anthropic's Messages API."""

    def read(self, event: Json) -> None:
        match event["type"]:
            case "message_start":
                self.opening = event["message"]
                self.prompt_tokens = tokens_of_prompt(event["message"].get("usage"))
            case "content_block_start":
                self.only_text &= not event["index"] and event["content_block"]["type"] == "text"
                self.announced = True
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                self.texts.append(event["delta"]["text"])
            case "content_block_stop":
                self.text_ended = True
            case "message_delta":
                self.finish_told = True
            case "message_stop":
                self.ended = True
            case "ping":
                return
            case _:
                self.only_text = False

    def delta(self, text: str) -> bytes:
        start = b""
        if not self.announced:
            block = {"type": "text", "text": ""}
            start = self._written({"type": "content_block_start", "index": 0, "content_block": block})
        delta = {"type": "text_delta", "text": text}
        return start + self._written({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, end: AnswerEnd) -> bytes:
        last = b""
        if self.announced and not self.text_ended:
            last = self._written({"type": "content_block_stop", "index": 0})
        if not self.finish_told:
            reason = "max_tokens" if end.length else "end_turn" if end.stop is None else "stop_sequence"
            delta = {"stop_reason": reason, "stop_sequence": end.stop}
            usage = (self.opening or {}).get("usage") or {"input_tokens": end.usage.prompt_tokens}
            usage = usage | {"output_tokens": end.usage.output_tokens}
            last += self._written({"type": "message_delta", "delta": delta, "usage": usage})
        return last + self._written({"type": "message_stop"})

    def retold(self, event: Json) -> bytes:
        return b"" if event["type"] == "message_start" and self.opening is not None else self._written(event)


_FIRST_PLACE = {"output_index": 0, "content_index": 0}
_OPENING = ("response.created", "response.in_progress", "response.queued")


class Response(TypedAnswer):
    """An answer of OpenAI's Responses API."""

    def __init__(self) -> None:
        super().__init__()
        self.next_number: int = 0
        self.item: Json = {}
        self.opened: set[str] = set()
        self.part_announced = self.part_ended = self.item_ended = False

    def read(self, event: Json) -> None:
        self.next_number = event["sequence_number"] + 1
        match event["type"]:
            case kind if kind in _OPENING:
                self.opened.add(kind)
                self.opening = event["response"]
            case "response.output_item.added":
                self.only_text &= not event["output_index"] and event["item"]["type"] == "message"
                self.item = event["item"]
                self.announced = True
            case "response.content_part.added":
                self.only_text &= not event["content_index"] and event["part"]["type"] == "output_text"
                self.part_announced = True
            case "response.output_text.delta":
                self.only_text &= not event.get("logprobs")
                self.texts.append(event["delta"])
            case kind:
                self._read_end(kind, event)

    def _read_end(self, kind: str, event: Json) -> None:
        match kind:
            case "response.output_text.done":
                self.text_ended = True
            case "response.content_part.done":
                self.part_ended = True
            case "response.output_item.done":
                self.item = event["item"]
                self.item_ended = True
            case "response.completed" | "response.incomplete":
                self.finish_told = self.ended = True
            case _:
                self.only_text = False

    def delta(self, text: str) -> bytes:
        start = b""
        if not self.announced:
            name = f"msg_{self._id.removeprefix('resp_')}"
            item = {"id": name, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            start = self._numbered("response.output_item.added", {"output_index": 0, "item": item})
        if not self.part_announced:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            start += self._numbered("response.content_part.added", self._place | {"part": part})
        return start + self._numbered("response.output_text.delta", self._place | {"delta": text, "logprobs": []})

    def closing(self, end: AnswerEnd) -> bytes:
        last = self._close_item() if self.announced else b""
        response = (self.opening or {}) | {
            "status": "incomplete" if end.length else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if end.length else None,
            "output": [self.item] if self.announced else [],
            "usage": _response_usage(end.usage),
        }
        end_event = self._numbered(f"response.{response['status']}", {"response": response})
        return last + as_published(end_event.rstrip()) + b"\n\n"

    def _close_item(self) -> bytes:
        text = self.text
        part: Json = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
        last = b""
        if self.part_announced and not self.text_ended:
            last = self._numbered("response.output_text.done", self._place | {"text": text, "logprobs": []})
        if self.part_announced and not self.part_ended:
            last += self._numbered("response.content_part.done", self._place | {"part": part})
        if not self.item_ended:
            item = self.item | {"status": "completed", "content": [part] if text else []}
            last += self._numbered("response.output_item.done", {"output_index": 0, "item": item})
        return last

    def retold(self, event: Json) -> bytes:
        if event["type"] in self.opened:
            return b""
        if self.opening is not None and isinstance(event.get("response"), dict):
            event["response"] |= {name: self.opening[name] for name in ("id", "created_at") if name in self.opening}
        return self._written(event | {"sequence_number": self.next_number})

    @property
    def _id(self) -> str:
        return str((self.opening or {}).get("id", ""))

    @property
    def _place(self) -> Json:
        return {"item_id": self.item["id"]} | _FIRST_PLACE

    def _numbered(self, kind: str, body: Json) -> bytes:
        return self._written({"type": kind, "sequence_number": self.next_number} | body)


def _response_usage(usage: Usage) -> Json:
    prompt, output = usage.prompt_tokens or 0, usage.output_tokens or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


def typed_answer(dialect: Dialect, transcript: Transcript) -> TypedAnswer:
    """What the client has. ValueError if an event is not one of its API's."""
    answer = Message() if dialect == "messages" else Response()
    try:
        for event in transcript.events().split(b"\n\n"):
            data = data_of(event)
            if data:
                answer.read(orjson.loads(data))
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"an event is not one of the API's: {error!r}") from None
    return answer
