"""The line: who is let in, when, and that nobody is lost, in virtual time and under every policy."""

import asyncio
import contextlib
import json
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from scheduler.catalog import build
from scheduler.jobs import Outcome, Tier
from scheduler.pools import Pools
from scheduler.tiers import TieredLanes
from scheduler.workers import Worker
from server.admission.dispatch import LONGEST_RETRY_S, Dispatcher, Lines, Pace
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member, WorkerState
from server.request.call import Phase, Ticket
from server.request.errors import BadRequest, EngineUnreachable, NoWorker, Overloaded, ServiceError, UnknownModel
from tests.server.calls import call_of, placed, ticket_of
from tests.server.conftest import in_virtual_time
from tests.steps import lines_executed

POLICIES = ["fcfs", "mlfq", "vtc", "gittins"]


class Hall:
    """A dispatcher over workers that are only names; requests hold their place for a while."""

    def __init__(
        self,
        policy: str = "fcfs",
        *,
        slots: tuple[int, ...] = (2,),
        max_waiting: int = 1000,
        timeout_s: float | None = None,
        replicas: int = 1,
    ) -> None:
        self.clock = asyncio.get_running_loop().time
        self.fleet = Fleet(pools=Pools(sharers=lambda: replicas))
        for number, count in enumerate(slots):
            self.join(f"w{number}", count)
        self.dispatcher = Dispatcher(
            "fake",
            TieredLanes(build(policy, {})),
            self.fleet,
            max_waiting=max_waiting,
            queue_timeout_s=timeout_s,
            clock=self.clock,
        )
        self.fleet.changed.append(self.dispatcher.advance)
        self.order: list[int] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.count = 0

    def join(self, name: str, slots: int) -> Member:
        url = "http://127.0.0.1:9"
        member = Member(Worker(name, url, slots=slots), EngineClient(url), WorkerState.READY, ("fake",))
        self.fleet.enroll(member)
        return member

    def ticket(self, tenant: str = "anybody", sequences: int = 1) -> Ticket:
        self.count += 1
        return ticket_of(self.clock, number=self.count - 1, tenant=tenant, sequences=sequences)

    async def visit(self, ticket: Ticket, stay_s: float = 1.0, tokens: int = 5) -> None:
        async with placed(self.dispatcher, ticket) as member:
            ticket.move(Phase.PREFILLING)
            self.order.append(int(ticket.job.id))
            self.running[member.worker.id] += ticket.call.sequences
            self.most[member.worker.id] = max(self.most[member.worker.id], self.running[member.worker.id])
            try:
                for _ in range(tokens):
                    await asyncio.sleep(stay_s / tokens)
                    if not ticket.uncharged:
                        self.dispatcher.charge.append(ticket)
                    ticket.uncharged += 1
                    ticket.tokens += 1
            finally:
                self.running[member.worker.id] -= ticket.call.sequences

    def send(self, ticket: Ticket, stay_s: float = 1.0) -> asyncio.Task[None]:
        return asyncio.create_task(self.visit(ticket, stay_s))

    def is_empty(self) -> bool:
        line = self.dispatcher
        return not (
            len(line.lanes)
            or line.lanes.running()
            or line._waiters
            or line._waiting_of
            or line.charge
            or any(member.load.in_flight or member.load.pending_tokens for member in self.fleet.members.values())
        )


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_fcfs_lets_in_by_arrival() -> None:
    async def run() -> None:
        hall = Hall(slots=(2,))
        tasks = [hall.send(hall.ticket()) for _ in range(10)]
        await asyncio.gather(*tasks)
        assert hall.order == list(range(10))
        assert hall.most["w0"] == 2
        assert hall.clock() == pytest.approx(1005.0)
        assert hall.is_empty()

    in_virtual_time(run())


def test_vtc_shares_between_tenants_whatever_their_numbers() -> None:
    async def run() -> None:
        hall = Hall("vtc", slots=(1,))
        heavy = [hall.send(hall.ticket("heavy")) for _ in range(50)]
        await settle()
        light = [hall.send(hall.ticket("light")) for _ in range(5)]
        await asyncio.gather(*light)
        done = sum(task.done() for task in heavy)
        assert done <= 7, "the light tenant waited behind the heavy one"
        await asyncio.gather(*heavy)
        assert hall.is_empty()

    in_virtual_time(run())


def test_lines_of_models_on_one_worker_take_turns_in_its_places() -> None:
    async def run() -> None:
        clock = asyncio.get_running_loop().time
        fleet = Fleet(pools=Pools())
        url, models = "http://127.0.0.1:9", ("a", "b", "c")
        member = Member(Worker("w", url, slots=1), EngineClient(url), WorkerState.READY, models)
        member.models_json = [{"id": model} for model in models]
        fleet.enroll(member)
        served: list[str] = []

        def line(model: str) -> Dispatcher:
            lanes = TieredLanes(build("fcfs", {}))
            return Dispatcher(model, lanes, fleet, max_waiting=9, queue_timeout_s=None, clock=clock, freed=lines.freed)

        async def visit(model: str, number: int) -> None:
            async with placed(lines.of(model), ticket_of(clock, number=number)):
                served.append(model)
                await asyncio.sleep(1.0)

        lines = Lines(line, fleet)
        await asyncio.gather(*(visit(model, number) for number, model in enumerate("aaaabbbc")))
        assert "".join(served) == "abcababa"

    in_virtual_time(run())


@pytest.mark.parametrize("policy", POLICIES)
def test_who_leaves_while_waiting_is_forgotten_and_the_next_goes(policy: str) -> None:
    async def run() -> None:
        hall = Hall(policy, slots=(1,))
        tasks = [hall.send(hall.ticket()) for _ in range(5)]
        await settle()
        tasks[2].cancel()
        tasks[0].cancel()  # this one runs: its place goes to the next
        await asyncio.wait(tasks)
        assert hall.order == [0, 1, 3, 4]
        assert [task.cancelled() for task in tasks] == [True, False, True, False, False]
        assert hall.is_empty()

    in_virtual_time(run())


def test_who_leaves_in_the_moment_it_is_let_in_gives_its_place_back() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        first, second, third = (hall.send(hall.ticket()) for _ in range(3))
        await settle()
        first.cancel()
        await asyncio.sleep(0)
        hall.dispatcher.advance()
        second.cancel()
        await asyncio.wait([first, second, third])
        assert 2 in hall.order and hall.is_empty()

    in_virtual_time(run())


def test_a_wide_request_starts_at_the_first_free_place_and_counts_for_all_of_its_sequences() -> None:
    async def run() -> None:
        hall = Hall(slots=(4,))
        one, two = hall.send(hall.ticket(), 1.0), hall.send(hall.ticket(), 2.0)
        await settle()
        wide = hall.send(hall.ticket(sequences=21), 1.5)
        narrow = hall.send(hall.ticket())
        await settle()
        assert hall.order == [0, 1, 2] and hall.most["w0"] == 23
        await asyncio.gather(one, two, wide, narrow)
        assert hall.clock() == pytest.approx(1002.5), "the next one starts when it is over"
        assert hall.is_empty()

    in_virtual_time(run())


def test_a_wide_request_goes_where_there_is_most_room() -> None:
    async def run() -> None:
        hall = Hall(slots=(4, 6))
        for _ in range(3):
            hall.fleet.members["w1"].load.reserve(0, 1000)  # it has more to do
        wide = hall.send(hall.ticket(sequences=9))
        await settle()
        assert hall.most == {"w1": 9}
        await wide

    in_virtual_time(run())


@settings(max_examples=60, deadline=None)
@given(
    running=st.lists(st.floats(0.5, 3.0), min_size=1, max_size=6),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    slots=st.integers(1, 6),
)
def test_who_stands_behind_wide_requests_waits_for_those_ahead_and_no_longer(
    running: list[float], widths: list[int], slots: int
) -> None:
    """With one place taken at a time, a worker that is never empty would keep a wide request waiting for ever."""

    async def run() -> None:
        hall = Hall(slots=(slots,))
        tasks = [hall.send(hall.ticket(), stay_s) for stay_s in running]
        tasks += [hall.send(hall.ticket(sequences=width), 1.0) for width in widths]
        behind = hall.ticket()
        tasks.append(hall.send(behind))
        await asyncio.gather(*tasks)
        began = behind.times[Phase.PREFILLING]
        assert began is not None and began - 1000.0 <= sum(running) + len(widths) + 1e-6
        assert hall.order[-1] == int(behind.job.id) and hall.is_empty()

    in_virtual_time(run())


def test_more_answers_than_one_request_may_ask_for_are_refused_before_it_waits() -> None:
    async def run() -> None:
        hall = Hall(slots=(2,))
        with pytest.raises(BadRequest, match="129 answers") as refused:
            await hall.visit(hall.ticket(sequences=129))
        assert refused.value.code == "too_many_sequences" and refused.value.param == "n"
        assert hall.is_empty()

    in_virtual_time(run())


def test_the_worker_with_the_least_to_do_is_taken() -> None:
    async def run() -> None:
        hall = Hall(slots=(3, 3))
        await asyncio.gather(*(hall.send(hall.ticket()) for _ in range(6)))
        assert hall.most == {"w0": 3, "w1": 3}

    in_virtual_time(run())


def asking(hall: Hall, number: int, *said: str) -> Ticket:
    """A ticket for a chat with these turns."""
    messages = [{"role": "user", "content": text} for text in said]
    body = json.dumps({"model": "fake", "messages": messages, "max_tokens": 20}).encode()
    return ticket_of(hall.clock, call_of(body), number=number)


def test_a_conversation_stays_with_its_worker_until_that_is_overloaded() -> None:
    async def run() -> None:
        hall = Hall(slots=(8, 8))
        story, other = "Tell me a very long story. " * 100, "Translate this for me. " * 100
        one, two = asking(hall, 0, story), asking(hall, 1, other)
        await asyncio.gather(hall.visit(one), hall.visit(two))
        assert (one.worker, two.worker) == ("w0", "w1")
        busy = [hall.send(asking(hall, number, "short")) for number in range(2, 4)]
        await settle()
        again, more = asking(hall, 4, other, "and this"), asking(hall, 5, story, "go on")
        await asyncio.gather(hall.visit(again), hall.visit(more), *busy)
        assert (again.worker, more.worker) == ("w1", "w0")

        hall.fleet.members["w0"].load.observe(others=8)
        elsewhere = asking(hall, 6, story, "go on", "and on")
        await hall.visit(elsewhere)
        assert elsewhere.worker == "w1"
        assert hall.is_empty()

    in_virtual_time(run())


def test_what_answers_are_expected_to_cost_is_learned() -> None:
    async def run() -> None:
        hall = Hall(slots=(8,))
        call = replace(hall.ticket().call, max_tokens=100_000)
        first = hall.dispatcher.sizes.expected_tokens(call)
        for _ in range(100):
            await hall.visit(hall.ticket(), tokens=5)
        assert hall.dispatcher.sizes.expected_tokens(call) < first < 100_000
        assert hall.dispatcher.sizes.expected_tokens(replace(call, max_tokens=1, sequences=3)) == 10 + 3

    in_virtual_time(run())


def test_who_waits_when_the_last_worker_leaves_gets_the_next_one() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        tasks = [hall.send(hall.ticket(), 10.0) for _ in range(3)]
        await settle()
        hall.fleet.drain("w0")
        await tasks[0]  # its place is nobody's
        assert len(hall.order) == 1 and len(hall.dispatcher.lanes) == 2
        hall.join("new", 1)
        hall.fleet._tell()
        await asyncio.gather(*tasks)
        assert len(hall.order) == 3 and hall.most == {"w0": 1, "new": 1}

    in_virtual_time(run())


def test_a_worker_that_joins_is_used_at_once_and_one_that_drains_is_not() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        tasks = [hall.send(hall.ticket(), 10.0) for _ in range(3)]
        await settle()
        hall.join("new", 1)
        hall.fleet._tell()
        await settle()
        assert len(hall.order) == 2
        hall.fleet.drain("w0")
        await asyncio.gather(*tasks)
        assert hall.most == {"w0": 1, "new": 1} and hall.clock() == pytest.approx(1020.0)

    in_virtual_time(run())


def test_a_full_line_refuses_and_a_long_wait_ends() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,), max_waiting=2, timeout_s=5.0)
        first = hall.send(hall.ticket(), 60.0)
        await settle()
        waiting = [hall.send(hall.ticket()) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded) as full:
            await hall.visit(hall.ticket())
        assert full.value.retry_after_s is not None and full.value.retry_after_s >= 1
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Overloaded, Overloaded]
        assert hall.clock() == pytest.approx(1005.0)
        await first
        assert hall.is_empty()

    in_virtual_time(run())


@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_refused_and_waits_as_long_as_told_gets_in_while_others_flood(policy: str) -> None:
    async def run() -> None:
        hall = Hall(policy, slots=(2,), max_waiting=10)
        flood: list[asyncio.Task[None]] = []

        async def pour() -> None:
            while hall.clock() < 1300.0:  # ten times what two places can do
                flood.extend(hall.send(hall.ticket("flood")) for _ in range(2))
                await asyncio.sleep(0.1)

        pouring = asyncio.create_task(pour())
        await asyncio.sleep(30.0)
        refusals = 0
        for number in range(20):
            light = f"light-{number % 3}"
            for attempt in range(2):
                try:
                    await hall.visit(hall.ticket(light))
                    break
                except Overloaded as refused:
                    assert attempt == 0, "it waited as long as it was told, and was refused again"
                    refusals += 1
                    assert refused.retry_after is not None and refused.retry_after <= 10
                    await asyncio.sleep(refused.retry_after)
        assert refusals or policy == "vtc"
        assert len(hall.dispatcher.lanes) <= 2 * 10
        await pouring
        await asyncio.gather(*flood, return_exceptions=True)
        assert hall.is_empty()

    in_virtual_time(run())


def test_under_vtc_a_tenant_that_fills_the_line_leaves_room_for_others() -> None:
    async def run() -> None:
        hall = Hall("vtc", slots=(1,), max_waiting=50)
        heavy = [hall.send(hall.ticket("heavy")) for _ in range(200)]
        await settle()
        assert len(hall.dispatcher.lanes) == 40
        light = [hall.send(hall.ticket(f"light-{number}"), 0.1) for number in range(10)]
        await settle()
        assert len(hall.dispatcher.lanes) == 50
        assert [type(end) for end in await asyncio.gather(*light, return_exceptions=True)] == [type(None)] * 10
        ends = await asyncio.gather(*heavy, return_exceptions=True)
        assert sum(isinstance(end, Overloaded) for end in ends) == 159
        assert hall.is_empty()

    in_virtual_time(run())


def test_a_deadline_counts_from_arrival_and_what_cannot_meet_it_is_not_started() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,), timeout_s=60.0)
        first = hall.send(hall.ticket(), 5.0)
        await settle()
        hurried, patient = hall.ticket(), hall.ticket()
        hurried.call = replace(hurried.call, deadline_s=2.0)
        tasks = [hall.send(hurried), hall.send(patient)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [Overloaded, type(None)]
        assert hurried.times[Phase.PREFILLING] is None and hall.order == [0, 2]
        await first
        moved = hall.ticket()
        moved.call = replace(moved.call, deadline_s=2.0)
        hall.join("w1", 1)
        error = EngineUnreachable("it is gone")
        with pytest.raises(Overloaded):
            async with placed(hall.dispatcher, moved), placed(hall.dispatcher, hall.ticket()):
                await asyncio.sleep(1.5)
                began = hall.clock()
                await hall.dispatcher.take_another(moved, error)
        assert hall.clock() - began == pytest.approx(0.5)
        assert hall.is_empty()

    in_virtual_time(run())


def test_no_worker_is_said_at_once_and_after_a_wait() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,), timeout_s=3.0)
        member = hall.fleet.members["w0"]
        first = hall.send(hall.ticket(), 60.0)
        await settle()
        waiting = hall.send(hall.ticket())
        await settle()
        hall.fleet.put(member, WorkerState.DOWN)
        with pytest.raises(NoWorker):
            await hall.visit(hall.ticket())
        with pytest.raises(NoWorker):
            await waiting
        await first
        assert hall.is_empty()

    in_virtual_time(run())


def test_a_worker_that_takes_no_connection_is_out_until_it_is_seen_again() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        with pytest.raises(EngineUnreachable):
            async with placed(hall.dispatcher, hall.ticket()) as member:
                hall.fleet.suspect(member, EngineUnreachable("refused"))
                raise EngineUnreachable("refused")
        assert hall.fleet.members["w0"].state is WorkerState.DOWN and hall.is_empty()

    in_virtual_time(run())


def test_a_call_whose_worker_failed_goes_before_those_that_wait_and_is_charged_once() -> None:
    async def run() -> None:
        hall = Hall("vtc", slots=(1, 1))
        order: list[str] = []
        error = EngineUnreachable("refused")

        async def fails_once() -> None:
            ticket = hall.ticket("a")
            async with placed(hall.dispatcher, ticket) as member:
                await asyncio.sleep(1.0)
                hall.fleet.suspect(member, error)
                other = await hall.dispatcher.take_another(ticket, error)
                assert other is not member
                order.append("moved")

        async def visits(name: str, seconds: float) -> None:
            async with placed(hall.dispatcher, hall.ticket("a")):
                order.append(name)
                await asyncio.sleep(seconds)

        failing = asyncio.create_task(fails_once())
        await settle()
        busy = asyncio.create_task(visits("busy", 5.0))
        await settle()
        waiting = asyncio.create_task(visits("waiting", 1.0))
        await asyncio.gather(failing, busy, waiting)
        assert order == ["busy", "moved", "waiting"]
        assert hall.is_empty()
        account = next(account for _, account, _ in hall.dispatcher.lanes.standings())
        assert account.counter == 3 * hall.ticket("a").call.prompt_tokens

    in_virtual_time(run())


def test_a_call_without_another_worker_ends_with_what_went_wrong() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        error = EngineUnreachable("refused")
        ticket = hall.ticket()
        with pytest.raises(EngineUnreachable):
            async with placed(hall.dispatcher, ticket):
                await hall.dispatcher.take_another(ticket, error)
        assert hall.is_empty()

    in_virtual_time(run())


def test_a_client_that_leaves_while_its_call_changes_workers_leaves_nothing_behind() -> None:
    async def run() -> None:
        hall = Hall(slots=(1, 1))
        holding = hall.send(hall.ticket(), 60.0)
        await settle()

        async def fails() -> None:
            ticket = hall.ticket()
            async with placed(hall.dispatcher, ticket):
                await hall.dispatcher.take_another(ticket, EngineUnreachable("refused"))

        leaving = asyncio.create_task(fails())
        await settle()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        holding.cancel()
        await asyncio.wait([holding])
        assert hall.is_empty()

    in_virtual_time(run())


def test_retry_after_grows_with_the_line_and_shrinks_with_its_pace() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,), max_waiting=10_000)
        first = hall.send(hall.ticket(), 1e6)
        await settle()
        line = hall.dispatcher
        for _ in range(20):
            await asyncio.sleep(1.0)
            line.pace.freed(hall.clock())
        told = []
        tasks = []
        for _ in range(50):
            told.append(line.retry_after_s("anybody"))
            tasks.append(hall.send(hall.ticket()))
            await settle()
        assert (
            told == sorted(told) and told[0] == pytest.approx(1.0, rel=0.2) and told[-1] == pytest.approx(50, rel=0.2)
        )
        await asyncio.sleep(1000)
        assert line.retry_after_s("anybody") == LONGEST_RETRY_S
        for task in [first, *tasks]:
            task.cancel()
        await asyncio.wait([first, *tasks])

    in_virtual_time(run())


def test_under_vtc_a_newcomer_is_told_its_own_wait_and_not_the_heavy_tenants() -> None:
    async def run() -> None:
        hall = Hall("vtc", slots=(1,))
        tasks = [hall.send(hall.ticket("heavy"), 1e6) for _ in range(100)]
        await settle()
        line = hall.dispatcher
        for _ in range(20):
            await asyncio.sleep(1.0)
            line.pace.freed(hall.clock())
        assert line.retry_after_s("light") < 5 < 80 < line.retry_after_s("heavy")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert hall.is_empty()

    in_virtual_time(run())


@pytest.mark.parametrize("rate", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("seconds", [5, 20, 200])
def test_the_pace_is_right_from_the_first_seconds_on(rate: float, seconds: int) -> None:
    pace, now = Pace(0.0), 0.0
    for number in range(int(rate * seconds)):
        now = (number + 1) / rate
        pace.freed(now)
    assert pace.per_s(now) == pytest.approx(rate, rel=0.35)


def test_a_model_that_nobody_serves_is_unknown_only_while_others_are_served() -> None:
    async def run() -> None:
        hall = Hall()
        lines = Lines(lambda model: hall.dispatcher, hall.fleet)
        member = hall.fleet.members["w0"]
        with pytest.raises(NoWorker):
            lines.of("fake")
        member.models_json = [{"id": "fake"}]
        with pytest.raises(UnknownModel):
            lines.of("other")
        assert lines.of("fake") is hall.dispatcher
        hall.fleet.put(member, WorkerState.DOWN)
        assert lines.of("fake") is hall.dispatcher

    in_virtual_time(run())


def test_those_who_wait_in_the_slack_are_not_among_those_whom_fairness_compares() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,))
        lines = Lines(lambda model: hall.dispatcher, hall.fleet)
        hall.fleet.members["w0"].models_json = [{"id": "fake"}]
        lines.of("fake")
        held = [hall.ticket("a"), hall.ticket("b"), hall.ticket("c")]
        held[2].job.tier = Tier.FLEX
        tasks = [hall.send(ticket) for ticket in held]
        await settle()
        assert lines.present() == ([held[0].job], Counter({"b": 1}))
        await asyncio.gather(*tasks)

    in_virtual_time(run())


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_is_lost_or_let_in_twice_whatever_happens(policy: str, seed: int) -> None:
    rng = random.Random(seed)

    async def client(hall: Hall, ticket: Ticket) -> str:
        task = hall.send(ticket, rng.uniform(0.1, 5.0))
        if rng.random() < 0.3:
            asyncio.get_running_loop().call_later(rng.uniform(0.0, 6.0), task.cancel)
        await asyncio.wait([task])
        if task.cancelled():
            return "cancelled"
        error = task.exception()
        assert error is None or isinstance(error, ServiceError)
        return "done" if error is None else "refused"

    async def run() -> None:
        slots = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        hall = Hall(policy, slots=slots, max_waiting=rng.choice([3, 1000]), timeout_s=rng.choice([None, 2.0]))
        clients = []
        for _ in range(60):
            ticket = hall.ticket(f"t{rng.randrange(4)}", rng.choice([1, 1, 1, 2, 9]))
            clients.append(asyncio.create_task(client(hall, ticket)))
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.3]))
            if rng.random() < 0.1:
                hall.fleet._tell()
        ends = await asyncio.gather(*clients)
        assert hall.is_empty()
        assert len(hall.order) == len(set(hall.order)), "somebody was let in twice"
        done = {number for number, end in enumerate(ends) if end == "done"}
        assert done <= set(hall.order)
        for number, count in enumerate(slots):
            assert hall.most[f"w{number}"] < count + 9, "a wide one starts at the last free place at worst"

    in_virtual_time(run())


def test_the_timer_of_one_who_was_just_let_in_does_no_harm() -> None:
    async def run() -> None:
        hall = Hall(slots=(1,), timeout_s=1.0)
        first = hall.send(hall.ticket(), 0.5)
        await settle()
        ticket = hall.ticket()
        second = hall.send(ticket, 1.0)
        await settle()
        first.cancel()
        for _ in range(10):
            if ticket.job not in hall.dispatcher._waiters:
                break
            await asyncio.sleep(0)
        assert hall.order == [0], "the second has its place and does not know it yet"
        hall.dispatcher._expire(ticket)
        await second
        assert hall.order == [0, 1] and hall.is_empty()

    in_virtual_time(run())


@pytest.mark.parametrize(
    ("replicas", "others", "most"),
    [(1, 0, 8), (1, 8, 8), (2, 0, 8), (2, 3, 5), (2, 8, 4), (2, 99, 4), (3, 99, 3), (20, 99, 1)],
)
async def test_a_window_is_shared_with_other_gateways_but_each_has_its_part(
    replicas: int, others: int, most: int
) -> None:
    hall = Hall(slots=(8,), replicas=replicas)
    hall.fleet.members["w0"].load.observe(others=others)
    await asyncio.gather(*(hall.visit(hall.ticket(), stay_s=0.01) for _ in range(24)))
    assert hall.most["w0"] == most


def lines_of_a_request(workers: int) -> int:
    """Lines of Python from a request's arrival at the line until its place is given back, the fleet half busy."""
    seen: list[int] = []

    async def run() -> None:
        hall = Hall(slots=(4,) * workers)
        busy = [asking(hall, number, f"Question {number}. " * 20) for number in range(2 * workers)]
        for ticket in busy:
            await hall.dispatcher.take(ticket)
        line = hall.dispatcher
        rng = random.Random(1)
        for number in range(60):
            ticket = asking(hall, 10_000 + number, f"Another question {number}. " * 20)
            leaving = busy.pop(rng.randrange(len(busy)))

            def one(ticket: Ticket = ticket, leaving: Ticket = leaving) -> None:
                with contextlib.suppress(StopIteration):
                    line.take(ticket).send(None)
                line.give_back(leaving, Outcome.DONE)

            seen.append(lines_executed(one))
            busy.append(ticket)

    in_virtual_time(run())
    return sum(seen)


def test_a_request_to_a_thousand_workers_costs_hardly_more_lines_than_one_to_two() -> None:
    few, many = lines_of_a_request(2), lines_of_a_request(1000)
    assert many <= 1.15 * few
