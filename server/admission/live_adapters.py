"""LoRA adapters: which worker has loaded which, and loading them where requests need them.

A worker has a few adapters at a time, however many there are (S-LoRA, Sheng et al. 2023). An adapter is loaded when the
first request for it has a place at a worker, once however many wait for it; the one that was used least recently, and
that nobody uses now, leaves for it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.pools import Pool, WorkerLoad
from scheduler.routing import AFFINITY, Choice
from scheduler.workers import Role
from server.fleet.adapters import NO_LORA, AdapterRefused, AdapterSite, list_adapters, load, unload
from server.fleet.fleet import Fleet, Member, WorkerState
from server.observe.telemetry import Distribution
from server.request.adapters import AdapterRecord, read_adapter
from server.request.errors import EngineGone, NoWorker, Refused, ServiceError
from server.settings import LoraSettings

log = logging.getLogger("evenhand.adapters")

LOADED = "loaded"
UNKNOWN_MOST = 1  # vLLM's own default of --max-loras
REFUSED_S = 30.0  # after which a worker that did not load an adapter is asked again
REFRESH_S = 10.0  # an operator may look every second, and workers are many
ANSWERING = (Role.BOTH, Role.DECODE)


class AdapterUnavailable(NoWorker):
    """No worker loads the adapter. The reason may name paths, and is for operators."""

    code = "adapter_unavailable"


class LiveAdapters(Collector):
    """Adapters by name: those of the settings, and over them those of the shared store."""

    def __init__(
        self,
        configured: Mapping[str, Any],
        fleet: Fleet,
        settings: LoraSettings,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """ValueError with a sentence for an adapter that cannot be."""
        self.configured = {name: read_adapter(name, value) for name, value in configured.items()}
        self.stored: dict[str, AdapterRecord] = {}
        self.records: dict[str, AdapterRecord] = {}
        self.pinned: frozenset[str] = frozenset()
        self.changed: list[Callable[[], None]] = []
        self.loads: Counter[str] = Counter()
        self.unloads = 0
        self.load_s = Distribution("evenhand_adapter_load_seconds", "Time a worker takes to load an adapter.")
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._look = asyncio.Event()
        self._refresh_at = -inf
        self._where: dict[str, set[str]] = {}  # workers that may have an adapter
        self._replacing: dict[str, str] = {}  # paths that operators are bringing in force
        fleet.manages, fleet.has_adapters = self.records.__contains__, self._note
        fleet.serves_unmanaged = settings.unmanaged
        fleet.changed.append(self._look.set)
        self._in_force(self.configured)

    # records
    def set_stored(self, texts: Mapping[str, str]) -> None:
        """Replaces the adapters from the store. Records that cannot be read are skipped."""
        stored: dict[str, AdapterRecord] = {}
        for name, text in texts.items():
            try:
                stored[name] = read_adapter(name, msgspec.json.decode(text))
            except ValueError as error:
                log.error("ignoring an adapter in the store: %s", error)
        if stored != self.stored:
            self.stored = stored
            self._in_force(self.configured | stored)
            log.info("adapters: %s", ", ".join(sorted(self.records)) or "none")

    def _in_force(self, records: Mapping[str, AdapterRecord]) -> None:
        for name in self.records.keys() | records.keys():
            if self.records.get(name) != records.get(name):
                for member in self._fleet.members.values():
                    member.site.refused.pop(name, None)
        self.records.clear()
        self.records.update(records)
        self.pinned = frozenset(name for name, record in records.items() if record.pinned)
        self._fleet.list_anew()
        self._look.set()
        for callback in self.changed:
            callback()

    def base_of(self, name: str) -> str | None:
        """The model that an adapter belongs to, None if there is no such adapter."""
        record = self.records.get(name)
        return None if record is None else record.model

    def serves(self, name: str) -> bool:
        """Whether a request for this adapter can be taken."""
        base = self.base_of(name)
        return base is not None and self._fleet.serves(base)

    def known(self) -> set[str]:
        """The adapters whose model some worker serves."""
        served = self._fleet.models_known()
        return {name for name, record in self.records.items() if record.model in served}

    def listed(self, tenant: str, served: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
        """The adapters as /v1/models has them for a tenant. served: the models by name."""
        return {
            name: {**served[record.model], "id": name, "parent": record.model}
            for name, record in self.records.items()
            if record.model in served and record.visible_to(tenant)
        }

    def problems(self) -> list[str]:
        """What an operator should know, without paths."""
        told = [
            f"adapter {name!r}: no worker serves {record.model!r}"
            for name, record in self.records.items()
            if record.model not in self._fleet.models_known() and not self._fleet.is_starting()
        ]
        now = self._clock()
        for member in self._fleet.members.values():
            for name, (until, _) in member.site.refused.items():
                if now < until and name in self.records:
                    told.append(f"adapter {name!r}: worker {member.worker.id} could not load it, see /admin/adapters")
        return told

    # placing
    def room(self, name: str, choice: Choice, pools: Sequence[Pool], avoid: str) -> WorkerLoad | None:
        """The worker for a request: one that has the adapter, unless another that may load it is less busy by half a
        batch. None while all such workers are full. Any worker where all have refused it: `ready` says so then."""
        if self.refused_everywhere(name, pools):
            return choice.cheapest()
        holders = (load for load in self._holders(name, pools) if load.free > 0 and load.worker.id != avoid)
        best = min(holders, key=lambda load: (choice.cost(load), load.number), default=None)
        other = choice.cheapest(ANSWERING, lambda load: self._may_load(load, name))
        if best is None or (other is not None and choice.cost(other) + AFFINITY < choice.cost(best)):
            return other
        return best

    def _holders(self, name: str, pools: Sequence[Pool]) -> list[WorkerLoad]:
        there = self._where.get(name, set())
        members = self._fleet.members
        for worker_id in [each for each in there if each not in members or not self._has(members[each].load, name)]:
            there.discard(worker_id)
        loads = [members[worker_id].load for worker_id in there]
        return [
            load
            for load in loads
            if load.pool in pools and load.role in ANSWERING and self._may_load(load, name)  # else it is about to leave
        ]

    def _note(self, member: Member) -> None:
        """More is known of the adapters that a worker has."""
        for name in member.site.loaded:
            self._where.setdefault(name, set()).add(member.worker.id)

    def _site(self, load: WorkerLoad) -> AdapterSite:
        return self._fleet.members[load.worker.id].site

    def _has(self, load: WorkerLoad, name: str) -> bool:
        """Whether a worker has it, from the path that is in force or is about to be."""
        if name not in self.records:
            return False
        path = self._site(load).loaded.get(name)
        return path is not None and path in (self.records[name].path, self._replacing.get(name))

    def _may_load(self, load: WorkerLoad, name: str) -> bool:
        site = self._site(load)
        kept = {each for each in site.loaded if each in self.pinned or each not in self.records}
        return self._reason(site, name) is None and site.has_room(name, self._most(site), kept)

    def _reason(self, site: AdapterSite, name: str) -> str | None:
        """Why a worker has not loaded an adapter lately."""
        if site.most == 0:
            return NO_LORA
        until, why = site.refused.get(name, (0.0, ""))
        return why if self._clock() < until else None

    def _most(self, site: AdapterSite) -> int:
        """How many adapters a worker may have. An engine that has more than it keeps reads the others from their files
        again and again, and vLLM dies when those are gone."""
        told = [most for most in (self._settings.per_worker, site.most) if most is not None]
        return min(told, default=UNKNOWN_MOST)

    def refused_everywhere(self, name: str, pools: Sequence[Pool]) -> bool:
        """Whether no worker has loaded an adapter when it was last asked to."""
        loads = (load for pool in pools if pool.role in ANSWERING for load in pool.workers.values())
        return all(self._reason(self._site(load), name) is not None for load in loads)

    # loading
    async def ready(self, member: Member, name: str) -> None:
        """Returns once the worker has the adapter; concurrent requests wait for the same load.

        AdapterRefused if the worker does not load it, EngineGone if it does not answer, AdapterUnavailable if there is
        no such adapter any more.
        """
        if name not in self.records:
            raise _gone(name)
        site = member.site
        if self._has(member.load, name):
            return
        if (why := self._reason(site, name)) is not None:
            raise AdapterRefused(why)
        task = site.loading.get(name)
        if task is None:
            task = site.loading[name] = asyncio.get_running_loop().create_task(self._load(member, name))
            task.add_done_callback(lambda done: _over(site, name, done))
        await asyncio.shield(task)

    async def _load(self, member: Member, name: str, wanted: AdapterRecord | None = None) -> None:
        """wanted: what an operator is bringing; None for the one that is in force when it is this load's turn."""
        site, began = member.site, self._clock()
        async with site.one_at_a_time:
            await self._ask(member)  # other gateways load and unload, too
            record = wanted or self.records.get(name)
            if record is None:
                raise _gone(name)
            if site.loaded.get(name) == record.path or (wanted is None and self._has(member.load, name)):
                return
            try:
                await self._replace(member, name, record)
            except AdapterRefused as error:
                self.loads["refused"] += 1
                if self.records.get(name) == record:  # of a path that is only tried it says nothing
                    site.refused[name] = (self._clock() + REFUSED_S, str(error))
                log.error("worker %s cannot load adapter %s: %s", member.worker.id, name, error)
                raise
            except EngineGone:
                self.loads["failed"] += 1
                raise
            site.loaded[name] = record.path
            if wanted is None and name not in self.records:  # taken out meanwhile
                await self.unload(member, name)
                raise _gone(name)
            self._note(member)
            site.refused.pop(name, None)
        self.loads["loaded"] += 1
        self.load_s.observe(self._clock() - began)
        log.info("worker %s has loaded adapter %s", member.worker.id, name)

    async def _replace(self, member: Member, name: str, record: AdapterRecord) -> None:
        if name in member.site.loaded:  # from another path
            await self.unload(member, name)
        await self._make_room(member)
        await load(member.engine, name, record, self._settings.load_timeout_s)

    async def _ask(self, member: Member) -> None:
        member.site.found(await list_adapters(member.engine))
        self._note(member)

    async def _make_room(self, member: Member) -> None:
        """Unloads what leaves for one more. AdapterRefused if all are pinned or in use."""
        site, most = member.site, self._most(member.site)
        for other in site.leaving(most, self.records, self.pinned):
            await self.unload(member, other)
        if len(site.loaded) >= most:
            raise AdapterRefused(
                f"all its {most} adapter slots are pinned or in use: retry later, or raise --max-cpu-loras"
            )

    async def unload(self, member: Member, name: str) -> None:
        """Unloads an adapter at a worker; requests that run with it continue. AdapterRefused, EngineGone."""
        member.site.loaded.pop(name, None)  # at once, so that nobody is sent there for it meanwhile
        await unload(member.engine, name, self._settings.load_timeout_s)
        self.unloads += 1
        log.info("worker %s has unloaded adapter %s", member.worker.id, name)

    async def has_left(self, member: Member, name: str, error: ServiceError) -> bool:
        """Whether a request failed because the worker has lost the adapter: it was restarted, or another gateway had
        it unloaded."""
        if not isinstance(error, Refused) or error.refused_status != 404:
            return False
        await self._ask(member)
        return name not in member.site.loaded

    @staticmethod
    def unavailable(name: str) -> AdapterUnavailable:
        """What a client is told."""
        return AdapterUnavailable(f"The adapter '{name[:100]}' cannot be loaded at present.", retry_after_s=REFUSED_S)

    # operators
    def members_of(self, model: str) -> list[Member]:
        """The workers that answer requests for a model."""
        ready = self._fleet.ready(model)
        return [member for member in ready if member.role is not Role.PREFILL]

    async def loaded_everywhere(self, name: str, record: AdapterRecord) -> dict[str, str]:
        """Loads an adapter at the workers of its model that have a free slot for it, and at one of the others if none
        has; a worker that has it from another path reloads it. `LOADED`, or the reason, by worker."""
        members = self.members_of(record.model)
        chosen = [
            member
            for member in members
            if record.pinned or name in member.site.loaded or len(member.site.loaded) < self._most(member.site)
        ] or members[:1]
        said: dict[str, str] = {}
        for member, result in zip(
            chosen,
            await asyncio.gather(*(self._load(member, name, record) for member in chosen), return_exceptions=True),
            strict=True,
        ):
            if isinstance(result, BaseException) and not isinstance(result, AdapterRefused | EngineGone):
                raise result
            said[member.worker.id] = LOADED if result is None else str(result)
        return said

    @contextmanager
    def replacing(self, name: str, record: AdapterRecord) -> Iterator[None]:
        """While the block runs, workers may have the adapter from its old path or from this one."""
        self._replacing[name] = record.path
        try:
            yield
        finally:
            if self._replacing.get(name) == record.path:  # else another one is being brought in force since
                del self._replacing[name]

    async def unloaded_everywhere(self, name: str) -> None:
        """Nobody needs this adapter any more. Workers that do not answer keep it until they are restarted."""
        members = [member for member in self._fleet.members.values() if name in member.site.loaded]
        results = await asyncio.gather(*(self.unload(member, name) for member in members), return_exceptions=True)
        for member, result in zip(members, results, strict=True):
            if isinstance(result, AdapterRefused | EngineGone):
                log.warning("worker %s keeps adapter %s: %s", member.worker.id, name, result)
            elif isinstance(result, BaseException):
                raise result

    def listed_by_workers(self) -> set[str]:
        """Adapters that workers have, whether they are managed here or not."""
        return {name for member in self._fleet.members.values() for name in member.site.loaded}

    async def refresh(self) -> None:
        """Asks every worker of a model with adapters what it has, unless that was done just now."""
        if self._clock() < self._refresh_at:
            return
        self._refresh_at = self._clock() + REFRESH_S
        models = {record.model for record in self.records.values()}
        asked = [
            member
            for member in self._fleet.members.values()
            if member.state is WorkerState.READY and not models.isdisjoint(member.models)
        ]
        for failed in await asyncio.gather(*map(self._ask, asked), return_exceptions=True):
            if failed is not None and not isinstance(failed, EngineGone):
                raise failed

    def described(self, name: str) -> dict[str, Any]:
        """An adapter for operators, and how it stands at each worker of its model. KeyError if there is none."""
        record = self.records[name]
        workers = {}
        for member in self._fleet.members.values():
            if record.model in member.models and (state := self._state(member.site, name, record)):
                workers[member.worker.id] = {"state": state, "running": member.site.running[name]}
                if (why := self._reason(member.site, name)) is not None:
                    workers[member.worker.id]["problem"] = why
        source = "store" if name in self.stored else "settings"
        return {"name": name, **record.described(), "source": source, "workers": workers}

    def _state(self, site: AdapterSite, name: str, record: AdapterRecord) -> str:
        if name in site.loading:
            return "loading"
        if name in site.loaded:
            return LOADED if site.loaded[name] == record.path else "outdated"
        return "refused" if self._reason(site, name) is not None else ""

    # life
    async def run(self) -> None:
        """Has pinned adapters loaded wherever they are not, until it is cancelled."""
        while True:
            self._look.clear()
            await self._load_pinned()
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_S if self.pinned else None):
                    await self._look.wait()

    async def _load_pinned(self) -> None:
        missing = [
            (member, name)
            for name in self.pinned
            for member in self.members_of(self.records[name].model)
            if not self._has(member.load, name) and self._reason(member.site, name) is None
        ]
        results = await asyncio.gather(*(self.ready(*each) for each in missing), return_exceptions=True)
        for (member, name), result in zip(missing, results, strict=True):
            if isinstance(result, EngineGone):
                log.warning("worker %s has not loaded adapter %s: %s", member.worker.id, name, result.message)
            elif isinstance(result, BaseException) and not isinstance(result, AdapterRefused | AdapterUnavailable):
                raise result

    async def close(self) -> None:
        """Waits for no load any more."""
        tasks = [task for member in self._fleet.members.values() for task in member.site.loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def collect(self) -> Iterator[Metric]:
        there = GaugeMetricFamily(
            "evenhand_worker_adapters", "LoRA adapters that a worker has loaded.", labels=("worker",)
        )
        loads = CounterMetricFamily(
            "evenhand_adapter_loads", "LoRA adapters that workers were asked to load.", labels=("outcome",)
        )
        for outcome in ("loaded", "refused", "failed"):
            loads.add_metric((outcome,), self.loads[outcome])
        if self.records:
            for member in self._fleet.members.values():
                there.add_metric((member.worker.id,), len(member.site.loaded))
        yield from (there, loads)
        yield CounterMetricFamily(
            "evenhand_adapter_unloads", "LoRA adapters unloaded from a worker.", value=self.unloads
        )
        yield self.load_s.family()


def _gone(name: str) -> AdapterUnavailable:
    return AdapterUnavailable(f"The adapter '{name[:100]}' is not served here any more.", code="model_not_found")


def _over(site: AdapterSite, name: str, done: "asyncio.Task[None]") -> None:
    if site.loading.get(name) is done:
        del site.loading[name]
    if not done.cancelled():
        done.exception()  # whoever waits for it is told; there may be nobody any more
