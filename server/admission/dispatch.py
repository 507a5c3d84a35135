"""The queue of each model: requests wait in policy order until a worker has room."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import exp2, inf, log
from typing import NamedTuple

from scheduler.hybrid import Visit
from scheduler.jobs import Job, Outcome, Tier
from scheduler.pacing import FirstToken, Pacing
from scheduler.placement import Aggregated, Disaggregated, Rules, place
from scheduler.pools import Pool, WorkerLoad
from scheduler.routing import LEARN_SHARE, Affinity, Choice, TypicalRequest, beginnings, cheapest_of_all
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker
from server.admission.live_adapters import AdapterUnavailable, LiveAdapters
from server.admission.live_names import LiveNames
from server.admission.predictor import Predictor
from server.admission.reservations import Reservations
from server.fleet.adapters import AdapterRefused
from server.fleet.fleet import Fleet, Member
from server.fleet.split import Split
from server.request.call import Call, Phase, Ticket
from server.request.errors import BadRequest, NoWorker, Overloaded, ServiceError, UnknownModel
from server.request.schemas import MAX_SEQUENCES
from server.settings import LoraSettings

RATE_MEMORY_S = 20.0
FORGET_EVERY_S = 0.05  # nothing fades in so short a time
LONGEST_RETRY_S = 600.0
TYPICAL_TOKENS_PER_S = 10.0  # of one sequence, before any request was seen
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
    """How large requests are and how fast answers come, averaged over the last ones."""

    __slots__ = ("tokens_per_s", "typical")

    def __init__(self) -> None:
        self.tokens_per_s = TYPICAL_TOKENS_PER_S
        self.typical = TypicalRequest()

    def learn(self, ticket: Ticket, now: float) -> None:
        """A call is complete."""
        output_tokens = ticket.tokens / ticket.call.sequences
        began = ticket.times[Phase.PREFILLING]
        if output_tokens and began is not None and now > began:
            self.tokens_per_s += LEARN_SHARE * (output_tokens / (now - began) - self.tokens_per_s)
        self.typical.learn(ticket.prompt_tokens, output_tokens)

    def made_unseen(self, ticket: Ticket, now: float) -> int:
        """Output tokens that an engine has made for a client that left before it was sent them: of an answer in one
        piece, or of reasoning that it does not show. An estimate from how fast answers come lately."""
        call, began = ticket.call, ticket.times[Phase.PREFILLING]
        if began is None or not call.route.makes_tokens or (call.stream and not call.hides_tokens):
            return 0
        made = (now - began) * self.tokens_per_s
        return max(0, round(min(made, call.max_tokens or made) * call.sequences) - ticket.tokens)

    def expected_tokens(self, call: Call) -> int:
        """What a call will have a worker compute: few answers are as long as they may be."""
        output_tokens = min(call.max_tokens or self.typical.output_tokens, self.typical.output_tokens)
        return call.prompt_tokens + round(output_tokens * call.sequences)


@dataclass(frozen=True, slots=True)
class FlexRules:
    """How flex requests are let in.

    timeout_s: how long one waits for a start. share: of the slots of a worker without our scheduler, which cannot
    displace a request that runs there. memory: of such a worker's KV cache, that flex requests may fill.
    """

    timeout_s: float = 600.0
    share: float = 0.25
    memory: float = 0.5

    def capacity(self, worker: Worker) -> int:
        """The most flex sequences that a worker is given."""
        return worker.slots if worker.plugin else max(1, round(self.share * worker.slots))

    def admits(self, load: WorkerLoad, tokens: int) -> bool:
        """Whether a worker is given one more, of so many tokens: only into a free slot, for a flex request waits
        cheapest in line; and one without our scheduler only if it leaves others memory."""
        free = load.worker.slots - load.in_flight - load.others
        if free <= 0 or load.flex >= self.capacity(load.worker):
            return False
        fills = load.flex_tokens + tokens > self.memory * load.kv_tokens
        return not fills or not load.flex or load.worker.plugin


class Dispatcher:
    """One model's line and the workers that serve it.

    lanes: the policy's line. max_waiting: requests beyond which newcomers are refused. queue_timeout_s: how long
    anybody waits, None for ever. rules: when prompts are read apart.
    max_sequences: answers that one request may ask for. flex: how requests of that tier are let in.
    predictor: places by prediction where workers hand prompts over; None: as `rules` say.
    placed: requests by how they were placed ("apart", or why not), where there are prefill or decode workers.
    adapters: set once somebody has asked for an adapter of this model.
    freed: called with the models of a worker that serves several when one of its places is free; lets their lines look.
    None: this is the only line.
    """

    def __init__(
        self,
        model: str,
        lanes: TieredLanes,
        fleet: Fleet,
        *,
        max_waiting: int,
        queue_timeout_s: float | None,
        clock: Callable[[], float],
        rules: Rules = Rules(),  # noqa: B008 - frozen
        freed: Callable[[str, Sequence[str]], None] | None = None,
    ) -> None:
        self.model = model
        self._freed = freed
        self.lanes = lanes
        self.fleet = fleet
        self.max_waiting = max_waiting
        self.queue_timeout_s = queue_timeout_s
        self.clock = clock
        self.rules = rules
        self.max_sequences = MAX_SEQUENCES
        self.wake: Callable[[str, str, float | None], Awaitable[None]] | None = None  # where models may sleep
        self.placed: Counter[str] = Counter()
        self.predictor: Predictor | None = None
        self.adapters: LiveAdapters | None = None
        self.flex = FlexRules()
        self.pace = Pace(clock())
        self.flex_pace = Pace(clock())  # at which flex requests start
        self.promises = Reservations(max_waiting)
        self.charge: list[Ticket] = []
        self.affinity = Affinity()
        self.sizes = Sizes()
        self._waiters: dict[Job, tuple[asyncio.Future[Member], Ticket]] = {}
        self._waiting_of: Counter[str] = Counter()
        self._looks_again: asyncio.Handle | None = None
        self._looks_at = inf  # by the loop's clock; uvloop's handles for less than half a millisecond do not tell

    async def take(self, ticket: Ticket) -> Member:
        """Waits for a place, which the ticket holds until `give_back`. Overloaded if the line is full or the wait too
        long, NoWorker if nobody serves."""
        now = self.clock()
        if ticket.call.sequences > self.max_sequences:
            self._bound_width(ticket.call)
        pools = self.fleet.pools.of_model.get(self.model)
        if pools is None:
            pools = await self._woken(ticket)
            now = self.clock()
        if not ticket.call.route.generates:
            return self._aside(ticket, pools)
        if not self.lanes.ahead(ticket.call.tier) and (room := self._room(ticket, pools)) is not None:
            if self.charge:
                self.settle(now)
            self.lanes.admit(ticket.job, now)
            return self._occupy(room, ticket)
        tenant = ticket.call.tenant.name
        if not self.promises.redeem(tenant, now) and self._is_full_for(ticket.call, now):
            pace = self._pace(ticket.call.tier).per_s(now)
            retry_s = self.promises.make(tenant, PROMISED_SHARE * pace, now) if pace > 0 else UNKNOWN_RETRY_S
            ahead, asked = self.lanes.ahead(ticket.call.tier), ticket.call.asked or self.model
            waiting = f"{ahead} requests are already waiting for '{asked}'"
            raise Overloaded(f"{waiting}.", retry_after_s=min(LONGEST_RETRY_S, max(1.0, retry_s)))
        return await self._wait(ticket, now)

    async def _woken(self, ticket: Ticket) -> tuple[Pool, ...]:
        """The workers of a model that sleeps, once they are awake. NoWorker if there are none."""
        asked = ticket.call.asked or self.model
        if self.wake is None:
            raise NoWorker(f"No worker serves '{asked}' right now.", retry_after_s=self.fleet.probe_s * 5)
        await self.wake(self.model, asked, self._patience_s(ticket))
        pools = self.fleet.pools.of_model.get(self.model)
        if pools is None:  # its worker has left again meanwhile
            raise NoWorker(f"No worker serves '{asked}' right now.", retry_after_s=self.fleet.probe_s * 5)
        return pools

    def _bound_width(self, call: Call) -> None:
        """BadRequest for more sequences than one request may have: those behind it wait until it is over. Where no
        tokens are made each is one step of the engine, and there may be as many as a body can list."""
        if call.route.makes_tokens:
            raise BadRequest(
                f"This request asks for {call.sequences} answers (prompts times 'n'); at most {self.max_sequences} are "
                "allowed: split the request.",
                param=call.route.content_field if call.route.prompts else "n",
                code="too_many_sequences",
            )

    def _is_full_for(self, call: Call, now: float) -> bool:
        """Whether the line has no room for one more such request.

        Those of lower tiers do not count, for they wait for as long as it takes; places that are kept for others do.
        Where tenants share, one that fills the line leaves room for the rest: it may have so many times what is left,
        and no more (Choudhury and Hahne's dynamic threshold).
        """
        left = self.max_waiting - self.lanes.ahead(call.tier) - self.promises.due(now)
        if left <= 0:
            return True
        return self.lanes.policy.shares is not None and self._waiting_of[call.tenant.name] >= TIMES_LEFT * left

    async def take_another(self, ticket: Ticket, error: ServiceError) -> Member:
        """A place at another worker than the one that failed, whose own is given back. The job goes first in its lane
        and is not charged again. Raises `error` if no other worker is ready."""
        failed, ticket.member = ticket.member, None
        assert failed is not None  # whoever has no place cannot change it
        now = self.clock()
        pools = self.fleet.pools.of(self.model)
        alone = sum(len(pool.workers) for pool in pools) == (failed.load.pool in pools)
        ticket.avoid = failed.worker.id
        if not ticket.call.route.generates:
            if alone:
                raise error
            return self._aside(ticket, pools)
        self._vacate(failed, ticket)
        ticket.split = None
        self.settle(now)
        if alone:
            self.lanes.finish(ticket.job, Outcome.FAILED, now)
            self._pass_on(failed.load)
            raise error
        self._pass_on(failed.load)
        self.lanes.preempt(ticket.job, now)
        return await self._wait_in_line(ticket)

    def _aside(self, ticket: Ticket, pools: Sequence[Pool]) -> Member:
        """A request that needs no slot in a batch: it does not queue, and does not delay others."""
        choice = Choice(pools, self.sizes.typical.tokens, avoid=ticket.avoid)
        load = choice.cheapest()
        if self.adapters is not None and ticket.call.model != self.model:
            load = self.adapters.room(ticket.call.model, choice, pools, ticket.avoid)
        if load is None:  # all are full, which does not keep it
            load = next(load for pool in pools for load in pool.workers.values() if load.worker.id != ticket.avoid)
        ticket.member, ticket.worker, ticket.line = self.fleet.members[load.worker.id], load.worker.id, self
        return ticket.member

    async def _wait(self, ticket: Ticket, now: float) -> Member:
        ticket.ahead = self.lanes.ahead(ticket.call.tier)
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

    def turn_away(self, error: ServiceError) -> None:
        """Ends the wait of everybody in this line, which is given up."""
        for future, _ in list(self._waiters.values()):
            if not future.done():
                future.set_exception(error)

    def _patience_s(self, ticket: Ticket) -> float | None:
        """How much longer a call waits, None for ever. Its client's deadline counts from its arrival, and no more once
        its answer has begun."""
        longest = self.flex.timeout_s if ticket.call.tier is Tier.FLEX else self.queue_timeout_s
        limits = [] if longest is None else [longest]
        if ticket.call.deadline_s is not None and ticket.times[Phase.DECODING] is None:
            limits.append(max(0.0, ticket.job.arrived_at + ticket.call.deadline_s - self.clock()))
        return min(limits, default=None)

    def _expire(self, ticket: Ticket) -> None:
        future, _ = self._waiters.get(ticket.job, (None, ticket))
        if future is not None and not future.done():  # else it was let in within this very turn of the loop
            waited = self.clock() - ticket.job.arrived_at
            error: ServiceError = Overloaded(
                f"No worker became free within {waited:.0f} s.",
                code="resource_unavailable" if ticket.call.tier is Tier.FLEX else None,
                retry_after_s=self.retry_after_s(ticket.call.tenant.name, ticket.call.tier),
            )
            if not self.fleet.pools.of(self.model):
                error = NoWorker(f"No worker served '{self.model}' within {waited:.0f} s.", retry_after_s=5.0)
            future.set_exception(error)

    def advance(self) -> None:
        """Admits requests in policy order while a worker has room. The first that does not fit stops it: skipping it
        would break the policies' bounds."""
        if not len(self.lanes):
            return
        now = self.clock()
        self.settle(now)
        while (job := self.lanes.peek(now)) is not None:
            future, ticket = self._waiters[job]
            if future.done():  # it has just left or expired; its own `finally` will come, but its turn is now
                self._forget(job, now)
                continue
            pools = self.fleet.pools.of(self.model)
            room = self._room(ticket, pools) if pools else None  # its last worker may have left, and another may come
            if room is None:
                return
            self.lanes.pop(now)
            del self._waiters[job]
            future.set_result(self._occupy(room, ticket))

    def _standings(self, ticket: Ticket) -> list[dict[str, object]]:
        """The workers of this line as this request sees them, for an operator who asks."""
        call = ticket.call
        known = self.affinity.known(beginnings(call.body, call.route.content_field, call.prompt_tokens))
        loads = (load for pool in self.fleet.pools.of(self.model) for load in pool.workers.values())
        return [
            {
                "worker": load.worker.id,
                "in_flight": load.in_flight,
                "free": max(0, load.free),
                "pending_tokens": load.pending_tokens,
                "others": load.others,
                "kv_usage": round(load.kv_usage, 3),
                "cached_tokens": known.get(load.worker.id, 0),
            }
            for load in islice(loads, MOST_TOLD)
        ]

    def _forget(self, job: Job, now: float) -> None:
        del self._waiters[job]
        self.lanes.finish(job, Outcome.ABORTED, now)

    def _room(self, ticket: Ticket, pools: Sequence[Pool]) -> "Room | None":
        """Where a request fits: one worker that has room, or two where prompts are read apart."""
        admits = None
        if ticket.job.tier is Tier.FLEX and not self.lanes.is_due(ticket.job):
            admits = partial(self._admits_flex, self.sizes.expected_tokens(ticket.call))
        if self.adapters is not None and ticket.call.model != self.model:
            return self._room_with_adapter(self.adapters, ticket, pools, admits)
        if len(pools) == len(pools[0].workers) == 1 and pools[0].role is Role.BOTH:  # nothing to choose
            only = pools[0].first()
            if only is None or (admits is not None and not admits(only)):
                return None
            return Room(self.fleet.members[only.worker.id])
        return self._room_of_several(ticket, pools, admits)

    def _admits_flex(self, tokens: int, load: WorkerLoad) -> bool:
        """Whether a worker is given one more flex request now. If it is only a matter of time, the line looks again."""
        if not self.flex.admits(load, tokens):
            return False
        if load.worker.plugin:
            return True  # its engine sees to the others
        if load.pacing is None:
            load.pacing = Pacing()
        wait_s = load.pacing.wait_s(self.clock(), alone=load.in_flight == load.flex)
        if 0.0 < wait_s < inf:
            self._look_within(wait_s)
        return wait_s <= 0.0

    def _look_within(self, wait_s: float) -> None:
        """The line looks again in so many seconds, or sooner if another worker is ready for flex before."""
        loop = asyncio.get_running_loop()
        at = loop.time() + wait_s
        if self._looks_again is not None:
            if self._looks_at <= at:
                return
            self._looks_again.cancel()
        self._looks_at, self._looks_again = at, loop.call_at(at, self._look_again)

    def _look_again(self) -> None:
        self._looks_again = None
        self.advance()

    def _room_of_several(
        self, ticket: Ticket, pools: Sequence[Pool], admits: Callable[[WorkerLoad], bool] | None
    ) -> "Room | None":
        whole, idlest = True, None
        for pool in pools:
            whole = whole and pool.role is Role.BOTH
            idlest = idlest or pool.first()
        if idlest is None:
            return None
        call = ticket.call
        prompt = beginnings(call.body, call.route.content_field, call.prompt_tokens)
        known = self.affinity.known(prompt)
        if self.predictor is not None and admits is None and (not whole or idlest.worker.hands_over):
            room = self._room_predicted(self.predictor, ticket, pools, known)
        elif whole and call.sequences == 1 and admits is None and not ticket.avoid:
            load = cheapest_of_all(pools, self.sizes.typical.tokens, known)
            room = None if load is None else Room(self.fleet.members[load.worker.id])
        else:
            choice = Choice(
                pools,
                self.sizes.typical.tokens,
                sequences=call.sequences,
                known=known,
                avoid=ticket.avoid,
                admits=admits,
            )
            room = self._room_whole(choice) if whole else self._room_in_pools(ticket, choice)
        if room is not None:
            for member in room.readers:
                self.affinity.note(prompt, member.worker.id)
        return room

    def _room_with_adapter(
        self,
        adapters: LiveAdapters,
        ticket: Ticket,
        pools: Sequence[Pool],
        admits: Callable[[WorkerLoad], bool] | None,
    ) -> "Room | None":
        """A worker that has the request's adapter, or loads it. Its prompt is not read apart, and what is cached of it
        belongs to the adapter."""
        call = ticket.call
        prompt = [
            (hash((key, call.model)), tokens)
            for key, tokens in beginnings(call.body, call.route.content_field, call.prompt_tokens)
        ]
        choice = Choice(
            pools,
            self.sizes.typical.tokens,
            sequences=call.sequences,
            known=self.affinity.known(prompt),
            avoid=ticket.avoid,
            admits=admits,
        )
        load = adapters.room(call.model, choice, pools, ticket.avoid)
        if load is None or (admits is not None and not admits(load)):
            return None
        self.affinity.note(prompt, load.worker.id)
        return Room(self.fleet.members[load.worker.id])

    async def fit(self, ticket: Ticket) -> Member:
        """The worker of a request that has a place, once it has the adapter that is asked for; another one if it does
        not load it. AdapterUnavailable if no worker does, EngineGone if this one went away."""
        adapters, name = self.adapters, ticket.call.model
        while True:
            member = ticket.member
            assert adapters is not None and member is not None  # it has a place, and asks for an adapter
            try:
                await adapters.ready(member, name)
                return member
            except AdapterRefused as error:
                ticket.failed_at(member.worker.id, AdapterUnavailable.code)
                why = adapters.unavailable(name)
                if adapters.refused_everywhere(name, self.fleet.pools.of(self.model)):
                    raise why from error
                await self.take_another(ticket, why)

    def _room_predicted(
        self, predictor: Predictor, ticket: Ticket, pools: Sequence[Pool], known: Mapping[str, int]
    ) -> "Room | None":
        visit = predictor.place(ticket, pools, known)
        if visit is None:
            return None
        members = self.fleet.members
        reader = members[visit.reader.worker.id] if visit.split else None
        return Room(members[visit.writer.worker.id], reader, "apart" if visit.split else "together", visit)

    def _room_whole(self, choice: Choice) -> "Room | None":
        load = choice.cheapest()
        return None if load is None else Room(self.fleet.members[load.worker.id])

    def _room_in_pools(self, ticket: Ticket, choice: Choice) -> "Room | None":
        call, members = ticket.call, self.fleet.members
        splittable = call.route.handover and call.sequences == 1 and not call.steers_kv and not ticket.avoid
        match place(call.prompt_tokens, choice, self.rules, splittable=splittable):
            case Disaggregated(prefill, decode):
                return Room(members[decode.worker.id], members[prefill.worker.id], "apart")
            case Aggregated(load, why):
                return Room(members[load.worker.id], placed=why.value)
        return None

    def _occupy(self, room: "Room", ticket: Ticket) -> Member:
        """The request holds its place; returns the worker that answers it."""
        member = room.member
        ticket.visit = room.visit
        if room.prefill is not None:
            wake = partial(self._pass_on, room.prefill.load)
            ticket.split = Split(room.prefill, member, ticket.call.prompt_tokens, wake)
        if room.placed:
            self.placed[room.placed] += 1
            ticket.placed = room.placed
        if ticket.decisions is not None:
            reader = {} if room.prefill is None else {"prefill_worker": room.prefill.worker.id}
            ticket.decide(
                "placed", worker=member.worker.id, **reader, how=room.placed or None, workers=self._standings(ticket)
            )
        read_elsewhere = 0 if ticket.split is None else ticket.split.prompt_tokens
        ticket.pending_tokens = self.sizes.expected_tokens(ticket.call) - read_elsewhere
        flex = ticket.job.tier is Tier.FLEX
        if flex:
            self.flex_pace.freed(self.clock())
        reads = member if room.prefill is None else room.prefill
        if reads.load.pacing is not None:
            self._pace_reading(reads.load, reads.load.pacing, ticket)
        member.load.reserve(ticket.call.sequences, ticket.pending_tokens, flex=flex)
        ticket.member, ticket.worker, ticket.line = member, member.worker.id, self
        if self.adapters is not None and ticket.call.model != self.model:
            member.site.hold(ticket.call.model)
        return member

    def _pace_reading(self, load: WorkerLoad, pacing: Pacing, ticket: Ticket) -> None:
        """Notes that a prompt is sent to a worker on which flex requests wait for a moment without any."""
        if ticket.job.tier is Tier.FLEX:
            pacing.started(ticket.call.prompt_tokens, self.clock())
        elif ticket.call.stream and ticket.times[Phase.DECODING] is None:
            ticket.first = FirstToken(pacing, ticket.call.prompt_tokens, self.clock, partial(self._pass_on, load))

    def _vacate(self, member: Member, ticket: Ticket) -> None:
        if ticket.first is not None:
            ticket.first.never()
            ticket.first = None
        if ticket.split is not None:
            ticket.split.over()
        if ticket.visit is not None:
            ticket.visit.over(self.clock(), ticket.last_at, ticket.tokens)
            ticket.visit = None
        load, flex = member.load, ticket.job.tier is Tier.FLEX
        load.release(ticket.call.sequences, ticket.pending_tokens, flex=flex)
        if flex and load.pacing is not None and ticket.split is None:  # a split prompt was paced at its prefill worker
            load.pacing.freed(alone=load.in_flight == load.flex)
        ticket.pending_tokens = 0
        if self.adapters is not None and ticket.call.model != self.model:
            member.site.release(ticket.call.model)

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
        if self.charge:
            self.settle(now)
        if outcome is Outcome.ABORTED:
            ticket.tokens += self.sizes.made_unseen(ticket, now)
        self.lanes.finish(
            ticket.job,
            outcome,
            now,
            # Tokens that were not seen one by one; less than none where an estimate was too high.
            tokens=ticket.tokens - ticket.job.output_tokens,
            prompt_tokens=ticket.prompt_tokens if ticket.exact else None,
            cached_tokens=ticket.cached_tokens,
        )
        if outcome in _COMPLETE:
            self.sizes.learn(ticket, now)
        self.pace.freed(now)
        self._pass_on(member.load)

    def _pass_on(self, load: WorkerLoad) -> None:
        """A worker has room again: for this line, and for those of the other models that it serves."""
        pool = load.pool
        if self._freed is not None and pool is not None and len(pool.models) > 1:
            self._freed(self.model, pool.models)
        elif len(self.lanes):
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
        ticket.told = True
        self.lanes.computed(ticket.job, ticket.cached_tokens, now, prompt_tokens=ticket.prompt_tokens)

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many requests of each tenant wait."""
        return dict(self._waiting_of)

    def _pace(self, tier: Tier) -> Pace:
        """How fast places come free for a tier."""
        return self.flex_pace if tier is Tier.FLEX else self.pace

    def retry_after_s(self, tenant: str, tier: Tier = Tier.DEFAULT) -> float:
        """Seconds until one more request of this tenant and tier would find a place: those ahead of it over the pace.

        Ahead are all that wait in its tier and above, or, where tenants share, only as many rounds as it has waiting.
        """
        ahead = float(self.lanes.ahead(tier)) + 1.0
        if self.lanes.policy.shares is not None and tier is not Tier.FLEX:
            rounds = self._waiting_of[tenant] + 1
            ahead = min(ahead, float(rounds * max(1, len(self._waiting_of))))
        pace = self._pace(tier).per_s(self.clock())
        return min(LONGEST_RETRY_S, max(1.0, ahead / pace)) if pace > 0 else UNKNOWN_RETRY_S


class Room(NamedTuple):
    """Where a request fits. prefill: who reads its prompt if not `member`. placed: its name in metrics, if any. visit:
    what the forecasts know of it."""

    member: Member
    prefill: Member | None = None
    placed: str = ""
    visit: Visit | None = None

    @property
    def readers(self) -> tuple[Member, ...]:
        """Who will have the prompt's KV."""
        return (self.member,) if self.prefill is None else (self.member, self.prefill)


class Lines:
    """A dispatcher for each served model; all under one policy. names: what clients may ask for."""

    def __init__(self, build: Callable[[str], Dispatcher], fleet: Fleet, names: LiveNames | None = None) -> None:
        self._build = build
        self.names = names or LiveNames({}, fleet, LiveAdapters({}, fleet, LoraSettings()))
        self.adapters = self.names.adapters
        self.fleet = fleet
        self.by_model: dict[str, Dispatcher] = {}
        fleet.changed.append(self.advance)
        self.adapters.changed.append(self._give_up)

    def _give_up(self) -> None:
        """What was a model of its own is an adapter now, and waits in its model's line."""
        for name in self.adapters.records:
            if (line := self.by_model.pop(name, None)) is not None:
                line.turn_away(NoWorker(f"'{name}' is now an adapter: retry the request.", retry_after_s=1.0))

    def of_call(self, call: Call) -> Dispatcher:
        """The line for a call: that of its model, or of the model of its adapter. UnknownModel, NoWorker."""
        adapter = self.adapters.records.get(call.model)
        if adapter is None:
            return self.of(call.model)
        if not call.asked and not adapter.visible_to(call.tenant.name):
            raise UnknownModel(f"The model '{call.model[:100]}' is not served here.", param="model")
        if not self.fleet.serves(adapter.model):
            raise NoWorker(f"No worker serves '{call.asked or call.model}' right now.", retry_after_s=5.0)
        line = self.of(adapter.model)
        line.adapters = self.adapters
        return line

    def of(self, model: str) -> Dispatcher:
        """The line for a model. UnknownModel if a fleet that is up does not serve it, NoWorker if nothing is up."""
        dispatcher = self.by_model.get(model)
        if dispatcher is None:
            served = [str(entry["id"]) for entry in self.fleet.models()]
            if not served:
                raise NoWorker("No worker is ready yet.", retry_after_s=5.0)
            if model not in served:
                raise UnknownModel(
                    f"The model '{model[:100]}' is not served here; available: {', '.join(served)}.", param="model"
                )
            dispatcher = self.by_model[model] = self._build(model)
        return dispatcher

    def freed(self, model: str, models: Sequence[str]) -> None:
        """A place of a worker that serves these models is free again, which a request for one of them had. Their lines
        look at it in turn, that one's last: so none takes what another waits for longer than one request runs."""
        at = 1 + models.index(model) if model in models else 0
        for name in (*models[at:], *models[:at]):
            if (line := self.by_model.get(name)) is not None:
                line.advance()

    def advance(self) -> None:
        """A worker has come or gone: every line looks again."""
        for dispatcher in self.by_model.values():
            dispatcher.advance()

    def present(self) -> tuple[list[Job], Counter[str]]:
        """Requests that run, and how many of the default tier wait by tenant, of all models."""
        running: list[Job] = []
        waiting: Counter[str] = Counter()
        for dispatcher in self.by_model.values():
            running += dispatcher.lanes.running_jobs()
            waiting.update(job.tenant for job in dispatcher.lanes.waiting_jobs() if job.tier is Tier.DEFAULT)
        return running, waiting

    def depth(self) -> list[tuple[str, int]]:
        """(model, waiting) for metrics."""
        return [(model, len(dispatcher.lanes)) for model, dispatcher in self.by_model.items()]

    def by_tier(self) -> dict[Tier, int]:
        """How many wait, for metrics."""
        waiting = dict.fromkeys(Tier, 0)
        for dispatcher in self.by_model.values():
            for tier, count in dispatcher.lanes.by_tier().items():
                waiting[tier] += count
        return waiting

    def placed(self) -> list[tuple[str, int]]:
        """(how, count) for metrics."""
        total: Counter[str] = Counter()
        for dispatcher in self.by_model.values():
            total.update(dispatcher.placed)
        return list(total.items())
