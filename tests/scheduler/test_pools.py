"""An index of workers chooses as a look at all of them does, whatever has happened to them before."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.bench.full_scan import FullScan
from scheduler.placement import Aggregated, Disaggregated, Rules, place
from scheduler.pools import Pools, WorkerLoad
from scheduler.routing import ANY_ROLE, LOOKS, Choice, cheapest_of_all
from scheduler.workers import Role, Worker

MODELS = [("base",), ("base", "adapter"), ("other",)]
TYPICAL = 500.0
RULES = Rules(min_prompt_tokens=100, busy_tokens=1000, max_arriving_tokens=2000)


class Site:
    """A fleet to which random things happen."""

    def __init__(self, random: Random, size: int) -> None:
        self.random = random
        self.ahead = 4
        self.sharers = 1
        self.pools = Pools(lambda worker: worker.slots + self.ahead, lambda: self.sharers)
        self.models: dict[str, tuple[str, ...]] = {}
        self.loads: dict[str, WorkerLoad] = {}
        for number in range(size):
            self.join(f"w{number}")

    def join(self, name: str) -> None:
        role = self.random.choice([Role.BOTH, Role.BOTH, Role.PREFILL, Role.DECODE])
        load = WorkerLoad(Worker(name, f"http://{name}", role, slots=self.random.choice([1, 2, 8, 64])))
        self.loads[name], self.models[name] = load, self.random.choice(MODELS)
        self.pools.add(load, self.models[name])

    def happens(self) -> None:
        """One thing."""
        random, name = self.random, self.random.choice(list(self.loads))
        load = self.loads[name]
        match random.randrange(9):
            case 0 | 1 | 2:
                load.reserve(random.randint(1, 4), random.randint(0, 3000))
            case 3 | 4:
                load.release(load.in_flight, load.pending_tokens)
            case 5:
                load.observe(others=random.choice([0, 0, 3, 50]), kv_usage=random.choice([0.0, 0.5, 0.97, 7.0]))
            case 6:
                load.expect(random.choice([0, 1500]) - load.arriving_tokens)
            case 7:
                self._comes_or_goes(load)
            case 8:
                self._changes(load)
        self._settle()

    def _comes_or_goes(self, load: WorkerLoad) -> None:
        if load.pool is None:
            self.pools.add(load, self.models[load.worker.id])
        else:
            self.pools.remove(load)

    def _changes(self, load: WorkerLoad) -> None:
        load.leans = self.random.choice(list(Role))
        load.worker = replace(load.worker, slots=self.random.choice([1, 8, 64]))
        self.models[load.worker.id] = self.random.choice(MODELS)
        load.observe()
        self.pools.moved(load, self.models[load.worker.id])
        self.ahead, self.sharers = self.random.choice([0, 4]), self.random.choice([1, 3])

    def _settle(self) -> None:
        for pool in self.pools.all():
            pool.typical_tokens = TYPICAL
        self.pools.refresh()

    def chosen(self, kind: type[Choice], seed: int) -> list[object]:
        """What a few random requests are given."""
        random, given = Random(seed), list[object]()
        for model in ("base", "adapter", "other"):
            known = {
                name: random.choice([50, 5000]) for name in random.sample(list(self.loads), min(2, len(self.loads)))
            }
            avoid = random.choice(["", *self.loads])
            pools = self.pools.of(model)
            for sequences in (1, 3, 40):
                choice = kind(pools, TYPICAL, known=known, sequences=sequences, avoid=avoid)
                roles = random.choice([ANY_ROLE, {Role.BOTH}, {Role.PREFILL}])
                load = choice.cheapest(roles)
                if sequences == 1 and not avoid and roles is ANY_ROLE:
                    assert cheapest_of_all(pools, TYPICAL, known) is load
                given.append(None if load is None else (load.worker.id, choice.cost(load)))
                placed = place(500, choice, RULES, splittable=sequences == 1)
                match placed:
                    case Disaggregated(prefill, decode):
                        given.append((prefill.worker.id, decode.worker.id))
                    case Aggregated(worker, why):
                        given.append((worker.worker.id, why))
                    case None:
                        given.append(None)
        return given


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, LOOKS), steps=st.integers(1, 40))
def test_the_index_chooses_as_a_full_scan_does(seed: int, size: int, steps: int) -> None:
    site = Site(Random(seed), size)
    for step in range(steps):
        site.happens()
        if step % 4 == 0:
            assert site.chosen(Choice, step) == site.chosen(FullScan, step)


def test_in_a_large_fleet_a_request_of_one_answer_goes_where_a_full_scan_sends_it() -> None:
    random = Random(7)
    pools = Pools()
    loads = [WorkerLoad(Worker(f"w{number}", "", slots=8)) for number in range(300)]
    for load in loads:
        pools.add(load, ("m",))
    held: list[tuple[WorkerLoad, int]] = []
    for _ in range(400):
        known = {f"w{random.randrange(300)}": random.choice([100, 4000]) for _ in range(random.randrange(4))}
        index, scan = (kind(pools.of("m"), TYPICAL, known=known).cheapest() for kind in (Choice, FullScan))
        assert index is scan is cheapest_of_all(pools.of("m"), TYPICAL, known)
        if index is not None:
            held.append((index, random.randint(10, 2000)))
            index.reserve(1, held[-1][1])
        if len(held) > 350 and random.random() < 0.5:
            load, tokens = held.pop(random.randrange(len(held)))
            load.release(1, tokens)


def test_a_choice_looks_at_as_many_of_a_thousand_workers_as_of_256() -> None:
    """Counted in workers whose cost is compared, for one answer and for several, whole and split."""

    def looks(size: int) -> int:
        pools, seen = Pools(), 0
        for number in range(size):
            role = [Role.PREFILL, Role.DECODE][number % 2]
            pools.add(WorkerLoad(Worker(f"w{number}", "", role, slots=2), in_flight=number % 3), ("m",))

        class Counted(Choice):
            def _suits(self, load: WorkerLoad, fits: object) -> bool:
                nonlocal seen
                seen += 1
                return super()._suits(load, fits)  # type: ignore[arg-type]

        place(500, Counted(pools.of("m"), TYPICAL), RULES, splittable=True)
        Counted(pools.of("m"), TYPICAL, sequences=3).cheapest()
        return seen

    assert 0 < looks(1000) == looks(256) <= 3 * LOOKS


def test_the_heap_does_not_grow_with_what_has_happened() -> None:
    pools = Pools()
    loads = [WorkerLoad(Worker(f"w{number}", "")) for number in range(4)]
    for load in loads:
        pools.add(load, ("m",))
    for _ in range(1000):
        first = pools.of("m")[0].first()
        assert first is not None
        first.reserve(1, 10)
        first.release(1, 10)
        assert Choice(pools.of("m"), TYPICAL, sequences=2).cheapest() is not None
    assert len(pools.of("m")[0]._heap) < 200


def test_two_workers_of_one_name_cannot_be() -> None:
    pools = Pools()
    pools.add(WorkerLoad(Worker("w", "")), ("m",))
    with pytest.raises(ValueError, match="'w'"):
        pools.add(WorkerLoad(Worker("w", "")), ("m",))


def test_a_model_that_nobody_serves_any_more_has_no_pool() -> None:
    pools, load = Pools(), WorkerLoad(Worker("w", ""))
    pools.add(load, ("a", "b"))
    assert [*pools.of_model] == ["a", "b"]
    pools.moved(load, ("b",))
    assert not pools.of("a") and len(pools.of("b")) == 1
    pools.remove(load)
    pools.remove(load)
    assert not pools.of_model and not pools.all() and not pools.workers
