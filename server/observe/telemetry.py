"""Every metric of the gateway, declared once.

Histograms are our own accumulators, read by Prometheus when it scrapes: observing costs 0.2 µs, a tenth of
prometheus_client's, and one is observed for every token that passes.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from scheduler.jobs import Tier
from server.fleet.fleet import WorkerRow
from server.observe.observer import Observer
from server.request.call import Call, Phase, Ticket

# 1 ms to 10 min: a token of a small model, and the longest wait that anybody has patience for.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5,
    10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip


RATIOS = (0.1, 0.25, 0.4, 0.6, 0.75, 0.85, 0.95, 1.05, 1.15, 1.25, 1.4, 1.6, 2.5, 4.0, 10.0)


class Distribution:
    """A histogram that costs next to nothing to feed."""

    __slots__ = ("name", "help", "bounds", "counts", "sum")

    def __init__(self, name: str, help: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name = name
        self.help = help
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self) -> HistogramMetricFamily:
        sums = list(accumulate(self.counts))
        names = [*(repr(bound) for bound in self.bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, sums, strict=True)]
        return HistogramMetricFamily(self.name, self.help, buckets=buckets, sum_value=self.sum)


class Telemetry(Observer, Collector):
    """What happened, for `/metrics`. Reads the present state (queue depth, workers) when it is asked."""

    def __init__(
        self,
        depth: Callable[[], Iterable[tuple[str, int]]],
        placed: Callable[[], Iterable[tuple[str, int]]],
        workers: Callable[[], Iterable[WorkerRow]],
        by_tier: Callable[[], Mapping[Tier, int]] = dict,
    ) -> None:
        self.depth = depth
        self.placed = placed
        self.workers = workers
        self.by_tier = by_tier
        # Of flex, which may wait for minutes, there are histograms apart: the others say what people notice.
        self.ttft = Distribution("evenhand_request_ttft_seconds", "Arrival to the first bytes of the answer.")
        self.second = Distribution(
            "evenhand_request_second_token_seconds", "From the first token of a streamed answer to its second."
        )
        self.itl = Distribution("evenhand_request_itl_seconds", "Gap between two streamed chunks of one answer.")
        self.tpot = Distribution("evenhand_request_tpot_seconds", "(E2E - TTFT) / (output tokens - 1).")
        self.e2e = Distribution("evenhand_request_e2e_seconds", "Arrival to the end of the answer.")
        self.kv_transfer = Distribution(
            "evenhand_kv_transfer_seconds",
            "From the end of a prefill at another worker to the answer's first bytes.",
        )
        self.predicted = Distribution(
            "evenhand_predicted_ttft_ratio",
            "Predicted over actual seconds from placement to first token, where placement is by prediction.",
            RATIOS,
        )
        self.queue = Distribution("evenhand_request_queue_seconds", "Time in the queue until a worker had room.")
        self.flex_queue = Distribution("evenhand_flex_queue_seconds", "Wait of flex requests until they started.")
        self.flex_itl = Distribution("evenhand_flex_itl_seconds", "Gap between two streamed chunks of a flex answer.")
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.tiers: Counter[tuple[str, str]] = Counter()
        self.tier_tokens: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.models: Counter[tuple[str, str, str]] = Counter()
        self.fallbacks: Counter[tuple[str, str, str, str]] = Counter()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def refused(self, path: str, outcome: str) -> None:
        """A request that was answered before it became a call (bad body, unknown key)."""
        self.outcomes[path, outcome] += 1

    def fell_back(self, call: Call, model: str, outcome: str) -> None:
        """The model of a call could not answer, and another is asked. outcome: how the first one ended."""
        self.fallbacks[call.name, call.model, model, outcome] += 1

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """A call is over: its phases become latencies."""
        call = ticket.call
        self.outcomes[call.route.path, outcome] += 1
        self.models[call.name or call.model, call.model, outcome] += 1
        arrived, sent, first, done = ticket.times[: Phase.DONE + 1]
        assert arrived is not None  # a ticket begins with it
        flex, tier = call.tier is Tier.FLEX, call.tier.label
        self.tiers[tier, outcome] += 1
        if sent is not None:
            (self.flex_queue if flex else self.queue).observe(sent - arrived)
        if not ticket.call.route.generates:
            return
        self.tier_tokens[tier, "completion"] += ticket.tokens
        self.tokens["completion"] += ticket.tokens
        if ticket.exact:
            self.tier_tokens[tier, "prompt"] += ticket.prompt_tokens
            self.tokens["prompt"] += ticket.prompt_tokens
            self.tokens["cached"] += ticket.cached_tokens
        if flex:
            return
        if first is not None and ticket.call.stream:
            self._streamed(ticket, first, done)
        if done is not None:
            self.e2e.observe(done - arrived)

    def _streamed(self, ticket: Ticket, first: float, done: float | None) -> None:
        self.ttft.observe(first - ticket.job.arrived_at)
        if ticket.second_s is not None:
            self.second.observe(ticket.second_s)
        if done is not None and ticket.tokens > 1:
            self.tpot.observe((done - first) / (ticket.tokens - 1))
        if ticket.split is not None and ticket.split.read_at is not None:
            self.kv_transfer.observe(first - ticket.split.read_at)

    def collect(self) -> Iterator[Metric]:
        latencies = (
            self.ttft,
            self.second,
            self.itl,
            self.tpot,
            self.e2e,
            self.queue,
            self.kv_transfer,
            self.predicted,
        )
        for distribution in (*latencies, self.flex_queue, self.flex_itl):
            yield distribution.family()
        requests = CounterMetricFamily("evenhand_requests", "Requests by how they ended.", labels=("route", "outcome"))
        for (path, outcome), count in self.outcomes.items():
            requests.add_metric((path, outcome), count)
        yield requests
        yield from self._of_models()
        yield from self._of_tiers()
        tokens = CounterMetricFamily(
            "evenhand_tokens", "Tokens of finished requests; cached ones are part of the prompt.", labels=("kind",)
        )
        for kind in ("prompt", "completion", "cached"):
            tokens.add_metric((kind,), self.tokens[kind])
        yield tokens
        depth = GaugeMetricFamily("evenhand_queue_depth", "Requests that wait for a worker.", labels=("model",))
        for model, waiting in self.depth():
            depth.add_metric((model,), waiting)
        yield depth
        yield from self._of_workers()
        placed = CounterMetricFamily(
            "evenhand_placements",
            "Requests to a fleet with prefill or decode workers: `apart`, or why one worker took them whole.",
            labels=("placement",),
        )
        for placement, count in self.placed():
            placed.add_metric((placement,), count)
        yield placed

    def _of_tiers(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "evenhand_tier_requests", "Requests by service tier and how they ended.", labels=("tier", "outcome")
        )
        for labels, count in self.tiers.items():
            requests.add_metric(labels, count)
        yield requests
        tokens = CounterMetricFamily(
            "evenhand_tier_tokens", "Tokens of finished requests by service tier.", labels=("tier", "kind")
        )
        for labels, count in self.tier_tokens.items():
            tokens.add_metric(labels, count)
        yield tokens
        waiting = GaugeMetricFamily(
            "evenhand_tier_waiting", "Requests of a service tier that wait for a worker.", labels=("tier",)
        )
        for tier, count in self.by_tier().items():
            waiting.add_metric((tier.label,), count)
        yield waiting

    def _of_models(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "evenhand_model_requests",
            "Requests by the requested name (`*`: the name that stands for every other) and the model it led to.",
            labels=("name", "model", "outcome"),
        )
        for labels, count in self.models.items():
            requests.add_metric(labels, count)
        yield requests
        fallbacks = CounterMetricFamily(
            "evenhand_fallbacks",
            "Requests that fell back to another model, by the outcome at the first.",
            labels=("name", "model", "fallback", "outcome"),
        )
        for steps, count in self.fallbacks.items():
            fallbacks.add_metric(steps, count)
        yield fallbacks

    def _of_workers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("evenhand_worker_up", "Whether a worker takes requests.", labels=("worker", "role"))
        busy = GaugeMetricFamily(
            "evenhand_worker_in_flight", "Sequences in flight at a worker from this gateway.", labels=("worker", "role")
        )
        pending = GaugeMetricFamily(
            "evenhand_worker_pending_tokens",
            "Tokens that a worker has yet to compute for this gateway, as expected.",
            labels=("worker", "role"),
        )
        slots = GaugeMetricFamily(
            "evenhand_worker_slots", "Sequences that a ready worker runs at once.", labels=("worker",)
        )
        flex = GaugeMetricFamily(
            "evenhand_worker_flex_in_flight",
            "Sequences of flex requests in flight at a worker from this gateway.",
            labels=("worker",),
        )
        for row in self.workers():
            labels = (row.worker, row.role.value)
            up.add_metric(labels, float(row.ready))
            busy.add_metric(labels, row.in_flight)
            pending.add_metric(labels, row.pending_tokens)
            slots.add_metric((row.worker,), row.slots if row.ready else 0)
            flex.add_metric((row.worker,), row.flex)
        yield from (up, busy, pending, slots, flex)
