"""Workers that may be given requests, each pool in order of load: a choice looks at a few of them, not at all.

A pool is the workers that are alike to a request: they serve the same models and have the same role. With n workers in
it a change of one worker's load costs O(log n), amortised, and the least loaded is found in as much. Where workers
serve different sets of models (adapters), a model has as many pools as there are such sets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

from scheduler.forecast import EngineForecast
from scheduler.pacing import Pacing
from scheduler.workers import Role, Worker

TYPICAL_TOKENS = 512.0  # of one request, before any was seen
_SLACK = 64  # outdated entries of a heap that are not worth a clean-up


@dataclass(slots=True, eq=False)
class WorkerLoad:
    """What a worker has to do. Change it through its methods only: its pool's order follows them.

    flex, flex_tokens: of the sequences in flight those of the flex tier, and tokens that are expected of them.
    in_flight, pending_tokens: sequences that it has from its owner, and tokens that it has yet to compute for them.
    arriving_tokens: prompts of requests that it is to answer and whose KV another worker has yet.
    others: sequences that it has from elsewhere. kv_usage: share of its KV cache in use, 0 to 1.
    leans: the side to which a worker of role `both` leans; BOTH if to none.
    kv_tokens: that its KV cache holds. forecast: set where placement is by prediction. pacing: set once flex requests
    want a place at a worker that cannot displace them.
    window: sequences that it is given at a time. free: those that it may be given beside these, of another tier than
    flex.
    tokens_per_slot: what its pool orders it by.
    """

    worker: Worker
    in_flight: int = 0
    flex: int = 0
    flex_tokens: int = 0
    pending_tokens: int = 0
    arriving_tokens: int = 0
    others: int = 0
    kv_usage: float = 0.0
    leans: Role = Role.BOTH
    window: int = 0
    free: int = 0
    tokens_per_slot: float = 0.0
    kv_tokens: float = inf
    forecast: EngineForecast | None = None
    pacing: Pacing | None = None
    pool: "Pool | None" = None
    number: int = 0  # its place among equals
    posted: float = inf  # its lowest entry in its pool's heap

    @property
    def role(self) -> Role:
        """What the worker does at present."""
        return self.leans if self.worker.role is Role.BOTH else self.worker.role

    def reserve(self, sequences: int, tokens: int, *, flex: bool = False) -> None:
        """The worker is given a request of so many sequences, with so many tokens to compute."""
        self.in_flight += sequences
        if flex:
            self.flex += sequences
            self.flex_tokens += tokens
        self.pending_tokens += tokens
        if self.pool is not None:
            self.pool.file(self)

    def release(self, sequences: int, tokens: int, *, flex: bool = False) -> None:
        """What was reserved is given back."""
        self.reserve(-sequences, -tokens, flex=flex)

    def expect(self, tokens: int) -> None:
        """KV of so many tokens will come from another worker; below zero: has come, or will not."""
        self.arriving_tokens += tokens

    def observe(self, *, others: int | None = None, kv_usage: float | None = None) -> None:
        """What the worker says of itself, which may be in `worker` already."""
        if others is not None:
            self.others = others
        if kv_usage is not None:
            self.kv_usage = min(1.0, kv_usage)
        if self.pool is not None:
            self.pool.learn(self)


class Pool:
    """Workers that are alike to a request, those that have room in order of load; of equals, in that of their numbers.

    The order is that of tokens per slot: what a worker has to do, each of the `others` as a typical request, or the
    share of its KV cache in use as that many tokens of a full batch, whichever is more.

    A heap whose entries may be too low: a load that grew is noticed when its entry comes to the top, one that fell is
    entered anew.
    """

    __slots__ = ("_heap", "_pools", "changes", "models", "role", "typical_tokens", "workers")

    def __init__(self, pools: "Pools", models: tuple[str, ...], role: Role) -> None:
        self._pools = pools
        self._heap: list[tuple[float, int, WorkerLoad]] = []
        self.models = models
        self.role = role
        self.typical_tokens = TYPICAL_TOKENS  # of one request, prompt and answer: as whoever chose here last has it
        self.workers: dict[str, WorkerLoad] = {}
        self.changes = 0  # of `workers`

    def add(self, load: WorkerLoad) -> None:
        """A worker joins."""
        self.changes += 1
        load.pool, load.posted = self, inf
        self.workers[load.worker.id] = load
        self.learn(load)

    def remove(self, load: WorkerLoad) -> None:
        """A worker leaves."""
        self.changes += 1
        del self.workers[load.worker.id]
        load.pool, load.posted = None, inf

    def file(self, load: WorkerLoad) -> None:
        """A worker's load has changed.

        A request of several sequences needs one free place: where it waited for as many as it has, places would stand
        empty meanwhile, and all behind it would wait as well. The engine begins what exceeds its batch when it can, and
        until that is over nobody else is let in.
        """
        others = load.others
        pending = load.pending_tokens + others * self.typical_tokens if others else load.pending_tokens
        slots = load.worker.slots
        tokens_per_slot = pending / slots
        if load.kv_usage and (held := load.kv_usage * self.typical_tokens) > tokens_per_slot:
            tokens_per_slot = held
        load.tokens_per_slot = tokens_per_slot
        load.free = free = self._pools.free(load) if others or load.flex else load.window - load.in_flight
        if free > 0 and tokens_per_slot < load.posted:
            load.posted = tokens_per_slot
            heappush(self._heap, (tokens_per_slot, load.number, load))
            if len(self._heap) > 2 * len(self.workers) + _SLACK:
                self._rebuild()

    def refresh(self) -> None:
        """Whatever all loads depend on has changed."""
        for load in self.workers.values():
            self.learn(load)

    def learn(self, load: WorkerLoad) -> None:
        """What is known of a worker, or how many sequences it is given, may have changed."""
        load.window = self._pools.window(load.worker)
        self.file(load)

    def first(self) -> WorkerLoad | None:
        """The least loaded worker that has room, or None."""
        heap = self._heap
        while heap:
            posted, _, load = heap[0]
            if posted != load.posted or load.pool is not self:
                heappop(heap)
            elif load.free <= 0:
                load.posted = inf
                heappop(heap)
            elif load.tokens_per_slot > posted:
                load.posted = load.tokens_per_slot
                heapreplace(heap, (load.posted, load.number, load))
            else:
                return load
        return None

    def in_order(self) -> Iterator[WorkerLoad]:
        """Those that have room, least loaded first. Each costs O(log n). No load may change meanwhile."""
        taken: list[WorkerLoad] = []
        try:
            while (load := self.first()) is not None:
                heappop(self._heap)
                load.posted = inf  # other entries of it are outdated for as long as this goes on
                taken.append(load)
                yield load
        finally:
            for load in taken:
                load.posted = load.tokens_per_slot
                heappush(self._heap, (load.posted, load.number, load))

    def _rebuild(self) -> None:
        self._heap = []
        for load in self.workers.values():
            load.posted = load.tokens_per_slot if load.free > 0 else inf
            if load.free > 0:
                self._heap.append((load.posted, load.number, load))
        heapify(self._heap)


class Pools:
    """All workers that may be given requests.

    window: how many sequences a worker is given at a time; call `refresh` when it has changed.
    sharers: gateways that feed these workers, this one included.
    of_model: the pools that serve each model; none is empty, and there is no model without one.
    """

    def __init__(
        self, window: Callable[[Worker], int] = lambda worker: worker.slots, sharers: Callable[[], int] = lambda: 1
    ) -> None:
        self.window = window
        self.sharers = sharers
        self.workers: dict[str, WorkerLoad] = {}
        self._pools: dict[tuple[tuple[str, ...], Role], Pool] = {}
        self.of_model: dict[str, tuple[Pool, ...]] = {}
        self._joined = 0

    def add(self, load: WorkerLoad, models: tuple[str, ...]) -> None:
        """A worker may be given requests for these models. ValueError if one of its name may already."""
        if load.worker.id in self.workers:
            raise ValueError(f"a worker named {load.worker.id!r} is in a pool already")
        self.number(load)
        self.workers[load.worker.id] = load
        self._enter(load, models)

    def number(self, load: WorkerLoad) -> None:
        """Gives a worker its place among equals, if it has none: behind all that have one."""
        if not load.number:
            self._joined += 1
            load.number = self._joined

    def _enter(self, load: WorkerLoad, models: tuple[str, ...]) -> None:
        kind = models, load.role
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = Pool(self, *kind)
            for model in models:
                self.of_model[model] = (*self.of_model.get(model, ()), pool)
        pool.add(load)

    def remove(self, load: WorkerLoad) -> None:
        """A worker gets nothing new. Nothing happens if it was in no pool."""
        pool = load.pool
        if pool is None:
            return
        del self.workers[load.worker.id]
        self._leave(load, pool)

    def _leave(self, load: WorkerLoad, pool: Pool) -> None:
        pool.remove(load)
        if pool.workers:
            return
        del self._pools[pool.models, pool.role]
        for model in pool.models:
            left = tuple(other for other in self.of_model[model] if other is not pool)
            if left:
                self.of_model[model] = left
            else:
                del self.of_model[model]

    def moved(self, load: WorkerLoad, models: tuple[str, ...]) -> None:
        """A worker's role or models may have changed. Nothing happens if it is in no pool."""
        pool = load.pool
        if pool is not None and (pool.role is not load.role or pool.models != models):
            self._leave(load, pool)
            self._enter(load, models)

    def refresh(self) -> None:
        """`window` has changed."""
        for pool in self._pools.values():
            pool.refresh()

    def of(self, model: str) -> Sequence[Pool]:
        """The pools that serve a model."""
        return self.of_model.get(model, ())

    def all(self) -> Sequence[Pool]:
        """Every pool; none is empty."""
        return list(self._pools.values())

    def free(self, load: WorkerLoad) -> int:
        """How many more sequences a worker may be given that has some of flex, or some from elsewhere.

        What other gateways have at the worker takes room from this one, but for its own share of the window. Without
        that each would fill the engine by itself, and a tenant would be served by how many gateways know it. Where our
        scheduler is inside, it displaces what is of tier flex, which so takes nobody's place.
        """
        free = load.window - load.in_flight
        if load.flex and load.worker.plugin:
            free += load.flex
        if load.others and (sharers := self.sharers()) > 1:
            free -= min(load.others, load.window * (sharers - 1) // sharers)
        return free
