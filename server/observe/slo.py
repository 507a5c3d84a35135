"""How many streams kept their objectives: one counter that alerts, dashboards and goodput are made of."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.objectives import Objectives
from server.observe.observer import Observer
from server.request.call import Phase, Ticket
from server.request.tenants import Tenant
from server.settings import SloSettings, SloTarget

DEFAULT: Final = Objectives(2.0, 0.1)  # by which streams are judged where nothing is set
OUTCOMES = ("met", "ttft", "tpot", "both")


class SloTargets:
    """The objectives in force, by model and tenant."""

    def __init__(self, settings: SloSettings, unset: Objectives = DEFAULT) -> None:
        """unset: what holds where nothing is set."""
        self._general = _over(unset, settings)
        self._models: Mapping[str, Objectives] = {name: _over(unset, settings.of(name)) for name in settings.models}

    def of(self, model: str, tenant: Tenant) -> Objectives:
        """What a tenant's streams are promised: its own objectives, else the model's, else the general ones."""
        targets = self._models.get(model, self._general)
        return targets if tenant.slo is None else _over(targets, tenant.slo)

    def rows(self) -> Iterator[tuple[str, Objectives]]:
        """(model, objectives) for metrics; the general ones under an empty name."""
        yield "", self._general
        yield from self._models.items()


def _over(targets: Objectives, own: SloSettings | SloTarget | object) -> Objectives:
    """`targets`, but for those that `own` (anything with `ttft_s` and `tpot_s`) names itself."""
    given = {name: value for name in ("ttft_s", "tpot_s") if (value := getattr(own, name)) is not None}
    return replace(targets, **given)


class SloMetrics(Observer, Collector):
    """Judges every stream that came to its end."""

    def __init__(self, targets: SloTargets) -> None:
        self._targets = targets
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def ended(self, ticket: Ticket, outcome: str) -> None:
        call = ticket.call
        first, done = ticket.times[Phase.DECODING], ticket.times[Phase.DONE]
        if not (call.stream and call.route.generates) or first is None or done is None:
            return
        targets = self._targets.of(call.model, call.tenant)
        late = first - ticket.job.arrived_at > targets.ttft_s
        slow = ticket.tokens > 1 and done - first > targets.tpot_s * (ticket.tokens - 1)
        self.outcomes[call.model, OUTCOMES[late + 2 * slow]] += 1

    def collect(self) -> Iterator[Metric]:
        judged = CounterMetricFamily(
            "evenhand_slo_streams",
            "Finished streams: `met` both objectives, or missed `ttft`, `tpot` or `both`.",
            labels=("model", "outcome"),
        )
        for model in {model for model, _ in self.outcomes}:
            for outcome in OUTCOMES:
                judged.add_metric((model, outcome), self.outcomes[model, outcome])
        yield judged
        seconds = GaugeMetricFamily(
            "evenhand_slo_seconds",
            "Objectives in force, by model; the empty name stands for models without their own.",
            labels=("model", "objective"),
        )
        for model, targets in self._targets.rows():
            seconds.add_metric((model, "ttft"), targets.ttft_s)
            seconds.add_metric((model, "tpot"), targets.tpot_s)
        yield seconds
