"""Operators' changes while gateways run, as records in the store: tenants, policy, names, adapters, drains."""

import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from server.admission.live_names import LiveNames
from server.admission.live_policy import LivePolicy, ModelQueue
from server.fleet.fleet import Fleet, WorkerState
from server.request.directory import Tenants
from server.request.tenants import TenantRecord, read_record
from server.store.store import Store, StoreAway

log = logging.getLogger("evenhand.records")

TENANT, POLICY, DRAINED, MODEL, ADAPTER = "tenant", "policy", "drained", "model", "adapter"
LIVE = "live"  # the name of the one policy record


class PolicyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy by name, with its options as text."""

    policy: str
    options: dict[str, str] = {}


class Records:
    """Reads the store's records and applies them. `stale` is set by whoever learns that they have changed.

    confirm: asks the store whether it is still the one that was known; calls `are_lost` if it is not, raises StoreAway
    if it does not answer. None for a store that cannot lose anything without us.
    """

    def __init__(
        self,
        store: Store,
        tenants: Tenants,
        policy: LivePolicy,
        names: LiveNames,
        fleet: Fleet,
        lines: Callable[[], Iterable[ModelQueue]],
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.stale = True
        self.store = store
        self._tenants = tenants
        self._policy = policy
        self._names = names
        self._fleet = fleet
        self._lines = lines
        self.drained: dict[str, str] = {}  # workers by id, with the address that each had; "" for any
        self._policy_text: str | None = None
        self._known: dict[str, dict[str, str]] = {}
        self._lost = False
        self._confirm = confirm

    def are_stale(self) -> None:
        """They have changed."""
        self.stale = True

    def are_lost(self) -> None:
        """The store lost its records: writes those known here back, except those that the store has again."""
        self._lost = True

    async def follow(self) -> None:
        """Reads them if they are stale. While the store is away nothing changes."""
        self._drain_newcomers()
        if not self.stale:
            return
        self.stale = False
        try:
            await self.read()
        except StoreAway:
            self.stale = True

    async def read(self) -> None:
        """Reads them and puts them in force. StoreAway."""
        found = await self._all()
        if self._confirm is not None:
            await self._confirm()  # a store that has come back empty is noticed before its emptiness is put in force
        if self._lost:
            await self._restore()
            found = await self._all()
        self._known = found
        drained = dict(self._known[DRAINED])
        self._tenants.set_stored(_tenants_in(self._known[TENANT]))
        self._set_policy(self._known[POLICY].get(LIVE))
        self._names.adapters.set_stored(self._known[ADAPTER])
        self._names.set_stored(self._known[MODEL])
        for worker_id in self.drained.keys() - drained.keys():
            if worker_id in self._fleet.members:
                self._fleet.resume(worker_id)
        self.drained = drained
        self._drain_newcomers()

    async def _all(self) -> dict[str, dict[str, str]]:
        return {kind: await self.store.records(kind) for kind in (TENANT, POLICY, DRAINED, MODEL, ADAPTER)}

    async def _restore(self) -> None:
        for kind, records in self._known.items():
            there = await self.store.records(kind)
            for name, text in records.items():
                if name not in there:
                    await self.store.put(kind, name, text)
        self._lost = False
        log.warning("the store had lost its records: this gateway has restored those that it knew")

    def _drain_newcomers(self) -> None:
        for worker_id, url in self.drained.items():
            member = self._fleet.members.get(worker_id)
            if member is not None and member.state is not WorkerState.DRAINING and url in ("", member.worker.url):
                self._fleet.drain(worker_id)

    def _set_policy(self, text: str | None) -> None:
        if text == self._policy_text:
            return
        self._policy_text = text
        if text is None:
            self._policy.as_configured(self._lines())
            return
        try:
            record = msgspec.json.decode(text, type=PolicyRecord)
            self._policy.switch(record.policy, record.options, self._lines())
        except (msgspec.ValidationError, ValueError) as error:
            log.error("ignoring the policy in the store: %s", error)


def _tenants_in(texts: dict[str, str]) -> dict[str, TenantRecord]:
    records: dict[str, TenantRecord] = {}
    for name, text in texts.items():
        try:
            records[name] = read_record(msgspec.json.decode(text))
        except ValueError as error:
            log.error("ignoring tenant %s in the store: %s", name, error)
    return records
