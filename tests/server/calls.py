"""Calls and tickets as tests need them."""

from collections.abc import Callable

from scheduler.jobs import Job
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
