"""The composition root: the only place that builds long-lived objects."""

import asyncio
import gc
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from time import CLOCK_REALTIME, clock_gettime, monotonic
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from scheduler.jobs import Tier
from scheduler.objectives import NO_OBJECTIVES
from scheduler.placement import Rules
from scheduler.pools import Pools
from scheduler.tiers import TieredLanes
from server.admission.dispatch import Dispatcher, FlexRules, Lines
from server.admission.live_adapters import LiveAdapters
from server.admission.live_names import LiveNames
from server.admission.live_policy import LivePolicy
from server.admission.predictor import Predictor
from server.admission.sleeper import Sleeper
from server.background import Background
from server.batch.batches import Batches
from server.batch.files import FileFolder, Files, FilesUnavailable, NoSpace
from server.batch.lines import GatewayEngines
from server.batch.object_files import object_files
from server.batch.redis_store import RedisBatchStore
from server.batch.routes import batch_routes, operator_routes
from server.batch.runner import Runner
from server.batch.store import BatchStore, SqliteBatchStore, StoreUnavailable
from server.cluster.local_sync import LocalSync, Process
from server.cluster.state import ClusterState
from server.cluster.usage import UsageBook
from server.failover.failover import Failover
from server.fleet.balancer import Balancer
from server.fleet.fleet import Fleet
from server.fleet.named import fleet_tls, named_worker
from server.front.gateway import Gateway
from server.front.listener import Listener, certificate_of, dress, edge_of, listener
from server.front.routes import AdminPortFilter, identified, public_app
from server.interrupts import ended_by_ctrl_c
from server.observe.cost import CostMeter
from server.observe.fairness_metrics import FairnessMetrics
from server.observe.observer import Observers
from server.observe.recorder import Recorder, RecordingBounds
from server.observe.slo import SloMetrics, SloTargets
from server.observe.telemetry import Telemetry
from server.operators.admin import Admin, admin_routes
from server.operators.console import Console, console_routes
from server.operators.logs import Pseudonyms, RequestLog, log_routes
from server.operators.usage import usage_routes
from server.relay.engine_body import EngineBody
from server.relay.prefill_leg import PrefillLeg
from server.relay.relay import Relay
from server.settings import Settings, admin_address, scheme_of

if TYPE_CHECKING:
    from server.observe.tracing import Tracing

log = logging.getLogger("evenhand")

YOUNG_OBJECTS = 20_000


wall_clock = partial(clock_gettime, CLOCK_REALTIME)  # seconds since 1970, for what follows the calendar


def calm_collector() -> None:
    """For a process that serves and does nothing else, once all is imported and built: that is there to stay and is not
    looked at again, and what requests leave behind is collected in larger heaps (a tenth of the time per request)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)


class GatewayServer:
    """A gateway that can be served. `fleet` may be filled while it runs.

    process: which one this is, where a gateway is several. on_start: called once clients are served.
    """

    def __init__(
        self, settings: Settings, process: Process | None = None, on_start: Callable[[], None] = lambda: None
    ) -> None:
        """Raises ValueError with a clear sentence for a policy, an option or a worker that cannot be."""
        self.settings = settings
        self.stopping = False
        self.workers = [named_worker(text, number, os.environ) for number, text in enumerate(settings.workers)]
        self.policy = LivePolicy(settings.policy, settings.policy_options, settings.admission.ahead, monotonic)
        self.background = Background(monotonic)
        self.fleet = self._fleet()
        self.sleeper = self._sleeper()
        self.lines = Lines(self._dispatcher, self.fleet, self._names())
        self.process = process
        self.shared = self._shared()
        self.telemetry = Telemetry(self.lines.depth, self.lines.placed, self.fleet.rows, self.lines.by_tier)
        self.balancer = Balancer(self.fleet, settings.disaggregation.busy_tokens, clock=monotonic)
        self.pseudonyms = Pseudonyms(settings.admin_key.get_secret_value() if settings.admin_key is not None else None)
        self.recorder, self.tracing = self._recorder(), self._tracing()
        sharing = self._fairness_metrics()
        self.gateway = self._gateway(self._observers(sharing))
        for collector in (sharing, self.gateway.handover, self.balancer, self.failover, self.adapters):
            self.telemetry.registry.register(collector)
        self.siblings = self._siblings()
        with ended_by_ctrl_c():
            self.app = public_app(
                self.fleet, self.lines.names, self.siblings.metrics, self.shared.tenants, self._notes, self._lifespan
            )
            self._for_operators(sharing)
        self.uvicorn = self._listener(on_start)

    def _names(self) -> LiveNames:
        """What clients may ask for."""
        settings = self.settings
        self.adapters = LiveAdapters(settings.adapters, self.fleet, settings.lora)
        return LiveNames(settings.models, self.fleet, self.adapters)

    def _fleet(self) -> Fleet:
        settings = self.settings
        # How many replicas there are and what can be moved is asked while requests run: who knows is built later.
        fleet = Fleet(
            probe_s=settings.probe_s,
            health=settings.health,
            background=self.background,
            tls=fleet_tls(settings),
            pools=Pools(self.policy.window, self._replicas),
            order=self.policy.order,
            movable=lambda leg: self.failover.can_move(leg),
        )
        self.policy.on_switch.append(fleet.pools.refresh)
        return fleet

    def _shared(self) -> ClusterState:
        return ClusterState(
            self.settings,
            self.fleet,
            self.lines,
            self.policy,
            clock=monotonic,
            wall=wall_clock,
            process=self.process,
            background=self.background,
        )

    def _siblings(self) -> LocalSync:
        """What this process and the other processes of the same gateway exchange."""
        number = self.process.number if self.process is not None else 0
        return LocalSync(
            self.shared.local,
            number,
            self.fleet,
            self.telemetry.registry,
            self.background,
            lambda: self.console.published(),
        )

    def _gateway(self, observers: Observers) -> Gateway:
        """The path of a request: limits, queue, prefill leg, relay, failover."""
        settings, shared = self.settings, self.shared
        steering = EngineBody(salt_cache=settings.salt_cache)
        relay = Relay(self.telemetry.itl, self.telemetry.flex_itl, steering.body_for)
        handover = PrefillLeg(
            steering.to_prefill, self.fleet, timeout_s=settings.disaggregation.prefill_timeout_s, clock=monotonic
        )
        self.failover = Failover(relay, steering, settings.health.attempts, observers.got_place)
        return Gateway(
            shared.tenants,
            shared.gate,
            self.lines,
            handover,
            self.failover,
            self.telemetry,
            observers,
            monotonic,
        )

    def _fairness_metrics(self) -> FairnessMetrics:
        shared = self.shared
        return FairnessMetrics(
            self.lines.present, shared.gate.refusals, shared.store_state, monotonic, self.settings.tenant_labels
        )

    def _observers(self, sharing: FairnessMetrics) -> Observers:
        """Everything that observes calls."""
        judging = SloMetrics(SloTargets(self.settings.slo))
        self.telemetry.registry.register(judging)
        if self.sleeper is not None:
            self.telemetry.registry.register(self.sleeper)
        self.usage = self._usage()
        request_log = RequestLog(self.pseudonyms) if self.settings.log_format == "json" else None
        meter = None if self.usage is None else self.usage.meter
        wanted = (self.telemetry, sharing, judging, meter, self.tracing, self.recorder, request_log, self.sleeper)
        return Observers(*(observer for observer in wanted if observer is not None))

    def _usage(self) -> UsageBook | None:
        """What requests cost, if that is to be counted."""
        settings = self.settings
        if not settings.cost.meter:
            return None
        factors = {Tier.FLEX.label: settings.tiers.flex_cost, Tier.PRIORITY.label: settings.tiers.priority_cost}
        meter = CostMeter(
            settings.cost,
            monotonic,
            wall_clock,
            factors=factors,
            labels=settings.tenant_labels,
            spend=self.shared.gate.spend,
        )
        self.telemetry.registry.register(meter)
        return UsageBook(meter, self.shared.store, self.shared.replicas.name, wall_clock)

    def _for_operators(self, sharing: FairnessMetrics) -> None:
        """Their routes, their address, and the log's line for each request."""
        self.batches = self._batches()
        self.apart = AdminPortFilter(self.app)
        self._admin_sock: socket.socket | None = None
        admin = self._admin()
        self.console = self._console(sharing)
        console = console_routes(self.console, admin.authorize)
        for routes in (
            admin_routes(admin),
            console,
            log_routes(admin.authorize),
            usage_routes(self.usage, admin.authorize),
        ):
            self.app.include_router(routes)
        if self.batches is not None:
            self.app.include_router(operator_routes(self.batches.batches, admin.authorize))

    def _listener(self, on_start: Callable[[], None]) -> Listener:
        """Where clients come in: our own protocol, and the application behind it."""
        settings = self.settings
        self.certificate = certificate_of(settings)
        self.edge = edge_of(settings, self.gateway, monotonic)
        dress(self.app, settings)
        return listener(self.apart, settings, self.edge, self.certificate, on_start)

    def _admin(self) -> Admin:
        key, shared = self.settings.admin_key, self.shared
        return Admin(
            key.get_secret_value() if key is not None else None,
            shared.tenants,
            shared.gate,
            self.policy,
            self.lines,
            self.fleet,
            shared.records,
            self.siblings,
            wall_clock,
            self.pseudonyms.of,
            self.settings.cost.meter,
        )

    def _sleeper(self) -> Sleeper | None:
        """Puts models to sleep and wakes them, if a setting asks for it."""
        sleep = self.settings.sleep
        wanted = sleep.after_s is not None or sleep.from_zero
        return Sleeper(self.fleet, sleep, monotonic, lambda: self.lines.depth()) if wanted else None

    def _tracing(self) -> "Tracing | None":
        """Spans, if they are wanted; OpenTelemetry is loaded only then."""
        if self.settings.tracing.endpoint is None:
            return None
        from server.observe.tracing import Tracing

        return Tracing(self.shared.replicas.name, self.pseudonyms.of, self.settings.tracing.share)

    def _recorder(self) -> Recorder | None:
        record = self.settings.record
        if record.folder is None:
            return None
        if self.settings.gateway_processes > 1:
            raise ValueError("--record works with one process only: remove it or --gateway-processes")
        return Recorder(
            record.folder,
            RecordingBounds(record.max_bytes, record.file_bytes),
            monotonic,
            lambda said: self.background.failed("recorder", said),
        )

    def _console(self, sharing: FairnessMetrics) -> Console:
        shared = self.shared
        return Console(
            self.telemetry,
            sharing,
            self.lines,
            self.fleet,
            self.policy,
            shared.tenants,
            shared.store_state,
            self.siblings,
            monotonic,
        )

    def _batches(self) -> Runner | None:
        """The Batch API, if there is a place for files. ValueError for one that cannot be used."""
        batch = self.settings.batch
        files = self._batch_files()
        if files is None:
            return None
        try:
            batches = Batches(files, self._batch_store(), batch, wall_clock)
            with suppress(NoSpace, FilesUnavailable, StoreUnavailable):  # then the runner checks, once they answer
                batches.check_at_start()
        except OSError as error:
            raise ValueError(f"the batch folder {batch.folder} cannot be used: {error.strerror}") from None
        tenants = self.shared.tenants
        self.app.include_router(batch_routes(batches, partial(identified, tenants)))
        engines = GatewayEngines(self.gateway.answer, tenants, self.lines, self._flex_rules())
        runner = Runner(batches, engines, self.shared.replicas.name, monotonic)
        self.telemetry.registry.register(runner)
        return runner

    def _batch_files(self) -> Files | None:
        batch = self.settings.batch
        if batch.files_url is not None:
            return object_files(batch.files_url)
        return None if batch.folder is None else FileFolder(batch.folder / "files")

    def _batch_store(self) -> BatchStore:
        batch = self.settings.batch
        if not batch.shared:
            if batch.folder is None:
                raise ValueError(
                    "batch.files_url needs a place for everything else: batch.folder, or Redis with batch.shared"
                )
            return SqliteBatchStore(batch.folder / "batches.sqlite", wall_clock)
        if not self.settings.redis_url:
            raise ValueError("batch.shared needs a Redis that the gateways share: set --redis-url")
        return RedisBatchStore(self.settings.redis_url[0].get_secret_value())

    def _notes(self) -> dict[str, Any]:
        """What /ready says beside the workers."""
        problems = self.background.problems()
        return (
            self.shared.notes()
            | ({"failing": problems} if problems else {})
            | ({"stopping": True} if self.stopping else {})
        )

    def _replicas(self) -> int:
        """Gateways that share the workers, this one included."""
        return self.shared.store_state()[1]

    def _flex_rules(self) -> FlexRules:
        tiers = self.settings.tiers
        return FlexRules(tiers.flex_timeout_s, tiers.flex_share)

    def _dispatcher(self, model: str) -> Dispatcher:
        admission, apart, tiers = self.settings.admission, self.settings.disaggregation, self.settings.tiers
        dispatcher = Dispatcher(
            model,
            TieredLanes(self.policy.build(), tiers.flex_reserve),
            self.fleet,
            max_waiting=admission.max_waiting,
            queue_timeout_s=admission.queue_timeout_s,
            clock=monotonic,
            rules=Rules(apart.min_prompt_tokens, apart.busy_tokens, apart.max_arriving_tokens),
            freed=self.lines.freed,
        )
        dispatcher.max_sequences = admission.max_sequences
        dispatcher.flex = self._flex_rules()
        if self.settings.slo.named:
            targets = SloTargets(self.settings.slo, unset=NO_OBJECTIVES)
            dispatcher.predictor = Predictor(
                targets, apart.min_prompt_tokens, monotonic, self.telemetry.predicted.observe, self._replicas
            )
        dispatcher.wake = None if self.sleeper is None else self.sleeper.woken
        return dispatcher

    def _tasks(self) -> list[asyncio.Task[None]]:
        """The background tasks that the settings ask for."""
        wanted = (
            ("balance roles", self.balancer.run if self.settings.disaggregation.balance_roles else None),
            ("run batches", self.batches.run if self.batches is not None else None),
            ("remove old batch files", self.batches.sweep if self.batches is not None else None),
            ("put idle models to sleep", self.sleeper.run if self.sleeper is not None else None),
            ("load pinned adapters", self.adapters.run),
            ("watch certificate", self.certificate.watch if self.certificate is not None else None),
        )
        return [self.background.start(name, run) for name, run in wanted if run is not None]

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        for worker, access in self.workers:
            self.fleet.add(worker, access)
        if self.recorder is not None:
            self.recorder.start()
        if self.tracing is not None and self.settings.tracing.endpoint is not None:
            self.tracing.start(self.settings.tracing.endpoint, monotonic, wall_clock)
        tasks = self._tasks()
        metered = nullcontext() if self.usage is None else self.usage.running(self.background)
        try:
            async with self.shared.running(), self.siblings.running(self.process), metered:
                yield
        finally:
            await Background.stop(*tasks)
            if self.batches is not None:
                self.batches.batches.close()
            if self.sleeper is not None:
                await self.sleeper.close()
            await self.adapters.close()
            await self.fleet.close()
            if self.recorder is not None:
                await asyncio.to_thread(self.recorder.stop)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.stop)

    def listen(self) -> socket.socket:
        """Takes the ports; with other processes of this gateway, its share of them. Returns the public one's socket.
        OSError if one is not free; with the address as its `filename` if that is the one for operators."""
        sock = self._bound(self.settings.host, self.settings.port)
        address = admin_address(self.settings, sock.getsockname()[1])
        if address is not None:
            try:
                self._admin_sock = self._bound(*address)
            except OSError as error:
                sock.close()
                raise OSError(error.errno, error.strerror, f"{address[0]}:{address[1]}") from None
            self.apart.port = self._admin_sock.getsockname()[1]
        return sock

    def _bound(self, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.process is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            sock.bind((host, port))
            sock.listen(4096)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    async def serve(self, sock: socket.socket | None = None) -> None:
        """Serves until `stop` is called. Signals are the caller's business."""
        sockets = [sock or self.listen()]
        if self._admin_sock is not None:
            sockets.append(self._admin_sock)
            scheme = scheme_of(self.settings)
            log.info("/admin and /console are on %s://%s:%d", scheme, self.settings.admin_host, self.apart.port)
        await self.uvicorn._serve(sockets)
        if self.uvicorn.force_exit:  # uvicorn then leaves the lifespan to be cancelled, with a stack in the log
            await self.uvicorn.lifespan.shutdown()

    def stop(self, *, at_once: bool = False) -> None:
        """Says so in /ready and, after `lame_duck_s`, takes no new connection, lets running answers finish, and makes
        `serve` return. Until then every answer ends its connection, so that clients go elsewhere and none is idle when
        it closes. `at_once`: no waiting for anything."""
        self.edge.parting = True
        if not self.stopping and self.settings.lame_duck_s and not at_once:
            asyncio.get_running_loop().call_later(self.settings.lame_duck_s, self._close)
            self.stopping = True
            return
        self.stopping = True
        self._close(at_once=at_once)

    def _close(self, *, at_once: bool = False) -> None:
        self.uvicorn.should_exit = True
        self.uvicorn.stopping.set()
        self.uvicorn.force_exit = self.uvicorn.force_exit or at_once
