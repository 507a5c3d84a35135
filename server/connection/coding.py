"""Request bodies that come compressed (RFC 9110, 8.4): expanded piece by piece, so that a bomb is found out early."""

import zlib
from collections.abc import Iterator
from typing import Protocol

from backports import zstd

STEP_BYTES = 64 * 1024  # the most that is expanded before somebody looks whether there is room for it
WINDOW_LOG = 23  # a decoder need not support larger windows (RFC 9659); each would be this process' memory
MOST_MEMBERS = 1024  # of one body: each costs more than its bytes, and may be empty


class BadCoding(ValueError):
    """The body is not what its Content-Encoding says; the message is a whole sentence."""


class BodyDecoder(Protocol):
    """Expands one body. whole: its end has come."""

    @property
    def whole(self) -> bool: ...
    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What this part of the body expands to, in pieces of at most `STEP_BYTES`. BadCoding."""


class GzipDecoder:
    """Gzip, of several members too."""

    def __init__(self) -> None:
        self._members = 0
        self._begin()

    def _begin(self) -> None:
        self._members = one_more(self._members)
        self._member = zlib.decompressobj(wbits=31)

    @property
    def whole(self) -> bool:
        return self._member.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._member.eof:
                if not data:
                    return
                self._begin()
            try:
                piece = self._member.decompress(data, STEP_BYTES)
            except zlib.error:
                raise BadCoding("The body is not valid gzip data.") from None
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                yield piece
            if not data and len(piece) < STEP_BYTES:
                return


class ZstdDecoder:
    """Zstandard, of several frames too."""

    def __init__(self) -> None:
        self._members = 0
        self._begin()

    def _begin(self) -> None:
        self._members = one_more(self._members)
        self._frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

    @property
    def whole(self) -> bool:
        return self._frame.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._frame.eof:
                if not data:
                    return
                self._begin()
            try:
                piece = self._frame.decompress(data, STEP_BYTES)
            except zstd.ZstdError:
                most = 1 << (WINDOW_LOG - 20)
                raise BadCoding(f"The body is not valid zstd data with a window of at most {most} MiB.") from None
            data = self._frame.unused_data if self._frame.eof else b""
            if piece:
                yield piece
            if not self._frame.eof and self._frame.needs_input:
                return


def one_more(members: int) -> int:
    """Counts the members of a body. BadCoding if there are too many."""
    if members == MOST_MEMBERS:
        raise BadCoding(f"The body has more than {MOST_MEMBERS} compressed parts.")
    return members + 1


DECODERS: dict[bytes, type[GzipDecoder] | type[ZstdDecoder]] = {
    b"gzip": GzipDecoder,
    b"x-gzip": GzipDecoder,
    b"zstd": ZstdDecoder,
}
