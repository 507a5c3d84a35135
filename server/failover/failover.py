"""When a worker fails in the middle of an answer: another one is asked, and the client is told nothing of it.

Before the first byte the request is asked again as it was. In a stream the other worker goes on from what the client
has. Never two at a time: a leg's connection is closed before the next one begins.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.admission.dispatch import Dispatcher
from server.engine.answers import Usage
from server.failover.resume import (
    CannotResume,
    Continuation,
    Resumed,
    clean_length,
    closing,
    continuation,
    ends_within,
    fit_to_resume,
    has_said_nothing,
    kept_of,
    restart,
    stop_texts,
)
from server.failover.typed_answers import AnswerEnd
from server.failover.typed_resume import (
    BegunAnew,
    Continued,
    Retold,
    answer_so_far,
    closing_of,
    continuation_at,
    fit_to_continue,
)
from server.fleet.fleet import Member, RunningAnswer
from server.relay.engine_body import EngineBody
from server.relay.relay import ClientAnswer, Pipe, Relay, answered
from server.request.call import Ticket
from server.request.errors import ServiceError, is_engine_failure, is_same_refusal, may_be_the_request, outcome_of
from server.request.schemas import COMPLETIONS
from server.request.transcript import Chunk, TranscriptProgress, progress_of

log = logging.getLogger("evenhand.failover")

MOST_LOOKS = 32  # at how many lengths the text of token ids is compared with what the client has


class Failover(Collector):
    """Brings an answer to its end at other workers.

    attempts: workers asked for one request, the first one too. moved: told of each request that has a place at another.
    """

    def __init__(
        self, relay: Relay, steering: EngineBody, attempts: int, moved: Sequence[Callable[[Ticket], None]] = ()
    ) -> None:
        self.relay = relay
        self.told_of_moves = moved
        self.steering = steering
        self.attempts = attempts
        self.outcomes: Counter[str] = Counter()

    def collect(self) -> Iterator[Metric]:
        failovers = CounterMetricFamily(
            "evenhand_failovers", "Answers that another worker had to take over.", labels=("outcome",)
        )
        for outcome in ("retried", "resumed", "failed", "blamed"):
            failovers.add_metric((outcome,), self.outcomes[outcome])
        yield failovers

    def can_move(self, leg: RunningAnswer) -> bool:
        """Whether another worker could go on with an answer."""
        if not isinstance(leg, Pipe) or not leg.out.begun:
            return isinstance(leg, Pipe)
        call = leg.ticket.call
        try:
            if call.route.tells_ids:
                fit_to_resume(call, _progress(leg.ticket))
            else:
                fit_to_continue(call, answer_so_far(leg.ticket))
        except CannotResume:
            return False
        return True

    async def go_on(self, ticket: Ticket, line: Dispatcher, out: ClientAnswer, error: ServiceError) -> None:
        """Returns when the client has the whole answer. Raises what went wrong last if it cannot be had.

        A failure is a worker's once another worker has answered the call. Where a second one fails in the same way and
        both are well, the call is to blame: nobody else is asked, and its tenant pays for the attempts.
        """
        fleet, call = line.fleet, ticket.call
        tried: list[Member] = []
        before: ServiceError | None = None  # what the latest worker to fail said
        while is_engine_failure(error) and ticket.member is not None:
            fleet.suspect(ticket.member, error)
            ticket.failed_at(ticket.member.worker.id, outcome_of(error))
            tried.append(ticket.member)
            if before is not None and is_same_refusal(before, error) and await fleet.are_well(tried):
                ticket.at_fault += len(tried)
                self.outcomes["blamed"] += 1
                raise _numbered(ticket, error)
            before = error
            if len(tried) == self.attempts:
                break
            try:
                await self._another(ticket, line, out, error)
            except ServiceError as next_error:
                error = next_error
            else:
                fleet.failed(tried, call.id, call.tenant.name, proven=True)
                return
        if is_engine_failure(error) or isinstance(error, Unresumable):
            fleet.failed(tried, call.id, call.tenant.name, proven=False)
            self.outcomes["failed"] += 1
            if may_be_the_request(before or error) and await fleet.are_well(tried):
                ticket.at_fault += len(tried)
        raise _numbered(ticket, error)

    async def _another(self, ticket: Ticket, line: Dispatcher, out: ClientAnswer, error: ServiceError) -> None:
        if not out.begun:
            if ticket.received is not None:
                ticket.received.begin_leg(None)
            member = await self._moved(ticket, line, error)
            await self.relay.pump(ticket, member, line.charge, out)
            self.outcomes["retried"] += 1
            return
        go_on = self._resume if ticket.call.route.tells_ids else self._continue
        try:
            await go_on(ticket, line, out, error)
        except CannotResume as why:
            log.info("request %s cannot continue at another worker: %s", ticket.call.id, why)
            raise Unresumable(error.message) from None
        self.outcomes["resumed"] += 1

    async def _moved(self, ticket: Ticket, line: Dispatcher, error: ServiceError) -> Member:
        member = await line.take_another(ticket, error)
        if line.adapters is not None and ticket.call.model != line.model:
            member = await line.fit(ticket)
        for told in self.told_of_moves:
            told(ticket)
        return member

    async def _resume(self, ticket: Ticket, line: Dispatcher, out: ClientAnswer, error: ServiceError) -> None:
        """The rest of a stream of chat or completions, by its token ids."""
        progress = _progress(ticket)
        if progress.finish is not None and ticket.call.sequences == 1:
            _end(out, closing(ticket.call, progress))
            return
        again = has_said_nothing(progress)
        if not again:
            fit_to_resume(ticket.call, progress)
        member = await self._moved(ticket, line, error)
        plan = restart(ticket.call, progress) if again else await _plan(ticket, progress, member)
        assert ticket.received is not None  # else there is no progress
        ticket.received.begin_leg(plan.kept)
        body = self.steering.dressed(ticket, member.worker, plan.body)
        rest = Resumed(ticket, out, self.relay.itl_of(ticket), line.charge, plan)
        await answered(rest, ticket, member, plan.path, body)

    async def _continue(self, ticket: Ticket, line: Dispatcher, out: ClientAnswer, error: ServiceError) -> None:
        """The rest of a stream of /v1/responses or /v1/messages, by its text."""
        call, itl = ticket.call, self.relay.itl_of(ticket)
        answer = answer_so_far(ticket)
        if answer.finish_told:
            _end(out, b"" if answer.ended else answer.closing(AnswerEnd(False, None, Usage(None, None, None))))
            return
        fit_to_continue(call, answer)
        member = await self._moved(ticket, line, error)
        if not answer.announced:
            body = self.steering.dressed(ticket, member.worker, call.body)
            anew = Retold(ticket, out, itl, line.charge, BegunAnew(call.route.dialect, answer))
            await answered(anew, ticket, member, call.route.path.encode(), body)
            return
        plan = await continuation_at(member, call, answer)
        if not plan.body:
            _end(out, closing_of(call, answer, plan))
            return
        body = self.steering.dressed(ticket, member.worker, plan.body)
        rest = Retold(ticket, out, itl, line.charge, Continued(ticket, answer, plan))
        await answered(rest, ticket, member, COMPLETIONS.path.encode(), body)


class Unresumable(ServiceError):
    """A stream that has begun and that no other worker can continue: it ends with this error."""

    status = 502
    code = "engine_gone"


def _numbered(ticket: Ticket, error: ServiceError) -> ServiceError:
    """The error with its number among the events that the client of /v1/responses has."""
    if ticket.call.route.dialect == "responses":
        with contextlib.suppress(CannotResume):
            error.number = answer_so_far(ticket).next_number
    return error


def _progress(ticket: Ticket) -> TranscriptProgress:
    try:
        return progress_of(kept_of(ticket))
    except ValueError as error:
        raise CannotResume(str(error)) from None


def _end(out: ClientAnswer, last: bytes) -> None:
    """All tokens are there: the events that close the stream are ours to write."""
    if last:
        out.write(last)
    out.end()


async def _plan(ticket: Ticket, progress: TranscriptProgress, member: Member) -> Continuation:
    """What `member` is asked. The text of the token ids that are built upon must be text that the client has, and must
    not end within a stop text: an engine finds one only if it makes the whole of it."""
    stops = stop_texts(ticket.call)
    length = clean_length(progress.chunks, stops=bool(stops))
    if length is not None:
        chunks = progress.chunks[:length]
        return continuation(ticket.call, progress, _ids(chunks), "".join(chunk.text for chunk in chunks))
    ids = _ids(progress.chunks)
    for end in range(len(ids), max(-1, len(ids) - MOST_LOOKS), -1):
        text = await _text_of(member, ticket.call.model, ids[:end])
        if progress.told.startswith(text) and not ends_within(text, stops):
            return continuation(ticket.call, progress, ids[:end], text)
    raise CannotResume("its text does not match its token ids")


def _ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.ids or ()]


async def _text_of(member: Member, model: str, ids: list[int]) -> str:
    if not ids:
        return ""
    answer = await member.engine.post("/detokenize", {"model": model, "tokens": ids})
    try:
        return str(answer.json()["prompt"])
    except (ValueError, KeyError, TypeError):
        raise CannotResume("the other worker does not say what text token ids have") from None
