"""An S3 server on loopback, moto's, some of whose answers a test may replace."""

import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from uuid import uuid4

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{0}</Code><Message>No: {0}</Message></Error>'
Fault = tuple[str, str]  # status line, code


class S3Server:
    """fault: the error that a request (method, path, query) gets in place of its answer; None for most."""

    def __init__(self) -> None:
        self.fault: Callable[[str, str, str], Fault | None] = lambda *_: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the port that it had before, with the objects that it had."""
        if self._server is not None:
            return
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="S3", daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        asked = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        fault = self.fault(*asked)
        if fault is None:
            return self._moto(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = ERROR.format(fault[1]).encode()
        start_response(fault[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class Bucket:
    """A fresh one. system: s3fs, for a test to look into it."""

    _names = count(1)

    def __init__(self, server: S3Server) -> None:
        from s3fs import S3FileSystem

        self.server = server
        self.name = f"bucket-{next(self._names)}-{uuid4().hex[:8]}"
        self.url = f"s3://{self.name}/batches"
        self.system = S3FileSystem(use_listings_cache=False)
        self.system.call_s3("create_bucket", Bucket=self.name)

    def objects(self) -> Iterator[str]:
        """The names of the contents."""
        for path in self.system.find(self.name):
            if (name := path.rpartition("/")[2]).startswith("file-"):
                yield name

    def uploads(self) -> list[str]:
        """Keys of multipart uploads that are not complete."""
        return [upload["Key"] for upload in self.system.list_multipart_uploads(self.name)]
