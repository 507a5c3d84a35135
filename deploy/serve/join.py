"""`evenhand worker`: one engine on this machine that joins the gateways of a Redis and leaves them gracefully.

It says every `HEARTBEAT_S` that it is there. SIGTERM, Ctrl-C or SIGHUP: it says that it wants nothing new, finishes
what it has, waits until its KV has been fetched, and goes; a second signal ends it at once. Exit codes as of
`evenhand serve`.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import uvloop
from pydantic import Field
from rich.console import Console

from deploy.engine.canary import Canary
from deploy.engine.engine_args import EnginePlan, Ports, worker_of
from deploy.engine.engine_log import LogFile
from deploy.engine.worker import EngineState, Listeners, WorkerEvent, WorkerProcess, is_free
from deploy.machine.gpu_lock import GpuLocks
from deploy.model.model import cache_folder, resolve
from deploy.serve.command import exit_code
from deploy.serve.preflight import PreflightError, check, check_transfer, driver_remarks, in_words, plan_workers
from deploy.serve.preparing import prepared
from deploy.serve.screen import Screen
from deploy.serve.serving import Stop, Surroundings, claimed, log_to_screen, state_folder
from deploy.settings import ServeSettings
from scheduler.workers import Role
from server.cluster.state import REGISTRY_S
from server.engine.access import Access
from server.engine.client import EngineClient
from server.fleet.fleet import is_idle
from server.fleet.registry import HEARTBEAT_S, WORKER_TTL_S, registration_of
from server.options import CliOption, add_options, given
from server.request.errors import EngineGone
from server.settings import DisaggregationSettings, read_settings
from server.store.redis_store import REDIS_PORT
from server.store.sharded import store_at
from server.store.store import Store, StoreAway

log = logging.getLogger("evenhand.worker")

HEARD_S = 2.5 * REGISTRY_S  # until every gateway has read that it wants nothing new
LOOK_S = 0.25
AUTO = "auto"


class JoinSettings(ServeSettings):
    """One engine of a fleet. What concerns gateways only is accepted, for a file may serve both, and not used."""

    role: Literal["prefill", "decode", "both"] = Field("both", description="which half of a request it takes")
    address: str = Field(
        "127.0.0.1",
        description="where gateways reach it, or `auto` for this machine's address towards Redis; "
        "KV transfers need no key, so keep it private",
    )
    name: str = Field("", max_length=64, description="its name in the fleet; default: the host's, with the role")
    engine_port: int | None = Field(
        None, ge=1, le=65534, description="the engine's port, and the next one for its KV transfer; default: free ones"
    )
    ready_file: Path | None = Field(None, description="holds the engine's URL while it is ready, for health checks")


OPTIONS = (
    CliOption("role", "prefill|decode|both"),
    CliOption("disaggregation.balance_roles", flag="--balance-roles"),
    CliOption("redis_url", "URL"),
    CliOption("address", "HOST"),
    CliOption("name", "NAME"),
    CliOption("engine_port", "PORT"),
    CliOption("model", "NAME|PATH|HF_ID"),
    CliOption("policy", "NAME"),
    CliOption("policy_options", "KEY=VALUE", "--policy-option"),
    CliOption("slo.ttft_s", "SECONDS", "--slo-ttft"),
    CliOption("slo.tpot_s", "SECONDS", "--slo-tpot"),
    CliOption("kv_cache_gib", "GIB"),
    CliOption("gpus", "LIST"),
    CliOption("compile"),
    CliOption("start_timeout_s", "SECONDS", "--start-timeout"),
    CliOption("state_folder", "FOLDER"),
    CliOption("engine_args", "ARG", "--engine-arg"),
    CliOption("verbose"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given comes from EVENHAND_…, the file, or the default."""
    add_options(parser, JoinSettings, OPTIONS)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings")


def run(args: argparse.Namespace, surroundings: Surroundings | None = None) -> int:
    """Serves until it is stopped; returns the exit code."""
    around = surroundings or Surroundings()

    def serve() -> int:
        settings = read_settings(given(args, JoinSettings, OPTIONS), args.config, JoinSettings)
        if len(settings.model) > 1:
            raise ValueError("a worker is one engine of one model: start one `evenhand worker` for each --model")
        if not settings.redis_url:
            raise ValueError("a worker joins its gateways through Redis: give --redis-url URL, or EVENHAND_REDIS_URL")
        redis_url = settings.redis_url[0].get_secret_value()  # of several, the first has the workers
        if settings.address == AUTO:
            settings = settings.model_copy(update={"address": address_towards(redis_url)})
        with contextlib.closing(around.locks()) as locks:
            plan = plan_of(settings, around, locks)
            code: int = uvloop.run(_joined(settings, plan, redis_url, around))
        return code

    return exit_code("evenhand worker", serve)


def address_towards(redis_url: str) -> str:
    """The address from which this machine reaches Redis: of several, gateways reach that one too.

    PreflightError where there is no way to it, ValueError for an address that names no host.
    """
    server = urlsplit(redis_url)
    if not server.hostname:
        raise ValueError("--address auto needs a Redis that is reached by its host name: give --address HOST")
    why = ""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            server.hostname, server.port or REDIS_PORT, type=socket.SOCK_DGRAM
        ):
            with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
                probe.connect(address)  # sends nothing: it only chooses the route
                return str(probe.getsockname()[0])
    except OSError as error:
        why = f" ({error.strerror})"
    raise PreflightError(f"no route to the Redis server {server.hostname}{why}: correct --redis-url")


def plan_of(settings: JoinSettings, around: Surroundings, locks: GpuLocks) -> EnginePlan:
    """The engine, whose GPUs are held in `locks` from here on.

    EngineArgsError, GpuPlanError, ModelError, PreflightError or ValueError says what is wrong.
    """
    alone = settings.each()[0].model_copy(
        update={
            "worker_count": 1,
            "prefill_workers": 0,
            "decode_workers": 0,
            "workers": [],
            "disaggregation": DisaggregationSettings(),
        }
    )
    role, machine = Role(settings.role), around.machine()
    leans = role is Role.BOTH and (settings.disaggregation.balance_roles or (settings.slo.named and machine.nixl))
    check_transfer([Role.PREFILL if leans else role], machine)
    checked = check(alone, machine, cache_folder(), around.ask, around.weigh)
    machine = claimed(alone, machine, [checked], locks)
    (plan,) = plan_workers(alone, machine, [checked], [resolve(settings.source, cache_folder())]).values()
    plan = replace(plan, role=role, host=settings.address, hands_over=leans)
    if machine.own_cores or checked.build != "cpu":
        return plan
    # Another worker beside this one, in a container of its own, would choose the same cores.
    anywhere = tuple(sorted(thread for threads in machine.physical for thread in threads))
    return replace(plan, cores=anywhere or plan.cores, allowed=(), threads=len(plan.cores))


def ports_of(settings: JoinSettings) -> Ports | None:
    """The requested ports. ValueError if one of them is not available."""
    first = settings.engine_port
    if first is None:
        return None
    for port in (first, first + 1):
        if not is_free(settings.address, port):
            raise ValueError(
                f"an engine cannot listen on {settings.address}:{port}: it is taken, or no address of this machine; "
                "choose another --engine-port"
            )
    return Ports(first, first + 1)


async def _joined(settings: JoinSettings, plan: EnginePlan, redis_url: str, around: Surroundings) -> int:
    store = store_at([redis_url])
    try:
        return await Joining(settings, plan, store, around).run()
    finally:
        await store.close()


class Joining:
    """One engine, from its start to its leave."""

    def __init__(self, settings: JoinSettings, plan: EnginePlan, store: Store, around: Surroundings) -> None:
        self.name = settings.name or f"{socket.gethostname()}-{settings.role}-{secrets.token_hex(2)}"
        self._settings = settings
        self._plan = plan
        self._store = store
        self._around = around
        self._screen = Screen(Console(highlight=False), [self.name], settings.verbose, time.monotonic)
        self._url = ""  # while it is ready
        self._draining = False
        self._was_ready = False
        self._changed = asyncio.Event()
        self._away = False
        self._worker = WorkerProcess(
            self.name,
            lambda ports: around.command(plan, ports, sys.executable),
            Canary(plan.served_name),
            Listeners(self._moved, self._screen.log),
            LogFile(state_folder(settings, os.environ) / f"{self.name}.log"),
            replace(around.timing, start_s=settings.start_timeout_s),
            ports_of(settings),
        )

    async def run(self) -> int:
        """Returns the exit code. WorkerError if the engine does not start."""
        stop = Stop()
        with self._screen:
            log_to_screen(self._screen, "worker", verbose=self._settings.verbose)
            self._screen.table({"model": self._plan.served_name, self.name: in_words(self._plan)})
            for remark in driver_remarks(self._around.machine()):
                self._screen.say(f"  {remark}", "yellow")
            self._screen.say()
            engine = asyncio.create_task(self._run_engine(), name="engine")
            beats = asyncio.create_task(self._beat(), name="heartbeats")
            asked = asyncio.create_task(stop.asked.wait())
            try:
                await asyncio.wait({engine, asked}, return_when=asyncio.FIRST_COMPLETED)
                if self._url and stop.asked.is_set():
                    await self._drain(stop)
            finally:
                await self._end(engine, beats, asked, stop)
        self._screen.say("Stopped. Nothing is left running.", "dim")
        return 0 if stop.number == signal.SIGTERM and self._was_ready else 128 + stop.number

    async def _run_engine(self) -> None:
        began_s = time.monotonic()

        def hear(line: str) -> None:
            self._screen.starting("model", line, time.monotonic() - began_s)

        settings = self._settings
        await prepared(settings.source, settings.engine_args, self._around.timing.grace_s, hear)
        self._screen.started("model")
        await self._worker.run()

    async def _end(
        self, engine: asyncio.Task[None], beats: asyncio.Task[None], asked: asyncio.Task[bool], stop: Stop
    ) -> None:
        for task in (beats, asked):
            task.cancel()
        await asyncio.wait({beats, asked})
        with contextlib.suppress(StoreAway):  # then it is forgotten when its time runs out
            await self._store.leave(self.name)
        if stop.at_once.is_set():
            self._worker.kill()
        engine.cancel()
        await asyncio.wait({engine})
        if not engine.cancelled() and (error := engine.exception()) is not None:
            raise error

    def _moved(self, event: WorkerEvent) -> None:
        self._screen.worker(event)
        self._url = event.url if event.state is EngineState.READY else ""
        self._note_ready()
        self._was_ready = self._was_ready or bool(self._url)
        self._changed.set()

    def _note_ready(self) -> None:
        """The ready file holds the URL of an engine that is ready, and else is not there."""
        file = self._settings.ready_file
        if file is None:
            return
        try:
            if self._url:
                file.write_text(self._url)
            else:
                file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot write the ready file %s: %s", file, error.strerror)

    async def _beat(self) -> None:
        """Tells the store that the engine is there, as often as it has to, and at once when something has changed."""
        while True:
            self._changed.clear()
            try:
                await self._tell()
            except StoreAway as error:
                if not self._away:
                    log.error(
                        "%s; gateways that know this worker keep using it, others cannot find it",
                        str(error).rstrip("."),
                    )
                self._away = True
            else:
                self._away = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):  # not wait_for, which under Python 3.11 loses cancellations
                    await self._changed.wait()

    async def _tell(self) -> None:
        if not self._url:
            await self._store.leave(self.name)
            return
        worker, access = worker_of(self._plan, self.name, self._url), Access(self._plan.key)
        await self._store.register(self.name, registration_of(worker, access, draining=self._draining), WORKER_TTL_S)

    async def _drain(self, stop: Stop) -> None:
        """Nothing new, and until what is there is finished; at most `shutdown_s`."""
        limit_s = self._settings.shutdown_s
        self._screen.say(
            f"\nLeaving: running answers may finish (at most {limit_s:.0f} s). Interrupt again to stop immediately.",
            "dim",
        )
        self._draining = True
        self._changed.set()
        hurry = asyncio.create_task(stop.at_once.wait())
        idle = asyncio.create_task(self._idle())
        await asyncio.wait({hurry, idle}, timeout=HEARD_S + limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (hurry, idle):
            task.cancel()

    async def _idle(self) -> None:
        """Returns when the engine has nothing more to do."""
        await asyncio.sleep(HEARD_S)
        engine = EngineClient(self._url, Access(self._plan.key))
        try:
            while True:
                if is_idle((await engine.get("/metrics")).text):
                    return
                await asyncio.sleep(LOOK_S)
        except EngineGone as error:
            log.warning("%s", error.message)
        finally:
            await engine.close()
