"""The operators' console: one page without any outside asset, and the one answer that feeds it.

The page itself is public and says nothing: without the admin key it shows what /ready tells everybody. Tenants, lines,
latencies and the policy come from /admin/live, which asks for the key.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from scheduler.catalog import POLICIES
from server.dispatch import Dispatcher, Lines
from server.fleet import Fleet, Member, described
from server.live_policy import LivePolicy
from server.sharing import Sharing
from server.telemetry import Distribution, Telemetry
from server.tenants import Tenants

TENANTS_SHOWN = 50
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """The page and the headers that keep it to itself: it may run its own script, and ask this server only."""

    html: bytes
    headers: dict[str, str]


def page() -> Page:
    """Reads the page; its policy allows exactly the script and the style that it has."""
    html = files("server").joinpath("console.html").read_text(encoding="utf-8")
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(digests['script'])}; style-src {' '.join(digests['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    return Page(
        html.encode(),
        {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-cache",
        },
    )


@dataclass(frozen=True, slots=True)
class Console:
    """What the page shows. clock: seconds; rates are differences of two answers over the difference of their times."""

    telemetry: Telemetry
    sharing: Sharing
    lines: Lines
    fleet: Fleet
    policy: LivePolicy
    tenants: Tenants
    store: Callable[[], tuple[bool, int]]
    clock: Callable[[], float]

    def live(self) -> dict[str, Any]:
        """Everything at this moment. Counters and histograms are totals since the start."""
        telemetry, standing = self.telemetry, self.sharing.standing()
        up, replicas = self.store()
        outcomes: dict[str, int] = {}
        for (_, outcome), count in telemetry.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        return {
            "at_s": self.clock(),
            "policy": {"name": self.policy.name, "options": self.policy.options},
            "workers": [seen(member) for member in self.fleet.members.values()],
            "starting": self.fleet.starting,
            "lines": [line(dispatcher) for dispatcher in self.lines.by_model.values()],
            "service": standing.service,
            "weights": {record.name: record.weight for record in self.tenants.all() if record.weight != 1.0},
            "gap": standing.gap,
            "outcomes": outcomes,
            "tokens": {kind: telemetry.tokens[kind] for kind in ("prompt", "completion", "cached")},
            "ttft": histogram(telemetry.ttft),
            "itl": histogram(telemetry.itl),
            "queue": histogram(telemetry.queue),
            "store": {"up": up, "replicas": replicas},
        }


def seen(member: Member) -> dict[str, Any]:
    """A worker as operators see it: as /ready tells, and how full it is."""
    return {**described([member])[0], "kv_usage": member.kv_usage, "plugin": member.worker.plugin}


def line(dispatcher: Dispatcher) -> dict[str, Any]:
    """A model's waiting line: by tenant, longest first, and by the policy's lane."""
    waiting = sorted(dispatcher.waiting_by_tenant().items(), key=lambda item: (-item[1], item[0]))
    named = dict(waiting[:TENANTS_SHOWN])
    rest = sum(count for _, count in waiting[TENANTS_SHOWN:])
    return {
        "model": dispatcher.model,
        "waiting": len(dispatcher.lanes),
        "running": dispatcher.lanes.running(),
        "by_tenant": named,
        "other_tenants": rest,
        "by_lane": dispatcher.lanes.depth(),
    }


def histogram(distribution: Distribution) -> dict[str, Any]:
    """Bounds in seconds; counts has one more, for what is above the last bound."""
    return {"bounds": distribution.bounds, "counts": distribution.counts, "sum": distribution.sum}


def choices() -> list[dict[str, Any]]:
    """The policies and their options, for the page's switch."""
    return [
        {
            "name": name,
            "text": entry.text,
            "options": [
                {"name": option.name, "default": option.default, "unit": option.unit, "text": option.text}
                for option in entry.options
            ],
        }
        for name, entry in POLICIES.items()
    ]


def console_routes(console: Console, authorize: Callable[[Request], None]) -> APIRouter:
    """/console for everybody, what it shows of tenants for those with the admin key."""
    router = APIRouter(tags=["operations"])
    shown = page()

    @router.get("/console", summary="The operators' console, for a browser")
    async def html() -> Response:
        return Response(shown.html, headers=shown.headers, media_type="text/html; charset=utf-8")

    admins = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(authorize)])

    @admins.get("/live", summary="What the console shows: workers, lines, shares, latencies, as totals")
    async def live() -> Response:
        return Response(orjson.dumps(console.live()), media_type="application/json")

    @admins.get("/policies", summary="The policies and options that can be chosen")
    async def policies() -> Response:
        return Response(orjson.dumps({"policies": choices()}), media_type="application/json")

    router.include_router(admins)
    return router
