"""The gateway's line in front of stock vLLM's scheduler, both in one process and in virtual time.

Between the two there is no HTTP, and neither takes any time: what is measured is whom the gateway lets in, and when.
Imports vLLM, which takes seconds.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.bench.batch.scheduler_only import ModelFreeEngine
from loadtest.bench.batch.work import DRAIN_S, Made, Outcome, Sent, outcome_of
from loadtest.call import TraceCall
from loadtest.virtual_loop import VirtualLoop
from scheduler.catalog import build
from scheduler.jobs import Job, Tier
from scheduler.jobs import Outcome as Ending
from scheduler.tiers import TieredLanes
from scheduler.workers import Worker
from server.admission.dispatch import Dispatcher, FlexRules
from server.batch.lines import LINES_AHEAD
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member, WorkerState
from server.request.call import Call, Phase, Ticket
from server.request.schemas import COMPLETIONS
from server.request.tenants import Tenant

MODEL = "model"


@dataclass(slots=True)
class OnItsWay:
    """A request that the engine has. done: set when it is over."""

    ticket: Ticket
    done: "asyncio.Future[None]"
    sent: Sent | None = None


@dataclass
class Site:
    """One gateway over one engine. share: `tiers.flex_share`."""

    engine: ModelFreeEngine
    share: float
    seconds: float
    way: dict[str, OnItsWay] = field(default_factory=dict)
    people: list[Sent] = field(default_factory=list)
    people_tokens: int = 0
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        self.clock = asyncio.get_running_loop().time
        self.begun = self.clock()
        self.arrived = asyncio.Event()
        fleet = Fleet()
        url = "http://127.0.0.1:9"
        worker = Worker("engine", url, slots=self.engine.cost.max_seqs)
        self.member = Member(worker, EngineClient(url), WorkerState.READY, (MODEL,))
        fleet.enroll(self.member)
        self.member.load.kv_tokens = float(self.engine.cost.kv_capacity_tokens)  # as it tells in its metrics
        self.line = Dispatcher(
            MODEL, TieredLanes(build("fcfs", {})), fleet, max_waiting=1 << 30, queue_timeout_s=None, clock=self.clock
        )
        self.line.flex = FlexRules(timeout_s=float("inf"), share=self.share)

    async def ask(self, call: TraceCall, tier: Tier, sent: Sent | None) -> None:
        """One request, from its arrival to its last token."""
        ticket = self._ticket(call, tier)
        await self.line.take(ticket)
        ticket.move(Phase.PREFILLING)
        flex = tier is Tier.FLEX
        if flex:
            self.engine.count.flex.add(call.id)
        self.way[call.id] = one = OnItsWay(ticket, asyncio.get_running_loop().create_future(), sent)
        self.engine.add(call, flex=flex)
        self.arrived.set()
        await one.done
        self.line.give_back(ticket, Ending.DONE)

    def _ticket(self, call: TraceCall, tier: Tier) -> Ticket:
        asked = Call(
            id=call.id,
            route=COMPLETIONS,
            tenant=Tenant(name=call.tenant),
            model=MODEL,
            stream=tier is not Tier.FLEX,  # lines of a batch are answered in one piece
            body=b"",
            hide_usage=False,
            prompt_tokens=call.prompt_tokens,
            max_tokens=call.output_tokens,
            sequences=1,
            kind="",
            tier=tier,
        )
        job = Job(call.id, call.tenant, call.prompt_tokens, self.clock(), call.output_tokens, tier=tier)
        return Ticket(asked, job, self.clock)

    async def serve(self) -> None:
        """Steps the engine for ever."""
        while True:
            if not self.engine.is_busy():
                self.arrived.clear()
                await self.arrived.wait()
            self.engine.skip_to(self.clock())
            made = self.engine.step()
            await asyncio.sleep(self.engine.now() - self.clock())
            for each in made:
                self._take(each)

    def _take(self, made: Made) -> None:
        one, now = self.way[made.name], self.clock()
        tokens = made.tokens if now - self.begun <= self.seconds else 0
        if one.sent is None:
            self.batch_tokens += tokens
        else:
            self.people_tokens += tokens
            if made.tokens and not one.sent.at:
                one.ticket.move(Phase.DECODING)
            one.sent.at.extend([now] * made.tokens)
        one.ticket.tokens += made.tokens
        if made.over:
            if one.sent is None:
                one.ticket.move(Phase.DECODING)
            one.ticket.move(Phase.DONE)
            self.engine.count.forget(made.name)
            del self.way[made.name]
            one.done.set_result(None)

    async def send(self, people: Sequence[TraceCall]) -> None:
        """The interactive requests, all to their ends."""
        async with asyncio.TaskGroup() as group:
            for call in people:
                await asyncio.sleep(self.begun + call.at_s - self.clock())
                sent = Sent(self.clock())
                self.people.append(sent)
                group.create_task(self.ask(call, Tier.DEFAULT, sent))
        await asyncio.sleep(max(0.0, self.begun + self.seconds - self.clock()))

    async def batch(self, jobs: Iterable[TraceCall]) -> None:
        """As many lines as the gateway's runner has on their way: what the worker may be given, and some in line."""
        coming, running = iter(jobs), set[asyncio.Task[None]]()
        most = self.line.flex.capacity(self.member.worker) + LINES_AHEAD
        while True:
            while len(running) < most:
                running.add(asyncio.create_task(self.ask(next(coming), Tier.FLEX, None)))
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()


def dispatched(
    engine: ModelFreeEngine, people: Sequence[TraceCall], jobs: Iterable[TraceCall], share: float, seconds: float
) -> Outcome:
    """What interactive requests and jobs get from stock vLLM behind a gateway. A request without a token when the time
    for it is over has waited until then."""

    async def run() -> Outcome:
        site = Site(engine, share, seconds)
        tasks = [asyncio.create_task(each) for each in (site.send(people), site.serve(), site.batch(jobs))]
        done, _ = await asyncio.wait(tasks, timeout=seconds + DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()  # the first ends; the others only by an error
        for task in tasks:
            task.cancel()
        return outcome_of(site.people, site.people_tokens, site.batch_tokens, seconds, engine.count, site.clock())

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run())
