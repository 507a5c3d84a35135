"""An answer with a trace of the gateway's decisions: why the request waited and where it went.

Only a request that carries `x-evenhand-trace: 1`, from a tenant that may ask, keeps its decisions.
"""

import json
from typing import Any, Protocol

from server.engine.client import EngineConnection
from server.relay.relay import ClientAnswer
from server.request.call import Phase, Ticket
from server.request.tenants import OPEN, Tenant

TRACE = b"x-evenhand-trace"
LONGEST_HEADER = 4096  # many clients take no line above 8 KiB


class HeadedAnswer(ClientAnswer, Protocol):
    """An answer that takes headers until it begins."""

    extra_headers: bytes


class TracedAnswer:
    """A client's answer with its trace: as a header, or as a comment at the end of a stream."""

    def __init__(self, out: HeadedAnswer, ticket: Ticket) -> None:
        self.out = out
        self.ticket = ticket
        self.streams = False

    @property
    def begun(self) -> bool:
        return self.out.begun

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        self.streams = content_type.startswith(b"text/event-stream")
        if not self.streams:
            self.out.extra_headers += header(self.ticket)
        self.out.begin(status, content_type, length)

    def write(self, data: bytes) -> None:
        self.out.write(data)

    def forward(self, chunk: bytes, at: int) -> None:
        self.out.forward(chunk, at)

    def end(self) -> None:
        if self.streams:
            self.out.write(comment(self.ticket))
        self.out.end()

    def flows_from(self, connection: EngineConnection | None) -> None:
        self.out.flows_from(connection)


def may_trace(tenant: Tenant) -> bool:
    """Whether a tenant may ask for traces: the header's name is among its grants, or there are no tenants at all."""
    return tenant is OPEN or "x-evenhand-trace" in tenant.grants


def tell_failure(ticket: Ticket, out: HeadedAnswer) -> None:
    """The trace of a request that ends with an error, which is yet to be written."""
    if not out.begun:
        out.extra_headers += header(ticket)
    elif ticket.call.stream:
        out.write(comment(ticket))


def header(ticket: Ticket) -> bytes:
    """The trace as a header's line, without the workers where it would be too long for one."""
    told = json.dumps(trace(ticket))  # in ASCII and without a line break
    if len(told) > LONGEST_HEADER:
        steps = [{name: fact for name, fact in step.items() if name != "workers"} for step in ticket.decisions or []]
        told = json.dumps(trace(ticket) | {"steps": steps})
    return b"%b: %b\r\n" % (TRACE, told.encode())


def comment(ticket: Ticket) -> bytes:
    """The trace as a comment in a stream of events, which clients pass over."""
    return b": %b %b\n\n" % (TRACE, json.dumps(trace(ticket)).encode())


def trace(ticket: Ticket) -> dict[str, Any]:
    """What is known of a request by now. Times are seconds since it arrived."""
    call = ticket.call
    first_s, queue_s = (ticket.since(Phase.WAITING, phase) for phase in (Phase.DECODING, Phase.PREFILLING))
    return {
        "request_id": call.id,
        "model": call.asked or call.model,
        "served_model": call.model,
        "queue_s": None if queue_s is None else round(queue_s, 6),
        "ttft_s": None if first_s is None else round(first_s, 6),
        "prompt_tokens": ticket.prompt_tokens,
        "steps": ticket.decisions or [],
    }
