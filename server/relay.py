"""From the engine to the client: who asks a worker, and the pipe through which its answer flows.

What happens here for every chunk of a stream is a handful of C calls: see `Stream.body`.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from scheduler.workers import Worker
from server.call import Phase, Ticket
from server.engine import MAX_ERROR_BODY_BYTES, Connection
from server.errors import EngineGone, ServiceError, refusal
from server.fleet import Member
from server.sse import is_usage_only, usage_in, without_usage
from server.telemetry import Distribution


class Answer(Protocol):
    """The client's side of a request."""

    begun: bool

    def begin(self, status: int, content_type: bytes, length: int | None) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def flows_from(self, connection: Connection | None) -> None: ...


class _Pipe:
    """Receives one answer; `done` ends it. An answer that is not a success is collected and raised as an error."""

    def __init__(self, ticket: Ticket, out: Answer) -> None:
        self.ticket = ticket
        self.out = out
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.refused: list[bytes] | None = None

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        self.status = status
        self.content_type = content_type
        self.length = length
        if not 200 <= status < 300:
            self.refused = []

    def collect(self, data: bytes) -> None:
        assert self.refused is not None
        if sum(map(len, self.refused)) < MAX_ERROR_BODY_BYTES:
            self.refused.append(data)

    def fail(self, error: ServiceError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def lost(self, error: EngineGone) -> None:
        self.fail(error)


class Whole(_Pipe):
    """An answer in one piece. Forwarded as it comes; its usage is read from its last bytes."""

    def __init__(self, ticket: Ticket, out: Answer) -> None:
        super().__init__(ticket, out)
        self.tail = b""

    def body(self, data: bytes) -> None:
        if self.refused is not None:
            self.collect(data)
            return
        if not self.out.begun:
            self.ticket.move(Phase.DECODING)
            self.out.begin(self.status, self.content_type, self.length)
        # usage follows the choices; what is behind it (metadata) is short
        self.tail = data if len(data) >= 4096 else (self.tail + data)[-8192:]
        self.out.write(data)

    def end(self) -> None:
        if self.refused is not None:
            self.fail(refusal(self.status, b"".join(self.refused)))
            return
        if not self.out.begun:
            self.ticket.move(Phase.DECODING)
            self.out.begin(self.status, self.content_type, self.length)
        if (usage := usage_in(self.tail)) is not None:
            self.ticket.prompt_tokens, self.ticket.tokens, self.ticket.cached_tokens = usage
            self.ticket.exact = True
        self.out.end()
        self.finish()


class Stream(_Pipe):
    """An answer token by token. Only whole events are forwarded, so that a stream can always be ended in good form."""

    def __init__(self, ticket: Ticket, out: Answer, itl: Distribution, charge: list[Ticket]) -> None:
        super().__init__(ticket, out)
        self.itl = itl
        self.charge = charge
        self.rest = b""
        self.clock = ticket.clock
        self.hide_usage = ticket.call.hide_usage

    def body(self, data: bytes) -> None:
        if self.refused is not None:
            self.collect(data)
            return
        if self.rest:
            data = self.rest + data
            self.rest = b""
        if not data.endswith(b"\n\n"):
            data = self._whole(data)
            if not data:
                return
        ticket = self.ticket
        now = self.clock()
        count = data.count(b"\ndata:") + 1
        if self.out.begun:
            self.itl.observe(now - ticket.last_at)
        else:
            ticket.move(Phase.DECODING)
            self.out.begin(self.status, self.content_type, None)
            count -= ticket.call.route.role_first
        ticket.last_at = now
        if b'"usage"' in data:
            data = self._usage(data)
        elif data.endswith(b"[DONE]\n\n"):
            count -= 1
        if count and not ticket.exact:
            if not ticket.uncharged:
                self.charge.append(ticket)
            ticket.uncharged += count
            ticket.tokens += count
        if data:
            self.out.write(data)

    def _whole(self, data: bytes) -> bytes:
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            self.rest = data
            return b""
        self.rest = data[cut:]
        return data[:cut]

    def _usage(self, data: bytes) -> bytes:
        if (usage := usage_in(data)) is not None:
            self.ticket.prompt_tokens, self.ticket.tokens, self.ticket.cached_tokens = usage
            self.ticket.exact = True
        return without_usage(data) if self.hide_usage and is_usage_only(data) else data

    def end(self) -> None:
        if self.refused is not None:
            self.fail(refusal(self.status, b"".join(self.refused)))
            return
        if not self.out.begun:
            self.fail(EngineGone("The engine ended its stream before the first event."))
            return
        if self.rest:
            self.out.write(self.rest + b"\n\n")
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
        call = ticket.call
        body = self.body_for(ticket, member.worker)
        path = call.route.path.encode()
        for last_try in (False, True):
            pipe = Stream(ticket, out, self.itl, charge) if call.stream else Whole(ticket, out)
            connection = await member.engine.ask(path, body, call.id, pipe)
            fresh = not connection.reused
            out.flows_from(connection)
            try:
                await pipe.done
                return
            except EngineGone:
                # A kept-alive connection may have been closed just as we wrote: the engine never saw the request.
                if fresh or connection.begun or last_try:
                    raise
            finally:
                out.flows_from(None)
                connection.abandon()
