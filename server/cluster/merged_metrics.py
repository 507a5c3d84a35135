"""Merges the /metrics of several processes into one answer, family by family."""

from collections.abc import Iterable, Iterator
from math import isfinite

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# Everything is added up, but for what each process tells of the same thing.
_LARGEST = frozenset(
    {
        "evenhand_worker_up",
        "evenhand_worker_slots",
        "evenhand_fairness_max_service_gap",
        "evenhand_replicas",
        "evenhand_batches_running",
        "evenhand_batches_late",
    }
)
_LEAST = frozenset({"evenhand_store_up"})
_LASTING = frozenset({"counter", "histogram"})  # what was counted by a process that is gone still counts

Labels = tuple[tuple[str, str], ...]


class Family(msgspec.Struct, array_like=True):
    """A metric with its samples: name, labels, value."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, Labels, float]]


_families = msgspec.json.Decoder(list[Family])


def taken(registry: Collector) -> list[Family]:
    """What a registry shows at this moment."""
    return [
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            [
                (sample.name, tuple(sample.labels.items()), float(sample.value))
                for sample in metric.samples
                if isfinite(sample.value)
            ],
        )
        for metric in registry.collect()
    ]


def written(families: list[Family]) -> str:
    """As text, for a store."""
    return msgspec.json.encode(families).decode()


def read(text: str) -> list[Family]:
    """What `written` wrote. ValueError if it did not."""
    return _families.decode(text)


def lasting(families: Iterable[Family]) -> list[Family]:
    """What stays true when the process that counted it is gone."""
    return [family for family in families if family.kind in _LASTING]


def joined(processes: Iterable[Iterable[Family]]) -> list[Family]:
    """The families of all processes as one."""
    first: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, Labels], float]] = {}
    for families in processes:
        for family in families:
            first.setdefault(family.name, family)
            samples = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                before = samples.get((name, labels))
                samples[name, labels] = value if before is None else _both(family.name, before, value)
    return [
        Family(name, family.kind, family.help, [(*key, value) for key, value in values[name].items()])
        for name, family in first.items()
    ]


def _both(family: str, one: float, other: float) -> float:
    if family in _LARGEST:
        return max(one, other)
    return min(one, other) if family in _LEAST else one + other


def exposition(families: Iterable[Family]) -> bytes:
    """As Prometheus reads it."""
    return generate_latest(_Shown(list(families)))


class _Shown(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, dict(labels), value)
            yield metric
