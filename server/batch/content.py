"""Lines of batch files: requests that are read, answers that are written."""

from typing import BinaryIO, NamedTuple

import msgspec
import orjson

from server.batch.objects import BatchLine


class Reply(NamedTuple):
    """What a line was answered. retry_after_s: None if the answer does not say."""

    status: int
    body: bytes
    request_id: str
    retry_after_s: float | None = None


class Ready(NamedTuple):
    """A line with its request."""

    line: BatchLine
    model: str
    body: bytes


class _Content(msgspec.Struct):
    model: str
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


class _Request(msgspec.Struct):
    body: msgspec.Raw


_request = msgspec.json.Decoder(_Request).decode
_content = msgspec.json.Decoder(_Content).decode


def read(file: BinaryIO, lines: list[BatchLine]) -> list[Ready]:
    """The lines with their requests, equal beginnings side by side, the first one last."""

    def order(ready: Ready) -> tuple[str, bytes]:
        content = _content(ready.body)
        return content.model, bytes(content.messages or content.prompt or content.input)[:4096]

    read = []
    for line in lines:
        file.seek(line.offset)
        body = bytes(_request(file.read(line.length)).body)
        read.append(Ready(line, _content(body).model, body))
    return sorted(read, key=order, reverse=True)


def answered(line: BatchLine, reply: Reply) -> bytes:
    """A line of the output or error file."""
    try:
        body = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        body = {"error": {"message": reply.body[:1000].decode("utf-8", "replace"), "type": "server_error"}}
    response = {"status_code": reply.status, "request_id": reply.request_id, "body": body}
    return orjson.dumps({"id": reply.request_id, "custom_id": line.custom_id, "response": response, "error": None})


def not_run(line: BatchLine, code: str, message: str) -> bytes:
    error = {"code": code, "message": message}
    return orjson.dumps(
        {"id": f"batch_req_{line.number}", "custom_id": line.custom_id, "response": None, "error": error}
    )
