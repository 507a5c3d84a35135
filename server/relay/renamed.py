"""An answer under the model name that the client used, where an alias sent the request to another model.

Whole answers are decoded and their `model` is set. Of a stream, one event is decoded to find where its `model` stands:
JSON is read from left to right, so in every event that begins with the same bytes it stands in the same place.
"""

from json import JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; the decoder itself uses it

import msgspec

from server.engine.client import EngineConnection
from server.relay.relay import ClientAnswer

_Object = dict[str, msgspec.Raw]
_read = msgspec.json.Decoder(_Object).decode
_encode = msgspec.json.Encoder().encode
_scan = JSONDecoder().raw_decode
_SPACE = " \t\r\n"
_NESTED = ("response", "message")  # where /v1/responses and /v1/messages name the model within an event
_LARGEST_HEAD = 64 * 1024  # of an answer that is forwarded in pieces: the part in which its `model` is looked for


class RenamedAnswer:
    """A client's answer in which `model` is the name that was asked."""

    def __init__(self, out: ClientAnswer, asked: str) -> None:
        self.out = out
        self.name = _encode(asked)
        self.streams = False
        self._head: tuple[int, bytes, int | None] | None = None
        self._before = self._instead = b""

    @property
    def begun(self) -> bool:
        return self.out.begun or self._head is not None

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        self.streams = content_type.startswith(b"text/event-stream")
        if self.streams:
            self.out.begin(status, content_type, length)
        else:  # its length is known once it is renamed
            self._head = status, content_type, length

    def write(self, data: bytes) -> None:
        if self.streams:
            events = data.split(b"\n\n")
            self.out.write(b"\n\n".join([*map(self._event, events[:-1]), events[-1]]))
        elif self._head is None:
            self.out.write(data)
        else:
            status, content_type, length = self._head
            self._head = None
            renamed = self._whole(data) if length == len(data) else self._beginning(data)
            self.out.begin(status, content_type, None if length is None else length + len(renamed) - len(data))
            self.out.write(renamed)

    def forward(self, chunk: bytes, at: int) -> None:
        self.write(chunk[at:-2])

    def end(self) -> None:
        if self._head is not None:
            self.out.begin(*self._head)
            self._head = None
        self.out.end()

    def flows_from(self, connection: EngineConnection | None) -> None:
        self.out.flows_from(connection)

    def _whole(self, body: bytes) -> bytes:
        try:
            members = _read(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return body
        return self._named(members) if "model" in members else body

    def _named(self, members: _Object) -> bytes:
        return _encode(members | {"model": msgspec.Raw(self.name)})

    def _beginning(self, data: bytes) -> bytes:
        span = model_span(data[:_LARGEST_HEAD])
        return data if span is None else data[: span[0]] + self.name + data[span[1] :]

    def _event(self, event: bytes) -> bytes:
        if self._before and event.startswith(self._before):
            return self._instead + event[len(self._before) :]
        at = event.find(b"data: ") + len(b"data: ")
        if not (event.startswith(b"data: ") or event.startswith(b"event: ")) or event[at : at + 1] != b"{":
            return event
        try:
            members = _read(event[at:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return event
        if "model" in members:
            return self._learned(event, at, members)
        for name in _NESTED:
            if name in members and bytes(members[name]).startswith(b"{"):
                return event[:at] + _encode(members | {name: msgspec.Raw(self._whole(bytes(members[name])))})
        return event

    def _learned(self, event: bytes, at: int, members: _Object) -> bytes:
        """An event of chat or completions; those like it need not be decoded."""
        span = model_span(event[at:])
        if span is None:
            return event[:at] + self._named(members)
        self._before, self._instead = event[: at + span[1]], event[: at + span[0]] + self.name
        return self._instead + event[len(self._before) :]


def model_span(data: bytes) -> tuple[int, int] | None:
    """Where the value of `model` stands in a JSON object, or in the beginning of one; None if it is not found there."""
    text = data.decode("latin-1")  # a byte a character: JSON's own signs are ASCII, and the rest is not looked at
    try:
        at = _after(text, 0, "{")
        while True:
            name, at = scanstring(text, _after(text, at, '"'), True)
            begin = _skip(text, _after(text, at, ":"))
            value, end = _scan(text, begin)
            if name == "model":
                return (begin, end) if isinstance(value, str) else None
            at = _after(text, end, ",")
    except (ValueError, RecursionError):
        return None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _after(text: str, at: int, sign: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != sign:
        raise ValueError(f"{sign} is missing at {at}")
    return at + 1
