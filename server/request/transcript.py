"""The part of a stream that the client already has: kept as raw bytes, parsed only if another worker must continue it.

Keeping costs a reference per chunk. Every `PACK_CHUNKS` chunks they are joined, and what all events of a stream have in
common (nine tenths of their bytes) is written as one byte.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

PACK_CHUNKS = 32  # few enough that what is not packed yet stays in the processor's caches
MAX_KEPT_BYTES = 8 * 1024 * 1024  # packed, about a million tokens

_DONE = b"data: [DONE]"
# An event with nothing but text: what stands before the text, the text, what stands behind it.
_TEXT_EVENT = re.compile(
    rb'((?:event: [^\n]*\n)?data: \{[^\n]*?"(?:content|text|delta)":")(?:[^"\\\n]|\\.)*("[^\n]*)\n\n'
)
_VARYING = (b'"token_ids":[', b'"sequence_number":')  # behind these, events differ again
_HEAD, _TAIL = b"\0", b"\1"  # bytes that no JSON text has
_NO_CONTENT = ("role", "content")


class Transcript:
    """The raw events of a stream's present leg. `chunks` is appended to by the relay, whole events each.

    earlier: what former legs said. full: it was too much to be kept, or keeping it was of no use.
    """

    __slots__ = ("chunks", "earlier", "full", "_packed", "_packed_bytes", "_head", "_tail")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.earlier: TranscriptProgress | None = None
        self.full = False
        self._packed: list[bytes] = []
        self._packed_bytes = 0
        self._head = self._tail = b""

    def add(self, events: bytes) -> None:
        """Whole events passed."""
        self.chunks.append(events)
        if len(self.chunks) >= PACK_CHUNKS:
            self.pack()

    def pack(self) -> None:
        """Makes the chunks small. Called every `PACK_CHUNKS` of them, by `add` and by whoever appends without it."""
        data = b"".join(self.chunks)
        self.chunks.clear()
        if self.full:
            return
        if not self._head:
            self._learn(data)
        if self._head and _HEAD not in data and _TAIL not in data:
            data = data.replace(self._head, _HEAD).replace(self._tail, _TAIL)
        elif _HEAD in data or _TAIL in data:
            self.full = True
        self._packed.append(data)
        self._packed_bytes += len(data)
        if self.full or self._packed_bytes > MAX_KEPT_BYTES:
            self.full = True
            self._packed.clear()

    def _learn(self, data: bytes) -> None:
        events = _TEXT_EVENT.findall(data)
        if events:
            self._head, tail = events[-1]
            self._tail = next((tail[: tail.find(name) + len(name)] for name in _VARYING if name in tail), tail)

    def events(self) -> bytes:
        """All that was appended, as it was."""
        packed = b"".join(self._packed)
        if self._head:
            packed = packed.replace(_TAIL, self._tail).replace(_HEAD, self._head)
        return packed + b"".join(self.chunks)

    def begin_leg(self, earlier: "TranscriptProgress | None") -> None:
        """Another worker goes on after `earlier`."""
        self.earlier = earlier
        self.chunks.clear()
        self._packed.clear()
        self._packed_bytes = 0
        self._head = self._tail = b""


class Chunk(NamedTuple):
    """Tokens and the text that came with them. ids: None where the engine did not send them."""

    ids: list[int] | None
    text: str


@dataclass(slots=True)
class TranscriptProgress:
    """How far a stream has come, one choice.

    head: what each event has beside its choices (id, created, model). told: the text that the client has.
    told_ids: the token ids that it has. chunks: in order; they may be shorter than what was told while a later leg says
    again what an earlier one had said. finish: why it ended, if it did. said_usage, said_done: what closes a stream was
    sent, too.
    only_text: nothing but text was said, so that token ids carry all there is to know.
    """

    head: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    chunks: list[Chunk] = field(default_factory=list)
    told: str = ""
    finish: str | None = None
    said_usage: bool = False
    said_done: bool = False
    only_text: bool = True
    told_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int] | None:
        """All token ids so far, None if any are unknown."""
        ids: list[int] = []
        for chunk in self.chunks:
            if chunk.ids is None:
                return None
            ids += chunk.ids
        return ids

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def read(self, event: dict[str, Any]) -> None:
        """One more event of an engine, in the shape of chat or of completions."""
        if not self.head:
            self.head = {name: value for name, value in event.items() if name in ("id", "object", "created", "model")}
        if self.prompt_ids is None:
            self.prompt_ids = event.get("prompt_token_ids")
        choices = event.get("choices")
        if event.get("usage") and not choices:
            self.said_usage = True
        for choice in choices or ():
            self._read_choice(choice)

    def _read_choice(self, choice: dict[str, Any]) -> None:
        if self.prompt_ids is None:
            self.prompt_ids = choice.get("prompt_token_ids")
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta")
        if delta is None:
            delta = {"content": choice.get("text")}
        elif delta.get("role") and not delta.get("content") and not choice.get("token_ids"):
            delta = {name: value for name, value in delta.items() if name not in _NO_CONTENT}
            self.only_text = self.only_text and not any(delta.values())
            return
        if (
            choice.get("index")
            or choice.get("logprobs")
            or any(value for name, value in delta.items() if name not in _NO_CONTENT)
        ):
            self.only_text = False
        text, ids = delta.get("content") or "", choice.get("token_ids")
        if text or ids:
            self.chunks.append(Chunk(ids, text))


def progress_of(received: Transcript) -> TranscriptProgress:
    """What a client has of a stream. ValueError if an event is not one of OpenAI's."""
    earlier = received.earlier
    progress = TranscriptProgress()
    if earlier is not None:
        progress.head, progress.prompt_ids = earlier.head, earlier.prompt_ids
        progress.chunks = list(earlier.chunks)
        progress.only_text = earlier.only_text
    try:
        for event in received.events().split(b"\n\n"):
            if event.startswith(_DONE):
                progress.said_done = True
            elif event.startswith(b"data:"):
                progress.read(orjson.loads(event[5:]))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"an event is not one of OpenAI's: {error}") from None
    said, ids = progress.text, progress.ids or []
    progress.told = said if earlier is None or len(said) > len(earlier.told) else earlier.told
    progress.told_ids = ids if earlier is None or len(ids) > len(earlier.told_ids) else earlier.told_ids
    return progress
