"""Model names that clients may use, and the models behind them: aliases, weighted targets, fallbacks, visibility.

A name is resolved once, before its request waits. Which of several weighted models answers is decided by weighted
rendezvous hashing (Thaler and Ravishankar 1998): a tenant stays with its model as long as the weights stay, and raising
one model's weight moves tenants to that model only.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf, isfinite, log
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

ANY = "*"
MOST_REMEMBERED = 100_000  # choices; forgotten all at once when there are more
Weight = Annotated[float, Meta(ge=0)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]


class NameRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name stands for, as the settings file and `/admin/models` write it.

    targets: models and their weights, empty for the model of the same name. A name may stand for other names.
    fallbacks: asked one after the other when none of the targets can answer.
    tenants: who may ask for this name, None for everybody. It says nothing about names that point here.
    sticky: what always gets the same target: a tenant, or each request by itself.
    """

    targets: dict[ModelName, Weight] = {}
    fallbacks: tuple[ModelName, ...] = ()
    tenants: frozenset[str] | None = None
    sticky: Literal["tenant", "request"] = "tenant"

    def described(self) -> dict[str, Any]:
        """The record as JSON has it."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return told | {"tenants": None if self.tenants is None else sorted(self.tenants)}


def read_name(name: str, value: Any) -> NameRecord:
    """A record from parsed YAML or JSON; a text stands for one target. ValueError with a sentence."""
    if not isinstance(value, str | dict):
        raise ValueError(f"model name {name!r}: write a model, or targets, fallbacks and tenants")
    told = {"targets": value} if isinstance(value, str) else dict(value)
    if isinstance(told.get("targets"), str):
        told["targets"] = {told["targets"]: 1.0}
    try:
        record = msgspec.convert(told, NameRecord)
    except msgspec.ValidationError as error:
        said, _, where = str(error).partition(" - at `$.")
        place = f" {where.rstrip('`')}:" if where else ""
        raise ValueError(f"model name {name!r}:{place} {said[:1].lower()}{said[1:]}") from None
    if record.targets and not 0.0 < sum(record.targets.values()) < inf:
        raise ValueError(f"model name {name!r}: at least one target needs a weight above 0")
    if not all(map(isfinite, record.targets.values())):
        raise ValueError(f"model name {name!r}: a weight must be a finite number")
    return record


@dataclass(frozen=True, slots=True)
class ServedName:
    """A name, resolved. models: what answers, with weights above 0; fallbacks: the names asked after them."""

    name: str
    models: tuple[tuple[str, float], ...]
    fallbacks: tuple[str, ...]
    tenants: frozenset[str] | None
    by_request: bool

    def visible_to(self, tenant: str) -> bool:
        return self.tenants is None or tenant in self.tenants

    def model_for(self, key: str) -> str:
        """The model that a tenant's, or a request's, key falls to."""
        if len(self.models) == 1:
            return self.models[0][0]
        return min(self.models, key=lambda target: _draw(key, target[0]) / target[1])[0]


def _draw(key: str, model: str) -> float:
    """An exponential variate that this key always draws for this model: the least over its weight wins."""
    digest = blake2b(f"{key}\0{model}".encode(), digest_size=8).digest()
    return -log((int.from_bytes(digest) + 1) / (2**64 + 1))


@dataclass(frozen=True, slots=True)
class NameTable:
    """All names at one moment. It never changes; a change makes another table."""

    names: Mapping[str, ServedName] = field(default_factory=dict)
    _chosen: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def chain(self, named: ServedName, tenant: str, request: str) -> tuple[str, ...]:
        """The models to try for this name, in order. request: the id, which decides for requests without a tenant."""
        if named.by_request or not tenant:
            return self._chain(named, request)
        chain = self._chosen.get((named.name, tenant))
        if chain is None:
            if len(self._chosen) >= MOST_REMEMBERED:
                self._chosen.clear()
            chain = self._chosen[named.name, tenant] = self._chain(named, tenant)
        return chain

    def _chain(self, named: ServedName, key: str) -> tuple[str, ...]:
        first = named.model_for(key)
        others = named.fallbacks
        if not others and first in self.names and first != named.name:
            others = self.names[first].fallbacks
        models = [first]
        for other in others:
            models.append(self.names[other].model_for(key) if other in self.names else other)
        return tuple(dict.fromkeys(models))

    def models_of(self, name: str) -> tuple[str, ...]:
        """Every model that may answer to a name before any fallback; the name itself where it is none of ours."""
        named = self.names.get(name)
        return (name,) if named is None else tuple(model for model, _ in named.models)

    def behind(self, named: ServedName) -> list[str]:
        """Every model that may answer to a name, those of its fallbacks last."""
        models = [model for model, _ in named.models]
        return models + [model for other in named.fallbacks for model in self.models_of(other)]

    def missing_behind(self, named: ServedName, served: Collection[str]) -> str | None:
        """A sentence if a name points to a model that nobody serves."""
        lost = [repr(model) for model in dict.fromkeys(self.behind(named)) if model not in served]
        return f"model name {named.name!r}: no worker serves {' or '.join(lost)}" if lost else None


def table_of(records: Mapping[str, NameRecord]) -> NameTable:
    """Resolves all records. ValueError for aliases in a circle, and for a name that falls back to itself."""
    names = {name: _served(name, record, records) for name, record in records.items()}
    return NameTable(names)


def _served(name: str, record: NameRecord, records: Mapping[str, NameRecord]) -> ServedName:
    if name == ANY and not record.targets:
        raise ValueError("model name '*': it needs a target")
    for other in record.fallbacks:
        if other in (name, ANY):
            raise ValueError(f"model name {name!r}: its fallback is {'itself' if other == name else repr(ANY)}")
    models: dict[str, float] = {}
    for model, weight in _models(name, records, (name,)):
        models[model] = models.get(model, 0.0) + weight
    fallbacks = _fallbacks(name, records)
    return ServedName(name, tuple(models.items()), fallbacks, record.tenants, record.sticky == "request")


def _fallbacks(name: str, records: Mapping[str, NameRecord]) -> tuple[str, ...]:
    """Its own, else those of the one name that it stands for."""
    record = records[name]
    if record.fallbacks or len(record.targets) != 1:
        return record.fallbacks
    (target,) = record.targets
    return _fallbacks(target, records) if target != name and target in records else ()


def _models(name: str, records: Mapping[str, NameRecord], path: tuple[str, ...]) -> Iterable[tuple[str, float]]:
    """The models behind a name with their shares of it. A target of the same name is the model itself."""
    targets = records[name].targets or {name: 1.0}
    total = sum(targets.values())
    for target, weight in targets.items():
        share = weight / total
        if not share:
            continue
        if target == name or target not in records:
            yield target, share
            continue
        if target in path:
            raise ValueError(f"model names form a cycle: {' → '.join((*path, target))}")
        for model, part in _models(target, records, (*path, target)):
            yield model, share * part
