"""What requests cost: GPU-seconds, and money by a price for each model and a factor for each tier.

A worker's busy time is shared by the requests that ran in it, by the tokens it computed for them. How it is shared is
an estimate from what the gateway sees. The sum is exact: each GPU-second in which a worker was busy is some request's.

The time that passes while a worker is busy goes into a pot. A request that ends takes its part: its own tokens over all
that were computed until then for those that share the worker with it. The last one takes what is left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.fairness import OTHER, OUTPUT_WEIGHT, PROMPT_WEIGHT
from server.observe.observer import Observer
from server.request.call import Phase, Ticket
from server.settings import CostSettings

HOUR_S = 3600
PRICED_TOKENS = 1_000_000
ANY = "*"  # the entry of prices for all models that have none
TYPICAL_OUTPUT_TOKENS = 256  # that an answer in one piece is taken to have while it runs
LEARN_SHARE = 0.05


class UsageKey(msgspec.Struct, frozen=True, array_like=True):
    """What a row is about. hour: seconds since 1970, divided by 3600. model: the name that was asked."""

    hour: int
    tenant: str
    model: str
    tier: str


class Used(msgspec.Struct, array_like=True):
    """What was used. cost: in the currency of the prices."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gpu_s: float = 0.0
    cost: float = 0.0

    def add(self, other: "Used") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, eq=False)
class WorkerPot:
    """GPU-seconds of one worker that no request has been given yet. at: until when they are counted.

    prefill: it only reads prompts, so that a request runs in it until its prompt is read.
    """

    worker: str
    gpus: int
    at: float
    prefill: bool = False
    seconds: float = 0.0
    running: dict[Ticket, None] = field(default_factory=dict)

    def pass_to(self, now: float) -> None:
        end = now
        if self.prefill:
            reads = [ticket.split for ticket in self.running if ticket.split is not None]
            if not any(split.reading for split in reads):
                end = max((split.read_at or self.at for split in reads), default=self.at)
        if self.running:
            self.seconds += max(0.0, end - self.at) * self.gpus
        self.at = now

    def enter(self, ticket: Ticket, now: float) -> None:
        self.pass_to(now)
        self.running[ticket] = None

    def leave(self, ticket: Ticket, now: float, work: Callable[[Ticket], float]) -> float:
        """The GPU-seconds of a request that ends."""
        self.pass_to(now)
        del self.running[ticket]
        own = work(ticket)
        others = sum(map(work, self.running))
        share = own / (own + others) if own + others else 1.0 / (len(self.running) + 1)
        taken = self.seconds * share if self.running else self.seconds
        self.seconds -= taken
        return taken


class CostMeter(Observer, Collector):
    """Counts what every request used.

    factors: of prices, by service tier. labels: tenants named in metrics. spend: told what each request cost.
    """

    def __init__(
        self,
        prices: CostSettings,
        clock: Callable[[], float],
        wall: Callable[[], float],
        *,
        factors: Mapping[str, float],
        labels: int,
        spend: Callable[[str, float], None] = lambda tenant, cost: None,
    ) -> None:
        self.prices = prices
        self.factors = factors
        self._spend = spend
        self.rows: dict[UsageKey, Used] = {}
        self._clock = clock
        self._wall = wall
        self._labels = labels
        self._pots: dict[str, WorkerPot] = {}
        self._entered: dict[Ticket, tuple[tuple[WorkerPot, ...], float]] = {}
        self._tokens_per_s = 10.0
        self._gpu_s: Counter[str] = Counter()
        self._cost: Counter[str] = Counter()

    def got_place(self, ticket: Ticket) -> None:
        before_s = self._left(ticket, self._clock())
        member = ticket.member
        if member is None or not ticket.call.route.generates:
            return
        now = self._clock()
        pots = [self._pot(member.worker.id, member.worker.gpus, prefill=False)]
        if ticket.split is not None:
            reader = ticket.split.prefill.worker
            pots.append(self._pot(reader.id, reader.gpus, prefill=True))
        for pot in pots:
            pot.enter(ticket, now)
        self._entered[ticket] = tuple(pots), before_s

    def _left(self, ticket: Ticket, now: float) -> float:
        """GPU-seconds of a request that leaves the workers where it was."""
        pots, before_s = self._entered.pop(ticket, ((), 0.0))
        taken_s = before_s + sum(pot.leave(ticket, now, self._work) for pot in pots)
        for pot in pots:
            if not pot.running and self._pots.get(pot.worker) is pot:  # nothing is in it
                del self._pots[pot.worker]
        return taken_s

    def _pot(self, worker: str, gpus: int, *, prefill: bool) -> WorkerPot:
        pot = self._pots.get(worker)
        if pot is None or pot.gpus != gpus or pot.prefill != prefill:
            pot = self._pots[worker] = WorkerPot(worker, gpus, self._clock(), prefill)
        return pot

    def ended(self, ticket: Ticket, outcome: str) -> None:
        now, call = self._clock(), ticket.call
        if ticket not in self._entered:
            return
        gpu_s = self._left(ticket, now)
        self._learn(ticket, now)
        used = Used(1, ticket.prompt_tokens, ticket.cached_tokens, max(0, ticket.tokens), gpu_s)
        model, tier = call.name or call.model, call.tier.label
        used.cost = self.factors.get(tier, 1.0) * money(self.prices, used, (model, call.model, ANY))
        key = UsageKey(int(self._wall() // HOUR_S), call.tenant.name, model, tier)
        self.rows.setdefault(key, Used()).add(used)
        self._spend(call.tenant.name, used.cost)
        label = call.tenant.name
        if label not in self._gpu_s and len(self._gpu_s) >= self._labels:
            label = OTHER
        self._gpu_s[label] += gpu_s  # type: ignore[assignment]  # Counter's stubs know whole numbers only
        self._cost[label] += used.cost  # type: ignore[assignment]

    def _work(self, ticket: Ticket) -> float:
        """Weighted tokens that were computed for a request by now."""
        prompt = PROMPT_WEIGHT * max(0, ticket.prompt_tokens - ticket.cached_tokens)
        return prompt + OUTPUT_WEIGHT * (ticket.tokens if ticket.call.stream or ticket.ended else self._unseen(ticket))

    def _unseen(self, ticket: Ticket) -> float:
        """Output tokens of an answer in one piece, by how fast answers come lately."""
        began, call = ticket.times[Phase.PREFILLING], ticket.call
        if began is None or not call.route.makes_tokens:
            return 0.0
        most = (call.max_tokens or TYPICAL_OUTPUT_TOKENS) * call.sequences
        return min(most, (self._clock() - began) * self._tokens_per_s * call.sequences)

    def _learn(self, ticket: Ticket, now: float) -> None:
        began = ticket.times[Phase.PREFILLING]
        if ticket.tokens > 0 and began is not None and now > began:
            rate = ticket.tokens / ticket.call.sequences / (now - began)
            self._tokens_per_s += LEARN_SHARE * (rate - self._tokens_per_s)

    def collect(self) -> Iterator[Metric]:
        for name, help, amounts in (
            ("evenhand_tenant_gpu_seconds", "GPU-seconds of finished requests, an estimate.", self._gpu_s),
            ("evenhand_tenant_cost", "What finished requests cost, in the currency of the prices.", self._cost),
        ):
            family = CounterMetricFamily(name, help, labels=("tenant",))
            for tenant, amount in amounts.items():
                family.add_metric((tenant,), amount)
            yield family


def money(prices: CostSettings, used: Used, names: Iterable[str]) -> float:
    """What a request costs: by its tokens if one of these names has a price, else by its GPU time."""
    price = next((prices.models[name] for name in names if name in prices.models), None)
    if price is None:
        return prices.gpu_hour * used.gpu_s / HOUR_S
    cached = min(used.cached_tokens, used.prompt_tokens)
    cached_price = price.input if price.cached is None else price.cached
    total = price.input * (used.prompt_tokens - cached) + cached_price * cached + price.output * used.output_tokens
    return total / PRICED_TOKENS
