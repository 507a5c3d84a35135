"""Calls and tickets as tests need them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from scheduler.jobs import Job, Outcome
from server.admission.dispatch import Dispatcher
from server.fleet.fleet import Member
from server.request.call import Call, Route, Ticket
from server.request.schemas import CHAT, call_from
from server.request.tenants import Tenant

ANYBODY = Tenant(name="anybody")


def call_of(body: bytes, route: Route = CHAT, tenant: Tenant = ANYBODY) -> Call:
    return call_from(route, body, tenant, "call-1", 4.0)


def ticket_of(
    clock: Callable[[], float],
    call: Call | None = None,
    *,
    number: int = 0,
    tenant: str = "anybody",
    sequences: int = 1,
) -> Ticket:
    """A ticket whose job arrives now."""
    call = call or Call(
        id=f"call-{number}",
        route=CHAT,
        tenant=Tenant(name=tenant),
        model="fake",
        stream=True,
        body=b"",
        hide_usage=False,
        prompt_tokens=10,
        max_tokens=20,
        sequences=sequences,
        kind="",
    )
    job = Job(str(number), call.tenant.name, call.prompt_tokens, clock(), call.max_tokens, call.tenant.weight)
    return Ticket(call, job, clock)


@asynccontextmanager
async def placed(line: Dispatcher, ticket: Ticket) -> AsyncIterator[Member]:
    """A place in a line's workers for as long as the block runs."""
    outcome = Outcome.DONE
    member = await line.take(ticket)
    try:
        yield member
    except asyncio.CancelledError:
        outcome = Outcome.ABORTED
        raise
    except BaseException:
        outcome = Outcome.FAILED
        raise
    finally:
        if ticket.member is not None:
            line.give_back(ticket, outcome)
