"""`evenhand gateway`, and `python -m server`: read the settings, build the server, run it until a signal."""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvloop

from scheduler.catalog import describe
from server.app import GatewayServer, calm_collector
from server.operators.logs import write_to_standard_error
from server.processes.prefork import all_reserved, serve_processes
from server.settings import Settings, read_settings, whence

# Options that are settings of the same name.
SAME_NAME = (
    "host", "port", "workers", "policy", "tenants", "allow_open", "redis_url", "replica", "gateway_processes",
    "log_format", "log_level",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The gateway's own options; whatever is not given comes from EVENHAND_…, the file, or the default."""
    _add_workers_and_policy(parser)
    _add_sharing(parser)
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="write the traffic as a trace without content (default: no)"
    )
    parser.add_argument("--log-format", metavar="text|json", help="json: a line for each request, too (default text)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings")
    parser.epilog = describe()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the table of policies is laid out already


def _add_workers_and_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000)")
    parser.add_argument(
        "--worker",
        action="append",
        dest="workers",
        metavar="URL[,role=…][,slots=N][,kv=yes]",
        help="an OpenAI-compatible engine, e.g. http://127.0.0.1:8101,slots=256; may be repeated",
    )
    parser.add_argument("--policy", help="fcfs, mlfq, vtc, gittins or srpt (default fcfs)")
    parser.add_argument(
        "--policy-option", action="append", metavar="KEY=VALUE", help="an option of the policy; may be repeated"
    )
    parser.add_argument(
        "--balance-roles",
        action="store_true",
        default=None,
        help="workers of role both that can hand over KV lean to the side (prefill, decode) that is short",
    )


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenants", type=Path, metavar="FILE", help="YAML file with tenants, their keys and limits")
    parser.add_argument(
        "--allow-open",
        action="store_true",
        default=None,
        help="serve anybody, without keys, on an address that others can reach",
    )
    parser.add_argument(
        "--redis-url",
        metavar="URL",
        help="Redis that several gateways share; with a password in it, set EVENHAND_REDIS_URL instead",
    )
    parser.add_argument(
        "--replica", metavar="NAME", help="this gateway's name among its replicas (default: the host's)"
    )
    parser.add_argument(
        "--gateway-processes", type=int, metavar="N", help="processes behind the port, for as many cores (default 1)"
    )
    parser.add_argument("--store-socket", type=Path, help=argparse.SUPPRESS)  # for a program that starts a gateway


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, as settings. ValueError for a policy option that is not KEY=VALUE."""
    given = {name: getattr(args, name) for name in SAME_NAME}
    if args.policy_option:
        given["policy_options"] = policy_options(args.policy_option)
    if args.record is not None:
        given["record"] = {"folder": args.record}
    if args.balance_roles:
        given["disaggregation"] = {"balance_roles": True}
    return {name: value for name, value in given.items() if value is not None}


def policy_options(pairs: list[str]) -> dict[str, str]:
    """`["key=value", …]` → mapping. ValueError with the pair that is not one."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--policy-option {pair!r}: write it as KEY=VALUE")
        options[key] = value
    return options


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM. 2 for wrong settings, 1 for a port that is taken."""
    try:
        settings = read_settings(overrides(args), args.config, Settings)
        write_to_standard_error(settings.log_format, settings.log_level)
        if options := whence(settings, overrides(args), args.config):
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
    logging.getLogger("evenhand").info("listening on http://%s:%d, policy %s", host, port, server.settings.policy)
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
