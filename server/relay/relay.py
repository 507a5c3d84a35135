"""From the engine to the client: who asks a worker, and the pipe through which its answer flows.

What happens here for every chunk of a stream is a handful of C calls: see `Stream.chunk`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol

from scheduler.jobs import Tier
from scheduler.workers import Worker
from server.engine.answers import (
    BYTES_PER_TOKEN,
    NOTHING,
    Said,
    Usage,
    UsageFinder,
    as_published,
    published_response,
    read_event,
    read_whole,
    with_fingerprint,
    without_prompt_ids,
)
from server.engine.client import MAX_ERROR_BODY_BYTES, EngineConnection, Received
from server.fleet.fleet import Member
from server.observe.telemetry import Distribution
from server.request.call import Phase, Ticket
from server.request.errors import EngineGone, EngineHungUp, ServiceError, answer_refused
from server.request.transcript import PACK_CHUNKS, Transcript

MAX_EVENT_BYTES = 64 * 1024 * 1024
MAX_HELD_BYTES = 8 * 1024 * 1024
_IDS_BYTES = 128  # of an event's end, in which the token ids of an ordinary one lie
_CHOICES = b'"choices":['
_IDS_END = b"]}]}"  # of an event whose last member is a list
_FRAME = b"\n\n\r\n"  # behind an event that is alone in its HTTP chunk
_FRAME_BYTES = len(_FRAME)
_ENDS_WITH_IDS = _IDS_END + _FRAME


class ClientAnswer(Protocol):
    """The client's side of a request."""

    @property
    def begun(self) -> bool:
        """Whether its head has been written."""

    def begin(self, status: int, content_type: bytes, length: int | None) -> None: ...
    def write(self, data: bytes) -> None: ...
    def forward(self, chunk: bytes, at: int) -> None: ...
    def end(self) -> None: ...
    def flows_from(self, connection: EngineConnection | None) -> None: ...


class EngineExchange(ABC):
    """Receives one answer; `done` ends it, with an error if the answer could not be had.

    asked_at: seconds on the gateway's clock.
    """

    __slots__ = ("asked_at", "done")

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def speaks(self) -> bool:
        """Whether its answer has begun to stream."""
        return False

    def silent_s(self, now: float) -> float:
        """Seconds since something of the answer came."""
        return now - self.asked_at

    def flows_from(self, connection: EngineConnection | None) -> None:
        """Which connection the answer comes through; None when no more is wanted from it."""
        return

    @abstractmethod
    def head(self, status: int, content_type: bytes, length: int | None) -> None: ...

    @abstractmethod
    def body(self, data: bytes) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def chunk(self, data: bytes, at: int) -> None:
        self.body(data[at:-2])

    def fail(self, error: ServiceError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def lost(self, error: EngineGone) -> None:
        self.fail(error)

    def ask_again(self, asked_at: float) -> None:
        """Resets the exchange for another attempt: nothing of an answer has arrived."""
        self.asked_at = asked_at
        self.done = asyncio.get_running_loop().create_future()

    def leave(self) -> None:
        """Nobody waits for `done` any more: an error in it is no news."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()


async def answered(receiver: EngineExchange, ticket: Ticket, member: Member, path: bytes, body: bytes) -> None:
    """Asks a worker; returns when the receiver has the whole answer. Raises a ServiceError when it cannot be had.

    A kept-alive connection that the engine closed just as we wrote is replaced once: the engine never saw the request.
    Not where an answer was taken away from an engine, however old its connection.
    """
    fresh = False
    while True:
        engine, name = member.engine, ticket.call.id
        connection = None if fresh else engine.ask_kept(path, body, name, receiver, ticket.trace)
        if connection is None:
            connection = await engine.ask(path, body, name, receiver, trace=ticket.trace, fresh=fresh)
        may_be_stale = connection.reused
        receiver.flows_from(connection)
        member.legs.add(receiver)
        try:
            await receiver.done
            return
        except EngineHungUp:
            if not may_be_stale or connection.received is not Received.NOTHING:
                raise
        finally:
            member.legs.discard(receiver)
            receiver.leave()
            receiver.flows_from(None)
            connection.abandon(receiver)
        receiver.ask_again(ticket.clock())
        fresh = True


class Pipe(EngineExchange):
    """An answer on its way to a client.

    instead: who receives it once its head has shown that it is not what was expected.
    """

    __slots__ = ("ticket", "out", "instead", "connection", "status", "content_type", "length")

    def __init__(self, ticket: Ticket, out: ClientAnswer) -> None:
        super().__init__(ticket.clock())
        self.ticket = ticket
        self.out = out
        self.instead: Whole | Refusal | None = None
        self.connection: EngineConnection | None = None

    @property
    def speaks(self) -> bool:
        return self.ticket.last_at > self.asked_at

    def silent_s(self, now: float) -> float:
        """Seconds since something of the answer came; 0 while its client does not keep up."""
        if self.connection is not None and self.connection.paused:
            return 0.0
        return now - max(self.asked_at, self.ticket.last_at)

    def flows_from(self, connection: EngineConnection | None) -> None:
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
        self.pipe.fail(answer_refused(self.status, self.said))


class Whole(Pipe):
    """An answer in one piece. Held until it is complete, so that another worker can be tried if it breaks off; one
    longer than `MAX_HELD_BYTES` is forwarded as it arrives, and its usage is read in passing."""

    __slots__ = ("held", "held_bytes", "finder")

    def __init__(self, ticket: Ticket, out: ClientAnswer) -> None:
        super().__init__(ticket, out)
        self.held: list[bytes] = []
        self.held_bytes = 0
        self.finder: UsageFinder | None = None

    def body(self, data: bytes) -> None:
        if self.instead is not None:
            self.instead.body(data)
            return
        if self.finder is not None:
            self.finder.feed(data)
            self.out.write(data)
            return
        self.held.append(data)
        self.held_bytes += len(data)
        if self.held_bytes > MAX_HELD_BYTES:
            self._forward_from_here()

    def _forward_from_here(self) -> None:
        self.finder = UsageFinder()
        self.begin(self.length)
        for piece in self.held:
            self.finder.feed(piece)
            self.out.write(piece)
        self.held.clear()

    def end(self) -> None:
        if self.instead is not None:
            self.instead.end()
            return
        if self.finder is not None:
            self._count(self.finder.usage)
        else:
            body = b"".join(self.held)
            said = read_whole(self.ticket.call.route.dialect, body)
            if said is not None and said.failure is not None:
                self.fail(said.failure)
                return
            if said is not None and said.response:
                body = published_response(body)
            self.begin(len(body))
            if body:
                self.out.write(body)
            self._count(None if said is None else said.usage)
        self.out.end()
        self.finish()

    def _count(self, usage: Usage | None) -> None:
        """The engine's own count, or an estimate: an answer is never free."""
        ticket = self.ticket
        if usage is not None:
            ticket.learn(usage.prompt_tokens, usage.cached_tokens)
            ticket.tokens = usage.output_tokens or 0
        elif ticket.call.route.makes_tokens:
            ticket.tokens = max(1, self.held_bytes // BYTES_PER_TOKEN)


class Stream(Pipe):
    """An answer token by token. Only whole events are forwarded, so that a stream can always be ended in good form.

    pieces: of an event that is not complete; seam: their last bytes. ended: its last event has come. spoke: this worker
    has made a token, or said why it makes none.
    keeps_events: what passes is what the client has, so that another worker can go on with it.
    beginning, mark, suffix, longest: how an ordinary event looks, learned from one that was read; see `_learn_shape`.
    framed: the suffix with the end of its HTTP chunk.
    finishing: the event that ends the choice, held until the usage event that the client did not ask for has shown
    whether the engine would have put its fingerprint there.
    """

    __slots__ = (
        "pieces", "pieces_bytes", "seam", "ended", "mark", "suffix", "longest", "chunks", "clock", "itl", "charge",
        "received", "finishing", "prompts", "spoke", "beginning", "framed",
    )  # fmt: skip
    keeps_events: ClassVar[bool] = True

    def __init__(self, ticket: Ticket, out: ClientAnswer, itl: Distribution, charge: list[Ticket]) -> None:
        super().__init__(ticket, out)
        self.itl = itl
        self.charge = charge
        self.clock = ticket.clock
        self.pieces: list[bytes] = []
        self.pieces_bytes = 0
        self.seam = b""
        self.ended = self.spoke = False
        self.beginning = self.mark = self.suffix = self.framed = self.finishing = b""
        self.longest = 0
        self.prompts: dict[int, int] = {}
        self.received: Transcript | None = None
        self.chunks: list[bytes] = []

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        super().head(status, content_type, length)
        if self.instead is None and not content_type.startswith(b"text/event-stream"):
            whole = self.instead = Whole(self.ticket, self.out)  # an engine that does not stream here
            whole.done = self.done
            whole.head(status, content_type, length)
        elif self.instead is None and self.keeps_events and self.ticket.call.route.resumes:
            self.received = self.ticket.received = self.ticket.received or Transcript()
            self.chunks = self.received.chunks

    def chunk(self, data: bytes, at: int) -> None:
        made = 0
        if self.beginning and data.startswith(self.beginning, at) and data.count(b"\n") == 4:
            if self.mark:
                start = data.rfind(b"[", -_IDS_BYTES) + 1
                if (
                    data.endswith(_ENDS_WITH_IDS)
                    and data.startswith(self.mark, start - len(self.mark))
                    and len(data) > start + len(_ENDS_WITH_IDS)
                ):
                    made = data.count(b",", start, -len(_ENDS_WITH_IDS)) + 1
            elif len(data) - at - _FRAME_BYTES <= self.longest and data.endswith(self.framed):
                made = 1
        ticket, chunks = self.ticket, self.chunks
        if not made or self.pieces or self.finishing or ticket.second_s is None:
            self.body(data[at:-2])
            return
        # An ordinary event of a choice that goes on: what follows is done for each of them.
        chunks.append(data[at:-2])
        if len(chunks) >= PACK_CHUNKS and self.received is not None:
            self.received.pack()
        now = self.clock()
        self.itl.observe(now - ticket.last_at)
        ticket.last_at = now
        if not ticket.uncharged:
            self.charge.append(ticket)
        ticket.uncharged += made
        ticket.tokens += made
        self.out.forward(data, at)

    def body(self, data: bytes) -> None:
        """What is not one ordinary event: the beginning, the end, several events or a part of one, a failure."""
        if self.instead is not None:
            self.instead.body(data)
            return
        if self.pieces or not data.endswith(b"\n\n"):
            data = self._whole(data)
        if not data:
            return
        self._events(data.split(b"\n\n")[:-1])

    def _events(self, events: list[bytes]) -> None:
        made, said = 0, NOTHING
        shown: list[bytes] = []
        for event in events:
            if ordinary := 0 if self.finishing else self._ordinary(event):
                made += ordinary
                shown.append(event + b"\n\n")
                continue
            said = self._heard(event)
            if said.failure is not None:
                break
            seen = self._shown(event, said)
            if self.done.done():  # it cannot be shown
                break
            shown.append(seen)
            made += self._made(said, made)
        if shown:
            self._keep(b"\n\n".join([*events[: len(shown)], b""]))
            self._pass(b"".join(shown), made)
        if said.failure is not None:
            self._stop(said.failure)

    def _heard(self, event: bytes) -> Said:
        """What an event says that had to be read. Whether those like it need not be is learned here."""
        said = self.read(event)
        self.spoke = self.spoke or said.tokens > 0 or said.finishes
        if (said.last or said.closing) and not self.spoke and self.ticket.call.route.tells_ids:
            # vLLM leaves out the one event of an answer that it aborts before the first token of this leg
            return said._replace(failure=EngineGone("The engine ended the answer before its first token."))
        self.ended = self.ended or said.last
        if said.tokens and self.received is not None:
            self._learn_shape(event, said)
        return said

    def _ordinary(self, event: bytes) -> int:
        """The tokens of an event of the shape that was learned, as `chunk` counts them; 0 for any other."""
        if not self.beginning or not event.startswith(self.beginning) or b"\n" in event:
            return 0
        if not self.mark:
            return int(len(event) <= self.longest and event.endswith(self.suffix))
        start = event.rfind(b"[", -_IDS_BYTES) + 1
        if (
            event.endswith(_IDS_END)
            and event.startswith(self.mark, start - len(self.mark))
            and len(event) > start + len(_IDS_END)
        ):
            return event.count(b",", start, -len(_IDS_END)) + 1
        return 0

    def read(self, event: bytes) -> Said:
        """What an event of this stream says."""
        return read_event(self.ticket.call.route.dialect, event)

    def _keep(self, events: bytes) -> None:
        if self.received is not None:
            self.received.add(events)

    def _learn_shape(self, event: bytes, said: Said) -> None:
        """How events with nothing but the next tokens look here, so that one more of them need not be read.

        An event's beginning, up to its choices, and its end are the engine's: the choice's last members, and the
        brackets that close all. Where it tells token ids, they come last, behind a part that is always the same. Where
        not, an event of one token ends always in the same way, and none is longer than the longest that counted as one
        (an escaped character is longer than it counts).
        """
        start, choices = event.rfind(b'"finish_reason":null'), event.find(_CHOICES)
        if not event.startswith(b"data: {") or not 0 < choices < start or b"\n" in event:
            return
        if said.usage or said.finishes or said.prompt_ids:
            return
        beginning = event[: choices + len(_CHOICES)]
        if said.exact:
            ids = event.rfind(b"[") + 1
            mark = event[start:ids]
            if event.endswith(_IDS_END) and mark.endswith(b',"token_ids":[') and b'"' not in event[ids:]:
                self.beginning, self.mark = beginning, mark
        elif said.tokens == 1 and event.endswith(b"}") and b"}]" in event[start:] and b"\\u" not in event:
            suffix = event[start:]
            self.longest = max(self.longest if suffix == self.suffix else 0, len(event))
            self.beginning, self.suffix, self.framed = beginning, suffix, suffix + _FRAME

    def _pass(self, events: bytes, made: int) -> None:
        """Whole events: charged, timed, and on their way."""
        ticket = self.ticket
        now = self.clock()
        if self.out.begun:
            self.itl.observe(now - ticket.last_at)
        elif events or made:
            self.begin(None)
        gap_s, ticket.last_at = now - ticket.last_at, now
        if made > 0 and ticket.second_s is None and ticket.tokens + made > 1:
            ticket.second_token(gap_s if ticket.tokens else None)
        if made:
            if not ticket.uncharged:
                self.charge.append(ticket)
            ticket.uncharged += made
            ticket.tokens += made
        if events:
            self.out.write(events)

    def _stop(self, failure: ServiceError) -> None:
        """The engine reports an error: that event is not for the client, and nothing after it is read."""
        self.beginning = b""
        self.fail(failure)
        self.instead = Refusal(self, 500)

    def _shown(self, event: bytes, said: Said) -> bytes:
        """What the client gets of an event."""
        call = self.ticket.call
        if not call.hide_usage:
            return (as_published(event) if said.response else self._without_prompt(event, said)) + b"\n\n"
        before, self.finishing = self.finishing, b""
        if said.closing:
            if before and said.fingerprint:
                before = with_fingerprint(before, said.fingerprint)
            return before + b"\n\n" if before else b""
        if before:
            before += b"\n\n"
        if said.finishes and call.sequences == 1:
            self.finishing = self._without_prompt(event, said)
            return before
        return before + self._without_prompt(event, said) + b"\n\n"

    def _without_prompt(self, event: bytes, said: Said) -> bytes:
        """Removes the prompt's token ids, which come with the first event, unless the client asked for them."""
        return event if self.ticket.call.wants_ids or not said.prompt_ids else without_prompt_ids(event, said)

    def _made(self, said: Said, before: int) -> int:
        """Tokens that are new with this event; negative where the engine's count is below the estimate so far. before:
        tokens of this read that are not in the ticket yet."""
        ticket, usage = self.ticket, said.usage
        if said.prompts:
            self._learn_prompts(said)
        if usage is None:
            return said.tokens
        one = ticket.call.sequences == 1
        if said.total or one:
            ticket.learn(usage.prompt_tokens, usage.cached_tokens)
        if usage.output_tokens is None:
            return said.tokens
        if said.total:
            return usage.output_tokens - ticket.tokens - before
        return max(said.tokens, usage.output_tokens - ticket.tokens - before) if one and not said.exact else said.tokens

    def _learn_prompts(self, said: Said) -> None:
        """The engine sent token ids of a prompt. Of several prompts, those not seen yet keep their estimate."""
        call = self.ticket.call
        each = call.sequences // call.prompts
        for choice, tokens in said.prompts:
            self.prompts[choice // each] = tokens
        known = sum(self.prompts.values())
        if len(self.prompts) >= call.prompts:
            self.ticket.learn(known, None)
        else:
            missing = call.prompts - len(self.prompts)
            self.ticket.prompt_tokens = known + call.prompt_tokens * missing // call.prompts

    def _whole(self, data: bytes) -> bytes:
        """The whole events of what has come; the rest waits in pieces, joined once it is complete. An engine's CR LF
        becomes LF: neither can be inside an event."""
        seam = self.seam + data
        if b"\n\n" not in seam and b"\n\r\n" not in seam:
            self._wait_with(data, seam)
            return b""
        if self.pieces:
            data = b"".join([*self.pieces, data])
            self.pieces.clear()
            self.pieces_bytes = 0
        if b"\r\n" in data:
            data = data.replace(b"\r\n", b"\n")
        cut = data.rfind(b"\n\n") + 2
        self.seam = b""
        if cut < len(data):
            self._wait_with(data[cut:], data[cut:])
        return data[:cut]

    def _wait_with(self, data: bytes, seam: bytes) -> None:
        self.pieces.append(data)
        self.pieces_bytes += len(data)
        self.seam = seam[-3:]
        if self.pieces_bytes > MAX_EVENT_BYTES:
            self.pieces.clear()
            self._stop(EngineGone(f"The engine sent more than {MAX_EVENT_BYTES} bytes without the end of an event."))

    def fail(self, error: ServiceError) -> None:
        if self.finishing and self.out.begun and not self.done.done():
            held, self.finishing = self.finishing, b""
            self.out.write(held + b"\n\n")
        super().fail(error)

    def end(self) -> None:
        if self.instead is not None:
            self.instead.end()
            return
        if self.pieces:
            self.body(b"\n\n")
        if self.done.done():
            return
        if not self.ended:
            self.fail(EngineHungUp("The engine ended its stream before its last event."))
            return
        self.out.end()
        self.finish()


class Relay:
    """Asks workers and lets their answers flow."""

    def __init__(self, itl: Distribution, flex_itl: Distribution, body_for: Callable[[Ticket, Worker], bytes]) -> None:
        self.itl = itl
        self.flex_itl = flex_itl
        self.body_for = body_for

    def itl_of(self, ticket: Ticket) -> Distribution:
        """Where the gaps of a stream are counted."""
        return self.flex_itl if ticket.job.tier is Tier.FLEX else self.itl

    def pump(self, ticket: Ticket, member: Member, charge: list[Ticket], out: ClientAnswer) -> Awaitable[None]:
        """One leg: returns when the client has the whole answer. Raises a ServiceError when it cannot be had.

        charge: where a ticket is noted that has streamed tokens its policy has not been told about.
        """
        body = self.body_for(ticket, member.worker)
        receiver = Stream(ticket, out, self.itl_of(ticket), charge) if ticket.call.stream else Whole(ticket, out)
        return answered(receiver, ticket, member, ticket.call.route.path.encode(), body)
