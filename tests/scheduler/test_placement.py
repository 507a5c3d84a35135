"""The decision as a table: one row, one situation."""

from dataclasses import dataclass, replace

import pytest

from loadtest.bench.full_scan import FullScan
from scheduler.placement import Aggregated, Disaggregated, Rules, Why, place
from scheduler.pools import Pools, WorkerLoad
from scheduler.workers import Role, Worker

RULES = Rules(min_prompt_tokens=100, busy_tokens=1000, max_arriving_tokens=2000)


@dataclass(frozen=True)
class Stand:
    """One worker of a situation, named after its role: p0 reads, d0 answers, b0 does both."""

    name: str
    cost: float = 0.0
    room: bool = True
    cached_tokens: int = 0
    pending_tokens: int = 0
    arriving_tokens: int = 0
    kv_usage: float = 0.0
    leans: Role = Role.BOTH

    def load(self) -> WorkerLoad:
        role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[self.name[0]]
        return WorkerLoad(
            Worker(self.name, f"http://{self.name}", role),
            in_flight=0 if self.room else 256,
            pending_tokens=self.pending_tokens,
            arriving_tokens=self.arriving_tokens,
            kv_usage=self.kv_usage,
            leans=self.leans,
        )


at = Stand


class Situation(FullScan):
    """Workers whose costs are given."""

    def __init__(self, stands: list[Stand]) -> None:
        pools = Pools()
        for stand in stands:
            pools.add(stand.load(), ("m",))
        known = {stand.name: stand.cached_tokens for stand in stands if stand.cached_tokens}
        super().__init__(pools.of("m"), 500.0, known=known)
        self.costs = {stand.name: stand.cost for stand in stands}

    def cost(self, load: WorkerLoad) -> float:
        return self.costs[load.worker.id]


def placed(prompt_tokens: int, stands: list[Stand], *, splittable: bool = True) -> tuple[str, str] | None:
    """(reader, answerer), or (worker, why it does both), or None."""
    match place(prompt_tokens, Situation(stands), RULES, splittable=splittable):
        case Disaggregated(prefill, decode):
            return prefill.worker.id, decode.worker.id
        case Aggregated(load, why):
            return load.worker.id, why.value
    return None


def apart(prefill: str, decode: str) -> tuple[str, str]:
    return prefill, decode


def together(name: str, why: Why) -> tuple[str, str]:
    return name, why.value


P, D = at("p0"), at("d0")
TABLE: dict[str, tuple[int, list[Stand], tuple[str, str] | None]] = {
    "a long prompt is read by one and answered by another": (500, [P, D], apart("p0", "d0")),
    "just long enough": (100, [P, D], apart("p0", "d0")),
    "short": (99, [P, D], together("d0", Why.SHORT_PROMPT)),
    "short, and one that does both is idler": (9, [P, at("d0", 5), at("b0", 4)], together("b0", Why.SHORT_PROMPT)),
    "short, and nobody has room": (9, [P, at("d0", room=False)], None),
    "the cheapest of each pool": (
        500,
        [at("p0", 7), at("p1", 3), at("d0", 7), at("d1", 9)],
        apart("p1", "d0"),
    ),
    "the cheapest that have room": (
        500,
        [at("p0", 3, room=False), at("p1", 7), at("d0", 3, room=False), at("d1", 9)],
        apart("p1", "d1"),
    ),
    "its beginning is cached where it will be answered": (
        500,
        [P, at("d0", cached_tokens=401)],
        together("d0", Why.CACHED_PREFIX),
    ),
    "too little of it is cached": (500, [P, at("d0", cached_tokens=400)], apart("p0", "d0")),
    "cached, but not where it will be answered": (
        500,
        [P, at("d0", 1, cached_tokens=0), at("d1", 2, cached_tokens=500)],
        apart("p0", "d0"),
    ),
    "every prefill worker has too much to do": (
        500,
        [at("p0", pending_tokens=1001), at("p1", room=False), D],
        together("d0", Why.PREFILL_BUSY),
    ),
    "another prefill worker has less to do": (
        500,
        [at("p0", pending_tokens=1001), at("p1", 9, pending_tokens=1000), D],
        apart("p1", "d0"),
    ),
    "a prefill worker is full of KV that nobody has fetched": (
        500,
        [at("p0", kv_usage=0.96), D],
        together("d0", Why.PREFILL_BUSY),
    ),
    "no decode worker has room": (500, [P, at("d0", room=False)], None),
    "no decode worker has room, but one that does both": (
        500,
        [P, at("d0", room=False), at("b0")],
        together("b0", Why.DECODE_BUSY),
    ),
    "too much KV is on its way": (1001, [P, at("d0", arriving_tokens=1000)], None),
    "just not too much": (1000, [P, at("d0", arriving_tokens=1000)], apart("p0", "d0")),
    "one prompt alone may be longer than the bound": (9999, [P, D], apart("p0", "d0")),
    "less KV is on its way to another": (
        1001,
        [P, at("d0", 1, arriving_tokens=1000), at("d1", 2, arriving_tokens=900)],
        apart("p0", "d1"),
    ),
    "too much KV is on its way, but one does both": (
        1001,
        [P, at("d0", arriving_tokens=1000), at("b0", 9)],
        together("b0", Why.BACK_PRESSURE),
    ),
    "no prefill worker": (500, [at("d0", 2), at("b0", 3)], together("d0", Why.NO_POOL)),
    "no decode worker": (500, [P, at("b0", 3)], together("b0", Why.NO_POOL)),
    "only workers that do both": (500, [at("b0", 3), at("b1", 2)], together("b1", Why.NO_POOL)),
    "only prefill workers are left": (500, [at("p0", 3), at("p1", 2)], together("p1", Why.NO_POOL)),
    "only a prefill worker is left, and full": (500, [at("p0", room=False)], None),
    "nobody": (500, [], None),
}


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_placement(row: str) -> None:
    prompt_tokens, stands, expected = TABLE[row]
    assert placed(prompt_tokens, stands) == expected


def test_what_cannot_be_split_is_never_split() -> None:
    assert placed(500, [P, D], splittable=False) == together("d0", Why.UNFIT)
    assert placed(500, [P, replace(D, room=False)], splittable=False) is None
    assert placed(500, [P], splittable=False) == together("p0", Why.UNFIT)


def test_a_worker_that_leans_is_one_of_its_side() -> None:
    reads, answers = at("b0", 1, leans=Role.PREFILL), at("b1", 1, leans=Role.DECODE)
    assert placed(500, [at("p0", 2), at("d0", 2), reads, answers]) == apart("b0", "b1")
    assert placed(9, [P, at("d0", 2), reads]) == together("d0", Why.SHORT_PROMPT)


def test_whoever_is_chosen_has_room() -> None:
    for prompt_tokens, stands, _ in TABLE.values():
        free = {stand.name for stand in stands if stand.room}
        chosen = placed(prompt_tokens, stands)
        assert chosen is None or set(chosen) - {why.value for why in Why} <= free
