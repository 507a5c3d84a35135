"""The operators' console: one page without any outside asset, and the one answer that feeds it.

The page itself is public and says nothing: without the admin key it shows what /ready tells everybody. Tenants, lines,
latencies and the policy come from /admin/live, which asks for the key.
"""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from scheduler.catalog import POLICIES
from scheduler.jobs import Tier
from server.admission.dispatch import Dispatcher, Lines
from server.admission.live_policy import LivePolicy
from server.cluster.local_sync import LocalSync
from server.fleet.fleet import Fleet, Member, WorkerState, described
from server.observe.fairness_metrics import FairnessMetrics
from server.observe.telemetry import Distribution, Telemetry
from server.operators.admin import Page as Part
from server.operators.admin import Paged
from server.request.directory import Tenants

TENANTS_SHOWN = 50
View = dict[str, Any]
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """The page and the headers that keep it to itself: it may run its own script, and ask this server only."""

    html: bytes
    headers: dict[str, str]


def page() -> Page:
    """Reads the page; its policy allows exactly the script and the style that it has."""
    html = files("server.operators").joinpath("console.html").read_text(encoding="utf-8")
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
    sharing: FairnessMetrics
    lines: Lines
    fleet: Fleet
    policy: LivePolicy
    tenants: Tenants
    store: Callable[[], tuple[bool, int]]
    siblings: LocalSync
    clock: Callable[[], float]

    async def live(self, part: Part, state: str) -> View:
        """Everything at this moment, of all processes of this gateway. Counters and histograms are totals.

        part, state: which of the workers are told one by one; state "" for any.
        """
        view = reduce(joined, (orjson.loads(text) for text in await self.siblings.views()), self.view())
        busy, flex = view.pop("busy"), view.pop("flex")
        members = self.fleet.members
        names, rest = part.of(name for name, member in members.items() if state in ("", member.state.value))
        workers = [seen(members[name]) | {"in_flight": busy.get(name, 0), "flex": flex.get(name, 0)} for name in names]
        return view | {"workers": workers, "fleet": summary(members.values(), busy, flex) | rest}

    def _by_name(self) -> dict[str, int]:
        """Requests by the name that was asked and the model that was, as a JSON list."""
        counts: Counter[str] = Counter()
        for (name, model, _), count in self.telemetry.models.items():
            counts[orjson.dumps([name, model]).decode()] += count
        return dict(counts)

    def _weights(self, names: Iterable[str]) -> dict[str, float]:
        """The weights of these tenants, but for those of the usual one."""
        records = (self.tenants.record(name) for name in names)
        return {record.name: record.weight for record in records if record is not None and record.weight != 1.0}

    def published(self) -> str:
        """This process's view, for the others."""
        return orjson.dumps(self.view()).decode()

    def view(self) -> View:
        """What this process alone has."""
        telemetry, standing = self.telemetry, self.sharing.standing()
        up, replicas = self.store()
        outcomes: Counter[str] = Counter()
        for (_, outcome), count in telemetry.outcomes.items():
            outcomes[outcome] += count
        lines = [line(dispatcher) for dispatcher in self.lines.by_model.values()]
        return {
            "at_s": self.clock(),
            "policy": {"name": self.policy.name, "options": self.policy.options},
            "busy": {
                name: member.load.in_flight for name, member in self.fleet.members.items() if member.load.in_flight
            },
            "flex": {name: member.load.flex for name, member in self.fleet.members.items() if member.load.flex},
            "starting": self.fleet.starting,
            "lines": lines,
            "service": standing.service,
            "weights": self._weights({*standing.service, *(name for told in lines for name in told["by_tenant"])}),
            "gap": standing.gap,
            "outcomes": dict(outcomes),
            "models": self._by_name(),
            "tokens": {kind: telemetry.tokens[kind] for kind in ("prompt", "completion", "cached")},
            "tiers": tiers(telemetry),
            "ttft": histogram(telemetry.ttft),
            "itl": histogram(telemetry.itl),
            "queue": histogram(telemetry.queue),
            "store": {"up": up, "replicas": replicas},
        }


def summary(members: Collection[Member], busy: Mapping[str, int], flex: Mapping[str, int]) -> View:
    """A fleet of any size in a few words. busy, flex: requests at each worker, of all processes, and the `flex` ones.

    flex, slack: at workers that are ready: what `flex` uses, and the slots that the other tiers leave to it.
    """
    ready = [member.worker for member in members if member.state is WorkerState.READY]
    slots = sum(worker.slots for worker in ready)
    used, flexible = (sum(counts.get(worker.id, 0) for worker in ready) for counts in (busy, flex))
    beyond = (busy.get(member.worker.id, 0) - member.worker.slots for member in members)
    return {
        "states": Counter(member.state.value for member in members),
        "slots": slots,
        "in_flight": sum(busy.values()),
        "beyond_slots": sum(more for more in beyond if more > 0),
        "flex": flexible,
        "slack": slots - used + flexible,
        "models": sorted({model for member in members for model in member.models}),
        "efficiency": efficiency(members),
    }


def joined(one: View, other: View) -> View:
    """Two processes' views as one: what is counted is added up, the wider gap counts, and the rest is the first's."""
    both = {**one, "gap": max(one["gap"], other["gap"])}
    for name in ("service", "outcomes", "models", "tokens", "busy", "flex"):
        both[name] = added(one[name], other[name])
    for name in ("ttft", "itl", "queue"):
        counts = [a + b for a, b in zip(one[name]["counts"], other[name]["counts"], strict=True)]
        both[name] = {**one[name], "counts": counts, "sum": one[name]["sum"] + other[name]["sum"]}
    both["weights"] = {**other["weights"], **one["weights"]}
    both["tiers"] = {name: added(counts, other["tiers"][name]) for name, counts in one["tiers"].items()}
    by_model = {line["model"]: line for line in (*one["lines"], *other["lines"])}
    for line in one["lines"]:
        if (theirs := by_model[line["model"]]) is not line:
            by_model[line["model"]] = joined_lines(line, theirs)
    both["lines"] = list(by_model.values())
    return both


def joined_lines(one: View, other: View) -> View:
    numbers = {name: one[name] + other[name] for name in ("waiting", "running", "other_tenants")}
    return {**one, **numbers, **{name: added(one[name], other[name]) for name in ("by_tenant", "by_lane")}}


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Longest first, as each of them is."""
    both = {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
    return dict(sorted(both.items(), key=lambda item: -item[1]))


def seen(member: Member) -> View:
    """A worker as operators see it: as /ready tells, and how full it is."""
    load = member.load
    return {**described([member])[0], "flex": load.flex, "kv_usage": load.kv_usage, "plugin": member.worker.plugin}


def efficiency(members: Iterable[Member]) -> View:
    """Means over workers, and the energy of their devices, each counted from a start of its own; None where no engine
    reports it. Engines that share a device report the same. batch: share of the slots in use. The KV cache of an engine
    without that metric counts as empty."""
    ready = [member for member in members if member.state is WorkerState.READY]
    joules: dict[str, float] = {}
    for device, value in (pair for member in ready for pair in member.hardware.joules.items()):
        joules[device] = max(value, joules.get(device, 0.0))
    in_use = (min(1.0, (one.load.in_flight + one.load.others) / one.worker.slots) for one in ready)
    return {
        "kv_usage": _mean(member.load.kv_usage for member in ready),
        "batch": _mean(in_use),
        "gpu_use": _mean(use for member in ready if (use := member.hardware.gpu_use) is not None),
        "compression": _mean(times for member in ready if (times := member.hardware.compression)),
        "joules": sum(joules.values()) if joules else None,
        "devices": len(joules),
    }


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def tiers(telemetry: Telemetry) -> View:
    """By service tier: requests that wait, requests that are over, and their output tokens."""
    waiting = telemetry.by_tier()
    over = Counter[str]()
    for (tier, _), count in telemetry.tiers.items():
        over[tier] += count
    return {
        tier.label: {
            "waiting": waiting.get(tier, 0),
            "requests": over[tier.label],
            "tokens": telemetry.tier_tokens[tier.label, "completion"],
        }
        for tier in Tier
    }


def line(dispatcher: Dispatcher) -> View:
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


def histogram(distribution: Distribution) -> View:
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

    @admins.get("/live", summary="What the console shows: workers, queues, shares, latencies, as totals")
    async def live(part: Paged, state: str = "") -> Response:
        return Response(orjson.dumps(await console.live(part, state)), media_type="application/json")

    @admins.get("/policies", summary="The policies and options that can be chosen")
    async def policies() -> Response:
        return Response(orjson.dumps({"policies": choices()}), media_type="application/json")

    router.include_router(admins)
    return router
