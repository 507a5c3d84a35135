"""A small question of the gateway's own to an engine, and its whole answer: health, metrics, models."""

import asyncio
from typing import Any

import orjson

from server.request.errors import EngineGone

MOST_BYTES = 16 << 20  # of an answer; vLLM's metrics are a hundredth of it


class Answer:
    """A complete answer."""

    __slots__ = ("content", "status_code")

    def __init__(self, status_code: int, content: bytes) -> None:
        self.status_code = status_code
        self.content = content

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """ValueError if it is none."""
        return orjson.loads(self.content)


class Question:
    """Receives one answer (a `client.Sink`). `answer`: its future; EngineGone if there is none."""

    __slots__ = ("_pieces", "_size", "_status", "answer")

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pieces: list[bytes] = []
        self._size = 0
        self._status = 0

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        self._status = status

    def body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MOST_BYTES:
            self._pieces.append(data)
        else:
            self.lost(EngineGone(f"The engine's answer is larger than {MOST_BYTES >> 20} MiB."))

    def chunk(self, data: bytes, at: int) -> None:
        self.body(data[at:-2])

    def end(self) -> None:
        if not self.answer.done():
            self.answer.set_result(Answer(self._status, b"".join(self._pieces)))

    def lost(self, error: EngineGone) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
