"""A gateway of several processes: one port, one state, one start-up message.

They share fairness, limits and operators' changes as gateways over Redis do: through that Redis, or, without one,
through a store in a process of its own that they reach over a Unix socket. That process holds the records of this
gateway alone (its workers, its metrics) in either case.
"""

import asyncio
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic

import uvloop

from server.app import GatewayServer, calm_collector
from server.cluster.local_sync import Process
from server.operators.logs import JsonLines
from server.processes.supervisor import ChildCommand, Post, Program, Supervisor
from server.settings import Settings, admin_address, scheme_of
from server.store.socket_store import LOCAL, SHARED, listen_at, serving_stores
from server.store.store import MemoryStore, Store

log = logging.getLogger("evenhand")


def serve_processes(settings: Settings, held: Sequence[socket.socket], stores: Path | None) -> int:
    """Serves until a signal; returns the exit code.

    held: from `all_reserved`. stores: the socket where another program serves this gateway's stores, None if nobody
    does.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evenhand-"))
        ports = [stack.enter_context(sock).getsockname()[1] for sock in held]
        # The same port for both is how settings say that there is only one.
        settings = settings.model_copy(update={"port": ports[0], "admin_port": ports[-1]})
        path = stores or Path(folder) / "stores"
        numbers = range(settings.gateway_processes)
        gateways = [Program(f"gateway-{n}", partial(_gateway, settings, Process(n, path))) for n in numbers]
        # The parent listens, so that whoever asks while the store's process is started anew waits, and is answered.
        hub = [] if stores else [Program("store", partial(_stores, listen_at(path)), last=True)]

        def all_ready() -> None:
            log.info(
                "listening on %s://%s:%d with %d processes, policy %s",
                scheme_of(settings),
                settings.host,
                settings.port,
                settings.gateway_processes,
                settings.policy,
            )

        return Supervisor([*hub, *gateways], grace_s=settings.shutdown_s, clock=monotonic, all_ready=all_ready).run()


def all_reserved(settings: Settings) -> list[socket.socket]:
    """The gateway's public address and, if it has one, that for operators. OSError if somebody else has one of
    them; with the address as its `filename` if that is the second."""
    held = [reserved(settings.host, settings.port)]
    address = admin_address(settings, held[0].getsockname()[1])
    if address is not None:
        try:
            held.append(reserved(*address))
        except OSError as error:
            held[0].close()
            raise OSError(error.errno, error.strerror, f"{address[0]}:{address[1]}") from None
    return held


def reserved(host: str, port: int) -> socket.socket:
    """An address, held for the gateway's processes. OSError if somebody else has it.

    Asked for alone first: SO_REUSEPORT would share it with whoever has set that too, another gateway for one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind((host, port))
        alone.listen()
        port = alone.getsockname()[1]
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def _gateway(settings: Settings, process: Process, post: Post) -> int:
    """One of the gateway's processes."""
    _speak(process.number, starting=True)

    def started() -> None:
        _speak(process.number, starting=False)
        post.ready()

    server = GatewayServer(settings, replace(process, again=post.again), started)
    calm_collector()
    uvloop.run(_obeying(server.serve(server.listen()), post, server.stop))
    return 0


def _speak(number: int, *, starting: bool) -> None:
    """What concerns all processes is said by the first alone, and the others say what goes wrong, with their number."""
    if number == 0:
        return
    logging.getLogger().setLevel(logging.ERROR if starting else logging.WARNING)
    for handler in logging.getLogger().handlers:
        plain = logging.Formatter(f"%(levelname)s %(name)s[{number}]: %(message)s")
        handler.setFormatter(JsonLines(number) if isinstance(handler.formatter, JsonLines) else plain)


def _stores(listener: socket.socket, post: Post) -> int:
    """The process that holds what the others share."""
    uvloop.run(_hold(listener, post))
    return 0


async def _hold(listener: socket.socket, post: Post) -> None:
    stores: dict[str, Store] = {SHARED: MemoryStore(monotonic), LOCAL: MemoryStore(monotonic)}
    ended = asyncio.Event()
    async with serving_stores(listener, stores):
        post.ready()
        await _obeying(ended.wait(), post, lambda at_once: ended.set())


async def _obeying(work: Awaitable[object], post: Post, stop: Callable[..., None]) -> None:
    """Does the work; the parent's orders, its end, and SIGTERM stop it."""
    loop = asyncio.get_running_loop()

    def ordered() -> None:
        order = os.read(post.orders, 1)
        stop(at_once=order == ChildCommand.STOP_AT_ONCE.value)
        if not order:
            loop.remove_reader(post.orders)

    loop.add_reader(post.orders, ordered)
    loop.add_signal_handler(signal.SIGTERM, partial(stop, at_once=False))
    await work
