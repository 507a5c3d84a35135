"""The lifecycle of a request, from the last byte of its body to its last token."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from scheduler.jobs import Job, Outcome
from server.admission.dispatch import Dispatcher, Lines
from server.admission.limits import Gate, permitted
from server.admission.live_adapters import LiveAdapters
from server.admission.live_names import may_fall_back
from server.failover.failover import Failover
from server.observe.observer import Observers
from server.observe.telemetry import Telemetry
from server.relay.prefill_leg import PrefillLeg
from server.relay.relay import ClientAnswer
from server.relay.renamed import RenamedAnswer
from server.relay.tiered import TieredAnswer
from server.relay.traced import TRACE, TracedAnswer, may_trace, tell_failure
from server.request.call import Call, Phase, Route, Ticket
from server.request.directory import Tenants
from server.request.errors import NoWorker, ServiceError, UnknownModel, outcome_of
from server.request.schemas import call_from, deadline_from
from server.request.tenants import OPEN, Tenant

log = logging.getLogger("evenhand.gateway")

BYTES_PER_TOKEN = 4.0  # English text under a modern tokenizer; each tenant's own ratio is learned from its answers
LEARN_FROM_TOKENS = 64  # in shorter prompts the chat template outweighs the text
LEARN_SHARE = 0.1


class Request(ClientAnswer, Protocol):
    """A complete request from the connection, and the way back to its client.

    headers: by lower-case name. received: its body, until it is read: a large one must not be in memory twice.
    """

    route: Route
    received: bytes | bytearray
    request_id: str
    extra_headers: bytes

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """Without those that hold a key."""

    @property
    def tenant(self) -> Tenant | None:
        """The tenant, once the head is complete."""

    @property
    def client(self) -> str:
        """The address it came from."""

    def fail(self, error: ServiceError) -> None: ...


class Gateway:
    """Serves relayed requests."""

    def __init__(
        self,
        tenants: Tenants,
        limits: Gate,
        lines: Lines,
        handover: PrefillLeg,
        failover: Failover,
        telemetry: Telemetry,
        observers: Observers,
        clock: Callable[[], float],
    ) -> None:
        self.tenants = tenants
        self.tenant_with = tenants.holder
        self.limits = limits
        self.lines = lines
        self.names = lines.names
        self.handover = handover
        self.failover = failover
        self.relay = failover.relay
        self.telemetry = telemetry
        self.clock = clock
        self.bytes_per_token: dict[str, float] = {}
        self.observers = observers
        self._count = 0

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self.tenants.open

    async def answer(self, request: Request) -> None:
        """One request from its body to its last byte. Never raises, but for the cancellation of a client that left."""
        try:
            call = self.read(request)
            dispatcher = self.lines.by_model.get(call.model)
            if dispatcher is None:
                call, dispatcher = self.line_for(call)
        except ServiceError as error:
            self.refused(request.route.path, error)
            request.fail(error)
            forget_way(error)
            return
        try:
            await self.serve(call, dispatcher, request)
        except ServiceError as error:
            request.fail(error)
            forget_way(error)
        except asyncio.CancelledError:
            raise
        except Exception:  # the outermost border: whatever this is, the client gets an answer and the log the reason
            log.exception("request %s failed inside the gateway", call.id)
            request.fail(ServiceError("The gateway failed on this request; see its log for the reason."))

    def read(self, request: Request) -> Call:
        """Parses the request."""
        tenant = request.tenant
        assert tenant is not None  # a request without one is refused with its head
        ratio = self.bytes_per_token.get(tenant.name, BYTES_PER_TOKEN)
        body, request.received = bytes(request.received), b""
        call = call_from(request.route, body, tenant, request.request_id, ratio)
        if tenant.models is not None or tenant.max_tokens is not None:
            call = permitted(call)
        deadline = request.headers.get(b"x-deadline-s")
        if deadline is not None:
            call = msgspec.structs.replace(call, deadline_s=deadline_from(deadline))
        return self.names.resolved(call) if self.names.table.names else call

    def line_for(self, call: Call) -> tuple[Call, Dispatcher]:
        """The queue of the requested model, or of its first fallback that is served."""
        while True:
            try:
                return call, self.lines.of_call(call)
            except (UnknownModel, NoWorker) as error:
                if not call.asked:
                    raise
                if not call.fallbacks:
                    raise NoWorker(f"No worker serves '{call.asked[:100]}' right now.", retry_after_s=5.0) from None
                call = self.next_model(call, error)

    async def serve(self, call: Call, dispatcher: Dispatcher, out: Request) -> None:
        """One call from admission to its last token: limits, queue, worker, answer."""
        ticket, outcome = self.ticket(call), "ok"
        for began in self.observers.began:
            began(ticket, out)
        traced = out.headers.get(TRACE) == b"1" and may_trace(call.tenant)
        answer = self.dressed(ticket, out, traced=traced) if call.asked or call.tells_tier or traced else out
        try:
            if call.tenant.limits is not None:
                self.limits.admit(ticket, out)
            try:
                await self.at_worker(ticket, dispatcher, answer)
            except ServiceError as error:
                if not call.fallbacks:
                    raise
                await self.fall_back(ticket, answer, error)
        except asyncio.CancelledError:
            ticket.move(Phase.CANCELLED)
            outcome = "cancelled"
            raise
        except BaseException as error:
            ticket.move(Phase.FAILED)
            outcome = outcome_of(error)
            raise
        finally:
            self.end(ticket, outcome)
            if ticket.decisions is not None and ticket.phase is Phase.FAILED:
                tell_failure(ticket, out)

    def end(self, ticket: Ticket, outcome: str) -> None:
        """A call is over, however it ended: releases what it holds, and counts it."""
        try:
            if ticket.member is not None:
                assert ticket.line is not None  # who has a place was given it by one
                ticket.line.give_back(ticket, _job_outcome(ticket))
        finally:
            if ticket.call.tenant is not OPEN:
                self.limits.settle(ticket)
            if ticket.exact:
                self.learn(ticket)
            for ended in self.observers.ended:
                ended(ticket, outcome)

    def dressed(self, ticket: Ticket, out: Request, *, traced: bool) -> ClientAnswer:
        """The way back to the client, with an alias, a tier or a trace of decisions where they apply."""
        answer: ClientAnswer = out
        if traced:
            ticket.decisions = []
            answer = TracedAnswer(out, ticket)
        if ticket.call.tells_tier:
            return TieredAnswer(answer, ticket.call)
        return RenamedAnswer(answer, ticket.call.asked) if ticket.call.asked else answer

    async def at_worker(self, ticket: Ticket, dispatcher: Dispatcher, out: ClientAnswer) -> None:
        """The answer of one model: waits for a worker, and returns when the client has the whole answer."""
        member = await dispatcher.take(ticket)
        for got_place in self.observers.got_place:
            got_place(ticket)
        ticket.move(Phase.PREFILLING)
        if ticket.split is not None:
            await self.handover.prefill(ticket)
        try:
            if dispatcher.adapters is None or ticket.call.model == dispatcher.model:
                await self.relay.pump(ticket, member, dispatcher.charge, out)
            else:
                await self.with_adapter(ticket, dispatcher, dispatcher.adapters, out)
        except ServiceError as error:
            await self.failover.go_on(ticket, dispatcher, out, error)
        ticket.move(Phase.DONE)

    async def with_adapter(
        self, ticket: Ticket, dispatcher: Dispatcher, adapters: LiveAdapters, out: ClientAnswer
    ) -> None:
        """The answer of a worker that has the adapter, which is loaded there if necessary."""
        member = await dispatcher.fit(ticket)
        try:
            await self.relay.pump(ticket, member, dispatcher.charge, out)
        except ServiceError as error:
            if out.begun or not await adapters.has_left(member, ticket.call.model, error):
                raise
            ticket.decide("loads the adapter again", worker=member.worker.id)
            member = await dispatcher.fit(ticket)
            await self.relay.pump(ticket, member, dispatcher.charge, out)

    async def fall_back(self, ticket: Ticket, out: ClientAnswer, error: ServiceError) -> None:
        """The answer of the first fallback that gives one, while the client has nothing yet. Raises the last error.

        A request on which two healthy workers failed does not fall back: it would make other models fail too.
        """
        while ticket.call.fallbacks and not out.begun and may_fall_back(error):
            if ticket.at_fault > 1:
                break
            if ticket.member is not None and ticket.line is not None:
                ticket.line.give_back(ticket, Outcome.FAILED)
            try:
                call, dispatcher = self.line_for(self.next_model(ticket.call, error))
            except NoWorker:
                break
            ticket.decide("falls back", model=call.model, outcome=outcome_of(error))
            ticket.ask_another(call)
            try:
                return await self.at_worker(ticket, dispatcher, out)
            except ServiceError as next_error:
                error = next_error
        raise error

    def next_model(self, call: Call, error: ServiceError) -> Call:
        """The call, addressed to its next fallback."""
        following = self.names.next(call)
        self.telemetry.fell_back(call, following.model, outcome_of(error))
        return following

    def learn(self, ticket: Ticket) -> None:
        """The engine reported the length of the prompt: improves the tenant's next estimate."""
        if ticket.prompt_tokens < LEARN_FROM_TOKENS:
            return
        tenant = ticket.call.tenant.name
        ratio = self.bytes_per_token.get(tenant, BYTES_PER_TOKEN)
        seen = ratio * ticket.call.prompt_tokens / ticket.prompt_tokens
        self.bytes_per_token[tenant] = min(16.0, max(0.5, ratio + LEARN_SHARE * (seen - ratio)))

    def ticket(self, call: Call) -> Ticket:
        """A call's record, with the job as the scheduler sees it."""
        self._count += 1
        job = Job(
            id=f"{self._count}",
            tenant=call.tenant.name,
            prompt_tokens=call.prompt_tokens,
            arrived_at=self.clock(),
            max_tokens=call.max_tokens,
            weight=call.tenant.weight,
            kind=call.kind,
            tier=call.tier,
        )
        return Ticket(call, job, self.clock)

    def refused(self, path: str, error: ServiceError) -> None:
        """A request ended before it became a call."""
        self.telemetry.refused(path, outcome_of(error))


def _job_outcome(ticket: Ticket) -> Outcome:
    """How a call ended, as the scheduler sees it."""
    match ticket.phase:
        case Phase.DONE:
            return Outcome.LENGTH if ticket.tokens == ticket.call.max_tokens else Outcome.DONE
        case Phase.CANCELLED:
            return Outcome.ABORTED
    return Outcome.FAILED


def forget_way(error: ServiceError) -> None:
    """Drops an error's traceback. A frame that holds the error in a variable is in turn held by it, and with it the
    request and its connection, until the garbage collector runs, which is rare here."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
