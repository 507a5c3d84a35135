"""The metrics of several processes as one answer."""

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from server.cluster.merged_metrics import Family, exposition, joined, lasting, read, taken, written
from server.observe.telemetry import Distribution


class Shows:
    """A collector with these metrics."""

    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics

    def collect(self) -> tuple[Metric, ...]:
        return self.metrics


def families(*metrics: Metric) -> list[Family]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Shows(*metrics))  # type: ignore[arg-type]
    return read(written(taken(registry)))


def counter(**by_outcome: float) -> CounterMetricFamily:
    metric = CounterMetricFamily("evenhand_requests", "Requests.", labels=("outcome",))
    for outcome, value in by_outcome.items():
        metric.add_metric((outcome,), value)
    return metric


def shown(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counters_are_added_up_label_by_label() -> None:
    both = joined([families(counter(ok=3, cancelled=1)), families(counter(ok=4, overloaded=2))])
    assert shown(exposition(both)) == {
        ("evenhand_requests_total", ("ok",)): 7,
        ("evenhand_requests_total", ("cancelled",)): 1,
        ("evenhand_requests_total", ("overloaded",)): 2,
    }


def test_histograms_stay_histograms() -> None:
    one, other = Distribution("x_seconds", "", (0.1, 1.0)), Distribution("x_seconds", "", (0.1, 1.0))
    one.observe(0.05)
    other.observe(0.5)
    other.observe(7.0)
    text = exposition(joined([families(one.family()), families(other.family())]))
    values = shown(text)
    assert [values["x_seconds_bucket", (bound,)] for bound in ("0.1", "1.0", "+Inf")] == [1, 2, 3]
    assert values["x_seconds_count", ()] == 3
    assert values["x_seconds_sum", ()] == pytest.approx(7.55)
    assert b"# TYPE x_seconds histogram" in text


@pytest.mark.parametrize(
    "name, together",
    [
        ("evenhand_queue_depth", 5),
        ("evenhand_worker_up", 3),
        ("evenhand_replicas", 3),
        ("evenhand_fairness_max_service_gap", 3),
        ("evenhand_store_up", 2),
    ],
)
def test_gauges_are_added_up_where_each_has_its_own_and_not_where_all_mean_the_same(name: str, together: float) -> None:
    both = joined([families(GaugeMetricFamily(name, "", 2)), families(GaugeMetricFamily(name, "", 3))])
    assert shown(exposition(both)) == {(name, ()): together}


def test_what_a_process_counted_outlives_it_and_its_state_does_not() -> None:
    gone = lasting(families(counter(ok=3), GaugeMetricFamily("evenhand_queue_depth", "", 9)))
    assert shown(exposition(joined([families(counter(ok=1)), gone]))) == {("evenhand_requests_total", ("ok",)): 4}


def test_what_cannot_be_written_as_json_is_left_out() -> None:
    assert families(GaugeMetricFamily("x", "", float("nan")))[0].samples == []
