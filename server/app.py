"""The composition root: the only place that builds long-lived objects."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from time import monotonic

import uvicorn
from fastapi import FastAPI

from scheduler.catalog import build
from scheduler.lanes import Lanes
from scheduler.policy import Policy
from scheduler.workers import Role, Worker
from server.dispatch import Dispatcher, Lines
from server.edge import Bounds, edge_for
from server.fleet import Fleet
from server.gateway import Gateway
from server.relay import Relay
from server.routes import public_app
from server.settings import Settings
from server.steering import Steering
from server.telemetry import Telemetry
from server.tenants import Tenants

log = logging.getLogger("evenhand")

FAR_AHEAD = 4096  # a preempting policy wants newcomers inside the engine, where they can displace a running job


def _wall_clock() -> float:
    return datetime.now(UTC).timestamp()


def window_for(policy: Policy, ahead: int | None) -> int:
    """Sequences given to a worker beyond its batch: few for policies that never preempt, so that what waits here can
    still be re-ordered, re-routed or shed; many for those that do."""
    if ahead is not None:
        return ahead
    return FAR_AHEAD if policy.order.preemptions_per_s else 4


def parse_worker(text: str, number: int) -> Worker:
    """`URL[,role=prefill|decode|both][,slots=N][,id=NAME]` → Worker. ValueError with what is wrong."""
    url, *pairs = text.split(",")
    if not url.startswith("http://"):
        raise ValueError(f"worker {text!r}: write it as http://HOST:PORT[,role=both][,slots=256]")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := set(options) - {"role", "slots", "id"}:
        raise ValueError(f"worker {text!r}: unknown option {sorted(unknown)[0]!r}; there are role, slots and id")
    roles = {role.value: role for role in Role}
    role, slots = options.get("role", "both"), options.get("slots", "256")
    if role not in roles:
        raise ValueError(f"worker {text!r}: role is prefill, decode or both, not {role!r}")
    if not slots.isdigit() or int(slots) < 1:
        raise ValueError(f"worker {text!r}: slots is how many sequences its batch holds, not {slots!r}")
    return Worker(options.get("id", f"worker-{number}"), url.rstrip("/"), roles[role], int(slots))


class GatewayServer:
    """A gateway that can be served. `fleet` may be filled while it runs."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError with a clear sentence for a policy, an option or a worker that cannot be."""
        self.settings = settings
        self.workers = [parse_worker(text, number) for number, text in enumerate(settings.workers)]
        build(settings.policy, settings.policy_options)  # refuse nonsense before anything listens
        self.fleet = Fleet(probe_s=settings.probe_s)
        self.lines = Lines(self._dispatcher, self.fleet)
        self.telemetry = Telemetry(self.lines.depth, self.fleet.rows)
        relay = Relay(self.telemetry.itl, Steering(self.lines).body_for)
        self.gateway = Gateway(Tenants(_wall_clock), self.lines, relay, self.telemetry, monotonic)
        self.app = public_app(self.fleet, self.telemetry, self._lifespan)
        edge = settings.edge
        bounds = Bounds(
            edge.max_head_bytes, edge.max_body_bytes, edge.head_timeout_s, edge.body_timeout_s, edge.stall_timeout_s
        )
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.port,
                http=edge_for(self.gateway, bounds),
                loop="uvloop",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                backlog=4096,
                timeout_keep_alive=int(edge.keep_alive_s),
                timeout_graceful_shutdown=int(settings.shutdown_s),
            )
        )

    def _dispatcher(self, model: str) -> Dispatcher:
        admission = self.settings.admission
        policy = build(self.settings.policy, self.settings.policy_options)
        ahead = window_for(policy, admission.ahead)
        return Dispatcher(
            model,
            Lanes(policy),
            self.fleet,
            window=lambda worker: worker.slots + ahead,
            max_waiting=admission.max_waiting,
            queue_timeout_s=admission.queue_timeout_s,
            clock=monotonic,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        for worker in self.workers:
            self.fleet.add(worker)
        try:
            yield
        finally:
            await self.fleet.close()

    def listen(self) -> socket.socket:
        """Takes the port. OSError if it is not free."""
        family = socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.settings.host, self.settings.port))
            sock.listen(4096)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    async def serve(self, sock: socket.socket | None = None) -> None:
        """Serves until `stop` is called. Signals are the caller's business."""
        await self.uvicorn._serve([sock or self.listen()])
        if self.uvicorn.force_exit:  # uvicorn then leaves the lifespan to be cancelled, with a stack in the log
            await self.uvicorn.lifespan.shutdown()

    def stop(self, *, at_once: bool = False) -> None:
        """Takes no new connection, lets running answers finish (unless `at_once`), and makes `serve` return."""
        self.uvicorn.should_exit = True
        self.uvicorn.force_exit = self.uvicorn.force_exit or at_once
