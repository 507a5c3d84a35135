"""Who goes next, and where to: the waiting line in policy order, until a worker has room."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from math import exp2, log
from typing import NamedTuple

from scheduler.jobs import Job, Outcome
from scheduler.placement import Aggregated, Candidate, Disaggregated, Rules, place
from scheduler.routing import Affinity, RouteOption, beginnings, best, score
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker
from server.admission.live_names import LiveNames
from server.admission.reservations import Reservations
from server.fleet.fleet import Fleet, Member
from server.fleet.split import Split
from server.request.call import Call, Phase, Ticket
from server.request.errors import BadRequest, NoWorker, Overloaded, ServiceError, UnknownModel
from server.request.schemas import MAX_SEQUENCES

RATE_MEMORY_S = 20.0
FORGET_EVERY_S = 0.05  # nothing fades in so short a time
LONGEST_RETRY_S = 600.0
TYPICAL_TOKENS_PER_S = 10.0  # of one sequence, before any request was seen
TYPICAL_PROMPT_TOKENS = TYPICAL_OUTPUT_TOKENS = 256.0  # before any request was seen
LEARN_SHARE = 0.05
_COMPLETE = (Outcome.DONE, Outcome.LENGTH)
UNKNOWN_RETRY_S = 5.0  # before any place has come free
PROMISED_SHARE = 0.8  # of the places that come free: the line must not grow when they come slower than lately
MOST_TOLD = 16  # workers that a trace of one request tells of
TIMES_LEFT = 4  # of the places that are left in line, one tenant may have so many times as many where tenants share


class Pace:
    """How many slots come free per second, averaged over the last `RATE_MEMORY_S` or so."""

    __slots__ = ("count", "at", "since")

    def __init__(self, now: float) -> None:
        self.count = 0.0
        self.at = now
        self.since = now

    def _decay(self, now: float) -> None:
        self.count *= exp2((self.at - now) / RATE_MEMORY_S)
        self.at = now

    def freed(self, now: float) -> None:
        if now - self.at > FORGET_EVERY_S:
            self._decay(now)
        self.count += 1.0

    def per_s(self, now: float) -> float:
        self._decay(now)
        seen = 1.0 - exp2(-max(1.0, now - self.since) / RATE_MEMORY_S)  # a young average has seen only part of it
        return self.count * log(2.0) / (RATE_MEMORY_S * seen)


class Sizes:
    """How large requests are, averaged over the last ones."""

    __slots__ = ("prompt_tokens", "output_tokens", "tokens_per_s")

    def __init__(self) -> None:
        self.tokens_per_s = TYPICAL_TOKENS_PER_S
        self.prompt_tokens = TYPICAL_PROMPT_TOKENS
        self.output_tokens = TYPICAL_OUTPUT_TOKENS

    def learn(self, ticket: Ticket, now: float) -> None:
        """A call is complete."""
        output_tokens = ticket.tokens / ticket.call.sequences
        began = ticket.times[Phase.PREFILLING]
        if output_tokens and began is not None and now > began:
            self.tokens_per_s += LEARN_SHARE * (output_tokens / (now - began) - self.tokens_per_s)
        self.prompt_tokens += LEARN_SHARE * (ticket.prompt_tokens - self.prompt_tokens)
        self.output_tokens += LEARN_SHARE * (output_tokens - self.output_tokens)

    def made_unseen(self, ticket: Ticket, now: float) -> int:
        """Output tokens that an engine has made for a client that left before it was sent them: of an answer in one
        piece, or of reasoning that it does not show. An estimate from how fast answers come lately."""
        call, began = ticket.call, ticket.times[Phase.PREFILLING]
        if began is None or not call.route.makes_tokens or (call.stream and not call.hides_tokens):
            return 0
        made = (now - began) * self.tokens_per_s
        return max(0, round(min(made, call.max_tokens or made) * call.sequences) - ticket.tokens)

    @property
    def typical_tokens(self) -> float:
        """Of one request, prompt and answer."""
        return self.prompt_tokens + self.output_tokens

    def expected_tokens(self, call: Call) -> int:
        """What a call will have a worker compute: few answers are as long as they may be."""
        output_tokens = min(call.max_tokens or self.output_tokens, self.output_tokens)
        return call.prompt_tokens + round(output_tokens * call.sequences)


class Dispatcher:
    """One model's line and the workers that serve it.

    lanes: the policy's line. window: how many sequences a worker is given at a time. max_waiting: requests beyond which
    newcomers are refused. queue_timeout_s: how long anybody waits, None for ever. rules: when prompts are read apart.
    max_sequences: answers that one request may ask for.
    placed: requests by how they were placed ("apart", or why not), where there are prefill or decode workers.
    """

    def __init__(
        self,
        model: str,
        lanes: TieredLanes,
        fleet: Fleet,
        *,
        window: Callable[[Worker], int],
        max_waiting: int,
        queue_timeout_s: float | None,
        clock: Callable[[], float],
        rules: Rules = Rules(),  # noqa: B008 - frozen
    ) -> None:
        self.model = model
        self.lanes = lanes
        self.fleet = fleet
        self.window = window
        self.max_waiting = max_waiting
        self.queue_timeout_s = queue_timeout_s
        self.clock = clock
        self.rules = rules
        self.max_sequences = MAX_SEQUENCES
        self.placed: Counter[str] = Counter()
        self.pace = Pace(clock())
        self.promises = Reservations(max_waiting)
        self.charge: list[Ticket] = []
        self.affinity = Affinity()
        self.sizes = Sizes()
        self._waiters: dict[Job, tuple[asyncio.Future[Member], Ticket]] = {}
        self._waiting_of: Counter[str] = Counter()

    async def take(self, ticket: Ticket) -> Member:
        """Waits for a place, which the ticket holds until `give_back`. Overloaded if the line is full or the wait too
        long, NoWorker if nobody serves."""
        now = self.clock()
        self._bound_width(ticket.call)
        ready = self.fleet.ready(self.model)
        if not ready:
            raise NoWorker(
                f"No worker serves '{ticket.call.asked or self.model}' right now.", retry_after_s=self.fleet.probe_s * 5
            )
        if not ticket.call.route.generates:
            return self._aside(ticket, ready)
        if not len(self.lanes) and (room := self._room(ticket, ready)) is not None:
            if self.charge:
                self.settle(now)
            self.lanes.admit(ticket.job, now)
            return self._occupy(room, ticket)
        tenant = ticket.call.tenant.name
        if not self.promises.redeem(tenant, now) and self._is_full_for(tenant, now):
            pace = self.pace.per_s(now)
            retry_s = self.promises.make(tenant, PROMISED_SHARE * pace, now) if pace > 0 else UNKNOWN_RETRY_S
            waiting = f"{len(self.lanes)} requests already wait for '{ticket.call.asked or self.model}'"
            raise Overloaded(f"{waiting}.", retry_after_s=min(LONGEST_RETRY_S, max(1.0, retry_s)))
        return await self._wait(ticket, now)

    def _bound_width(self, call: Call) -> None:
        """BadRequest for more sequences than one request may have: those behind it wait until it is over. Where no
        tokens are made each is one step of the engine, and there may be as many as a body can list."""
        if call.sequences > self.max_sequences and call.route.makes_tokens:
            raise BadRequest(
                f"This request asks for {call.sequences} answers (prompts times 'n'), and {self.max_sequences} are "
                "allowed: send it in parts.",
                param=call.route.content_field if call.route.prompts else "n",
                code="too_many_sequences",
            )

    def _is_full_for(self, tenant: str, now: float) -> bool:
        """Whether the line has no room for one more request of this tenant.

        Places that are kept for others count. Where tenants share, one that fills the line leaves room for the rest: it
        may have so many times what is left, and no more (Choudhury and Hahne's dynamic threshold).
        """
        left = self.max_waiting - len(self.lanes) - self.promises.due(now)
        if left <= 0:
            return True
        return self.lanes.policy.shares is not None and self._waiting_of[tenant] >= TIMES_LEFT * left

    async def take_another(self, ticket: Ticket, error: ServiceError) -> Member:
        """A place at another worker than the one that failed, whose own is given back. The job goes first in its lane
        and is not charged again. Raises `error` if no other worker is ready."""
        failed, ticket.member = ticket.member, None
        assert failed is not None  # whoever has no place cannot change it
        now = self.clock()
        ready = [member for member in self.fleet.ready(self.model) if member is not failed]
        if not ticket.call.route.generates:
            if not ready:
                raise error
            return self._aside(ticket, ready)
        self._vacate(failed, ticket)
        ticket.split = None
        self.settle(now)
        if not ready:
            self.lanes.finish(ticket.job, Outcome.FAILED, now)
            self.advance()
            raise error
        ticket.avoid = failed.worker.id
        self.lanes.preempt(ticket.job, now)
        return await self._wait_in_line(ticket)

    def _aside(self, ticket: Ticket, ready: list[Member]) -> Member:
        """A request that needs no place in a batch: nobody waits for it, and it waits for nobody."""
        member = min(ready, key=lambda member: member.in_flight)
        ticket.member, ticket.worker = member, member.worker.id
        return member

    async def _wait(self, ticket: Ticket, now: float) -> Member:
        ticket.ahead = len(self.lanes)
        if ticket.decisions is not None:
            ticket.decide("waits", ahead=ticket.ahead, workers=self._standings(ticket))
        self.lanes.push(ticket.job, now)
        return await self._wait_in_line(ticket)

    async def _wait_in_line(self, ticket: Ticket) -> Member:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Member] = loop.create_future()
        tenant = ticket.call.tenant.name
        self._waiters[ticket.job] = (future, ticket)
        self._waiting_of[tenant] += 1
        patience = self._patience_s(ticket)
        timer = None if patience is None else loop.call_later(patience, self._expire, ticket)
        try:
            self.advance()
            return await future
        except asyncio.CancelledError:
            if ticket.member is not None:
                self.give_back(ticket, Outcome.ABORTED)  # got its place in the moment it left
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._waiting_of[tenant] -= 1
            if not self._waiting_of[tenant]:
                del self._waiting_of[tenant]
            if self._waiters.pop(ticket.job, None) is not None:
                self.lanes.finish(ticket.job, Outcome.ABORTED, self.clock())
                self.advance()  # who stood behind it may fit where it did not

    def _patience_s(self, ticket: Ticket) -> float | None:
        """How much longer a call waits, None for ever. Its client's deadline counts from its arrival, and no more once
        its answer has begun."""
        limits = [] if self.queue_timeout_s is None else [self.queue_timeout_s]
        if ticket.call.deadline_s is not None and ticket.times[Phase.DECODING] is None:
            limits.append(max(0.0, ticket.job.arrived_at + ticket.call.deadline_s - self.clock()))
        return min(limits, default=None)

    def _expire(self, ticket: Ticket) -> None:
        future, _ = self._waiters.get(ticket.job, (None, ticket))
        if future is not None and not future.done():  # else it was let in within this very turn of the loop
            waited = self.clock() - ticket.job.arrived_at
            error: ServiceError = Overloaded(
                f"No place came free within {waited:.0f} s.", retry_after_s=self.retry_after_s(ticket.call.tenant.name)
            )
            if not self.fleet.ready(self.model):
                error = NoWorker(
                    f"No worker served '{ticket.call.asked or self.model}' within {waited:.0f} s.", retry_after_s=5.0
                )
            future.set_exception(error)

    def advance(self) -> None:
        """Lets in whom the policy names, as long as a worker has room. The first who does not fit stops it: nobody is
        skipped, or the policies' bounds would not hold."""
        if not len(self.lanes):
            return
        now = self.clock()
        self.settle(now)
        while (job := self.lanes.peek(now)) is not None:
            future, ticket = self._waiters[job]
            if future.done():  # it has just left or expired; its own `finally` will come, but its turn is now
                self._forget(job, now)
                continue
            room = self._room(ticket, self.fleet.ready(self.model))
            if room is None:
                return
            self.lanes.pop(now)
            del self._waiters[job]
            future.set_result(self._occupy(room, ticket))

    def _standings(self, ticket: Ticket) -> list[dict[str, object]]:
        """The workers of this line as this request sees them, for an operator who asks."""
        call = ticket.call
        known = self.affinity.known(beginnings(call.body, call.route.content_field, call.prompt_tokens))
        return [
            {
                "worker": member.worker.id,
                "in_flight": member.in_flight,
                "free": max(0, self._free(member)),
                "pending_tokens": member.pending_tokens,
                "others": member.others,
                "kv_usage": round(member.kv_usage, 3),
                "cached_tokens": known.get(member.worker.id, 0),
            }
            for member in self.fleet.ready(self.model)[:MOST_TOLD]
        ]

    def _forget(self, job: Job, now: float) -> None:
        del self._waiters[job]
        self.lanes.finish(job, Outcome.ABORTED, now)

    def _room(self, ticket: Ticket, ready: list[Member]) -> "Room | None":
        """Where a request fits: one worker that has room, or two where prompts are read apart."""
        if ticket.avoid:
            ready = [member for member in ready if member.worker.id != ticket.avoid] or ready
        if len(ready) == 1 and ready[0].role is Role.BOTH:  # nothing to choose
            return Room(ready[0]) if self._free(ready[0]) > 0 else None
        call = ticket.call
        free = [self._free(member) for member in ready]
        most = max(free)
        if most <= 0:
            return None
        needed = min(call.sequences, most)
        roomy = [member for member, places in zip(ready, free, strict=True) if places >= needed]
        prompt = beginnings(call.body, call.route.content_field, call.prompt_tokens)
        known = self.affinity.known(prompt)
        if any(member.role is not Role.BOTH for member in ready):
            room = self._room_in_pools(ticket, ready, roomy, known)
        else:
            options = [_option(member, known) for member in roomy]
            room = Room(roomy[best(options, self.sizes.typical_tokens)])
        if room is not None:
            for member in room.readers:
                self.affinity.note(prompt, member.worker.id)
        return room

    def _free(self, member: Member) -> int:
        """How many more sequences a worker is given. A request of several needs one free place: where it waited for as
        many as it has, places would stand empty meanwhile, and all behind it would wait as well. The engine begins what
        exceeds its batch when it can, and until that is over nobody else is let in.

        What other gateways have at the worker takes room from this one, but for its own share of the window. Without
        that each would fill the engine by itself, and a tenant would be served by how many gateways know it.
        """
        window = self.window(member.worker)
        free = window - member.in_flight
        if member.others and (replicas := self.fleet.replicas()) > 1:
            free -= min(member.others, window * (replicas - 1) // replicas)
        return free

    def _room_in_pools(
        self, ticket: Ticket, ready: list[Member], roomy: list[Member], known: Mapping[str, int]
    ) -> "Room | None":
        call, typical_tokens = ticket.call, self.sizes.typical_tokens
        places = [
            Candidate(
                member.worker,
                member.role,
                member in roomy,
                score(_option(member, known), typical_tokens),
                member.pending_tokens,
                member.arriving_tokens,
                known.get(member.worker.id, 0),
                member.kv_usage,
            )
            for member in ready
        ]
        splittable = call.route.handover and call.sequences == 1 and not call.steers_kv and not ticket.avoid
        members = {member.worker.id: member for member in ready}
        match place(call.prompt_tokens, places, self.rules, splittable=splittable):
            case Disaggregated(prefill, decode):
                return Room(members[decode.id], members[prefill.id], "apart")
            case Aggregated(worker, why):
                return Room(members[worker.id], placed=why.value)
        return None

    def _occupy(self, room: "Room", ticket: Ticket) -> Member:
        """The request holds its place; returns the worker that answers it."""
        member = room.member
        if room.prefill is not None:
            ticket.split = Split(room.prefill, member, ticket.call.prompt_tokens, self.advance)
        if room.placed:
            self.placed[room.placed] += 1
            ticket.placed = room.placed
        if ticket.decisions is not None:
            reader = {} if room.prefill is None else {"prefill_worker": room.prefill.worker.id}
            ticket.decide(
                "placed", worker=member.worker.id, **reader, how=room.placed or None, workers=self._standings(ticket)
            )
        member.in_flight += ticket.call.sequences
        read_elsewhere = 0 if ticket.split is None else ticket.split.prompt_tokens
        ticket.pending_tokens = self.sizes.expected_tokens(ticket.call) - read_elsewhere
        member.pending_tokens += ticket.pending_tokens
        ticket.member, ticket.worker = member, member.worker.id
        return member

    @staticmethod
    def _vacate(member: Member, ticket: Ticket) -> None:
        if ticket.split is not None:
            ticket.split.over()
        member.in_flight -= ticket.call.sequences
        member.pending_tokens -= ticket.pending_tokens
        ticket.pending_tokens = 0

    def give_back(self, ticket: Ticket, outcome: Outcome) -> None:
        """A call that holds a place is over: its place is the next one's."""
        member, ticket.member = ticket.member, None
        assert member is not None
        if outcome in _COMPLETE:
            self.fleet.did_well(member, ticket.call.tenant.name)
        if not ticket.call.route.generates:
            return
        now = self.clock()
        self._vacate(member, ticket)
        self.settle(now)
        if outcome is Outcome.ABORTED:
            ticket.tokens += self.sizes.made_unseen(ticket, now)
        self._tell_prompt(ticket, now)
        missing = ticket.tokens - ticket.job.output_tokens
        if missing:  # tokens that were not seen one by one; less than none where an estimate was too high
            self.lanes.serve(ticket.job, missing, now)
        self.lanes.finish(ticket.job, outcome, now)
        if outcome in _COMPLETE:
            self.sizes.learn(ticket, now)
        self.pace.freed(now)
        self.advance()

    def settle(self, now: float) -> None:
        """Charges what streamed since the last decision. Exact whenever somebody must choose, and free between."""
        for ticket in self.charge:
            if ticket.exact and not ticket.told:
                self._tell_prompt(ticket, now)
            self.lanes.serve(ticket.job, ticket.uncharged, now)
            ticket.uncharged = 0
        self.charge.clear()

    def _tell_prompt(self, ticket: Ticket, now: float) -> None:
        """Corrects what the policy charged for the prompt, once the engine has told how long it is and what of it was
        in its cache."""
        if ticket.exact:
            ticket.told = True
            self.lanes.computed(ticket.job, ticket.cached_tokens, now, prompt_tokens=ticket.prompt_tokens)

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many requests of each tenant wait."""
        return dict(self._waiting_of)

    def retry_after_s(self, tenant: str) -> float:
        """Seconds until one more request of this tenant would find a place: those ahead of it over the line's pace.

        Ahead are all that wait, or, where tenants share, only as many rounds as it has waiting.
        """
        ahead = float(len(self.lanes)) + 1.0
        if self.lanes.policy.shares is not None:
            rounds = self._waiting_of[tenant] + 1
            ahead = min(ahead, float(rounds * max(1, len(self._waiting_of))))
        pace = self.pace.per_s(self.clock())
        return min(LONGEST_RETRY_S, max(1.0, ahead / pace)) if pace > 0 else UNKNOWN_RETRY_S


class Room(NamedTuple):
    """Where a request fits. prefill: who reads its prompt if not `member`. placed: its name in metrics, if any."""

    member: Member
    prefill: Member | None = None
    placed: str = ""

    @property
    def readers(self) -> tuple[Member, ...]:
        """Who will have the prompt's KV."""
        return (self.member,) if self.prefill is None else (self.member, self.prefill)


def _option(member: Member, known: Mapping[str, int]) -> RouteOption:
    worker = member.worker
    return RouteOption(worker.slots, member.pending_tokens, member.others, member.kv_usage, known.get(worker.id, 0))


class Lines:
    """A dispatcher for each served model; all under one policy. names: what clients may ask for."""

    def __init__(self, build: Callable[[str], Dispatcher], fleet: Fleet, names: LiveNames | None = None) -> None:
        self._build = build
        self.names = names or LiveNames({}, fleet)
        self.fleet = fleet
        self.by_model: dict[str, Dispatcher] = {}
        fleet.changed.append(self.advance)

    def of(self, model: str) -> Dispatcher:
        """The line for a model. UnknownModel if a fleet that is up does not serve it, NoWorker if nothing is up."""
        dispatcher = self.by_model.get(model)
        if dispatcher is None:
            served = [str(entry["id"]) for entry in self.fleet.models()]
            if not served:
                raise NoWorker("No worker is ready yet.", retry_after_s=5.0)
            if model not in served:
                raise UnknownModel(
                    f"The model '{model[:100]}' is not served here; there is {', '.join(served)}.", param="model"
                )
            dispatcher = self.by_model[model] = self._build(model)
        return dispatcher

    def advance(self) -> None:
        """A worker has come or gone: every line looks again."""
        for dispatcher in self.by_model.values():
            dispatcher.advance()

    def present(self) -> tuple[list[Job], Counter[str]]:
        """Requests that run, and how many wait by tenant, of all models."""
        running: list[Job] = []
        waiting: Counter[str] = Counter()
        for dispatcher in self.by_model.values():
            running += dispatcher.lanes.running_jobs()
            waiting.update(dispatcher.waiting_by_tenant())
        return running, waiting

    def depth(self) -> list[tuple[str, int]]:
        """(model, waiting) for metrics."""
        return [(model, len(dispatcher.lanes)) for model, dispatcher in self.by_model.items()]

    def placed(self) -> list[tuple[str, int]]:
        """(how, count) for metrics."""
        total: Counter[str] = Counter()
        for dispatcher in self.by_model.values():
            total.update(dispatcher.placed)
        return list(total.items())
