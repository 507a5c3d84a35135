"""`evenhand batch`: run a file of requests through a gateway's Batch API and fetch the answers.

The batch's id is kept beside the output file until the answers are there, so that the same command after an
interruption goes on with the same batch.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from server.batch.batches import ENDPOINTS, MAX_FILE_BYTES

POLL_S = 1.0
OVER = ("completed", "failed", "expired", "cancelled")


class BatchFailed(Exception):
    """The batch, or a request to the gateway, failed. The message says why."""


class _Line(msgspec.Struct):
    url: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="FILE.jsonl", help="one request per line, in the format of OpenAI's Batch API"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="file for the answers")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the gateway (default: %(default)s)")
    parser.add_argument("--window", default="24h", help="completion window, e.g. 90m, 24h, 7d (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite the output file")
    parser.epilog = "The API key is read from OPENAI_API_KEY. Exit status: 0 if every line was answered, 1 otherwise."


def run(args: argparse.Namespace) -> int:
    """0 if every line was answered, 1 if not, 2 if the command makes no sense."""
    if args.out.exists() and not args.force:
        sys.stderr.write(f"evenhand batch: {args.out} exists; choose another --out, or overwrite it with --force\n")
        return 2
    headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'any')}"}
    base = args.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx2.Client(base_url=base, headers=headers, timeout=120.0) as client:
            return Session(client, args.out, _say).run(args.input, args.window)
    except BatchFailed as error:
        sys.stderr.write(f"evenhand batch: {error}\n")
    except httpx2.TransportError as error:
        sys.stderr.write(f"evenhand batch: no gateway answers at {base}: {error}\n")
    except OSError as error:
        sys.stderr.write(f"evenhand batch: {error.filename or args.out}: {error.strerror}\n")
    return 1


def _say(text: str) -> None:
    """One line that replaces the last one on a terminal, and a line of its own elsewhere."""
    sys.stderr.write(f"\r\x1b[K{text}" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


class Session:
    """One batch, from upload to download."""

    def __init__(self, client: httpx2.Client, out: Path, say: Callable[[str], None]) -> None:
        self.client = client
        self.out = out
        self.say = say
        self.note = out.with_name(out.name + ".batch")  # the id of a batch that is under way

    def run(self, source: Path, window: str) -> int:
        batch_id = self.note.read_text().strip() if self.note.exists() else self.submit(source, window)
        batch = self.wait(batch_id)
        if batch["status"] == "failed":
            self.note.unlink(missing_ok=True)  # nothing to fetch
        code = self.fetch(batch)
        self.note.unlink(missing_ok=True)
        return code

    def submit(self, source: Path, window: str) -> str:
        """Uploads the file and starts the batch; returns its id."""
        with source.open("rb") as file:
            first = file.readline(MAX_FILE_BYTES)
            try:
                endpoint = msgspec.json.decode(first, type=_Line).url
            except msgspec.MsgspecError as error:
                raise BatchFailed(f"{source}: the first line is not a batch request: {error}") from None
            if endpoint not in ENDPOINTS:
                raise BatchFailed(f"{source}: url must be one of {', '.join(ENDPOINTS)}, not '{endpoint}'")
            file.seek(0)
            form = {"file": (source.name, file), "purpose": (None, "batch")}
            uploaded = self._asked("POST", "/v1/files", files=form)
        wanted = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window}
        batch_id = str(self._asked("POST", "/v1/batches", json=wanted)["id"])
        self.note.write_text(batch_id + "\n")
        return batch_id

    def wait(self, batch_id: str) -> dict[str, Any]:
        """The batch once it is over."""
        began, before = time.monotonic(), None
        while (batch := self._asked("GET", f"/v1/batches/{batch_id}"))["status"] not in OVER:
            counts = batch["request_counts"]
            done = counts["completed"] + counts["failed"]
            before = done if before is None else before
            pace = (done - before) / max(1e-9, time.monotonic() - began)
            left = f", {(counts['total'] - done) / pace:.0f} s left" if pace > 0 else ""
            self.say(f"{batch['status']}: {done} of {counts['total']} lines, {counts['failed']} failed{left}")
            time.sleep(POLL_S)
        return batch

    def fetch(self, batch: dict[str, Any]) -> int:
        """Writes the answers, and the lines that failed beside them."""
        counts = batch["request_counts"]
        self.say(f"{batch['status']}: {counts['completed']} of {counts['total']} lines answered\n")
        problems = (batch["errors"] or {"data": []})["data"]
        if problems:
            told = "\n".join(f"  line {problem['line']}: {problem['message']}" for problem in problems)
            raise BatchFailed(f"the input file is wrong:\n{told}")
        self._download(batch["output_file_id"], self.out)
        if batch["error_file_id"]:
            errors = self.out.with_name(self.out.stem + ".errors" + self.out.suffix)
            self._download(batch["error_file_id"], errors)
            self.say(f"{counts['failed']} lines failed: see {errors}\n")
        return 0 if batch["status"] == "completed" and not counts["failed"] else 1

    def _download(self, file_id: str | None, path: Path) -> None:
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            if file_id is not None:
                with self.client.stream("GET", f"/v1/files/{file_id}/content") as answer:
                    if answer.status_code != 200:
                        raise BatchFailed(f"the gateway answers {answer.status_code} for the file {file_id}")
                    file.writelines(answer.iter_bytes())
        part.replace(path)

    def _asked(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        answer = self.client.request(method, path, **how)
        try:
            content: dict[str, Any] = answer.json()
        except ValueError:
            content = {}
        if answer.status_code >= 400:
            message = content.get("error", {}).get("message", answer.text[:200])
            raise BatchFailed(f"the gateway answers {answer.status_code}: {message}")
        return content
