"""The load generator: sends a workload on time, whatever the server does, and notes when every token arrived.

One asyncio.Protocol per connection on httptools; nothing is awaited per token, so one core holds thousands of streams.
It measures itself too: how late it sent, and how late its event loop woke.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import orjson

from loadtest.call import Call
from loadtest.client.watch import Watch
from loadtest.records import Ending, Record

# vLLM ends a stream in good form where its engine could not go on; its reason is the only sign.
_BAD_FINISHES = frozenset({"error", "abort"})
_PACKED_US = 1e6


@dataclass(frozen=True, slots=True)
class Target:
    """Where a workload goes, and how it is put.

    url: base, http(s)://host:port, without /v1. keys: API key by tenant; `key` for those without one.
    extra: fields added to every body. tenant_xargs: name the tenant in `vllm_xargs`, for an engine without a gateway.
    exact_length: ask for exactly the planned output length (`ignore_eos`), else let the model end earlier.
    timeout_s: how long a client waits for the whole answer.
    """

    url: str
    model: str = ""
    key: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    tenant_xargs: bool = False
    exact_length: bool = True
    chat: bool = False
    timeout_s: float = 600.0

    def request(self, call: Call) -> bytes:
        """The HTTP request of one call, whole."""
        parts = urlsplit(self.url)
        body = orjson.dumps(self._body(call))
        chat = self.chat and isinstance(call.prompt, str)
        key = self.keys.get(call.tenant, self.key)
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST {parts.path.rstrip('/')}/v1/{'chat/completions' if chat else 'completions'} HTTP/1.1\r\n"
            f"host: {parts.netloc}\r\n{authorization}x-request-id: {call.id}\r\n"
            f"content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _body(self, call: Call) -> dict[str, Any]:
        body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        if self.model:
            body["model"] = self.model
        if self.chat and isinstance(call.prompt, str):
            body["messages"] = [{"role": "user", "content": call.prompt}]
        else:
            body["prompt"] = call.prompt
        if call.output_tokens:
            body["max_tokens"] = call.output_tokens
            if self.exact_length:
                body["ignore_eos"] = True
        if self.tenant_xargs:
            body["vllm_xargs"] = {"evenhand_tenant": call.tenant, "evenhand_job": call.id}
        return body | dict(self.extra)


@dataclass(slots=True)
class Progress:
    """What a run has come to, for a progress line; the lists hold seconds."""

    sent: int = 0
    done: int = 0
    in_flight: int = 0
    errors: int = 0
    output_tokens: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=500))
    lag_s: list[float] = field(default_factory=list)
    loop_s: list[float] = field(default_factory=list)


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True, eq=False)
class Exchange:
    """One call on its way: what was seen of its answer so far, in perf_counter seconds."""

    call: Call
    request: bytes
    started_at: float
    done: Callable[["Exchange", Record], None]
    sent_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    status: int = 0
    retry_after_s: float | None = None
    finished: bool = False
    terminated: bool = False
    error: str = ""
    ending: Ending | None = None
    usage: _Usage | None = None
    body: bytes = b""
    timer: asyncio.TimerHandle | None = None
    over: bool = False

    def event(self, data: bytes, now: float) -> None:
        """One server-sent event's data."""
        if data == b"[DONE]":
            self.terminated = True
            return
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError as error:
            self.ending, self.error = Ending.ERROR_EVENT, f"unreadable chunk: {error}"
            return
        if chunk.error is not None:
            self.ending, self.error = Ending.ERROR_EVENT, orjson.dumps(chunk.error).decode()[:500]
            return
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            self._choice(choice, now)

    def named_event(self, event: bytes, now: float) -> None:
        """An event of several lines: one named `error` is an error whatever its data are."""
        lines = event.split(b"\n")
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if any(line.startswith(b"event:") and line[6:].strip() == b"error" for line in lines):
            self.ending, self.error = Ending.ERROR_EVENT, data.decode(errors="replace")[:500]
        elif data:
            self.event(data, now)

    def _choice(self, choice: _Choice, now: float) -> None:
        delta = choice.delta
        text = choice.text or (delta and (delta.content or delta.reasoning))
        if choice.finish_reason:
            self.finished = True
            if choice.finish_reason in _BAD_FINISHES:
                self.ending, self.error = Ending.ERROR_EVENT, f"the engine ended the answer: {choice.finish_reason}"
        # A chunk with only the role, or only the end, is no token; one without text may be half a character.
        opening = delta is not None and delta.role is not None
        if text or not (choice.finish_reason or opening):
            self.arrivals.append(now)

    def record(self, ending: Ending, now: float) -> Record:
        arrivals, call = self.arrivals, self.call
        usage = self.usage
        # A gap is the difference of two rounded times, so that gaps add up to the whole without drift.
        marks = [round((at - self.sent_at) * _PACKED_US) for at in arrivals]
        return Record(
            id=call.id,
            tenant=call.tenant,
            due_s=round(call.at_s, 6),
            sent_s=round(self.sent_at - self.started_at, 6),
            e2e_s=round(now - self.sent_at, 6),
            prompt_tokens=usage.prompt_tokens if usage else call.prompt_tokens,
            output_tokens=(usage.completion_tokens or 0) if usage else len(arrivals),
            ending=ending,
            status=self.status,
            ttft_s=round(arrivals[0] - self.sent_at, 6) if arrivals else None,
            gaps_us=[later - earlier for earlier, later in zip(marks, marks[1:], strict=False)],
            asked_tokens=call.output_tokens,
            kind=call.kind,
            session=call.session,
            error=self.error,
            retry_after_s=self.retry_after_s,
        )


class Connection(asyncio.Protocol):
    """One connection to the target: carries one exchange at a time, then offers itself again."""

    def __init__(self, idle: list["Connection"], retry: Callable[[Exchange], None]) -> None:
        self._idle = idle
        self._retry = retry
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0.0
        self._used = False
        self._sse = False
        self._headers = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, exchange: Exchange) -> None:
        """Send; ValueError if the connection is gone or busy."""
        if self._transport is None or self._exchange is not None:
            raise ValueError("This connection cannot take a request.")
        self._exchange = exchange
        self._rest = b""
        self._sse = self._headers = False
        if not exchange.sent_at:
            exchange.sent_at = perf_counter()
        self._transport.write(exchange.request)

    def drop(self) -> None:
        """Leave: the client hangs up."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by duck typing only

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self in self._idle:
            self._idle.remove(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.over:
            return
        if self._used and not self._headers:
            self._retry(exchange)  # the server closed an idle connection just as we used it
            return
        exchange.error = exchange.error or f"connection lost: {exc or 'closed by the server'}"
        cut = Ending.TRUNCATED if exchange.status == 200 else Ending.FAILED
        _end(exchange, exchange.ending or cut, perf_counter())

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._exchange is not None:
                self._exchange.error = f"unreadable HTTP: {error}"
            if self._transport is not None:
                self._transport.abort()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is None:
            return
        name = name.lower()
        if name == b"content-type":
            self._sse = value.startswith(b"text/event-stream")
        elif name == b"retry-after" and value.strip().isdigit():
            self._exchange.retry_after_s = float(value)

    def on_headers_complete(self) -> None:
        self._headers = True
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if not self._sse:
            exchange.body += body
            return
        data = self._rest + body
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                exchange.event(event[6:], self._now)
            elif event:
                exchange.named_event(event, self._now)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._used = True
        if self._parser.should_keep_alive() and self.usable:
            self._parser = httptools.HttpResponseParser(self)
            self._idle.append(self)
        elif self._transport is not None:
            self._transport.close()
        if exchange is not None:
            _end(exchange, _ending(exchange), self._now)


def _ending(exchange: Exchange) -> Ending:
    if exchange.status != 200:
        exchange.error = exchange.error or exchange.body[:500].decode(errors="replace")
        if exchange.status == 429:
            return Ending.LIMITED
        return Ending.REFUSED if 400 <= exchange.status < 500 else Ending.FAILED
    if exchange.ending is not None:
        return exchange.ending
    return Ending.OK if exchange.terminated and exchange.finished else Ending.TRUNCATED


def _end(exchange: Exchange, ending: Ending, now: float) -> None:
    if exchange.over:
        return
    exchange.over = True
    if exchange.timer is not None:
        exchange.timer.cancel()
    exchange.done(exchange, exchange.record(ending, now))


class Client:
    """Sends calls to one target and makes a record of each; `note` is called with every record as it ends."""

    def __init__(self, target: Target, note: Callable[[Record], None] | None = None) -> None:
        self.target = target
        self.progress = Progress()
        self.records: list[Record] = []
        self._note = note
        self._idle: list[Connection] = []
        self._open: dict[Exchange, Connection | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._address = urlsplit(target.url)
        self._ssl = ssl.create_default_context() if self._address.scheme == "https" else None
        self._started_at = 0.0
        self._quiet = asyncio.Event()
        self._freed: asyncio.Event | None = None
        self._unended: set[str] = set()
        self._parked: dict[str, list[tuple[Call, bytes]]] = {}
        self._closing = False

    async def open_loop(self, calls: Iterable[Call], *, drain_s: float | None = None) -> Sequence[Record]:
        """Send every call when it is due, however slow the answers are; wait `drain_s` for the last ones.

        Calls come in order of `at_s`. Returns the records in the order in which they ended.
        """
        async with Watch(self.progress.loop_s):
            self._started_at = perf_counter()
            for call in calls:
                request = self.target.request(call)  # before it is due: building it is no lag
                await self._until(call.at_s)
                self.progress.lag_s.append(perf_counter() - self._started_at - call.at_s)
                self._offer(call, request)
            await self._drain(drain_s)
        return self.records

    async def closed_loop(
        self, calls: Iterable[Call], concurrency: int, *, drain_s: float | None = None
    ) -> Sequence[Record]:
        """Keep `concurrency` calls on their way until there are no more; `at_s` is not looked at."""
        async with Watch(self.progress.loop_s):
            self._started_at = perf_counter()
            pending = iter(calls)
            self._freed = asyncio.Event()
            while self._fill(pending, concurrency):
                await self._freed.wait()
                self._freed.clear()
            await self._drain(drain_s)
        return self.records

    def _fill(self, pending: Iterator[Call], concurrency: int) -> bool:
        while len(self._open) < concurrency:
            call = next(pending, None)
            if call is None:
                return False
            self._offer(call, self.target.request(call))
        return True

    async def _until(self, at_s: float) -> None:
        wait_s = self._started_at + at_s - perf_counter()
        # Behind or not, the loop must turn: what arrived meanwhile is to be noted before more is sent.
        await asyncio.sleep(max(0.0, wait_s))

    def _offer(self, call: Call, request: bytes) -> None:
        """Send the call, or keep it until the answer that it waits for is there: then it is due."""
        self._unended.add(call.id)
        if call.after in self._unended:
            self._parked.setdefault(call.after, []).append((call, request))
        else:
            self._send(call, request)

    def _release(self, ended: str) -> None:
        self._unended.discard(ended)
        for call, request in self._parked.pop(ended, ()):
            due = replace(call, at_s=perf_counter() - self._started_at)
            if self._closing:
                exchange = Exchange(due, request, self._started_at, self._ended, sent_at=perf_counter())
                exchange.error = "the run was over before its turn came"
                _end(exchange, Ending.UNFINISHED, perf_counter())
            else:
                self._send(due, request)

    def _send(self, call: Call, request: bytes) -> None:
        exchange = Exchange(call, request, self._started_at, self._ended)
        loop = asyncio.get_running_loop()
        exchange.timer = loop.call_later(self.target.timeout_s, self._give_up, exchange, Ending.TIMEOUT)
        self._open[exchange] = None
        self.progress.sent += 1
        self.progress.in_flight = len(self._open)
        self._start(exchange)

    def _start(self, exchange: Exchange) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._open[exchange] = connection
                connection.start(exchange)
                return
        task = asyncio.get_running_loop().create_task(self._connect(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, exchange: Exchange) -> None:
        exchange.sent_at = exchange.sent_at or perf_counter()  # connecting is part of what the user waits for
        port = self._address.port or (443 if self._ssl else 80)
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._idle, self._start), self._address.hostname or "", port, ssl=self._ssl
            )
        except OSError as error:
            exchange.error = f"cannot connect: {error}"
            _end(exchange, Ending.UNREACHABLE, perf_counter())
            return
        if exchange.over:  # given up while connecting
            connection.drop()
            return
        self._open[exchange] = connection
        if connection.usable:
            connection.start(exchange)
        else:
            exchange.error = "the server closed the connection at once"
            _end(exchange, Ending.UNREACHABLE, perf_counter())

    def _give_up(self, exchange: Exchange, ending: Ending) -> None:
        connection = self._open.get(exchange)
        if connection is not None:
            connection.drop()
        exchange.error = exchange.error or "the client gave up"
        _end(exchange, ending, perf_counter())

    def _ended(self, exchange: Exchange, record: Record) -> None:
        self._open.pop(exchange, None)
        self._count(record)
        self.records.append(record)
        if self._note is not None:
            self._note(record)
        self._release(record.id)
        if self._freed is not None:
            self._freed.set()
        if not self._open:
            self._quiet.set()

    def _count(self, record: Record) -> None:
        progress = self.progress
        progress.done += 1
        progress.in_flight = len(self._open)
        progress.output_tokens += record.output_tokens
        progress.errors += not record.ok
        if record.ttft_s is not None:
            progress.ttft_s.append(record.ttft_s)

    async def _drain(self, drain_s: float | None) -> None:
        """Wait for what is still on its way; what is not done in time is recorded as unfinished."""
        while self._open:
            self._quiet.clear()
            try:
                async with asyncio.timeout(drain_s):  # not wait_for, which under Python 3.11 loses cancellations
                    await self._quiet.wait()
            except TimeoutError:
                self._closing = True
                for exchange in list(self._open):
                    self._give_up(exchange, Ending.UNFINISHED)
        for connection in self._idle[:]:
            connection.drop()
        await asyncio.gather(*self._tasks, return_exceptions=False)
