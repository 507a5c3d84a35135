"""What a visit tells the planner and the forecasts of its engines."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from math import inf

import pytest

from scheduler.forecast import EngineForecast
from scheduler.hybrid import Planner, Visit
from scheduler.objectives import Objectives
from scheduler.pools import Pools, WorkerLoad
from scheduler.prediction import Asked
from scheduler.step_cost import LinearFit
from scheduler.workers import Role, Worker

SOON = Objectives(2.0, inf)


def split_visit(planner: Planner, prompt_tokens: int = 1000, output_tokens: float = 100.0) -> Visit:
    """Of a prompt that is read elsewhere, for who answers has a long one to read."""
    pools, busy = Pools(lambda worker: worker.slots), EngineForecast(fleet=planner.fleet)
    busy.sends_prompt("another", 100_000, 0.0, 5.0)
    pools.add(WorkerLoad(Worker("reads", "", Role.PREFILL, plugin=True)), ("m",))
    pools.add(WorkerLoad(Worker("writes", "", Role.DECODE, plugin=True), forecast=busy), ("m",))
    visit = planner.place(Asked(prompt_tokens, output_tokens, SOON), pools.of("m"), {}, 0.0)
    assert visit is not None and visit.split
    return visit


def at_writer(visit: Visit) -> EngineForecast:
    assert visit.writer.forecast is not None
    return visit.writer.forecast


def running(visit: Visit) -> int:
    return at_writer(visit).running


def test_an_answer_whose_first_token_was_passed_on_runs_from_its_second_one() -> None:
    ratios: list[float] = []
    planner = Planner(ratios.append)
    visit = split_visit(planner)
    assert visit.passes_on
    visit.read(0.5)
    visit.begins(0.504)
    assert running(visit) == 0 and len(ratios) == 1
    visit.goes_on(0.7)
    visit.goes_on(0.72)
    assert running(visit) == 1
    visit.over(2.0, 2.0, 100)
    forecast = visit.writer.forecast
    assert forecast is not None and forecast.answers == 0 and len(ratios) == 1


def test_the_ways_of_tokens_are_learned_apart_and_by_length() -> None:
    planner = Planner(lambda ratio: None)
    for number in range(200):
        tokens = 500 + 400 * (number % 5)
        visit = split_visit(planner, tokens)
        visit.read(0.5)
        visit.begins(0.503 + 2e-6 * tokens)
        visit.goes_on(0.6 + 1e-4 * tokens)
        visit.over(2.0, 2.0, 100)
    for tokens in (500, 2000):
        for fit, seconds in ((planner.passed_on, 0.003 + 2e-6 * tokens), (planner.fetched, 0.1 + 1e-4 * tokens)):
            fixed, each = fit.coefficients
            assert fixed + tokens * each == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("asked_after", [inf, 2.0], ids=["before a long answer", "before a short one"])
def test_a_wait_for_memory_is_not_learned_as_what_a_hand_over_takes(asked_after: float) -> None:
    planner = Planner(lambda ratio: None, fetched=LinearFit((1.0, 1e-6)), output_tokens=100.0)
    usual_s = planner.handover.fetched_s(1000)
    for _ in range(100):
        visit = split_visit(planner)
        full = at_writer(visit)
        full.kv_tokens = 2000.0
        full.reads_itself(full.expects(2000.0))
        split_visit(planner, output_tokens=asked_after)  # what a typical answer takes does not follow from this one
        visit.read(0.071)
        visit.begins(0.075)
        visit.goes_on(2.571)
        visit.over(3.0)
    assert planner.handover.fetched_s(1000) == usual_s
    assert planner.fleet.memory_waits * visit.memory_s == pytest.approx(2.5 - usual_s, rel=0.1)


def test_a_hand_over_that_takes_less_than_usual_is_learned_though_memory_was_short() -> None:
    planner = Planner(lambda ratio: None, fetched=LinearFit((1.0, 1e-6)))
    for _ in range(100):
        visit = split_visit(planner)
        at_writer(visit).kv_tokens = 1200.0
        at_writer(visit).reads_itself(at_writer(visit).expects(1000.0))
        visit.read(0.071)
        visit.begins(0.075)
        visit.goes_on(0.271)
        visit.over(2.0)
    assert visit.memory_s > 0.0
    assert planner.handover.fetched_s(1000) == pytest.approx(0.2, rel=0.1)
    assert planner.fleet.memory_waits == 1.0


def test_a_short_prompt_does_not_wait_for_memory_behind_a_long_one_that_comes_later() -> None:
    def second_ttft_s(kv_tokens: float, first_tokens: int) -> float:
        pools, planner = Pools(lambda worker: worker.slots), Planner(lambda ratio: None)
        for name, role in (("r1", Role.PREFILL), ("r2", Role.PREFILL), ("w", Role.DECODE)):
            pools.add(WorkerLoad(Worker(name, "", role), kv_tokens=kv_tokens), ("m",))
        pools.workers["w"].forecast = busy = EngineForecast(fleet=planner.fleet)
        busy.sends_prompt("another", 2000, 0.0, 5.0)
        visits = [planner.place(Asked(tokens, 100.0, SOON), pools.of("m"), {}, 0.0) for tokens in (first_tokens, 3000)]
        first, second = visits
        assert first is not None and second is not None and first.reader is not second.reader
        return second.ttft_s

    assert second_ttft_s(10_000.0, 9000) == second_ttft_s(inf, 9000)
    assert second_ttft_s(5000.0, 2900) > second_ttft_s(inf, 2900)


@pytest.mark.parametrize(
    ("ttft_s", "is_busy", "passes_on"), [(2.0, True, False), (2.0, False, True), (0.5, True, True)],
    ids=["the writer reads", "it does not", "it does, but late by then"],
)  # fmt: skip
@pytest.mark.parametrize("planned", [True, False])
def test_whether_a_first_token_is_passed_on_is_settled_when_the_prompt_has_been_read(
    ttft_s: float, *, is_busy: bool, passes_on: bool, planned: bool
) -> None:
    """A short answer would not make up for a prompt that is read between its first token and its second."""
    reader, writer = (
        WorkerLoad(Worker(role.value, "", role, plugin=True), forecast=EngineForecast())
        for role in (Role.PREFILL, Role.DECODE)
    )
    assert reader.forecast is not None and writer.forecast is not None
    asked = Asked(1000, 8.0, Objectives(ttft_s, 0.05), 1000.0)
    stay = writer.forecast.expects(asked.context_tokens, due_at=0.45)
    planner = Planner(lambda ratio: None)
    visit = Visit(reader, writer, planner, asked, 0.45, 0.0, stay, can_pass_on=True, passes_on=planned)
    if is_busy:
        writer.forecast.sends_prompt("long", 2048, 0.4, 5.0)
    visit.read(0.45)
    assert visit.passes_on == passes_on


def test_a_reader_that_fails_passes_nothing_on() -> None:
    visit = split_visit(Planner(lambda ratio: None))
    visit.gave_up(0.3)
    assert not visit.split and not visit.passes_on
    visit.begins(0.8)
    assert running(visit) == 1
    visit.over(2.0, 2.0, 100)
    forecast = visit.writer.forecast
    assert forecast is not None and forecast.answers == 0


def fleet(number: int, kv_tokens: float = inf) -> Pools:
    pools = Pools(lambda worker: worker.slots)
    for at in range(number):
        worker = Worker(f"w{at}", "", Role.BOTH, plugin=True, hands_over=True)
        pools.add(WorkerLoad(worker, kv_tokens=kv_tokens), ("m",))
    return pools


def serves(planner: Planner, pools: Pools, requests: int, *, every_s: float, since: float = 0.0) -> list[Visit]:
    """The later half of so many requests with long prompts and a tight objective, each served to its end."""
    due: list[tuple[float, int, Callable[[float], None]]] = []  # what happens to those that were placed, and when
    visits: list[Visit] = []
    for number in range(requests):
        now = since + every_s * number
        happen(due, now)
        visit = planner.place(Asked(5000, 200.0, Objectives(2.0, 0.0135)), pools.of("m"), {}, now)
        assert visit is not None
        visits.append(visit)
        for at, (after_s, happens) in enumerate(life(visit)):
            heappush(due, (now + after_s, 4 * number + at, happens))
    happen(due, inf)
    return visits[requests // 2 :]


def happen(due: list[tuple[float, int, Callable[[float], None]]], until: float) -> None:
    while due and due[0][0] <= until:
        at_s, _, happens = heappop(due)
        happens(at_s)


def life(visit: Visit) -> Iterator[tuple[float, Callable[[float], None]]]:
    """What happens to a visit, and after how many seconds."""
    visit.reader.reserve(1, visit.prompt_tokens)
    visit.writer.reserve(1, 200)

    def over(now: float) -> None:
        visit.writer.release(1, 200)
        visit.over(now, now, 200)

    def read(now: float) -> None:
        visit.reader.release(1, visit.prompt_tokens)
        visit.read(now)

    yield from ((0.31, read), (0.32, visit.begins), (0.33, visit.goes_on), (2.3, over))


def sides_of(visits: list[Visit]) -> tuple[set[int], set[int]]:
    """Which engines read, and which ones answer what others have read."""
    apart = [visit for visit in visits if visit.split]
    return {one.reader.number for one in apart}, {one.writer.number for one in apart}


def test_engines_of_a_fleet_keep_their_sides_whoever_is_busy_and_whoever_leaves() -> None:
    """The last ones read, and the first ones answer: for every request the same, though few of them are looked at."""
    pools, planner = fleet(12), Planner(lambda ratio: None)
    visits = serves(planner, pools, 800, every_s=0.05)
    readers, writers = sides_of(visits)
    assert sum(visit.split for visit in visits) > 200 and max(writers) < min(readers)
    for load in [load for load in pools.workers.values() if load.number <= 8]:
        pools.remove(load)
    readers, writers = sides_of(serves(planner, pools, 800, every_s=0.2, since=100.0))
    assert 9 <= min(writers) and max(writers) < min(readers)


def test_what_sides_are_worth_follows_from_what_all_gateways_ask() -> None:
    def answered_by_the_second(gateways: int) -> int:
        visits = serves(Planner(lambda ratio: None, sharers=lambda: gateways), fleet(2), 400, every_s=1.5)
        return sum(visit.writer.number == 2 for visit in visits)

    assert answered_by_the_second(1) > 50 and answered_by_the_second(3) == 0


def test_as_many_engines_write_as_have_the_memory_for_all_answers() -> None:
    def writers(kv_tokens: float) -> int:
        return len(sides_of(serves(Planner(lambda ratio: None), fleet(4, kv_tokens), 400, every_s=0.2))[1])

    assert (writers(inf), writers(30_000.0)) == (1, 2)


def test_a_prompt_is_expected_to_take_longer_where_the_engine_limits_its_steps() -> None:
    def ttft_s(*, plugin: bool) -> float:
        pools, planner = Pools(lambda worker: worker.slots), Planner(lambda ratio: None)
        pools.add(WorkerLoad(Worker("w", "", Role.BOTH, plugin=plugin, hands_over=True)), ("m",))
        asked = Asked(5000, 200.0, Objectives(2.0, 0.03))
        first = planner.place(asked, pools.of("m"), {}, 0.0)
        assert first is not None
        first.begins(0.5)
        second = planner.place(asked, pools.of("m"), {}, 0.6)
        assert second is not None
        return second.ttft_s

    assert ttft_s(plugin=True) > 1.2 * ttft_s(plugin=False)
