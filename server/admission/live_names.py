"""The current model names: those in the settings, overridden by those in the shared store."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from server.admission.live_adapters import LiveAdapters
from server.fleet.fleet import Fleet
from server.request.call import Call
from server.request.errors import NoWorker, Overloaded, ServiceError, UnknownModel, is_engine_failure
from server.request.names import ANY, NameRecord, NameTable, read_name, table_of
from server.request.schemas import splice
from server.request.tenants import OPEN, Tenant

log = logging.getLogger("evenhand.names")


class LiveNames:
    """Names → models. `table` is replaced as a whole when something changes; a request is resolved by one table."""

    def __init__(self, configured: Mapping[str, Any], fleet: Fleet, adapters: LiveAdapters) -> None:
        """ValueError with a sentence for a name that cannot be."""
        self.fleet = fleet
        self.adapters = adapters
        self.configured = {name: read_name(name, value) for name, value in configured.items()}
        self.stored: dict[str, NameRecord] = {}
        self.table: NameTable = table_of(self.configured)
        self.problem = ""
        self._warned: list[str] = []
        fleet.changed.append(self._look)

    @property
    def records(self) -> dict[str, NameRecord]:
        """All that are in force."""
        return self.configured | self.stored

    def set_stored(self, texts: Mapping[str, str]) -> None:
        """The store's names, in place of those before. What cannot be read, or makes a circle, changes nothing."""
        stored: dict[str, NameRecord] = {}
        try:
            for name, text in texts.items():
                stored[name] = read_name(name, msgspec.json.decode(text))
            if stored == self.stored:
                return
            self.table = table_of(self.configured | stored)
        except ValueError as error:
            if str(error) != self.problem:
                log.error("ignoring the model names in the store: %s", error)
            self.problem = str(error)
            return
        self.stored, self.problem = stored, ""
        log.info("model names: %s", ", ".join(sorted(self.records)) or "none")

    def checked(self, name: str, record: NameRecord) -> None:
        """ValueError if this record conflicts with the others, or points to a model that no worker serves."""
        table = table_of(self.records | {name: record})
        served = self._known()
        if (missing := table.missing_behind(table.names[name], served)) is not None:
            raise ValueError(f"{missing}; available: {', '.join(sorted(served)) or 'none'}")

    def problems(self) -> list[str]:
        """What an operator should know of the names: those that point to nothing."""
        return ([self.problem] if self.problem else []) + self._missing()

    def _missing(self) -> list[str]:
        """Nothing while a worker is starting: its models are not known yet."""
        fleet = self.fleet
        if not self.table.names or fleet.is_starting():
            return []
        served = self._known()
        told = (self.table.missing_behind(named, served) for named in self.table.names.values())
        return [sentence for sentence in told if sentence is not None]

    def _known(self) -> set[str]:
        """What requests can be answered by: models, and adapters of models."""
        return self.fleet.models_known() | self.adapters.known()

    def _serves(self, model: str) -> bool:
        return self.fleet.serves(model) or self.adapters.serves(model)

    def _look(self) -> None:
        """Workers have come or gone: says once what points to nothing."""
        missing = self._missing()
        for sentence in missing:
            if sentence not in self._warned:
                log.warning("%s", sentence)
        self._warned = missing

    # requests
    def resolved(self, call: Call) -> Call:
        """The call, asked of the model behind its name. UnknownModel for a name that its tenant may not use."""
        table, tenant = self.table, call.tenant
        named = table.names.get(call.model)
        if named is None:
            if not self.fleet.serves() or self._serves(call.model):
                return call  # who has no entry is found, or missed, by the model's own line
            named = table.names.get(ANY)
        if named is None or not named.visible_to(tenant.name):
            raise self._unknown(call.model, tenant)
        chain = table.chain(named, "" if tenant is OPEN else tenant.name, call.id)
        if chain == (call.model,):
            return call
        return _asked_of(call, chain, asked=call.model, name=named.name)

    def answers_to(self, name: str, tenant: Tenant) -> bool:
        """Whether a name is one that this tenant may ask for, and that a worker here answers to."""
        named = self.table.names.get(name)
        if named is None and self._serves(name):
            record = self.adapters.records.get(name)
            return record is None or record.visible_to(tenant.name)
        named = named or self.table.names.get(ANY)
        return named is not None and named.visible_to(tenant.name) and any(map(self._serves, self.table.behind(named)))

    def next(self, call: Call) -> Call:
        """The call, asked of its next fallback."""
        return _asked_of(call, call.fallbacks, asked=call.asked, name=call.name)

    def _unknown(self, model: str, tenant: Tenant) -> UnknownModel:
        names = sorted(str(entry["id"]) for entry in self.listed(tenant))
        there = f"; available: {', '.join(names)}" if names else ""
        return UnknownModel(f"The model '{model[:100]}' is not served here{there}.", param="model")

    def listed(self, tenant: Tenant) -> list[dict[str, object]]:
        """The models as a tenant may see them: names whose models are served, and models that have no entry."""
        served = {str(entry["id"]): entry for entry in self.fleet.models()}
        names = self.table.names
        adapters = self.adapters.listed(tenant.name, served) if self.adapters.records else {}
        entries = {model: entry for model, entry in {**served, **adapters}.items() if model not in names}
        for named in names.values():
            found = next((entry for model in self.table.behind(named) if (entry := self._entry(model, served))), None)
            if found is not None and named.name != ANY and named.visible_to(tenant.name):
                entries[named.name] = {**found, "id": named.name}
        return [entry for name, entry in entries.items() if tenant.models is None or name in tenant.models]

    def _entry(self, model: str, served: Mapping[str, dict[str, object]]) -> dict[str, object] | None:
        """The /v1/models entry of an alias; an adapter's is built like its model's, because `parent` would reveal what
        it is."""
        return served.get(model) or served.get(self.adapters.base_of(model) or "")


def may_fall_back(error: ServiceError) -> bool:
    """Whether a fallback may be tried after this error: no worker, all busy, or a failed engine."""
    return isinstance(error, NoWorker | Overloaded) or is_engine_failure(error)


def _asked_of(call: Call, chain: tuple[str, ...], *, asked: str, name: str) -> Call:
    model = chain[0]
    body = call.body if model == call.model else splice(call.body, b'"model":' + msgspec.json.encode(model))
    return msgspec.structs.replace(call, model=model, fallbacks=chain[1:], body=body, asked=asked, name=name)
