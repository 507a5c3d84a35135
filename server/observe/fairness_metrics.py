"""Metrics of what tenants share: service by tenant, the widest gap between them, refusals, and the store itself."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.fairness import FairnessTally
from scheduler.jobs import Job
from server.observe.observer import Observer
from server.request.call import Phase, Ticket


@dataclass(frozen=True, slots=True)
class TenantService:
    """service: weighted tokens since the start, by tenant or `other`. gap: see `scheduler.fairness.FairnessSample`."""

    service: dict[str, float]
    gap: float


class FairnessMetrics(Observer, Collector):
    """Counts service (weighted tokens) by tenant; only the largest are named, the rest is `other`.

    present: the jobs that run, and how many wait by tenant. refusals: by reason. store: whether it answers, and how
    many replicas there are.
    """

    def __init__(
        self,
        present: Callable[[], tuple[Iterable[Job], Mapping[str, int]]],
        refusals: Counter[str],
        store: Callable[[], tuple[bool, int]],
        clock: Callable[[], float],
        labels: int,
    ) -> None:
        self.tally = FairnessTally(labels=labels)
        self.clock = clock
        self._present = present
        self._refusals = refusals
        self._store = store
        self._service: Counter[str] = Counter()

    def ended(self, ticket: Ticket, outcome: str) -> None:
        # A request may leave between its place and its start: the tally then knows it by `present` alone.
        if ticket.times[Phase.PREFILLING] is not None or ticket.job in self.tally:
            self.tally.finished(ticket.job)

    def standing(self) -> TenantService:
        """What everybody got so far."""
        self.tally.present(*self._present())
        sample = self.tally.sample(self.clock())
        for label, amount in sample.service.items():
            self._service[label] += amount  # type: ignore[assignment]  # Counter's stubs know whole numbers only
        return TenantService(dict(self._service), sample.gap)

    def collect(self) -> Iterator[Metric]:
        standing = self.standing()
        service = CounterMetricFamily(
            "evenhand_tenant_service", "Weighted tokens (a prompt token 1, an output token 2).", labels=("tenant",)
        )
        for tenant, total in standing.service.items():
            service.add_metric((tenant,), total)
        yield service
        yield GaugeMetricFamily(
            "evenhand_fairness_max_service_gap",
            "Service gap between the most and the least served waiting tenant, in weighted tokens per weight.",
            standing.gap,
        )
        refused = CounterMetricFamily(
            "evenhand_limit_refusals", "Requests refused by a limit of their tenant.", labels=("reason",)
        )
        for reason in ("requests_per_minute", "tokens_per_minute", "concurrency", "budget"):
            refused.add_metric((reason,), self._refusals[reason])
        yield refused
        up, replicas = self._store()
        yield GaugeMetricFamily("evenhand_store_up", "Whether the shared store answers.", float(up))
        yield GaugeMetricFamily("evenhand_replicas", "Gateways that share limits and fairness.", replicas)
