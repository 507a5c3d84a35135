"""Reading an input file: one JSON object a line, each a request for the batch's endpoint."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

import msgspec

from server.batch.objects import BatchLine, LineError

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ERRORS = 20  # of one file; who mends these finds the rest the next time
MAX_CUSTOM_ID = 512  # characters


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None


class _Request(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: _Body


_read = msgspec.json.Decoder(_Request).decode


def first_model(file: BinaryIO) -> str | None:
    """The model of the first request; None if its line is wrong, or there is none."""
    text = b""
    while (line := file.readline(MAX_LINE_BYTES)) and not text:
        text = line.strip()
    try:
        return _read(text).body.model
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class Checker:
    """Checks a file's lines one after the other. served: whether a model may be used by the batch's tenant."""

    def __init__(self, endpoint: str, most: int, served: Callable[[str], bool]) -> None:
        self.endpoint = endpoint
        self.most = most
        self.served = served
        self.errors: list[LineError] = []
        self.count = 0
        self._enough = False
        self._seen: set[int] = set()  # hashes: 50,000 ids of 512 characters would take 25 MB

    def lines(self, file: BinaryIO) -> Iterator[BatchLine]:
        """The lines that are right; what is wrong with the others is in `errors`. Stops after `MAX_ERRORS`."""
        offset = 0
        number = 0
        while not self._enough and (text := file.readline(MAX_LINE_BYTES + 1)):
            number += 1
            line = self._line(number, offset, text)
            offset += len(text)
            if line is not None:
                yield line
        if not self.count and not self.errors:
            self._wrong("empty_file", "The input file has no request: write one JSON object on each line.")

    def _line(self, number: int, offset: int, text: bytes) -> BatchLine | None:
        if not text.strip():
            return None
        self.count += 1
        if len(text) > MAX_LINE_BYTES:
            self._enough = True  # where the next line begins is not known
            self._wrong("line_too_long", f"The line is longer than {MAX_LINE_BYTES} bytes.", number)
            return None
        if self.count > self.most:
            self._enough = True
            self._wrong("too_many_requests", f"The file has more than {self.most} requests: split it.", number)
            return None
        try:
            request = _read(text)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            code = "invalid_request" if isinstance(error, msgspec.ValidationError) else "invalid_json_line"
            self._wrong(code, f"The line is not a batch request: {error}.", number)
            return None
        problem = self._problem(request)
        if problem is not None:
            code, param, message = problem
            self._wrong(code, message, number, param)
            return None
        self._seen.add(hash(request.custom_id))
        return BatchLine(number, request.custom_id, offset, len(text))

    def _problem(self, request: _Request) -> tuple[str, str, str] | None:
        """(code, param, message) of the first thing that is wrong with a request."""
        if not 0 < len(request.custom_id) <= MAX_CUSTOM_ID:
            return "invalid_custom_id", "custom_id", f"custom_id must have 1 to {MAX_CUSTOM_ID} characters."
        if hash(request.custom_id) in self._seen:
            return "duplicate_custom_id", "custom_id", f"custom_id '{request.custom_id}' is used by an earlier line."
        if request.method != "POST":
            return "invalid_method", "method", f"method must be POST, not '{request.method[:20]}'."
        if request.url != self.endpoint:
            wrong = f"url must be the batch's endpoint '{self.endpoint}', not '{request.url[:100]}'."
            return "mismatched_endpoint", "url", wrong
        if request.body.stream:
            return "stream_not_supported", "body.stream", "A batch request cannot be streamed: remove 'stream'."
        if not self.served(request.body.model):
            return "model_not_found", "body.model", f"The model '{request.body.model[:100]}' is not served here."
        return None

    def _wrong(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        self.errors.append(LineError(code, message, line, param))
        self._enough = self._enough or len(self.errors) >= MAX_ERRORS
