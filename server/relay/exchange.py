"""One question to one worker, from the request to the last byte of its answer."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from server.engine.client import EngineConnection
from server.fleet.fleet import Member
from server.request.call import Ticket
from server.request.errors import EngineGone, EngineHungUp, ServiceError


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

    def leave(self) -> None:
        """Nobody waits for `done` any more: an error in it is no news."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()


R = TypeVar("R", bound=EngineExchange)


async def answered(receiver: Callable[[], R], ticket: Ticket, member: Member, path: bytes, body: bytes) -> R:
    """Asks a worker; returns when a receiver has the whole answer. Raises a ServiceError when it cannot be had."""
    first = receiver()
    if await _through(first, ticket, member, path, body, fresh=False):
        return first
    second = receiver()
    await _through(second, ticket, member, path, body, fresh=True)
    return second


async def _through(
    receiver: EngineExchange, ticket: Ticket, member: Member, path: bytes, body: bytes, *, fresh: bool
) -> bool:
    """False for a kept-alive connection that the engine closed just as we wrote: it never saw the request, which may be
    sent again on a fresh one. Not for an answer that was taken away from an engine, however old its connection."""
    connection = await member.engine.ask(path, body, ticket.call.id, receiver, trace=ticket.trace, fresh=fresh)
    stale = connection.reused
    receiver.flows_from(connection)
    member.legs.add(receiver)
    try:
        await receiver.done
        return True
    except EngineHungUp:
        if not stale or connection.begun or fresh:
            raise
        return False
    finally:
        member.legs.discard(receiver)
        receiver.leave()
        receiver.flows_from(None)
        connection.abandon(receiver)
