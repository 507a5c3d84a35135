"""Flex requests at workers that cannot displace them: when they start, in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace as with_fields

from msgspec.structs import replace

from scheduler.catalog import build
from scheduler.jobs import Tier
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker
from server.admission.dispatch import Dispatcher, FlexRules, Lines
from server.engine.client import EngineClient
from server.fleet.fleet import Member, WorkerState
from server.request.call import Phase, Ticket
from tests.server.calls import placed, ticket_of
from tests.server.conftest import eventually, in_virtual_time
from tests.server.test_dispatch import Hall, settle


def ticket(hall: Hall, tier: Tier = Tier.DEFAULT, *, stream: bool = True, prompt_tokens: int = 10) -> Ticket:
    plain = hall.ticket()
    call = replace(plain.call, tier=tier, stream=stream, prompt_tokens=prompt_tokens)
    made = ticket_of(hall.clock, call, number=hall.count)
    made.job = with_fields(made.job, tier=tier)
    return made


class Held:
    """A request that holds its place until it is told to leave. started_at: when it got it."""

    def __init__(self, hall: Hall, asked: Ticket, line: Dispatcher | None = None) -> None:
        self.hall, self.ticket, self.line = hall, asked, line or hall.dispatcher
        self.started_at: float | None = None
        self.leaves = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with placed(self.line, self.ticket):
            self.started_at = self.hall.clock()
            self.ticket.move(Phase.PREFILLING)
            await self.leaves.wait()

    async def end(self) -> None:
        self.leaves.set()
        await self.task


def virtual(test: Callable[[Hall], Awaitable[None]], *, slots: int = 16, plugin: bool = False) -> None:
    async def run() -> None:
        hall = Hall(slots=(slots,))
        (member,) = hall.fleet.members.values()
        member.load.worker = with_fields(member.load.worker, plugin=plugin)
        hall.dispatcher.flex = FlexRules(share=0.5)
        await test(hall)
        assert hall.is_empty()

    in_virtual_time(run())


def test_flex_waits_for_the_first_tokens_of_others_and_starts_when_they_are_here() -> None:
    async def run(hall: Hall) -> None:
        first = Held(hall, ticket(hall, Tier.FLEX))
        await settle()
        assert first.started_at is not None
        await first.end()
        people = [Held(hall, ticket(hall)) for _ in range(2)]
        await settle()
        flex = Held(hall, ticket(hall, Tier.FLEX, stream=False))
        await asyncio.sleep(5.0)
        people[0].ticket.move(Phase.DECODING)
        await asyncio.sleep(5.0)
        assert flex.started_at is None
        people[1].ticket.move(Phase.DECODING)
        await settle()
        assert flex.started_at == hall.clock()
        for held in (*people, flex):
            await held.end()

    virtual(run)


def test_a_request_that_ends_without_a_token_keeps_flex_no_longer() -> None:
    async def run(hall: Hall) -> None:
        await Held(hall, ticket(hall, Tier.FLEX)).end()
        lost = Held(hall, ticket(hall))
        await settle()
        flex = Held(hall, ticket(hall, Tier.FLEX))
        await asyncio.sleep(5.0)
        assert flex.started_at is None
        lost.task.cancel()
        await asyncio.wait([lost.task])
        await settle()
        assert flex.started_at is not None
        await flex.end()

    virtual(run)


def test_beside_others_flex_starts_one_after_the_other_and_long_prompts_further_apart() -> None:
    async def starts(hall: Hall, prompt_tokens: int) -> list[float]:
        flex = [Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=prompt_tokens)) for _ in range(4)]
        await asyncio.sleep(60.0)
        begun = [held.started_at for held in flex]
        for held in flex:
            await held.end()
        assert all(at is not None for at in begun)
        return [b - a for a, b in zip(begun, begun[1:], strict=False)]  # type: ignore[operator]

    async def run(hall: Hall) -> None:
        answered = Held(hall, ticket(hall))
        await settle()
        answered.ticket.move(Phase.DECODING)
        short, long = await starts(hall, 10), await starts(hall, 5000)
        assert all(0.0 < gap < 0.2 for gap in short)
        assert all(gap > 5 * max(short) for gap in long)
        await answered.end()

    virtual(run)


def test_an_answer_in_one_piece_does_not_keep_flex_waiting_for_its_end() -> None:
    async def run(hall: Hall) -> None:
        await Held(hall, ticket(hall, Tier.FLEX)).end()
        whole = Held(hall, ticket(hall, stream=False))
        await settle()
        flex = Held(hall, ticket(hall, Tier.FLEX))
        await asyncio.sleep(1.0)
        assert flex.started_at is not None
        await whole.end()
        await flex.end()

    virtual(run)


def test_an_engine_with_our_scheduler_gets_flex_at_once() -> None:
    async def run(hall: Hall) -> None:
        people = Held(hall, ticket(hall))
        await settle()
        flex = [Held(hall, ticket(hall, Tier.FLEX)) for _ in range(6)]
        await settle()
        assert {held.started_at for held in flex} == {hall.clock()}
        for held in (people, *flex):
            await held.end()

    virtual(run, plugin=True)


def test_flex_leaves_others_half_of_the_memory_but_is_not_kept_out() -> None:
    async def run(hall: Hall) -> None:
        (member,) = hall.fleet.members.values()
        member.load.kv_tokens = 4000.0
        flex = [Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=900)) for _ in range(4)]
        await asyncio.sleep(60.0)
        assert [held.started_at is not None for held in flex] == [True, True, False, False]
        await flex[0].end()
        await asyncio.sleep(60.0)
        assert flex[2].started_at is not None and flex[3].started_at is None
        large = Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=9000))
        for held in flex[1:]:
            await asyncio.sleep(60.0)
            await held.end()
        await asyncio.sleep(60.0)
        assert large.started_at is not None and member.load.flex_tokens > 9000
        await large.end()
        assert member.load.flex_tokens == 0

    virtual(run)


def test_a_worker_that_is_soon_ready_is_not_kept_waiting_by_another_that_reads_a_long_prompt() -> None:
    async def run() -> None:
        hall = Hall(slots=(16, 16))
        hall.dispatcher.flex = FlexRules(share=0.5)
        loads = [member.load for member in hall.fleet.members.values()]
        people = [Held(hall, ticket(hall)) for _ in range(2)]  # one at each, that has its first token
        await settle()
        assert [load.in_flight for load in loads] == [1, 1]
        for held in people:
            held.ticket.move(Phase.DECODING)
        first = [Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=tokens)) for tokens in (100_000, 512)]
        await settle()
        assert [load.flex for load in loads] == [1, 1]
        people.append(Held(hall, ticket(hall)))
        await settle()
        assert [load.in_flight for load in loads] == [2, 3]
        third = Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=512))
        await settle()  # one worker awaits a first token, the other reads for seconds
        people[-1].ticket.move(Phase.DECODING)
        await asyncio.sleep(1.0)
        assert third.started_at is not None, "it waits for the worker that reads 100,000 tokens"
        for held in (*people, *first, third):
            await held.end()

    in_virtual_time(run())


def test_a_first_token_lets_flex_of_the_worker_s_other_models_start() -> None:
    async def run() -> None:
        hall = Hall(slots=())
        url, models = "http://127.0.0.1:9", ("a", "b")
        worker = Worker("w", url, slots=16)
        hall.fleet.enroll(
            Member(
                worker, EngineClient(url), WorkerState.READY, models, models_json=[{"id": model} for model in models]
            )
        )

        def line(model: str) -> Dispatcher:
            lanes = TieredLanes(build("fcfs", {}))
            return Dispatcher(
                model, lanes, hall.fleet, max_waiting=9, queue_timeout_s=None, clock=hall.clock, freed=lines.freed
            )

        lines = Lines(line, hall.fleet)
        begun = Held(hall, ticket(hall, Tier.FLEX), lines.of("b"))  # from here on the worker is paced
        await settle()
        person = Held(hall, ticket(hall), lines.of("a"))
        await settle()
        flex = Held(hall, ticket(hall, Tier.FLEX), lines.of("b"))
        await asyncio.sleep(5.0)
        assert flex.started_at is None
        person.ticket.move(Phase.DECODING)
        await settle()
        assert flex.started_at is not None
        for held in (begun, person, flex):
            await held.end()

    in_virtual_time(run())


def test_split_flex_requests_leave_no_places_that_others_take_at_once() -> None:
    """Their prompts were paced at the prefill worker: at the decode worker none of them was ever started."""

    async def run() -> None:
        hall = Hall(slots=())
        for role in (Role.PREFILL, Role.DECODE):
            worker = Worker(role.value, "http://127.0.0.1:9", role, slots=16)
            hall.fleet.enroll(Member(worker, EngineClient(worker.url), WorkerState.READY, ("fake",)))
        hall.dispatcher.flex = FlexRules(share=0.5)
        for _ in range(4):
            split = Held(hall, ticket(hall, Tier.FLEX, prompt_tokens=500))
            await asyncio.sleep(60.0)
            assert split.started_at is not None and split.ticket.split is not None
            await split.end()
        whole = [Held(hall, ticket(hall, Tier.FLEX)) for _ in range(3)]
        await asyncio.sleep(60.0)
        assert [held.ticket.split for held in whole] == [None] * 3
        begun = [held.started_at for held in whole]
        assert len(set(begun)) == 3 and None not in begun, "they start one after the other"
        for held in whole:
            await held.end()
        assert hall.is_empty()

    in_virtual_time(run())


async def test_the_line_looks_again_however_soon_it_is_told_to() -> None:
    """On the loop of production: uvloop makes no timer of less than half a millisecond."""
    hall = Hall(slots=(1,))
    for wait_s in (30.0, 1e-4, 1e-4, 1e-5):
        hall.dispatcher._look_within(wait_s)
    await eventually(lambda: hall.dispatcher._looks_again is None, "it has looked")
