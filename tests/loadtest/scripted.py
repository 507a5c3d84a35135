"""A server that answers by a script: what it sends, when, to the byte. What a client should measure follows from it.

In virtual time, on a loop whose clock jumps to the next thing to do, every figure is exact. As a program it is a real
server on a port: `python -m tests.loadtest.scripted --port 8123`.
"""

import argparse
import asyncio
import json
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from loadtest.records import Ending

Result = TypeVar("Result")
DONE = "[DONE]"


@dataclass(frozen=True)
class Step:
    """at_s: since the request came. data: of the body. tokens: that it brings with content."""

    at_s: float
    data: bytes
    tokens: int = 0


@dataclass(frozen=True)
class Script:
    """One answer. chunked: its body is framed, else it ends with the connection. cut: the connection breaks at the end.

    usage: the server counts the tokens. ending: as a client must judge it.
    """

    steps: Sequence[Step]
    status: int = 200
    headers: str = "content-type: text/event-stream\r\n"
    chunked: bool = True
    cut: bool = False
    ending: Ending = Ending.OK

    # What is true of it.

    @property
    def marks_s(self) -> list[float]:
        """When content came."""
        return [step.at_s for step in self.steps if step.tokens]

    @property
    def ttft_s(self) -> float | None:
        return next(iter(self.marks_s), None)

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def e2e_s(self) -> float:
        return self.steps[-1].at_s

    @property
    def tpot_s(self) -> float | None:
        marks = self.marks_s
        return (marks[-1] - marks[0]) / (self.tokens - 1) if len(marks) > 1 else None

    def bytes_at(self) -> list[tuple[float, bytes]]:
        """What goes over the connection, and when."""
        framing = "transfer-encoding: chunked\r\n" if self.chunked else "connection: close\r\n"
        head = f"HTTP/1.1 {self.status} X\r\n{self.headers}{framing}\r\n".encode()
        sent = [(self.steps[0].at_s, head)]
        for step in self.steps:
            if step.data:
                sent.append((step.at_s, b"%x\r\n%b\r\n" % (len(step.data), step.data) if self.chunked else step.data))
        if self.chunked and not self.cut:
            sent.append((self.steps[-1].at_s, b"0\r\n\r\n"))
        return sent


# Events


def event(data: object, name: str = "") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(prompt: int, output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})


def ended(at_s: float, output: int, finish: str = "stop") -> list[Step]:
    """The end of a chat's stream."""
    return [
        Step(at_s, chat({}, finish)),
        Step(at_s, usage(7, output)),
        Step(at_s + 0.004, event(DONE)),
    ]


# Virtual time


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: the clock jumps."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is not None and timeout > 0:
            self.skipped_s += timeout
        return super().select(0)


class _Transport(asyncio.Transport):
    def __init__(self, loop: "VirtualLoop", protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._loop, self._protocol, self._closing = loop, protocol, False
        self._timers: list[asyncio.TimerHandle] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        script = self._loop.answer(head.split(b" ", 2)[1].decode(), json.loads(body))
        parts: dict[float, bytes] = {}  # timers of the same moment have no order
        for at_s, part in script.bytes_at():
            parts[at_s] = parts.get(at_s, b"") + part
        for at_s, part in parts.items():
            over = at_s == script.e2e_s and (script.cut or not script.chunked)
            self._timers.append(self._loop.call_later(at_s, self._receive, part, over))

    def _receive(self, data: bytes, over: bool) -> None:
        for part in self._loop.packets(data):
            if not self._closing:
                self._protocol.data_received(part)
        if over:
            self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if not self._closing:
            self._closing = True
            self._protocol.connection_lost(error)

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self._closing = True
        for timer in self._timers:
            timer.cancel()

    close = abort


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which time passes only where there is nothing to do, and whose connections lead to a script.

    answer: path and body of a request → its answer. packets: how a part of it is cut on its way.
    """

    def __init__(
        self,
        answer: Callable[[str, dict[str, Any]], Script],
        packets: Callable[[bytes], Sequence[bytes]] = lambda data: [data],
    ) -> None:
        self._selected = _Selector()
        super().__init__(self._selected)
        self.answer = answer
        self.packets = packets

    def time(self) -> float:
        return 1000.0 + self._selected.skipped_s

    def pass_(self, seconds: float) -> None:
        """Something takes so long, and nothing else happens meanwhile."""
        self._selected.skipped_s += seconds

    async def create_connection(self, factory: Any, *_: Any, **__: Any) -> Any:
        protocol = factory()
        transport = _Transport(self, protocol)
        protocol.connection_made(transport)
        return transport, protocol

    def run(self, main: Coroutine[Any, Any, Result]) -> Result:
        try:
            return self.run_until_complete(main)
        finally:
            self.close()


# A real server


@dataclass
class Server:
    """Answers every request by one script on a real port, and keeps the bodies it was asked with."""

    answer: Callable[[str, dict[str, Any]], Script]
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
            except (asyncio.IncompleteReadError, ConnectionResetError):
                break
            headers = dict(line.lower().partition(": ")[::2] for line in head.split("\r\n")[1:])
            length = int(headers.get("content-length", 0))
            began, path = loop.time(), head.split(" ", 2)[1]
            body = await reader.readexactly(length)
            if head.startswith("GET"):
                models = json.dumps({"object": "list", "data": [{"id": "scripted", "object": "model"}]}).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(models), models)
                )
                continue
            self.bodies.append(json.loads(body))
            script = self.answer(path, self.bodies[-1])
            for at_s, part in script.bytes_at():
                if (wait_s := began + at_s - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                writer.write(part)
            if script.cut or not script.chunked:
                break
        writer.close()

    async def start(self, port: int = 0) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", port)


def plain(tokens: int, first_s: float, gap_s: float, api: str = "chat") -> Script:
    """A well-behaved answer: the first token after `first_s`, the others every `gap_s`."""

    def piece(number: int) -> bytes:
        word = f"word{number} "
        return chat({"content": word}) if api == "chat" else event({"choices": [{"index": 0, "text": word}]})

    steps = [Step(first_s + at * gap_s, piece(at), 1) for at in range(tokens)]
    last_s = steps[-1].at_s
    finish = chat({}, "length") if api == "chat" else event({"choices": [{"text": "", "finish_reason": "length"}]})
    return Script([*steps, Step(last_s, finish), Step(last_s, usage(7, tokens)), Step(last_s, event(DONE))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--first", type=float, default=0.1, help="seconds to the first token")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds between tokens")
    parser.add_argument("--tokens", type=int, default=20, help="of an answer that asks for no other number")
    parser.add_argument("--per-event", type=int, default=1, help="tokens in one event")
    parser.add_argument("--role-first", action="store_true", help="a role and an empty delta come at once")
    args = parser.parse_args()

    def answer(path: str, body: dict[str, Any]) -> Script:
        tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or args.tokens)
        script = plain(tokens, args.first, args.gap, "chat" if "chat" in path else "completions")
        if args.per_event > 1:
            script = _joined(script, args.per_event)
        if args.role_first and "chat" in path:
            early = [Step(0.0, chat({"role": "assistant", "content": ""})), Step(args.first / 3, chat({"content": ""}))]
            script = replace(script, steps=[*early, *script.steps])
        return script

    async def serve() -> None:
        async with await Server(answer).start(args.port) as server:
            await server.serve_forever()

    asyncio.run(serve())


def _joined(script: Script, per_event: int) -> Script:
    """The same answer with several tokens in each event, at the time of the last of them."""
    words = [step for step in script.steps if step.tokens]
    rest = [step for step in script.steps if not step.tokens]
    joined = []
    for at in range(0, len(words), per_event):
        group = words[at : at + per_event]
        text = "".join(cast(str, _text(step.data)) for step in group)
        joined.append(Step(group[-1].at_s, chat({"content": text}), len(group)))
    return replace(script, steps=[*joined, *rest])


def _text(data: bytes) -> object:
    choice = json.loads(data[6:])["choices"][0]
    return choice.get("text") or choice["delta"]["content"]


if __name__ == "__main__":
    main()
