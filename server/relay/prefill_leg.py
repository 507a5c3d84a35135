"""The prefill leg of a split request: one worker computes the prompt's KV and says where it can be fetched.

Whatever goes wrong here costs time and no answer: the worker that is to answer then reads the prompt itself.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.workers import Worker
from server.engine.client import MAX_ERROR_BODY_BYTES
from server.fleet.fleet import Fleet, Member
from server.fleet.split import Split
from server.observe.telemetry import Distribution
from server.relay.relay import EngineExchange, answered
from server.request.call import Ticket
from server.request.errors import EngineGone, answer_refused
from server.request.schemas import splice

log = logging.getLogger("evenhand.handover")

MAX_ANSWER_BYTES = 1024 * 1024  # one token, and the numbers of the blocks that hold the prompt
# The engine that answers makes the first token itself then, when it has the KV.
WITHHELD = b'"evenhand_first_token":null'
OUTCOMES = ("read", "gone", "slow", "refused", "no_kv")


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Read(msgspec.Struct):
    """What we read of a prefill worker's answer."""

    usage: _Usage | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


_read = msgspec.json.Decoder(_Read).decode


class NotRead(Exception):
    """The prompt was not read apart. outcome: its name in metrics."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class _Whole(EngineExchange):
    """Receives one small answer as a whole."""

    __slots__ = ("status", "data")

    def __init__(self, asked_at: float) -> None:
        super().__init__(asked_at)
        self.status = 0
        self.data = bytearray()

    def head(self, status: int, content_type: bytes, length: int | None) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        most = MAX_ANSWER_BYTES if self.status == 200 else MAX_ERROR_BODY_BYTES
        self.data += data[: max(0, most - len(self.data))]

    def end(self) -> None:
        self.finish()


class PrefillLeg(Collector):
    """Has prompts read by prefill workers.

    body_for: the body that a prefill worker gets. timeout_s: after so long the prompt is read where it is answered.
    """

    def __init__(
        self,
        body_for: Callable[[Ticket, Worker], bytes],
        fleet: Fleet,
        *,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.body_for = body_for
        self.fleet = fleet
        self.timeout_s = timeout_s
        self.clock = clock
        self.outcomes: Counter[str] = Counter()
        self.seconds = Distribution(
            "evenhand_prefill_seconds", "Time of a prompt at a prefill worker, including its wait."
        )

    async def prefill(self, ticket: Ticket) -> None:
        """Returns when the prompt has been read, or will have to be read by the worker that answers."""
        split = ticket.split
        if split is None or not split.reading:
            return
        began = self.clock()
        try:
            kv = await self._read(ticket, split)
            split.read_at = self.clock()
            if ticket.visit is not None:
                ticket.visit.read(split.read_at)
                kv = kv if ticket.visit.passes_on else splice(kv, WITHHELD)
            split.kv = kv
            self.seconds.observe(split.read_at - began)
            self.outcomes["read"] += 1
        except NotRead as reason:
            self.outcomes[reason.outcome] += 1
            if ticket.visit is not None:
                ticket.visit.gave_up(self.clock())
            log.warning("prefill at worker %s failed: %s", split.prefill.worker.id, reason)
        finally:
            split.read()

    async def _read(self, ticket: Ticket, split: Split) -> bytes:
        member = split.prefill
        try:
            async with asyncio.timeout(self.timeout_s):
                status, data = await self._ask(ticket, member)
            refused = None if status == 200 else answer_refused(status, data)
            if isinstance(refused, EngineGone):
                raise refused
        except EngineGone as error:
            self.fleet.suspect(member, error)
            self.fleet.failed([member], ticket.call.id, ticket.call.tenant.name, proven=False)
            raise NotRead("gone", error.message) from None
        except TimeoutError:
            raise NotRead("slow", f"it took longer than {self.timeout_s:g} s") from None
        if refused is not None:
            raise NotRead("refused", refused.message)
        return self._kv_in(ticket, data)

    async def _ask(self, ticket: Ticket, member: Member) -> tuple[int, bytes]:
        body = self.body_for(ticket, member.worker)
        path = ticket.call.route.path.encode()
        answer = _Whole(self.clock())
        await answered(answer, ticket, member, path, body)
        return answer.status, bytes(answer.data)

    def _kv_in(self, ticket: Ticket, data: bytes) -> bytes:
        """Where the answer says that the KV is, with the count of tokens that came from the prefill worker's cache."""
        try:
            answer = _read(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise NotRead("no_kv", f"its answer cannot be read: {error}") from None
        kv = bytes(answer.kv_transfer_params)
        if not kv.startswith(b"{") or b"do_remote_prefill" not in kv:
            raise NotRead("no_kv", "it has no KV connector")
        if (usage := answer.usage) is None:
            return kv
        details = usage.prompt_tokens_details
        cached_tokens = None if details is None else details.cached_tokens
        ticket.learn(usage.prompt_tokens, cached_tokens)
        return kv if cached_tokens is None else splice(kv, b'"remote_prefill_cached_tokens":%d' % cached_tokens)

    def collect(self) -> Iterator[Metric]:
        yield self.seconds.family()
        handovers = CounterMetricFamily(
            "evenhand_prefills",
            "Prompts sent to prefill workers; all but `read` are prefilled again by the worker that answers.",
            labels=("outcome",),
        )
        for outcome in OUTCOMES:
            handovers.add_metric((outcome,), self.outcomes[outcome])
        yield handovers
        received = CounterMetricFamily(
            "evenhand_kv_transfer_bytes", "KV that a worker has fetched from others.", labels=("worker",)
        )
        for member in self.fleet.members.values():
            received.add_metric((member.worker.id,), member.kv_received_bytes)
        yield received
