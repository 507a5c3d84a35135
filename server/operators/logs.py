"""The gateway's own log: lines for people, or JSON with a line for each request; never a prompt, an answer or a key."""

import hashlib
import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from server.observe.observer import Asked, Observer
from server.operators.admin import json_object
from server.request.call import Phase, Ticket
from server.request.errors import BadRequest
from server.settings import LogFormat, LogLevel

LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
OURS = "evenhand"

log = logging.getLogger("evenhand.request")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what `extra={"fields": …}` adds.

    process: its number, where a gateway is several.
    """

    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._own = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._own,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def write_to_standard_error(form: LogFormat, level: LogLevel) -> None:
    """This process's log, in place of whatever it had before."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for loud in ("uvicorn.error", "httpx2", "aiobotocore", "botocore"):
        logging.getLogger(loud).setLevel(logging.WARNING)
    # Whoever asks for JSON asks for these lines, however little else is to be said.
    log.setLevel(logging.INFO if form == "json" else logging.NOTSET)
    set_level(level)


def set_level(level: LogLevel) -> None:
    """From which level on the log speaks; at `debug` only our own loggers say that much."""
    logging.getLogger().setLevel(logging.INFO if level == "debug" else level.upper())
    logging.getLogger(OURS).setLevel(logging.DEBUG if level == "debug" else logging.NOTSET)


class Pseudonyms:
    """Names for tenants in logs, the same at every gateway with the same key; without one they end with the process."""

    def __init__(self, key: str | None) -> None:
        secret = secrets.token_bytes(32) if key is None else hashlib.sha256(b"log " + key.encode()).digest()
        self.of: Callable[[str], str] = lru_cache(4096)(lambda name: _keyed(secret, name))


def _keyed(secret: bytes, name: str) -> str:
    return hashlib.blake2b(name.encode(), key=secret, digest_size=6).hexdigest()


class RequestLog(Observer):
    """A line for each request that became a call, when it has ended."""

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        self._pseudonyms = pseudonyms
        self._clients: dict[Ticket, str] = {}

    def began(self, ticket: Ticket, asked: Asked) -> None:
        self._clients[ticket] = asked.client

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """Times are seconds; None where a phase was not reached."""
        call = ticket.call
        end = ticket.times[ticket.phase]
        fields = {
            "request_id": call.id,
            "tenant": self._pseudonyms.of(call.tenant.name),
            "client": self._clients.pop(ticket, "") or None,
            "route": call.route.path,
            "model": call.asked or call.model,
            "served_model": call.model,
            "stream": call.stream,
            "tier": call.tier.label,
            "outcome": outcome,
            "worker": ticket.worker or None,
            "prefill_worker": None if ticket.split is None else ticket.split.prefill.worker.id,
            "placement": ticket.placed or None,
            "ahead": ticket.ahead,
            "failures": [{"worker": worker, "outcome": ended} for worker, ended in ticket.failures],
            "prompt_tokens": ticket.prompt_tokens,
            "cached_tokens": ticket.cached_tokens,
            "output_tokens": ticket.tokens,
            "queue_s": _rounded(ticket.since(Phase.WAITING, Phase.PREFILLING)),
            "ttft_s": _rounded(ticket.since(Phase.WAITING, Phase.DECODING)),
            "e2e_s": None if end is None else _rounded(end - ticket.job.arrived_at),
        }
        log.info("request ended", extra={"fields": fields})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def log_routes(authorize: Callable[[Request], None]) -> APIRouter:
    """/admin/log: how much this gateway says, changed while it runs."""
    router = APIRouter(prefix="/admin/log", tags=["admin"], dependencies=[Depends(authorize)])

    def told() -> Response:
        level = logging.getLevelName(logging.getLogger(OURS).getEffectiveLevel()).lower()
        return Response(orjson.dumps({"level": level}), media_type="application/json")

    @router.get("", summary="The level of this gateway's log")
    async def current() -> Response:
        return told()

    @router.put("", summary="Change the level of this gateway's log: debug, info, warning, error")
    async def change(request: Request) -> Response:
        level = (await json_object(request)).get("level")
        if level not in LEVELS:
            raise BadRequest(f"'level' is {', '.join(LEVELS[:-1])} or {LEVELS[-1]}.", param="level")
        set_level(level)
        return told()

    return router
