"""Finds images, audio and video inside a prompt, whose bytes do not count as text."""

from collections.abc import Iterator

import msgspec

LARGEST_MEDIA_BYTES = 4096  # what one of them counts for at most: about a thousand tokens, as vision models make

_TYPES = frozenset("image_url input_image image input_audio audio_url video_url input_video video".split())
_NO_CONTENT = msgspec.Raw(b"")


class _Item(msgspec.Struct):
    """A message, or a part of one."""

    type: str = ""
    content: msgspec.Raw = _NO_CONTENT


_MOST_ITEMS = 100_000  # each becomes an object

_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_item = msgspec.json.Decoder(_Item).decode


def media_bytes_beyond(content: bytes, most: int) -> int:
    """How many bytes of a list of messages belong to media parts beyond `most` of each. 0 where it is no such list.

    A part is one by its `type`, in the place where an API has it: a text that looks like a picture stays a text.
    """
    if b"base64" not in content or content.count(b",") > _MOST_ITEMS:  # who writes it otherwise is counted in full
        return 0
    try:
        return sum(max(0, size - most) for size in _media(content, depth=3))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0


def _media(content: bytes, depth: int) -> Iterator[int]:
    """Sizes of the media parts: of messages, of their parts, and of a tool's results among these."""
    for raw in _items(content):
        if not bytes(raw).startswith(b"{"):
            continue
        item = _item(raw)
        if item.type in _TYPES:
            yield len(bytes(raw))
        elif depth > 1 and bytes(item.content).startswith(b"["):
            yield from _media(bytes(item.content), depth - 1)
