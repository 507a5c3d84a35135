"""What travels to an engine beside the client's own body: tenant, job, weight and service, for the plug-in inside."""

from typing import Any

import orjson

from scheduler.workers import Worker
from server.call import Ticket
from server.dispatch import Lines
from server.schemas import raw_members, splice


class Steering:
    """Writes `vllm_xargs` into request bodies."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def body_for(self, ticket: Ticket, worker: Worker) -> bytes:
        """The body that a worker gets: the client's own bytes, and the scheduler's words behind them."""
        call = ticket.call
        if not (worker.plugin and call.route.xargs):
            return call.body
        tenant = call.tenant
        lanes = self.lines.by_model[call.model].lanes
        words = {
            "evenhand_tenant": tenant.name,
            "evenhand_job": ticket.job.id,
            "evenhand_weight": tenant.weight,
            "evenhand_service": lanes.service(tenant.name),
        }
        if "vllm_xargs" in tenant.grants and b"vllm_xargs" in call.body:
            words = {**_granted(call.body), **words}
        return splice(call.body, b'"vllm_xargs":' + orjson.dumps(words))


def _granted(body: bytes) -> dict[str, Any]:
    """What a tenant that may use `vllm_xargs` has put there itself."""
    own = raw_members(body).get("vllm_xargs")
    return (orjson.loads(bytes(own)) if own is not None else None) or {}
