"""The server that listens: uvicorn, its protocol as the settings configure it, and TLS."""

import asyncio
import re
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

from server.connection.address_limit import AddressLimit, LimitedProtocol
from server.connection.exchanges import EXPOSED, GZIP_LEVEL, exchange_type
from server.connection.forwarded import networks
from server.connection.intake import BodyBudget, Connections, connections_allowed
from server.connection.protocol import GatewayProtocol, ProtocolBounds, Serves, protocol_for
from server.front.certificate import ServerCertificate
from server.settings import Settings

PREFLIGHT_AGE_S = 600
_ORIGIN = re.compile(r"https?://[^/?#\s@]+|\*")


class Listener(uvicorn.Server):
    """uvicorn's server, which waits to be stopped instead of looking ten times a second whether it is.

    handshake_s: after so long without a complete TLS handshake a connection is closed. on_start: called once clients
    are served.
    """

    def __init__(self, config: uvicorn.Config, handshake_s: float, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self.handshake_s = handshake_s
        self.stopping = asyncio.Event()
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own, which cannot say how long a TLS handshake may take."""
        if self.config.ssl is None or sockets is None:
            await super().startup(sockets)
            return
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        self.servers = [await self._serving(sock) for sock in sockets]
        self.started = True

    async def _serving(self, sock: socket.socket) -> asyncio.Server:
        config: Any = self.config
        protocol = partial(
            config.http_protocol_class, config=config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return await asyncio.get_running_loop().create_server(
            protocol, sock=sock, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=self.handshake_s
        )

    async def main_loop(self) -> None:
        self._on_start()
        await self.stopping.wait()


def edge_of(settings: Settings, gateway: Serves, clock: Callable[[], float]) -> type[GatewayProtocol]:
    """The protocol of client connections. ValueError for addresses or origins that cannot be."""
    edge = settings.edge
    bounds = ProtocolBounds(
        head_bytes=edge.max_head_bytes,
        body_bytes=edge.max_body_bytes,
        head_s=edge.head_timeout_s,
        body_s=edge.body_timeout_s,
        stall_s=edge.stall_timeout_s,
        local_names=not settings.allow_open,
    )
    for origin in settings.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"setting 'cors_origins': {origin!r} is not an origin: write it as https://HOST[:PORT], or *"
            )
    try:
        trusted = networks(settings.trusted_proxies)
    except ValueError as error:
        raise ValueError(f"setting 'trusted_proxies': {error}") from None
    more: dict[str, object] = {
        "exchange_type": exchange_type(settings.cors_origins, edge.gzip_from_bytes),
        "trusted": trusted,
    }
    kind: type[GatewayProtocol] = GatewayProtocol
    if edge.address_rpm is not None:
        kind, more["addresses"] = LimitedProtocol, AddressLimit(edge.address_rpm, clock)
    connections = Connections(connections_allowed(edge.max_connections), clock)
    return protocol_for(gateway, bounds, BodyBudget(edge.max_held_bytes), connections, kind, **more)


def dress(app: FastAPI, settings: Settings) -> None:
    """What web pages and clients that accept gzip get of the routes that are not relayed."""
    if settings.edge.gzip_from_bytes is not None:
        app.add_middleware(GZipMiddleware, minimum_size=settings.edge.gzip_from_bytes, compresslevel=GZIP_LEVEL)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED.decode().split(", "),
            max_age=PREFLIGHT_AGE_S,
        )


def certificate_of(settings: Settings) -> ServerCertificate | None:
    """The certificate that clients see, None for plain HTTP. ValueError for files that cannot be used."""
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ValueError("setting 'tls_key' needs a certificate: set 'tls_cert' too")
        return None
    return ServerCertificate(settings.tls_cert, settings.tls_key)


def listener(
    app: ASGIApp,
    settings: Settings,
    edge: type[GatewayProtocol],
    certificate: ServerCertificate | None,
    on_start: Callable[[], None],
) -> Listener:
    """The server, not yet listening."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=edge,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=4096,
        timeout_keep_alive=int(settings.edge.keep_alive_s),
        timeout_graceful_shutdown=int(settings.shutdown_s),
        ssl_context_factory=None if certificate is None else lambda config, default: certificate.context,
    )
    return Listener(config, settings.edge.head_timeout_s, on_start)
