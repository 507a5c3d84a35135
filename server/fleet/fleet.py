"""The gateway's view of its workers, their state and load, kept current by probes."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from time import monotonic
from typing import NamedTuple, Protocol

from scheduler.pools import Pools, WorkerLoad
from scheduler.workers import UNKNOWN_SLOTS, Role, Worker
from server.background import Background
from server.engine.access import Access
from server.engine.client import EngineClient
from server.fleet.adapters import AdapterSite, adapters_in
from server.fleet.hardware import Hardware, hardware_in
from server.fleet.health import NUMBER, Breaker, Output, told_in, trial_answer
from server.fleet.rounds import Rounds
from server.request.errors import (
    EngineGone,
    EngineLost,
    EngineRefusesKey,
    EngineUnreachable,
    EngineUntrusted,
    OutOfFiles,
)
from server.settings import HealthSettings

log = logging.getLogger("evenhand.fleet")

# Only an engine with our plug-in inside shows this; then tenant and policy may travel to it.
_PLUGIN = "evenhand_engine_policy_info"
_SEQUENCES = re.compile(r"^vllm:num_requests_(?:running|waiting)" + NUMBER, re.MULTILINE)
_KV_USAGE = re.compile(r"^vllm:kv_cache_usage_perc" + NUMBER, re.MULTILINE)
_RANKS = re.compile(r'^vllm:num_requests_running\{[^}]*\bengine="(\d{1,4})"', re.MULTILINE)
_AWAKE = re.compile(r'^vllm:engine_sleep_state\{[^}]*sleep_state="awake"[^}]*\}\s+([01])', re.MULTILINE)
_SLOTS = re.compile(r"^evenhand_engine_slots" + NUMBER, re.MULTILINE)
_ADAPTERS = re.compile(r"^evenhand_engine_adapters" + NUMBER, re.MULTILINE)
_STEP_TOKENS = re.compile(r"^evenhand_engine_step_tokens" + NUMBER, re.MULTILINE)
_BLOCKS = re.compile(
    r'^vllm:cache_config_info\{(?=.*\bblock_size="(\d{1,6})")(?=.*\bnum_gpu_blocks="(\d{1,9})")', re.MULTILINE
)
_KV_RECEIVED = re.compile(r"^vllm:nixl_bytes_transferred_sum" + NUMBER, re.MULTILINE)
MISSES = 3  # probes in a row without an answer that take a worker out
WELL = (200, 404)  # of /health; where nothing tells its health, the list of models does
TENANT_MEMORY_S = 60.0  # a tenant that got an answer within this time is being served
MOST_TENANTS = 10_000
PROBES_PER_S, IDLE_PROBES_PER_S = 250, 100  # of a fleet at work, and of one that has nothing to do
LOCKED_OUT = (401, 403)
REFUSED_PAUSE_S = 5.0  # between two probes of a worker that refuses the gateway's key
_MOST_SEQUENCES = 1e6  # a larger number is none


class WorkerState(Enum):
    STARTING = "starting"  # known, not yet seen healthy
    READY = "ready"
    DOWN = "down"  # was ready, does not answer
    DRAINING = "draining"  # finishes what it has, gets nothing new
    UNAUTHORISED = "unauthorised"  # refuses the gateway's key
    ASLEEP = "asleep"  # until somebody asks for one of its models


_OUT = (WorkerState.STARTING, WorkerState.DOWN, WorkerState.UNAUTHORISED)


class Nap(Protocol):
    """How a worker sleeps and wakes; `wake` may return before it takes requests again."""

    async def sleep(self) -> None: ...
    async def wake(self) -> None: ...


class RunningAnswer(Protocol):
    """An answer on its way through this gateway.

    speaks: its stream has begun. silent_s: seconds since something came; 0 while its client does not keep up.
    """

    @property
    def speaks(self) -> bool: ...
    def silent_s(self, now: float) -> float: ...
    def lost(self, error: EngineGone) -> None: ...


@dataclass(slots=True, eq=False)
class Member:
    """A worker as the gateway sees it. Written by the fleet (state), the dispatcher (load) and the relay (legs) only.

    load: what it has to do.
    ranks: its data-parallel ranks. Each has a scheduler of its own, and all share the worker's address.
    policy: name and options that its plug-ins were last told, None if they were told nothing yet.
    suspected: a relayed answer failed there since it was last seen healthy.
    slept: it said that it sleeps when it was last probed.
    problem: why it is not ready, where somebody has to do something about it; shown to everybody, so without addresses.
    heard_at: when an answer of it last went through here.
    kv_received_bytes: KV that it has fetched from other workers, as it counts itself.
    leaned_at: when it last changed the side to which it leans.
    site: the LoRA adapters that it has. hardware: what its engine tells of its devices and weights.
    """

    worker: Worker
    engine: EngineClient
    state: WorkerState = WorkerState.STARTING
    models: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (0,)
    kv_received_bytes: float = 0.0
    leaned_at: float = -inf
    misses: int = 0
    suspected: bool = False
    slept: bool = False
    breaker: Breaker = field(default_factory=Breaker)
    output: Output = field(default_factory=Output)
    drained_at: float = 0.0
    note: str = ""
    access: Access = Access()  # frozen
    problem: str = ""
    policy: tuple[str, tuple[str, ...]] | None = None
    models_json: list[dict[str, object]] = field(default_factory=list)
    legs: set["RunningAnswer"] = field(default_factory=set)
    heard_at: float = -inf
    site: AdapterSite = field(default_factory=AdapterSite)
    hardware: Hardware = field(default_factory=Hardware)
    load: WorkerLoad = field(init=False)

    def __post_init__(self) -> None:
        self.load = WorkerLoad(self.worker)

    @property
    def role(self) -> Role:
        """What it does at present."""
        return self.load.role


class WorkerRow(NamedTuple):
    """A worker in metrics. in_flight, flex: sequences that it has from this gateway, and those of the flex tier."""

    worker: str
    role: Role
    ready: bool
    slots: int
    in_flight: int
    flex: int
    pending_tokens: int


class Fleet:
    """The workers. `changed` is called whenever a worker may take requests that it could not take before."""

    def __init__(
        self,
        *,
        probe_s: float = 1.0,
        health: HealthSettings | None = None,
        clock: Callable[[], float] = monotonic,
        background: Background | None = None,
        tls: Access = Access(),  # noqa: B008 - frozen
        pools: Pools | None = None,
        order: Callable[[], tuple[str, tuple[str, ...]]] | None = None,
        movable: Callable[[RunningAnswer], bool] = lambda leg: False,
    ) -> None:
        """tls: certificates for workers that name none of their own. pools: of the workers that may be given requests.
        order: name and options of the policy that plug-ins inside engines must follow. movable: whether another worker
        could go on with an answer."""
        self._tls = tls
        self._background = background or Background(clock)
        self.pools = pools or Pools()
        self.members: dict[str, Member] = {}
        self.served: dict[str, float] = {}  # tenants, and when one of their requests last went through
        self.starting: dict[str, str] = {}  # workers that are not there yet, and how far each is
        self.probe_s = probe_s
        self.health = health or HealthSettings()
        self.clock = clock
        self.trial_answers: dict[str, str] = {}
        self.changed: list[Callable[[], None]] = []
        self._order_of_queues = order
        self._movable = movable
        self._rounds = Rounds(self._look, self._pause_s, clock=clock, background=self._background)
        self.manages: Callable[[str], bool] = lambda name: False  # adapters that are no models of their own
        self.has_adapters: Callable[[Member], None] = lambda member: None
        self.serves_unmanaged = True  # whether other adapters that an engine lists are models of their own
        self.naps: dict[str, Nap] = {}  # how workers sleep that do not do so by themselves
        self.wakes = False  # whether requests wake what sleeps
        self.waking: set[str] = set()  # models that are about to be served again
        self.from_zero: tuple[str, ...] = ()  # models that are started elsewhere once requests wait for them

    def add(self, worker: Worker, access: Access = Access(), *, note: str = "") -> Member:  # noqa: B008 - frozen
        """Adds a worker; it gets requests once a probe has found it healthy. ValueError if its id is taken, or for
        certificates that cannot be read."""
        if worker.id in self.members:
            raise ValueError(f"a worker named {worker.id!r} is already in the fleet")
        try:
            engine = EngineClient(worker.url, access.or_tls_of(self._tls))
        except ValueError as error:
            raise ValueError(f"worker {worker.id!r}: {error}") from None
        member = Member(worker, engine, note=note, access=access, output=Output(moved_at=self.clock()))
        self.enroll(member)
        self._rounds.add(worker.id)
        return member

    def enroll(self, member: Member) -> None:
        """A worker is one of the fleet, in the state that it has."""
        self.members[member.worker.id] = member
        self.pools.number(member.load)
        self.put(member, member.state)

    def put(self, member: Member, state: WorkerState) -> None:
        """A worker is in this state from here on: it is in a pool if it may be given requests, and else in none."""
        member.state = state
        if state is not WorkerState.READY:
            self.pools.remove(member.load)
        elif member.load.pool is None:
            self.pools.add(member.load, member.models)

    def lean(self, member: Member, side: Role) -> None:
        """A worker that does both leans to this side from here on; BOTH: to none."""
        member.load.leans = side
        self.pools.moved(member.load, member.models)
        self._tell()

    async def remove(self, worker_id: str) -> None:
        """A worker leaves at once; what it still relays ends as its connections end. KeyError if unknown."""
        member = self.members.pop(worker_id)
        self.put(member, WorkerState.DOWN)
        await self._rounds.remove(worker_id)
        await member.engine.close()
        self._tell()

    def drain(self, worker_id: str) -> None:
        """Drains a worker: it gets no new requests and finishes its running ones; after `drain_s` another worker
        continues them. KeyError if unknown."""
        member = self.members[worker_id]
        if member.state is not WorkerState.DRAINING:
            self.put(member, WorkerState.DRAINING)
            member.drained_at = self.clock()

    def resume(self, worker_id: str) -> None:
        """A drained worker is given requests again once a probe finds it healthy. KeyError if unknown."""
        member = self.members[worker_id]
        if member.state is WorkerState.DRAINING:
            self.put(member, WorkerState.STARTING)

    def ready(self, model: str | None = None) -> list[Member]:
        """Workers that may be given a request (for `model`)."""
        return [
            member
            for member in self.members.values()
            if member.state is WorkerState.READY and (model is None or model in member.models)
        ]

    def models_known(self) -> set[str]:
        """What the workers serve, as far as they have said so."""
        return {model for member in self.members.values() for model in member.models}

    def is_starting(self) -> bool:
        """Whether there is a worker that has not said yet what it serves, or none at all."""
        members = self.members.values()
        return bool(self.starting) or not members or any(member.state is WorkerState.STARTING for member in members)

    def serves(self, model: str | None = None) -> bool:
        """Whether a request (for `model`) can be taken: by a worker, or by one that it wakes."""
        return bool(self.pools.workers if model is None else self.pools.of(model)) or self.is_dormant(model)

    def is_dormant(self, model: str | None = None) -> bool:
        """Whether a request (for `model`) would wake a worker."""
        if not self.wakes:
            return False
        soon = self.waking.union(self.from_zero)
        if soon if model is None else model in soon:
            return True
        asleep = (member for member in self.members.values() if member.state is WorkerState.ASLEEP)
        return any(model is None or model in member.models for member in asleep)

    def missing_roles(self) -> list[str]:
        """The roles of a disaggregated deployment that no worker has at present, so that requests are not split."""
        there = {pool.role for pool in self.pools.all()}
        halves = {Role.PREFILL, Role.DECODE}
        return sorted(role.value for role in halves - there) if there & halves else []

    def models(self) -> list[dict[str, object]]:
        """The served models as /v1/models lists them, each once."""
        listed: dict[object, dict[str, object]] = {}
        for member in self.members.values():
            if member.state in (WorkerState.READY, WorkerState.ASLEEP) or not self.waking.isdisjoint(member.models):
                for entry in member.models_json:
                    listed.setdefault(entry.get("id"), entry)
        for model in self.from_zero:
            listed.setdefault(model, {"id": model, "object": "model", "created": 0, "owned_by": "evenhand"})
        return list(listed.values())

    def rows(self) -> Iterator[WorkerRow]:
        """A row per worker, for metrics."""
        for member in self.members.values():
            load = member.load
            yield WorkerRow(
                member.worker.id,
                member.role,
                member.state is WorkerState.READY,
                member.worker.slots,
                load.in_flight,
                load.flex,
                load.pending_tokens,
            )

    def suspect(self, member: Member, error: BaseException) -> None:
        """A relayed request failed at this worker: probes it now. The worker is down at once if it cannot be reached or
        is known to be lost; otherwise after one failed probe."""
        if member.state is WorkerState.DRAINING:
            return
        member.suspected = True
        self.look_now(member)
        if isinstance(error, EngineRefusesKey):
            self._locked_out(member, error)
        elif member.state is WorkerState.READY and isinstance(error, EngineUnreachable | EngineLost):
            self._take_out(member, error)

    def failed(self, members: Iterable[Member], call: str, tenant: str, *, proven: bool) -> None:
        """A call failed at these workers; `proven` if another then answered it. Enough of them take a worker out for a
        while, but never the last one of a model: the calls may be to blame."""
        for member in members:
            self._failed(member, call, tenant, proven=proven)

    def _failed(self, member: Member, call: str, tenant: str, *, proven: bool) -> None:
        if member.state is WorkerState.DRAINING:
            return
        member.breaker.failed(call, tenant, proven=proven)
        now = self.clock()
        several = any(name != tenant and now - at < TENANT_MEMORY_S for name, at in self.served.items())
        if member.state is not WorkerState.READY or self._is_last(member):
            return
        if member.breaker.opens(now, self.health.failures, several=several):
            self._take_out(member, f"{member.breaker.failures} requests in a row failed there")

    def did_well(self, member: Member, tenant: str) -> None:
        """A tenant's request went through."""
        if len(self.served) > MOST_TENANTS and tenant not in self.served:
            self.served.clear()
        self.served[tenant] = member.heard_at = self.clock()
        if member.breaker.calls:
            member.breaker = Breaker()

    def _is_last(self, member: Member) -> bool:
        return any(sum(len(pool.workers) for pool in self.pools.of(model)) == 1 for model in member.models)

    def _take_out(self, member: Member, why: object) -> None:
        self.put(member, WorkerState.DOWN)
        log.warning("worker %s gets no requests until it answers again: %s", member.worker.id, why)

    async def are_well(self, members: Iterable[Member]) -> bool:
        """Whether these workers say at this moment that they are healthy, all of them."""
        return all(await asyncio.gather(*map(self.is_well, members)))

    def _locked_out(self, member: Member, error: EngineRefusesKey) -> None:
        """A worker refuses the gateway's key. Its models are asked for again, which shows when it takes the key."""
        if member.state not in (WorkerState.DRAINING, WorkerState.UNAUTHORISED):
            self.put(member, WorkerState.UNAUTHORISED)
        member.models, member.policy = (), None
        self._say(member, error)

    def _say(self, member: Member, error: EngineGone) -> None:
        """Shows a problem that an operator must solve, and logs it once."""
        if member.problem != error.message:
            member.problem = error.message
            log.error("worker %s: %s", member.worker.id, error.message)

    async def is_well(self, member: Member) -> bool:
        """Whether a worker says at this moment that it is healthy."""
        try:
            return (await member.engine.get("/health", self.health.probe_timeout_s)).status_code in WELL
        except EngineGone:
            return False

    def look_now(self, member: Member) -> None:
        """A worker is probed as soon as can be."""
        self._rounds.soon(member.worker.id)

    def _pause_s(self, worker_id: str) -> float:
        """Seconds between two probes of a worker. With so many workers that probes would take a noticeable part of a
        core, they are less frequent, first at idle workers."""
        member = self.members.get(worker_id)
        if member is None or member.state is WorkerState.STARTING:
            return min(self.probe_s, 0.25)
        if member.problem:
            return max(self.probe_s, min(REFUSED_PAUSE_S, 20 * self.probe_s))
        if member.suspected or 0 < member.misses < MISSES:
            return self.probe_s
        idle = not (member.load.in_flight or member.load.others or member.legs)
        return max(self.probe_s, len(self.members) / (IDLE_PROBES_PER_S if idle else PROBES_PER_S))

    async def _look(self, worker_id: str) -> None:
        """One probe and what follows from it."""
        member = self.members[worker_id]
        try:
            await self._probe(member)
        except EngineRefusesKey as error:
            self._locked_out(member, error)
        except EngineGone as error:
            if isinstance(error, EngineUntrusted):
                self._say(member, error)
            else:
                member.problem = ""  # what there was to be seen to is another thing now
            self._missed(member, error)
        except OutOfFiles:  # of this worker nothing is known then
            log.warning("worker %s could not be probed: no file descriptor is left", member.worker.id)
        self._rescue(member)

    def _rescue(self, member: Member) -> None:
        """Takes answers away from a worker that will not finish them; the relay then tries another worker."""
        others_ready = len(self.pools.workers) - (member.load.pool is not None)
        if not member.legs or not others_ready:
            return
        now, patience_s = self.clock(), self.health.stall_s
        dead = member.misses >= MISSES
        stuck = member.output.stuck_s(now) > patience_s
        drained = member.state is WorkerState.DRAINING and now - member.drained_at > self.health.drain_s
        for leg in list(member.legs):
            silent_s = leg.silent_s(now)
            if dead and silent_s > self.health.probe_timeout_s:
                leg.lost(EngineLost("The engine no longer answers."))
            elif stuck and leg.speaks and silent_s > patience_s:
                leg.lost(EngineLost(f"The engine has generated no token for {silent_s:.0f} s."))
            elif member.output.idle and silent_s > patience_s:  # it hung while it had nothing to do
                leg.lost(EngineLost(f"The engine has not started the request for {silent_s:.0f} s."))
            elif drained and self._movable(leg):
                leg.lost(EngineLost("The engine is being drained."))

    async def _probe(self, member: Member) -> None:
        timeout_s = self.health.probe_timeout_s
        if not self._has_just_answered(member):
            await self._ask_health(member)
        metrics = await member.engine.get("/metrics", timeout_s)
        if metrics.status_code == 200:
            told = told_in(metrics.content)
            self._read(member, told)
            if (awake := _AWAKE.search(told)) is not None:
                self._follow_sleep(member, awake=float(awake.group(1)) > 0)
            member.output.read(told, self.clock())
        if member.worker.plugin and self._order_of_queues is not None:
            order = self._order_of_queues()
            if member.policy != order:
                await self._order(member, *order)
        if member.state in _OUT and await self._may_join(member):
            self.put(member, WorkerState.READY)
            log.info("worker %s is ready: %s", member.worker.id, ", ".join(member.models))
            self._tell()
        member.misses = 0
        member.suspected = False
        member.problem = ""

    def _has_just_answered(self, member: Member) -> bool:
        """Whether a request that went through shows that a worker is well, so that it need not be asked."""
        sound = member.state is WorkerState.READY and not (member.suspected or member.misses)
        return sound and self.clock() - member.heard_at < self.probe_s

    async def _ask_health(self, member: Member) -> None:
        """EngineGone if a worker is unhealthy. Also asks for the worker's models if they are unknown."""
        health = (await member.engine.get("/health", self.health.probe_timeout_s)).status_code
        if health in LOCKED_OUT:
            raise refuses_key(member.access)
        if health not in WELL:
            raise EngineGone(f"its /health answers {health}")
        if not member.models or health == 404:
            await self._learn(member)

    async def _may_join(self, member: Member) -> bool:
        """Whether a healthy worker gets requests (again): not within its pause, not while it is stuck, and not without
        an answer to a trial question. One that works for others has more to do than ours, and shows that it can."""
        now, health = self.clock(), self.health
        if now < member.breaker.retry_at or member.output.stuck_s(now) > health.stall_s:
            return False
        if health.canary == "off" or member.load.others:
            return True
        model = member.models[0]
        said = await trial_answer(member.engine, model)
        if health.canary == "same" and said != self.trial_answers.setdefault(model, said):
            member.note = "does not answer the test prompt as the other workers do"
            raise EngineGone(f"it {member.note}: {said!r}")
        return member.state is not WorkerState.DRAINING  # it may have been told so while it answered

    def _read(self, member: Member, metrics: str) -> None:
        load = member.load
        member.ranks = tuple(sorted({int(rank) for rank in _RANKS.findall(metrics)})) or (0,)
        sequences = min(_MOST_SEQUENCES, sum(map(float, _SEQUENCES.findall(metrics))))
        others, before = max(0, round(sequences) - load.in_flight), load.others
        load.observe(others=others, kv_usage=max(map(float, _KV_USAGE.findall(metrics)), default=None))
        if others < before and member.state is WorkerState.READY:
            self._tell()  # there may be room for who waits here
        if (received := _KV_RECEIVED.search(metrics)) is not None:
            member.kv_received_bytes = float(received.group(1))
        if load.kv_tokens == inf and (blocks := _BLOCKS.search(metrics)) is not None:
            load.kv_tokens = float(int(blocks.group(1)) * int(blocks.group(2))) or inf
        self._read_plugin(member, metrics)

    def _read_plugin(self, member: Member, metrics: str) -> None:
        """What our scheduler says of its engine, if it is inside."""
        if _PLUGIN not in metrics:
            member.hardware = Hardware()  # an engine that was restarted without it says nothing of it
            return
        metrics = "\n".join(line for line in metrics.split("\n") if line.startswith("evenhand_"))  # a few of hundreds
        if not member.worker.plugin:
            self._learned(member, replace(member.worker, plugin=True))
        if (slots := _SLOTS.search(metrics)) is not None and 1 <= float(slots.group(1)) < _MOST_SEQUENCES:
            self._learn_slots(member, int(float(slots.group(1))))
        if (adapters := _ADAPTERS.search(metrics)) is not None and float(adapters.group(1)) < _MOST_SEQUENCES:
            member.site.most = int(float(adapters.group(1)))
        member.hardware = hardware_in(metrics)
        if (step := _STEP_TOKENS.search(metrics)) is not None and 1 <= float(step.group(1)) < _MOST_SEQUENCES:
            if (tokens := int(float(step.group(1)))) != member.worker.step_tokens:
                self._learned(member, replace(member.worker, step_tokens=tokens))

    def _follow_sleep(self, member: Member, *, awake: bool) -> None:
        """Another gateway, or an operator, may have put an engine to sleep or woken it."""
        if not awake and member.state in (WorkerState.READY, WorkerState.STARTING, WorkerState.DOWN):
            self.put(member, WorkerState.ASLEEP)
        elif awake and member.state is WorkerState.ASLEEP and member.slept:
            self.put(member, WorkerState.STARTING)
        member.slept = not awake

    def _learn_slots(self, member: Member, slots: int) -> None:
        """The engine itself says how many sequences it runs at once; that counts, whatever was said of it before."""
        said = member.worker.slots
        if slots == said:
            return
        # What was not told is assumed, and needs no alarm.
        level = logging.INFO if said == UNKNOWN_SLOTS else logging.ERROR
        log.log(level, "worker %s runs %d sequences at once, not %d", member.worker.id, slots, said)
        self._learned(member, replace(member.worker, slots=slots))
        if slots > said and member.state is WorkerState.READY:
            self._tell()

    @staticmethod
    def _learned(member: Member, worker: Worker) -> None:
        """More is known of a worker."""
        member.worker = member.load.worker = worker
        member.load.observe()

    async def _order(self, member: Member, policy: str, options: tuple[str, ...]) -> None:
        """Tells the plug-ins inside an engine which policy holds; one that refuses keeps its own, and is asked once."""
        order = {"evenhand_policy": policy, "evenhand_policy_options": list(options)}
        body = {"model": member.models[0], "prompt": [1], "max_tokens": 1, "vllm_xargs": order}
        for rank in member.ranks:
            # Without a rank, vLLM would hand each order to whichever rank is least busy.
            headers = {"X-data-parallel-rank": f"{rank}"} if len(member.ranks) > 1 else {}
            answer = await member.engine.post("/v1/completions", body, headers=headers)
            try:
                told = answer.json()["kv_transfer_params"]["evenhand"]
            except (ValueError, KeyError, TypeError):
                told = {"error": f"it answered {answer.status_code}"}
            if "error" in told:
                member.note = f"keeps its own policy: {told['error']}"
                log.warning("worker %s refused policy %s: %s", member.worker.id, policy, told["error"])
        member.policy = (policy, options)

    async def _learn(self, member: Member) -> None:
        answer = await member.engine.get("/v1/models")
        if answer.status_code in LOCKED_OUT:
            raise refuses_key(member.access)
        try:
            listed = [_public(entry) for entry in answer.json()["data"]]
            adapters = adapters_in(answer.content)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EngineGone(f"its /v1/models answers {answer.status_code} and is not a list of models") from None
        if not listed:
            raise EngineGone("it lists no model")
        member.site.found(adapters)
        member.site.refused.clear()
        self.has_adapters(member)
        self._list(member, listed)
        tells_ids = any(entry.get("owned_by") == "vllm" for entry in listed)
        if tells_ids != member.worker.token_ids:
            self._learned(member, replace(member.worker, token_ids=tells_ids))

    def _list(self, member: Member, entries: list[dict[str, object]]) -> None:
        """The models that a worker serves: what it lists, without the adapters that are loaded and unloaded."""
        own = [
            entry
            for entry in entries
            if not self.manages(str(entry["id"]))
            and (self.serves_unmanaged or str(entry["id"]) not in member.site.loaded)
        ]
        member.models_json, member.models = own, tuple(str(entry["id"]) for entry in own)
        self.pools.moved(member.load, member.models)

    def has_asked_all(self) -> bool:
        """Whether every worker was asked how it is, and has answered or failed to."""
        return all(member.state is not WorkerState.STARTING or member.misses for member in self.members.values())

    def list_anew(self) -> None:
        """Other adapters are managed from here on."""
        for member in self.members.values():
            self.has_adapters(member)
            if any(map(self.manages, member.models)):
                self._list(member, member.models_json)

    def _missed(self, member: Member, error: EngineGone) -> None:
        member.misses += 1
        member.breaker = Breaker()  # it was away, and may be another process when it comes back
        if member.state is WorkerState.READY and (member.misses >= MISSES or member.suspected):
            self.put(member, WorkerState.DOWN)
            member.models = ()  # it may come back with another model, and a plug-in that knows nothing yet
            member.policy = None
            log.warning("worker %s is down: %s", member.worker.id, error.message)

    def _tell(self) -> None:
        for callback in self.changed:
            callback()

    async def close(self) -> None:
        """Stops probing and closes every connection."""
        for worker_id in list(self.members):
            await self.remove(worker_id)
        await self._rounds.close()


def refuses_key(access: Access) -> EngineRefusesKey:
    """What is wrong with the key, or with there being none."""
    if access.key:
        return EngineRefusesKey("The worker refuses the gateway's key: start the gateway with the worker's key.")
    return EngineRefusesKey("The worker requires a key: name the variable that holds it with key=ENV_NAME.")


def is_idle(metrics: str) -> bool:
    """Whether an engine has nothing to do by its own metrics, nor holds KV that another is to fetch."""
    return sum(map(float, [*_SEQUENCES.findall(metrics), *_KV_USAGE.findall(metrics)])) == 0


def _public(entry: dict[str, object]) -> dict[str, object]:
    """A model as clients may see it: no path of the machine that serves it."""
    return {name: value for name, value in entry.items() if name not in ("root", "permission", "parent")}


def described(members: Iterable[Member]) -> list[dict[str, object]]:
    """Workers for /ready and /admin."""
    return [
        {
            "id": member.worker.id,
            "role": member.worker.role.value,
            "state": member.state.value,
            "models": list(member.models),
            "in_flight": member.load.in_flight,
            "slots": member.worker.slots,
            **({"dtype": member.worker.dtype} if member.worker.dtype else {}),
            **({"leans": member.load.leans.value} if member.load.leans is not Role.BOTH else {}),
            **({"note": member.note} if member.note else {}),
            **({"problem": member.problem} if member.problem else {}),
        }
        for member in members
    ]
