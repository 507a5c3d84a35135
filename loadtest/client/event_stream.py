"""Server-sent events from bytes, as the HTML standard reads them, and as servers really send them."""

from collections.abc import Iterator

_MARK = b"\xef\xbb\xbf"

Event = tuple[bytes, bytes]  # name (empty: "message"), data


class EventStream:
    """Cuts a body into events: lines may end with LF, CR or CRLF, at any place of a packet."""

    __slots__ = ("_begun", "_rest", "_skip_lf")

    def __init__(self) -> None:
        self._rest = b""
        self._skip_lf = False
        self._begun = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that these bytes complete."""
        if self._skip_lf and data.startswith(b"\n"):  # the other half of a CRLF that two packets shared
            data = data[1:]
        self._skip_lf = False
        if b"\r" in data:
            self._skip_lf = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._rest:
            data = self._rest + data
        if not self._begun and data:
            self._begun = True
            data = data.removeprefix(_MARK)
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                yield b"", event[6:]
            elif (parsed := _parsed(event)) is not None:
                yield parsed

    def end(self) -> Iterator[Event]:
        """The last event, where the body ended without the blank line after it."""
        rest, self._rest = self._rest, b""
        if (parsed := _parsed(rest)) is not None:
            yield parsed


def _parsed(event: bytes) -> Event | None:
    """None for comments, and for blocks without data."""
    name, data = b"", list[bytes]()
    for line in event.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return (name, b"\n".join(data)) if data else None
