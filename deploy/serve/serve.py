"""`evenhand serve`: the gateway and its engines on this machine; here its options and the checks before the start.

Exit codes: 0 after SIGTERM to a server that was ready, 128 + the signal after any other stop (130 after Ctrl-C),
2 for settings that cannot be, 1 for everything else that cannot work.
"""

import argparse
import errno
import os
import socket
import time

import uvloop
from rich.console import Console

from deploy.model.model import cache_folder
from deploy.serve.command import exit_code
from deploy.serve.dry_run import dry_run
from deploy.serve.gateway import GatewayRunner, front_for
from deploy.serve.preflight import PreflightError, check_all, worker_roles
from deploy.serve.screen import Screen
from deploy.serve.serving import Serving, Surroundings, with_batches
from deploy.settings import ServeSettings
from server.__main__ import OPTIONS as GATEWAY_OPTIONS
from server.__main__ import add_arguments as add_gateway_arguments
from server.app import calm_collector
from server.options import CliOption, add_options, given
from server.settings import read_settings

OPTIONS = (
    CliOption("model", "NAME|PATH|HF_ID[,workers=N][,…]"),
    CliOption("worker_count", "N", "--workers"),
    CliOption("prefill_workers", "N"),
    CliOption("decode_workers", "N"),
    CliOption("kv_cache_gib", "GIB"),
    CliOption("gpus", "LIST"),
    CliOption("compile"),
    CliOption("start_timeout_s", "SECONDS", "--start-timeout"),
    CliOption("state_folder", "FOLDER"),
    CliOption("engine_args", "ARG", "--engine-arg"),
    CliOption("dry_run"),
    CliOption("verbose"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The gateway's options and those of its local engines; what is not given comes from EVENHAND_…, the settings file,
    or the default."""
    add_options(parser, ServeSettings, OPTIONS)
    add_gateway_arguments(parser)


def run(args: argparse.Namespace, surroundings: Surroundings | None = None) -> int:
    """Serves until it is stopped; returns the exit code (see the module)."""
    around = surroundings or Surroundings()

    def serve() -> int:
        chosen = given(args, ServeSettings, (*OPTIONS, *GATEWAY_OPTIONS))
        settings = read_settings(chosen, args.config, ServeSettings)
        if settings.dry_run:
            return dry_run(settings, around, Console(highlight=False))
        settings = with_batches(settings, os.environ)
        screen = Screen(Console(highlight=False), list(worker_roles(settings)), settings.verbose, time.monotonic)
        front = front_for(settings, screen.gateway)
        with listen(front, settings) as sock:
            checked = check_all(settings, around.machine(), cache_folder(), around.ask, around.weigh)
            serving = Serving(settings, checked, front, screen, around)
            calm_collector()
            code: int = uvloop.run(serving.serve(sock))
            return code

    return exit_code("evenhand serve", serve)


def listen(front: GatewayRunner, settings: ServeSettings) -> socket.socket:
    """Takes the gateway's port; PreflightError with a way out if it cannot be had."""
    host, port = settings.host, settings.port
    try:
        return front.listen()
    except OSError as error:
        if error.filename is not None:
            raise PreflightError(
                f"cannot listen on {error.filename} for /admin ({error.strerror}): "
                "set EVENHAND_ADMIN_PORT to another port"
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise PreflightError(
                f"port {port} on {host} is taken, perhaps by another `evenhand serve`: stop that one, or choose "
                f"another with --port, for example --port {port + 1 if port < 65535 else port - 1}"
            ) from error
        why = error.strerror or str(error)
        raise PreflightError(f"cannot listen on {host}:{port} ({why}): choose another --host or --port") from error
