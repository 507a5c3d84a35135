"""The load generator: sends a workload on schedule, whatever the server does, and records when each token arrived.

One asyncio.Protocol per connection on httptools; nothing is awaited per token, so one core holds thousands of streams.
It measures itself too: how late it sent, and how late its event loop woke.
"""

import asyncio
import ssl
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from loadtest.call import IDLE_GAP, TRACE, TraceCall
from loadtest.client.answer import ParsedAnswer
from loadtest.client.event_stream import EventStream
from loadtest.client.target import Target, base_url
from loadtest.client.watch import Watch
from loadtest.records import LATE_S, Ending, Kept, Record
from loadtest.thinned import Values

_PACKED_US = 1e6
_KEPT_BYTES = 4096  # of an answer that is no stream
_GONE_S, _GONE_REQUESTS = 30.0, 20  # without a connection for so long, so many in a row: the server is gone
_MOST_WAITING = 10_000  # turns that a closed loop reads ahead, while their conversations are busy
_MOST_SESSIONS = 4096  # idle conversations whose answers are remembered
_LOOKED_AT = 4  # sessions, to find an idle one to forget

__all__ = ["Client", "ReplayExchange", "Manner", "ReplayProgress", "Target"]


@dataclass(slots=True)
class ReplayProgress:
    """What a run has come to, for a progress line; the lists hold seconds."""

    sent: int = 0
    done: int = 0
    in_flight: int = 0
    errors: int = 0
    output_tokens: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=500))
    lag_s: Values = field(default_factory=Values)
    late: int = 0
    loop_s: Values = field(default_factory=Values)


@dataclass(slots=True, eq=False)
class ReplayExchange:
    """One call on its way: what was seen of its answer so far, in perf_counter seconds."""

    call: TraceCall
    request: bytes
    started_at: float
    done: Callable[["ReplayExchange", Record], None]
    released_s: float | None = None
    sent_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    status: int = 0
    retry_after_s: float | None = None
    answer: ParsedAnswer = field(default_factory=ParsedAnswer)
    error: str = ""
    ended_at: float = 0.0
    body: bytes = b""
    timer: asyncio.TimerHandle | None = None
    over: bool = False

    def event(self, name: bytes, data: bytes, now: float) -> None:
        """One server-sent event."""
        if self.answer.event(name, data):
            self.arrivals.append(now)
        if self.answer.terminated and not self.ended_at:
            self.ended_at = now

    @property
    def whole(self) -> bool:
        """All of the answer is there, and the server said so."""
        answer = self.answer
        return self.status == 200 and answer.finished and answer.terminated and not answer.error

    def record(self, ending: Ending, now: float) -> Record:
        arrivals, call, answer = self.arrivals, self.call, self.answer
        # A gap is the difference of two rounded times, so that gaps add up to the whole without drift.
        marks = [round((at - self.sent_at) * _PACKED_US) for at in arrivals]
        output = answer.output_tokens
        return Record(
            id=call.id,
            tenant=call.tenant,
            due_s=round(call.at_s, 6),
            sent_s=round(self.sent_at - self.started_at, 6),
            e2e_s=round((self.ended_at or now) - self.sent_at, 6),
            prompt_tokens=call.prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens,
            output_tokens=len(arrivals) if output is None else output,
            ending=ending,
            status=self.status,
            ttft_s=round(arrivals[0] - self.sent_at, 6) if arrivals else None,
            gaps_us=[later - earlier for earlier, later in zip(marks, marks[1:], strict=False)],
            asked_tokens=call.output_tokens,
            kind=call.kind,
            session=call.session,
            error="" if ending is Ending.OK else answer.error or self.error,
            retry_after_s=self.retry_after_s,
            released_s=None if self.released_s is None else round(self.released_s, 6),
            planned_tokens=call.prompt_tokens,
            counted=output is not None or ending is not Ending.OK,
        )


class ClientConnection(asyncio.Protocol):
    """One connection to the target: carries one exchange at a time, then offers itself again."""

    def __init__(
        self, idle: list["ClientConnection"], retry: Callable[[ReplayExchange], None], clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._idle = idle
        self._retry = retry
        self._transport: asyncio.Transport | None = None
        self._exchange: ReplayExchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._events = EventStream()
        self._now = 0.0
        self._used = False
        self._sse = False
        self._framed = False
        self._headers = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, exchange: ReplayExchange) -> None:
        """Send; ValueError if the connection is gone or busy."""
        if self._transport is None or self._exchange is not None:
            raise ValueError("This connection cannot take a request.")
        self._exchange = exchange
        self._events = EventStream()
        self._sse = self._headers = self._framed = False
        if not exchange.sent_at:
            exchange.sent_at = self._clock()
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
        now = self._clock()
        if self._headers and not self._framed and exc is None:  # the end of the connection is the end of the body
            self._last_events(exchange, now)
            _end(exchange, _ending(exchange), now)
            return
        if not exchange.whole:
            where = "inside the answer" if self._headers else "before the answer"
            exchange.error = exchange.error or f"the connection was lost {where}: {exc or 'closed by the server'}"
        _end(exchange, _cut(exchange), now)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
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
            self._sse = value.lower().startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True
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
        if not self._sse or exchange.status != 200:
            exchange.body += body[: _KEPT_BYTES - len(exchange.body)]
            return
        for name, data in self._events.feed(body):
            exchange.event(name, data, self._now)

    def _last_events(self, exchange: ReplayExchange, now: float) -> None:
        for name, data in self._events.end():
            exchange.event(name, data, now)

    def on_message_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._used = True
        if self._parser.should_keep_alive() and self.usable:
            self._parser = httptools.HttpResponseParser(self)
            self._idle.append(self)
        elif self._transport is not None:
            self._transport.close()
        if exchange is not None:
            self._last_events(exchange, self._now)
            if not self._sse and exchange.status == 200:
                exchange.error = "the server answered in one piece, not as a stream of events"
            _end(exchange, _ending(exchange), self._now)


def _ending(exchange: ReplayExchange) -> Ending:
    """How an exchange ended whose HTTP answer is complete."""
    if exchange.status != 200:
        exchange.error = exchange.error or exchange.body[:500].decode(errors="replace") or f"HTTP {exchange.status}"
        if exchange.status == 429:
            return Ending.LIMITED
        return Ending.REFUSED if 400 <= exchange.status < 500 else Ending.FAILED
    answer = exchange.answer
    if answer.error:
        return Ending.ERROR_EVENT
    if exchange.whole:
        return Ending.OK
    if exchange.error:
        return Ending.FAILED
    missing = "without its last event ([DONE])" if answer.finished else "without a finish reason"
    exchange.error = f"the stream ended {missing}"
    return Ending.TRUNCATED


def _cut(exchange: ReplayExchange) -> Ending:
    """How an exchange ended that was cut off."""
    if exchange.whole:
        return Ending.OK
    if exchange.answer.error:
        return Ending.ERROR_EVENT
    return Ending.TRUNCATED if exchange.status == 200 else Ending.FAILED


def _end(exchange: ReplayExchange, ending: Ending, now: float) -> None:
    if exchange.over:
        return
    exchange.over = True
    if exchange.timer is not None:
        exchange.timer.cancel()
    exchange.done(exchange, exchange.record(ending, now))


@dataclass(slots=True)
class _Session:
    """A conversation: whether a turn is on its way, which ones wait, and what the server answered, by turn."""

    busy: bool = False
    waiting: deque[TraceCall] = field(default_factory=deque)
    said: dict[int, str] = field(default_factory=dict)
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class Manner:
    """How calls are sent.

    think: what a turn waits for after the answer before it: TRACE, until it is due; IDLE_GAP, also as long as the
    trace's user waited; or so many seconds. own_answers: a turn's messages have the server's answers in place of the
    trace's. duration_s: nothing is sent after. most_errors: the run stops at one more. drain_s: the last answers are
    waited for no longer (None: as long as any answer).
    """

    think: str | float = TRACE
    own_answers: bool = True
    duration_s: float = float("inf")
    most_errors: float = float("inf")
    warmup_s: float = 0.0


class Client:
    """Sends calls to one target and makes a record of each; `note` is called with every record as it ends.

    kept: the records, but for those that warmed the server up. stopped: why the run was ended early, "" if it was not.
    """

    def __init__(
        self, target: Target, note: Callable[[Record], None] | None = None, manner: Manner | None = None,
        *, begin_s: float = 0.0, clock: Callable[[], float] = perf_counter,
    ) -> None:  # fmt: skip
        """begin_s: what the run's own time is when it begins."""
        self._clock = clock
        self._begin_s = begin_s
        self.target = target
        self.note = note
        self.progress = ReplayProgress()
        self.kept = Kept()
        self.stopped = ""
        self._manner = manner or Manner()
        self._idle: list[ClientConnection] = []
        self._open: dict[ReplayExchange, ClientConnection | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._address = urlsplit(base_url(target.url))
        self._ssl = ssl.create_default_context() if self._address.scheme == "https" else None
        self._started_at = 0.0
        self._quiet = asyncio.Event()
        self._freed: asyncio.Event | None = None
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._thinking: dict[str, tuple[asyncio.TimerHandle, TraceCall]] = {}
        self._waiting = 0
        self._closing = False
        self._enough = False
        self._sending: asyncio.Future[None] | None = None
        self._unreachable, self._unreachable_since = 0, 0.0

    @property
    def records(self) -> Sequence[Record]:
        """In the order in which they ended; of a very long run every n-th (`kept` says which)."""
        return self.kept.records

    async def open_loop(self, calls: Iterable[TraceCall], *, drain_s: float | None = None) -> Sequence[Record]:
        """Send every call when it is due, however slow the answers are; wait `drain_s` for the last ones.

        Calls come in order of `at_s`. Returns the records in the order in which they ended.
        """
        prepared = self._prepared(calls)
        first = next(prepared, None)  # before the run's time begins: to make up a prompt and its request is no lag
        await self._run(self._open_loop(prepared if first is None else chain([first], prepared)), drain_s)
        return self.records

    async def closed_loop(
        self, calls: Iterable[TraceCall], concurrency: int, *, drain_s: float | None = None
    ) -> Sequence[Record]:
        """Keep `concurrency` calls on their way until there are no more; `at_s` is not looked at."""
        await self._run(self._closed_loop(iter(calls), concurrency), drain_s)
        return self.records

    def stop(self, reason: str) -> None:
        """Send nothing more, and count what is on its way as unfinished."""
        if not self.stopped:
            self.stopped = reason
            if self._sending is not None:
                self._sending.cancel()
            self._quiet.set()

    async def _run(self, sending: Coroutine[Any, Any, None], drain_s: float | None) -> None:
        async with Watch(self.progress.loop_s, self._clock):
            self._started_at = self._clock() - self._begin_s
            self._sending = asyncio.ensure_future(sending)
            if self.stopped:  # before the run had begun
                self._sending.cancel()
            try:
                await self._sending
            except asyncio.CancelledError:
                if not self.stopped:
                    raise
            await self._drain(drain_s)

    def _prepared(self, calls: Iterable[TraceCall]) -> Iterator[tuple[TraceCall, bytes | None]]:
        """Each call with its request; without one if it may depend on an answer."""
        for call in calls:
            yield call, None if call.waits else self.target.request(call)

    async def _open_loop(self, prepared: Iterable[tuple[TraceCall, bytes | None]]) -> None:
        for call, request in prepared:
            if call.at_s >= self._manner.duration_s:
                return
            await self._until(call.at_s)
            self._offer(call, request)
            await asyncio.sleep(0)  # it goes out before the next request is built

    async def _closed_loop(self, pending: Iterator[TraceCall], concurrency: int) -> None:
        self._freed = asyncio.Event()
        if self._manner.duration_s != float("inf"):
            asyncio.get_running_loop().call_later(self._manner.duration_s, self._have_enough)
        while self._fill(pending, concurrency):
            await self._freed.wait()
            self._freed.clear()

    def _have_enough(self) -> None:
        self._enough = True
        if self._freed is not None:
            self._freed.set()

    def _fill(self, pending: Iterator[TraceCall], concurrency: int) -> bool:
        while len(self._open) + len(self._thinking) < concurrency and self._waiting < _MOST_WAITING:
            call = None if self._enough else next(pending, None)
            if call is None:
                return False
            self._offer(replace(call, at_s=self._clock() - self._started_at))
        return True

    async def _until(self, at_s: float) -> None:
        wait_s = self._started_at + at_s - self._clock()
        # Behind or not, the loop must turn: what arrived meanwhile is to be noted before more is sent.
        await asyncio.sleep(max(0.0, wait_s))

    # Conversations

    def _offer(self, call: TraceCall, request: bytes | None = None) -> None:
        """Send the call, or keep it until the answer that it waits for is there."""
        if not call.waits:
            self._send(call, request)
            return
        session = self._sessions.setdefault(call.session, _Session())
        if session.busy:
            session.waiting.append(call)
            self._waiting += 1
        else:
            self._begin(call, session)

    def _begin(self, call: TraceCall, session: _Session) -> None:
        """A turn whose answer before is there: send it now, or after the time to think."""
        session.busy = True
        now = self._clock()
        ready_at = now
        if session.ended_at is not None:
            ready_at = max(session.ended_at + self._think_s(call), self._started_at + call.at_s)
        if ready_at <= now:
            self._send_turn(call, session, ready_at)
        else:
            later = asyncio.get_running_loop().call_later(ready_at - now, self._thought, call, session, ready_at)
            self._thinking[call.id] = (later, call)

    def _think_s(self, call: TraceCall) -> float:
        think = self._manner.think
        if isinstance(think, float):
            return think
        return call.idle_s if think == IDLE_GAP else 0.0

    def _thought(self, call: TraceCall, session: _Session, ready_at: float) -> None:
        del self._thinking[call.id]
        self._send_turn(call, session, ready_at)

    def _send_turn(self, call: TraceCall, session: _Session, ready_at: float) -> None:
        released_s = ready_at - self._started_at
        held = session.ended_at is not None and released_s > call.at_s
        self._send(call, self.target.request(call, self._messages(call, session)), released_s if held else None)

    def _messages(self, call: TraceCall, session: _Session) -> Sequence[Mapping[str, Any]]:
        """A turn's messages with the answers that there are; where there is none, the message is left out."""
        places = {place: session.said.get(turn, "") for turn, place in enumerate(call.answers)}
        messages: list[Mapping[str, Any]] = []
        for place, message in enumerate(call.messages):
            said = places.get(place, "")
            if said and (self._manner.own_answers or not message["content"]):
                messages.append({"role": "assistant", "content": said})
            elif message["content"] or place not in places:
                messages.append(message)
        return messages

    def _ended_turn(self, exchange: ReplayExchange) -> None:
        """The conversation goes on with the next turn, if one waits."""
        call = exchange.call
        session = self._sessions.get(call.session)
        if not call.waits or session is None or self._closing:
            return
        session.ended_at = self._clock()
        if exchange.answer.keep and exchange.answer.text and exchange.whole:
            session.said[len(call.answers)] = exchange.answer.text
        session.busy = False
        self._sessions.move_to_end(call.session)
        if session.waiting:
            self._waiting -= 1
            self._begin(session.waiting.popleft(), session)
        self._forget(call)

    def _forget(self, call: TraceCall) -> None:
        """Keeps what later turns may need, and no more than a bounded number of conversations."""
        if call.last and not self._sessions[call.session].busy:
            del self._sessions[call.session]
        for _ in range(_LOOKED_AT if len(self._sessions) > _MOST_SESSIONS else 0):
            name, oldest = next(iter(self._sessions.items()))
            if oldest.busy:
                self._sessions.move_to_end(name)
            else:
                del self._sessions[name]

    def _unsent(self, call: TraceCall) -> None:
        now = self._clock()
        exchange = ReplayExchange(call, b"", self._started_at, self._ended, sent_at=now)
        exchange.error = "the run ended before it was sent"
        _end(exchange, Ending.UNFINISHED, now)

    # Connections

    def _send(self, call: TraceCall, request: bytes | None = None, released_s: float | None = None) -> None:
        exchange = ReplayExchange(
            call, request or self.target.request(call), self._started_at, self._ended, released_s,
            answer=ParsedAnswer(keep=call.waits and not call.last and bool(call.messages)),
        )  # fmt: skip
        late_s = self._clock() - self._started_at - max(call.at_s, released_s or 0.0)
        self.progress.lag_s.append(late_s)
        self.progress.late += late_s > LATE_S
        loop = asyncio.get_running_loop()
        exchange.timer = loop.call_later(self.target.timeout_s, self._give_up, exchange, Ending.TIMEOUT)
        self._open[exchange] = None
        self.progress.sent += 1
        self.progress.in_flight = len(self._open)
        self._start(exchange)

    def _start(self, exchange: ReplayExchange) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._open[exchange] = connection
                connection.start(exchange)
                return
        task = asyncio.get_running_loop().create_task(self._connect(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, exchange: ReplayExchange) -> None:
        exchange.sent_at = exchange.sent_at or self._clock()  # connecting is part of what the user waits for
        port = self._address.port or (443 if self._ssl else 80)
        loop, host = asyncio.get_running_loop(), self._address.hostname or ""
        try:
            _, connection = await loop.create_connection(
                lambda: ClientConnection(self._idle, self._start, self._clock), host, port, ssl=self._ssl
            )
        except OSError as error:
            exchange.error = f"cannot connect: {error}"
            _end(exchange, Ending.UNREACHABLE, self._clock())
            return
        if exchange.over:  # given up while connecting
            connection.drop()
            return
        self._open[exchange] = connection
        if connection.usable:
            connection.start(exchange)
        else:
            exchange.error = "the server closed the connection at once"
            _end(exchange, Ending.UNREACHABLE, self._clock())

    def _give_up(self, exchange: ReplayExchange, ending: Ending) -> None:
        connection = self._open.get(exchange)
        if connection is not None:
            connection.drop()
        if exchange.whole:  # only the body's own end is missing
            ending = Ending.OK
        exchange.error = exchange.error or "the request timed out at the client"
        _end(exchange, ending, self._clock())

    def _ended(self, exchange: ReplayExchange, record: Record) -> None:
        self._open.pop(exchange, None)
        if exchange.call.at_s < self._begin_s + self._manner.warmup_s:
            record = msgspec.structs.replace(record, warmup=True)
        else:
            self.kept.add(record)
        self._count(record)
        if self.note is not None:
            self.note(record)
        self._ended_turn(exchange)
        if self._freed is not None:
            self._freed.set()
        if not self._open and not self._thinking:
            self._quiet.set()

    def _count(self, record: Record) -> None:
        progress = self.progress
        progress.done += 1
        progress.in_flight = len(self._open)
        progress.output_tokens += record.output_tokens
        progress.errors += not record.ok
        if record.ttft_s is not None:
            progress.ttft_s.append(record.ttft_s)
        if progress.errors > self._manner.most_errors:
            self.stop(f"more than {self._manner.most_errors:g} requests failed")
        if record.ending is not Ending.UNREACHABLE:
            self._unreachable = 0
            return
        now = self._clock()
        self._unreachable_since = now if not self._unreachable else self._unreachable_since
        self._unreachable += 1
        if self._unreachable >= _GONE_REQUESTS and now - self._unreachable_since > _GONE_S:
            self.stop(f"the server is gone: {self._unreachable} requests in a row had no connection for {_GONE_S:g} s")

    async def _drain(self, drain_s: float | None) -> None:
        """Waits for running requests; those not done in time are recorded as unfinished."""
        while (self._open or self._thinking) and not self.stopped:
            self._quiet.clear()
            try:
                async with asyncio.timeout(drain_s):  # not wait_for, which under Python 3.11 loses cancellations
                    await self._quiet.wait()
            except TimeoutError:
                break
        self._close()
        for connection in self._idle[:]:
            connection.drop()
        for task in self._tasks:
            task.cancel()
        for failed in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(failed, Exception):
                raise failed

    def _close(self) -> None:
        """Everything that is on its way, or waits, ends here."""
        self._closing = True
        for exchange in list(self._open):
            self._give_up(exchange, Ending.UNFINISHED)
        for timer, call in self._thinking.values():
            timer.cancel()
            self._unsent(call)
        for session in self._sessions.values():
            for call in session.waiting:
                self._unsent(call)
