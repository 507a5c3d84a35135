"""The gateway of `evenhand serve`: in this process, or as a program with several processes."""

import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import SecretStr

from deploy.engine.child import ChildEnded, ChildProcess, running
from deploy.engine.worker import WorkerError
from scheduler.workers import Worker
from server.app import GatewayServer
from server.cluster.local_sync import READY, STARTING, WORKER
from server.engine.access import Access
from server.fleet.fleet import Nap
from server.fleet.named import key_names
from server.fleet.registry import registration_of
from server.processes.prefork import reserved
from server.processes.supervisor import KILL_S
from server.settings import Settings
from server.store.socket_store import LOCAL, SHARED, listen_at, serving_stores
from server.store.store import MemoryStore

LOOK_S = 0.05


class GatewayRunner(Protocol):
    """What stands before the engines."""

    def listen(self) -> socket.socket:
        """Takes the port. OSError if it cannot be had."""

    async def serve(self, sock: socket.socket) -> None:
        """Serves until `stop`. WorkerError if it ends by itself."""

    def stop(self, *, at_once: bool) -> None:
        """Lets running answers finish, unless `at_once`."""

    def starting(self, worker_id: str, stage: str) -> None:
        """A worker is not there yet."""

    def join(self, worker: Worker, access: Access, nap: Nap | None = None) -> None:
        """Adds a worker; `access` is its key and certificates, `nap` how it sleeps if the engine itself cannot."""

    def leave(self, worker_id: str) -> None:
        """A worker is gone. Harmless if it never was there."""

    async def takes_requests(self, workers: int) -> None:
        """Returns when so many workers are seen to be ready."""

    async def settled(self) -> None:
        """Returns when nothing of the above is under way."""


def front_for(settings: Settings, heard: Callable[[str], None]) -> GatewayRunner:
    """The gateway that the settings describe. heard: gets each output line of a gateway in a separate program.

    ValueError for settings that cannot be.
    """
    server = GatewayServer(settings)
    return InProcessGateway(server) if settings.gateway_processes == 1 else GatewayProcesses(settings, heard)


class _Tasks:
    """Small tasks that must not be forgotten."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)


class InProcessGateway:
    """A gateway in this process."""

    def __init__(self, server: GatewayServer) -> None:
        self._server = server
        self._tasks = _Tasks()

    def listen(self) -> socket.socket:
        return self._server.listen()

    async def serve(self, sock: socket.socket) -> None:
        await self._server.serve(sock)

    def stop(self, *, at_once: bool) -> None:
        self._server.stop(at_once=at_once)

    def starting(self, worker_id: str, stage: str) -> None:
        self._server.fleet.starting[worker_id] = stage

    def join(self, worker: Worker, access: Access, nap: Nap | None = None) -> None:
        fleet = self._server.fleet
        fleet.starting.pop(worker.id, None)
        if nap is not None:
            fleet.naps[worker.id] = nap
        if worker.id in fleet.members:  # it has slept
            self._tasks.start(self._again(worker, access))
        else:
            fleet.add(worker, access)

    async def _again(self, worker: Worker, access: Access) -> None:
        await self._server.fleet.remove(worker.id)
        self._server.fleet.add(worker, access)

    def leave(self, worker_id: str) -> None:
        self._server.fleet.starting.pop(worker_id, None)
        if worker_id in self._server.fleet.members:
            self._tasks.start(self._server.fleet.remove(worker_id))

    async def takes_requests(self, workers: int) -> None:
        fleet, changed = self._server.fleet, asyncio.Event()
        fleet.changed.append(changed.set)
        while len(fleet.ready()) < workers:
            await changed.wait()
            changed.clear()
        fleet.changed.remove(changed.set)

    async def settled(self) -> None:
        await self._tasks.settled()


class GatewayProcesses:
    """A gateway of several processes, in a separate program that learns of workers through a store served here."""

    def __init__(self, settings: Settings, heard: Callable[[str], None]) -> None:
        self._settings = settings
        self._heard = heard
        self._said = ""
        self._local = MemoryStore(time.monotonic)
        self._tasks = _Tasks()
        self._stop = asyncio.Event()
        self._child: ChildProcess | None = None

    def listen(self) -> socket.socket:
        return reserved(self._settings.host, self._settings.port)

    async def serve(self, sock: socket.socket) -> None:
        sock.close()  # it takes the port itself
        stores = {SHARED: MemoryStore(time.monotonic), LOCAL: self._local}
        with tempfile.TemporaryDirectory(prefix="evenhand-") as folder:
            path, config = Path(folder) / "stores", Path(folder) / "gateway.yaml"
            config.write_text(yaml.safe_dump(plain(self._settings)))  # in a folder that is this user's alone
            options = ["--config", str(config), "--store-socket", str(path)]
            keys = key_names(self._settings.workers)
            env = {
                name: value for name, value in os.environ.items() if not name.startswith("EVENHAND_") or name in keys
            }
            argv = (sys.executable, "-P", "-m", "server", *options)
            async with (
                serving_stores(listen_at(path), stores),
                running(
                    argv, env, self._settings.shutdown_s + self._settings.lame_duck_s + KILL_S, self._hear
                ) as self._child,
            ):
                try:
                    await self._child.or_end(self._stopped())
                except ChildEnded as end:
                    raise WorkerError(
                        f"the gateway ended with exit code {end.exit_code}; its last output: {self._said or 'none'}"
                    ) from None

    async def _stopped(self) -> None:
        await self._stop.wait()

    def _hear(self, line: str) -> None:
        self._said = line
        self._heard(line)

    def stop(self, *, at_once: bool) -> None:
        self._stop.set()
        if at_once and self._child is not None:
            self._child.kill()

    def starting(self, worker_id: str, stage: str) -> None:
        self._tasks.start(self._local.put(STARTING, worker_id, stage))

    def join(self, worker: Worker, access: Access, nap: Nap | None = None) -> None:
        self._tasks.start(self._put(worker.id, registration_of(worker, access)))

    def leave(self, worker_id: str) -> None:
        self._tasks.start(self._put(worker_id, ""))

    async def _put(self, worker_id: str, registration: str) -> None:
        await self._local.drop(STARTING, worker_id)
        if registration or worker_id in await self._local.records(WORKER):
            await self._local.put(WORKER, worker_id, registration)

    async def takes_requests(self, workers: int) -> None:
        while True:
            ready = await self._local.records(READY)
            if len(ready) == self._settings.gateway_processes and all(int(n) >= workers for n in ready.values()):
                return
            await asyncio.sleep(LOOK_S)

    async def settled(self) -> None:
        await self._tasks.settled()


def plain(settings: Settings) -> dict[str, Any]:
    """The gateway's part of the settings, as a settings file has them, secrets too."""
    known = settings.model_dump(mode="json", include=set(Settings.model_fields))
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            known[name] = value.get_secret_value()
        elif name == "redis_url":
            known[name] = [url.get_secret_value() for url in value]
    return known
