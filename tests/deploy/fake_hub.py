"""A model hub on loopback, with one model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import cast

COMMIT = "c" * 40
NAME = "owner/model"
FILES = {
    "config.json": b'{"dtype": "float32"}',
    "tokenizer.json": b"[]",
    "model-00001-of-00002.safetensors": Random(1).randbytes(300_000),
    "model-00002-of-00002.safetensors": Random(2).randbytes(100_000),
    "consolidated.safetensors": b"c" * 1000,
    "pytorch_model.bin": b"p" * 1000,
    "original/params.json": b"{}",
}
NEEDED = {
    "config.json",
    "tokenizer.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


@dataclass
class Hub:
    """refused: an error code that it gives for the model. cut_after: it breaks off each file after so many bytes."""

    url: str = ""
    refused: str = ""
    cut_after: int | None = None
    sent: list[tuple[str, int]] = field(default_factory=list)  # each file's name, and from which byte on

    def environ(self, home: Path) -> dict[str, str]:
        return {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server.hub)  # type: ignore[attr-defined]

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.refused:
            self._send(b"{}", 403 if self.hub.refused == "GatedRepo" else 404, **{"X-Error-Code": self.hub.refused})
        elif path == f"/api/models/{NAME}/revision/main":
            self._send(json.dumps({"id": NAME, "sha": COMMIT}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in FILES.items()
            ]
            self._send(json.dumps(tree).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self._file(path.partition(f"{COMMIT}/")[2])
        else:
            self._send(b"{}", 404)

    def _file(self, name: str) -> None:
        data, first = FILES[name], int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        about = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT}
        if first:
            about["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.sent.append((name, first))
        self._send(data[first:], 206 if first else 200, **about)

    def _send(self, body: bytes, status: int = 200, **about: str) -> None:
        self.send_response(status)
        for name, value in about.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        most = self.hub.cut_after
        self.wfile.write(body if most is None else body[:most])
        self.close_connection = most is not None and len(body) > most


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def there(home: Path) -> set[str]:
    """The model's files that are whole in the cache of this HF_HOME."""
    folder = home / "hub/models--owner--model/snapshots" / COMMIT
    return {file.name for file in folder.glob("*") if file.read_bytes() == FILES[file.name]}
