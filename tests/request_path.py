"""The path of a streamed chat through the gateway, call by call: `python -m tests.request_path`.

A fake engine stands behind a real gateway, and a first request has opened the connection to the engine. Traced are,
with `sys.setprofile`:

- a request on a new connection, from the accept until its bytes are written to the engine's socket;
- a second one with the same head, on another new connection, for the gateway remembers heads;
- a token in the middle of an answer, from the engine's socket to the client's.

Printed are the calls of functions in server/ and scheduler/ in their order (a coroutine counts once), how many files
they are in, and how often the next call is in another file than the one before.
"""

import argparse
import asyncio
import sys
from asyncio.selector_events import _SelectorSocketTransport
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from loadtest.fake.engine import FakeEngine
from tests.server.conftest import SLOW, Wire, chat, request, serving

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "scheduler")
CHAT = "/v1/chat/completions"


@dataclass
class Trace:
    """Calls until something is written to `port`, from the last call of a function named `since` if there is one."""

    port: int
    since: str = ""
    calls: list[CodeType] = field(default_factory=list)
    _seen: set[FrameType] = field(default_factory=set)

    @contextmanager
    def recording(self) -> Iterator[None]:
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code is _SelectorSocketTransport.write.__code__ and self._is_the_end(frame):
            sys.setprofile(None)
        elif file_of(code) is not None and frame not in self._seen and not in_background():
            self._seen.add(frame)  # a coroutine's frame is entered anew after every wait
            if code.co_name == self.since:
                self.calls.clear()  # what came before is some other task
            self.calls.append(code)

    def _is_the_end(self, frame: FrameType) -> bool:
        peer = frame.f_locals["self"].get_extra_info("peername")
        return peer is not None and peer[1] == self.port

    @property
    def files(self) -> list[str]:
        """The file of each call."""
        return [file for code in self.calls if (file := file_of(code)) is not None]

    @property
    def changes(self) -> int:
        return sum(one != other for one, other in pairwise(self.files))

    def __str__(self) -> str:
        return f"{len(self.calls)} calls in {len(set(self.files))} files, {self.changes} changes of file"

    def page(self) -> str:
        lines, before = [], ""
        for code, file in zip(self.calls, self.files, strict=True):
            lines.append(f"{'' if file == before else file:36} {code.co_qualname}")
            before = file
        return "\n".join(lines)


def in_background() -> bool:
    """Whether a long-lived task of the gateway runs: those have names, requests' tasks have none of their own."""
    task = asyncio.current_task()
    return task is not None and not task.get_name().startswith("Task-")


def file_of(code: CodeType) -> str | None:
    """The path of a function's file below the root; None if it is not the gateway's."""
    path = Path(code.co_filename)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
        return str(path.relative_to(ROOT))
    return None


async def event(wire: Wire) -> None:
    while not (await wire.chunk()).startswith(b"data: "):
        pass


async def traced() -> dict[str, Trace]:
    body = chat(stream=True, max_tokens=12, ignore_eos=True)
    traces = {}
    async with FakeEngine(SLOW) as engine, serving(engine.url, probe_s=3600.0) as gateway:
        await (await gateway.send(request(CHAT, body))).answer()
        for name in ("request", "request with a head seen before"):
            traces[name] = Trace(engine.port, since="connection_made")
            with traces[name].recording():
                wire = await gateway.send(request(CHAT, body, headers={"x-client": "another"}))
                await wire.head()
            for _ in range(4):
                await event(wire)
            traces["token"] = Trace(wire.writer.get_extra_info("sockname")[1], since="data_received")
            with traces["token"].recording():
                await event(wire)
            while await wire.chunk():
                pass
    return traces


def measured() -> dict[str, Trace]:
    """By name. On asyncio's own loop: its transports are written in Python, so that their calls are seen."""
    return asyncio.run(traced())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="only the figures")
    args = parser.parse_args()
    for name, trace in measured().items():
        if not args.summary:
            sys.stdout.write(f"{trace.page()}\n\n")
        sys.stdout.write(f"{name}: {trace}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
