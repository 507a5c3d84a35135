"""Optional features of an exchange, each behind a setting: CORS and compressed answers.

Each is a subclass, so that a gateway without the setting does nothing for it.
"""

import zlib

from server.connection.protocol import ClientExchange, Stage

GZIP_LEVEL = 1  # this runs between other clients' tokens: some 100 MB/s
MOST_GZIP_BYTES = 1024 * 1024  # a longer answer would hold them up for longer
EXPOSED = b"x-request-id, request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests"


class CorsExchange(ClientExchange):
    """Answers that web pages of certain origins may read (the Fetch standard's CORS protocol)."""

    __slots__ = ()
    origins: frozenset[bytes]

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        origin = self.headers.get(b"origin")
        anyone = b"*" in self.origins
        if origin is not None and (anyone or origin in self.origins):
            allowed, vary = (b"*", b"") if anyone else (origin, b"vary: origin\r\n")
            self.extra_headers += b"access-control-allow-origin: %b\r\n%baccess-control-expose-headers: %b\r\n" % (
                allowed,
                vary,
                EXPOSED,
            )
        super().begin(status, content_type, length)


class GzipExchange(ClientExchange):
    """Whole JSON answers are compressed for clients that accept that.

    least: bytes from which on an answer is. awaits: head of an answer whose body decides.
    """

    __slots__ = ("awaits",)
    least: int

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        self.awaits: tuple[int, bytes, int] | None = None
        if (
            length is not None
            and self.least <= length <= MOST_GZIP_BYTES
            and content_type.startswith(b"application/json")
            and accepts_gzip(self.headers.get(b"accept-encoding", b""))
        ):
            self.stage = Stage.BEGUN
            self.awaits = status, content_type, length
        else:
            super().begin(status, content_type, length)

    def write(self, data: bytes) -> None:
        if self.awaits is not None:
            (status, content_type, length), self.awaits = self.awaits, None
            if len(data) == length:  # else it comes in pieces, as an engine sends what is very long
                packer = zlib.compressobj(GZIP_LEVEL, wbits=31)
                data = packer.compress(data) + packer.flush()
                length = len(data)
                self.extra_headers += b"content-encoding: gzip\r\nvary: accept-encoding\r\n"
            super().begin(status, content_type, length)
        super().write(data)


def accepts_gzip(header: bytes) -> bool:
    """Whether an Accept-Encoding asks for gzip (RFC 9110, 12.5.3)."""
    for part in header.lower().split(b","):
        coding, _, weight = part.partition(b";")
        if coding.strip() in (b"gzip", b"*"):
            quality = weight.strip().removeprefix(b"q=").strip()
            return quality.strip(b"0.") != b"" or not quality
    return False


def exchange_type(origins: list[str], gzip_from: int | None) -> type[ClientExchange]:
    """The exchange that these settings ask for."""
    kinds: list[type[ClientExchange]] = []
    named: dict[str, object] = {}
    if origins:
        kinds.append(CorsExchange)
        named["origins"] = frozenset(origin.encode() for origin in origins)
    if gzip_from is not None:
        kinds.append(GzipExchange)
        named["least"] = gzip_from
    return type("Exchange", tuple(kinds), {"__slots__": (), **named}) if kinds else ClientExchange
