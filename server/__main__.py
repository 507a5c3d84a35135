"""`evenhand gateway`, and `python -m server`: read the settings, build the server, run it until a signal."""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path

import uvloop

from scheduler.catalog import describe
from server.app import GatewayServer, calm_collector
from server.operators.logs import write_to_standard_error
from server.options import CliOption, add_options, given
from server.processes.prefork import all_reserved, serve_processes
from server.settings import Settings, read_settings, scheme_of, whence

OPTIONS = (
    CliOption("host", "HOST"),
    CliOption("port", "PORT"),
    CliOption("tls_cert", "FILE"),
    CliOption("tls_key", "FILE"),
    CliOption("cors_origins", "ORIGIN", "--cors-origin"),
    CliOption("trusted_proxies", "CIDR", "--trusted-proxy"),
    CliOption("workers", "URL[,role=…][,slots=N][,kv=yes][,key=ENV_NAME][,ca=FILE][,cert=FILE]", "--worker"),
    CliOption("worker_ca", "FILE"),
    CliOption("worker_cert", "FILE"),
    CliOption("worker_cert_key", "FILE"),
    CliOption("models", "NAME=MODEL", "--model-alias"),
    CliOption("adapters", "NAME=MODEL:PATH", "--adapter"),
    CliOption("lora.per_worker", "N", "--adapters-per-worker"),
    CliOption("policy", "NAME"),
    CliOption("policy_options", "KEY=VALUE", "--policy-option"),
    CliOption("slo.ttft_s", "SECONDS", "--slo-ttft"),
    CliOption("slo.tpot_s", "SECONDS", "--slo-tpot"),
    CliOption("disaggregation.balance_roles", flag="--balance-roles"),
    CliOption("tenants", "FILE"),
    CliOption("allow_open"),
    CliOption("redis_url", "URL"),
    CliOption("replica", "NAME"),
    CliOption("gateway_processes", "N"),
    CliOption("record.folder", "FOLDER", "--record"),
    CliOption("batch.folder", "FOLDER", "--batch-folder"),
    CliOption("batch.files_url", "URL", "--batch-files-url"),
    CliOption("sleep.after_s", "SECONDS", "--sleep-after"),
    CliOption("sleep.from_zero", "MODEL", "--from-zero"),
    CliOption("log_format", "text|json"),
    CliOption("log_level", "LEVEL"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The gateway's own options; whatever is not given comes from EVENHAND_…, the file, or the default."""
    add_options(parser, Settings, OPTIONS)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings")
    parser.add_argument("--store-socket", type=Path, help=argparse.SUPPRESS)  # for a program that starts a gateway
    parser.epilog = describe()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the table of policies is laid out already


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. 2 for wrong settings, 1 for a port that is taken."""
    try:
        overrides = given(args, Settings, OPTIONS)
        settings = read_settings(overrides, args.config, Settings)
        write_to_standard_error(settings.log_format, settings.log_level)
        if options := whence(settings, overrides, args.config):
            logging.getLogger("evenhand").info("policy %s with %s", settings.policy, options)
        server = GatewayServer(settings)
    except ValueError as error:
        sys.stderr.write(f"evenhand gateway: {error}\n")
        return 2
    several = settings.gateway_processes > 1
    try:
        held = all_reserved(settings) if several else [server.listen()]
    except OSError as error:
        address, way_out = f"{settings.host}:{settings.port}", "Choose another --port."
        if error.filename is not None:
            address, way_out = f"{error.filename} for /admin", "Set EVENHAND_ADMIN_PORT to another one."
        sys.stderr.write(f"evenhand gateway: cannot listen on {address}: {error.strerror}. {way_out}\n")
        return 1
    if several:
        return serve_processes(settings, held, args.store_socket)
    uvloop.run(_serve(server, held[0]))
    return 0


async def _serve(server: GatewayServer, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        server.stop(at_once=signals > 1)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    host, port = sock.getsockname()[:2]
    scheme, policy = scheme_of(server.settings), server.settings.policy
    logging.getLogger("evenhand").info("listening on %s://%s:%d, policy %s", scheme, host, port, policy)
    calm_collector()
    await server.serve(sock)


def main() -> int:
    """`python -m server`."""
    parser = argparse.ArgumentParser(
        "evenhand gateway", description="The gateway alone, over engines that run elsewhere."
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
