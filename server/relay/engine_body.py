"""What travels to an engine beside the client's own body: the scheduler's words for the plug-in, and where KV is."""

from typing import Any

import orjson

from scheduler.jobs import Tier
from scheduler.workers import Worker
from server.request.call import Ticket
from server.request.schemas import CHAT, COMPLETIONS, raw_members

_KIND = "evenhand_kind"  # a tenant may name it: it makes a class among its own requests

# One token, in one piece: nothing that is changed here may change the prompt, whose KV another engine will take over.
_ONE_TOKEN = (
    b'"stream":false,"stream_options":null,"max_tokens":1,"min_tokens":0,"stop":null,"return_token_ids":false,'
    b'"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
_READ_ONLY = {
    CHAT.path: _ONE_TOKEN + b',"max_completion_tokens":1,"logprobs":false,"top_logprobs":null',
    COMPLETIONS.path: _ONE_TOKEN + b',"echo":false,"logprobs":null',
}


class EngineBody:
    """Writes `vllm_xargs` and `kv_transfer_params` into request bodies."""

    def __init__(self, *, salt_cache: bool = False) -> None:
        """salt_cache: tenants share no prefix cache."""
        self.salt_cache = salt_cache

    def body_for(self, ticket: Ticket, worker: Worker) -> bytes:
        """The body that a worker gets: the client's own bytes, and ours behind them."""
        kv = b"" if ticket.split is None else ticket.split.fetch(worker.id)
        return self.dressed(ticket, worker, ticket.call.body, b'"kv_transfer_params":' + kv if kv else b"")

    def to_prefill(self, ticket: Ticket, worker: Worker) -> bytes:
        """The body for a worker that only reads the prompt, and keeps its KV until another has fetched it."""
        return self.dressed(ticket, worker, ticket.call.body, _READ_ONLY[ticket.call.route.path])

    def dressed(self, ticket: Ticket, worker: Worker, body: bytes, more: bytes = b"") -> bytes:
        """`body` with the scheduler's words for a plug-in, a stream's wish to be told its token ids, and `more`."""
        call = ticket.call
        ours: list[bytes] = []
        if worker.plugin and call.route.xargs:
            ours.append(b'"vllm_xargs":' + self._words(ticket))
        if worker.token_ids and call.stream and call.route.tells_ids and not call.wants_ids:
            ours.append(b'"return_token_ids":true')
        if self.salt_cache and call.route.generates and "cache_salt" not in call.tenant.grants:
            ours.append(b'"cache_salt":' + orjson.dumps(call.tenant.cache_salt))
        if more:  # last: a member that comes twice counts as its last
            ours.append(more)
        return body[: body.rindex(b"}")] + b",%b}" % b",".join(ours) if ours else body

    def _words(self, ticket: Ticket) -> bytes:
        call = ticket.call
        tenant = call.tenant
        assert ticket.line is not None  # it has a place
        lanes = ticket.line.lanes
        words = {
            "evenhand_tenant": tenant.name,
            "evenhand_job": ticket.job.id,
            "evenhand_weight": tenant.weight,
            "evenhand_service": lanes.service_without(ticket.job),
        }
        if call.tier is not Tier.DEFAULT:
            words["evenhand_tier"] = call.tier.label
        if call.kind:
            words[_KIND] = call.kind
        if tenant.slo is not None and tenant.slo.tpot_s is not None:  # else the engine knows its model's
            words["evenhand_tpot_s"] = tenant.slo.tpot_s
        if "vllm_xargs" in tenant.grants and b"vllm_xargs" in call.body:
            words = {**_granted(call.body), **words}
        return orjson.dumps(words)


def _granted(body: bytes) -> dict[str, Any]:
    """What a tenant that may use `vllm_xargs` has put there itself, without what only the gateway says. That it is an
    object was seen when the request was read."""
    own = raw_members(body).get("vllm_xargs")
    given = (orjson.loads(bytes(own)) if own is not None else None) or {}
    return {name: value for name, value in given.items() if name == _KIND or not name.startswith("evenhand_")}
