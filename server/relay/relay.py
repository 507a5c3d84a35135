"""From the engine to the client: who asks a worker, and the pipe through which its answer flows.

What happens here for every chunk of a stream is a handful of C calls: see `Stream.chunk`.
"""

from collections.abc import Callable
from typing import Protocol

from scheduler.workers import Worker
from server.engine.client import MAX_ERROR_BODY_BYTES, Connection
from server.engine.sse import (
    USAGE_BYTES,
    engine_failure_in,
    is_broken_off,
    is_usage_only,
    usage_in,
    without_prompt_ids,
    without_usage,
)
from server.fleet.fleet import Member
from server.observe.telemetry import Distribution
from server.relay.exchange import Receiver, answered
from server.request.call import Phase, Ticket
from server.request.errors import EngineGone, refusal
from server.request.transcript import PACK_CHUNKS, Received

MAX_EVENT_BYTES = 64 * 1024 * 1024
MAX_HELD_BYTES = 8 * 1024 * 1024
_GOES_ON = b'"finish_reason":null'
_TAIL_BYTES = 74  # vLLM says that a stream goes on in the last bytes of an event


class Answer(Protocol):
    """The client's side of a request."""

    begun: bool

    def begin(self, status: int, content_type: bytes, length: int | None) -> None: ...
    def write(self, data: bytes) -> None: ...
    def forward(self, chunk: bytes, at: int) -> None: ...
    def end(self) -> None: ...
    def flows_from(self, connection: Connection | None) -> None: ...


class Pipe(Receiver):
    """An answer on its way to a client.

    instead: who receives it once its head has shown that it is not what was expected.
    """

    __slots__ = ("ticket", "out", "instead", "connection", "status", "content_type", "length")

    def __init__(self, ticket: Ticket, out: Answer) -> None:
        super().__init__(ticket.clock())
        self.ticket = ticket
        self.out = out
        self.instead: Whole | Refusal | None = None
        self.connection: Connection | None = None

    @property
    def speaks(self) -> bool:
        return self.ticket.last_at > self.asked_at

    def silent_s(self, now: float) -> float:
        """Seconds since something of the answer came; 0 while its client does not keep up."""
        if self.connection is not None and self.connection.paused:
            return 0.0
        return now - max(self.asked_at, self.ticket.last_at)

    def flows_from(self, connection: Connection | None) -> None:
        if connection is not None:
            self.connection = connection
        self.out.flows_from(connection)

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        self.status = status
        self.content_type = content_type
        self.length = length
        if not 200 <= status < 300:
            self.instead = Refusal(self, status)

    def begin(self, length: int | None) -> None:
        """The answer gets its head."""
        self.ticket.move(Phase.DECODING)
        self.out.begin(self.status, self.content_type, length)


class Refusal:
    """The body of an answer that is not a success: collected, and raised as an error."""

    def __init__(self, pipe: Pipe, status: int) -> None:
        self.pipe = pipe
        self.status = status
        self.said = b""

    def body(self, data: bytes) -> None:
        if len(self.said) < MAX_ERROR_BODY_BYTES:
            self.said += data

    def end(self) -> None:
        self.pipe.fail(refusal(self.status, self.said))


class Whole(Pipe):
    """An answer in one piece. Held until it is complete, so that another worker can be asked if it breaks off; what is
    longer than `MAX_HELD_BYTES` is forwarded as it comes. Its usage is picked out as it passes."""

    __slots__ = ("tail", "usage", "held")

    def __init__(self, ticket: Ticket, out: Answer) -> None:
        super().__init__(ticket, out)
        self.tail = b""
        self.usage = b""
        self.held = b""

    def body(self, data: bytes) -> None:
        if self.instead is not None:
            self.instead.body(data)
            return
        self._look(data)
        if self.out.begun:
            self.out.write(data)
            return
        self.held = self.held + data if self.held else data
        if len(self.held) > MAX_HELD_BYTES:
            self._let_go(self.length)

    def _let_go(self, length: int | None) -> None:
        self.begin(length)
        if self.held:
            self.out.write(self.held)
            self.held = b""

    def _look(self, data: bytes) -> None:
        """Keeps the bytes from the last usage on; a long prompt's token ids may come behind it."""
        data = self.tail + data if self.tail else data
        at = data.rfind(b'"usage"')
        if at >= 0:
            self.usage = data[at : at + USAGE_BYTES]
            self.tail = b""
        elif len(self.usage) < USAGE_BYTES:
            self.usage += data[len(self.tail) :][:USAGE_BYTES]
        self.tail = data[-6:]

    def end(self) -> None:
        if self.instead is not None:
            self.instead.end()
            return
        if not self.out.begun:
            if is_broken_off(self.held):
                self.fail(EngineGone("The engine stopped in the middle of the answer."))
                return
            self._let_go(len(self.held))
        if (usage := usage_in(self.usage)) is not None:
            self.ticket.learn(usage.prompt_tokens, usage.cached_tokens)
            self.ticket.tokens = usage.output_tokens or 0
        self.out.end()
        self.finish()


class Stream(Pipe):
    """An answer token by token. Only whole events are forwarded, so that a stream can always be ended in good form.

    steady: two tokens were there, and the next event is most likely one more.
    """

    __slots__ = (
        "rest", "steady", "chunks", "clock", "itl", "charge", "received", "hide_usage", "mark", "last", "openings",
    )  # fmt: skip

    def __init__(self, ticket: Ticket, out: Answer, itl: Distribution, charge: list[Ticket]) -> None:
        super().__init__(ticket, out)
        self.itl = itl
        self.charge = charge
        self.rest = b""
        self.clock = ticket.clock
        self.hide_usage = ticket.call.hide_usage
        route = ticket.call.route
        self.mark = route.token_mark
        self.last = b"[DONE]\n\n" if self.mark == b"\n\n" else b"\0"  # an event that carries no token
        self.openings = ticket.call.sequences if route.role_first else 0
        self.steady = False
        self.received: Received | None = None
        self.chunks: list[bytes] = []
        if route.resumes:
            self.received = ticket.received = ticket.received or Received()
            self.chunks = self.received.chunks

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        super().head(status, content_type, length)
        if self.instead is None and not content_type.startswith(b"text/event-stream"):
            whole = self.instead = Whole(self.ticket, self.out)  # an engine that does not stream here
            whole.done = self.done
            whole.head(status, content_type, length)

    def chunk(self, data: bytes, at: int) -> None:
        if (
            self.rest
            or not self.steady
            or data.find(_GOES_ON, -_TAIL_BYTES) < 0
            or not data.endswith(b"\n\n\r\n")
            or data.count(b"\n") != 4
        ):
            self.body(data[at:-2])
            return
        # One more token of many: what follows is done for each of them.
        ticket, chunks = self.ticket, self.chunks
        chunks.append(data[at:-2])
        if len(chunks) >= PACK_CHUNKS and self.received is not None:
            self.received.pack()
        now = self.clock()
        self.itl.observe(now - ticket.last_at)
        ticket.last_at = now
        if not ticket.uncharged:
            self.charge.append(ticket)
        ticket.uncharged += 1
        ticket.tokens += 1
        self.out.forward(data, at)

    def body(self, data: bytes) -> None:
        """What is not one event with one token: the beginning, the end, several events or a part of one, a failure."""
        if self.instead is not None:
            self.instead.body(data)
            return
        if self.rest or not data.endswith(b"\n\n"):
            data = self._whole(self.rest + data)
        if not data:
            return
        if self.received is not None:
            if data.count(_GOES_ON) != data.count(b"\n\n"):
                data = self._until_failure(data)
            self.chunks.append(data)
            if len(self.chunks) >= PACK_CHUNKS:
                self.received.pack()
        if data:
            self._forward(data)
        self.steady = (
            self.received is not None
            and self.instead is None
            and self.ticket.second_s is not None
            and not self.openings
        )

    def _forward(self, data: bytes) -> None:
        """Whole events: counted, timed, and on their way."""
        ticket = self.ticket
        now = self.clock()
        if self.out.begun:
            self.itl.observe(now - ticket.last_at)
        else:
            data = self._open(data)
        gap_s, ticket.last_at = now - ticket.last_at, now
        made = self._made(data)
        if b'"usage"' in data:
            made, data = self._usage(made, data)
        if made > 0:
            if ticket.tokens and ticket.second_s is None:
                ticket.second_s = gap_s
            if not ticket.uncharged:
                self.charge.append(ticket)
            ticket.uncharged += made
            ticket.tokens += made
        if data:
            self.out.write(data)

    def _open(self, data: bytes) -> bytes:
        """The answer gets its head. The prompt's token ids, which come with the first event, are for us alone."""
        self.begin(None)
        asked = b'"return_token_ids"' in self.ticket.call.body
        return data if asked or b'"prompt_token_ids":[' not in data else without_prompt_ids(data)

    def _until_failure(self, data: bytes) -> bytes:
        """These events up to the first with which the engine says that it failed: that one is not the client's."""
        failure, at = engine_failure_in(data)
        if failure is None:
            return data
        self.fail(failure)
        self.instead = Refusal(self, 500)  # what may still come is not looked at
        return data[:at]

    def _made(self, data: bytes) -> int:
        """How many of these events carry tokens."""
        made = data.count(self.mark)
        if self.openings:  # each choice of a chat begins with an event that says who speaks
            skipped = min(made, self.openings)
            self.openings -= skipped
            made -= skipped
        return made - 1 if data.endswith(self.last) else made

    def _whole(self, data: bytes) -> bytes:
        """The whole events of `data`; the rest waits. An engine's CR LF becomes LF: neither can be inside an event."""
        if b"\r\n" in data:
            data = data.replace(b"\r\n", b"\n")
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            if len(data) > MAX_EVENT_BYTES:
                self.fail(EngineGone(f"The engine sent more than {MAX_EVENT_BYTES} bytes without the end of an event."))
                data = b""
            self.rest = data
            return b""
        self.rest = data[cut:]
        return data[:cut]

    def _usage(self, made: int, data: bytes) -> tuple[int, bytes]:
        """(tokens that are new in `data` by the engine's own count, `data` as the client is to see it)."""
        ticket = self.ticket
        alone = is_usage_only(data)
        if (usage := usage_in(data)) is not None:
            ticket.learn(usage.prompt_tokens, usage.cached_tokens)
            counted = usage.output_tokens
            if counted is not None:
                made = counted - ticket.tokens if alone else max(made, counted - ticket.tokens)
                if made < 0:
                    ticket.tokens = counted
        return made, without_usage(data) if self.hide_usage and alone else data

    def end(self) -> None:
        if self.instead is not None:
            self.instead.end()
            return
        if self.rest:
            self.body(b"\n\n")
        if self.done.done():
            return
        if not self.out.begun:
            self.fail(EngineGone("The engine ended its stream before the first event."))
            return
        self.out.end()
        self.finish()


class Relay:
    """Asks workers and lets their answers flow."""

    def __init__(self, itl: Distribution, body_for: Callable[[Ticket, Worker], bytes]) -> None:
        self.itl = itl
        self.body_for = body_for

    async def pump(self, ticket: Ticket, member: Member, charge: list[Ticket], out: Answer) -> None:
        """One leg: returns when the client has the whole answer. Raises a ServiceError when it cannot be had.

        charge: where a ticket is noted that has streamed tokens its policy has not been told about.
        """
        body = self.body_for(ticket, member.worker)

        def pipe() -> Pipe:
            return Stream(ticket, out, self.itl, charge) if ticket.call.stream else Whole(ticket, out)

        await answered(pipe, ticket, member, ticket.call.route.path.encode(), body)
