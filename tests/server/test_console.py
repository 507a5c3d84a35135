"""The console: its page tells nothing and loads nothing, and what feeds it is for the admin key alone."""

import asyncio
import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson

from scheduler.catalog import POLICIES
from scheduler.workers import Worker
from server.engine.client import EngineClient
from server.fleet.fleet import Member, WorkerState
from server.fleet.hardware import Hardware, hardware_in
from server.operators.console import choices, efficiency, joined, page
from tests.server.conftest import SLOW, chat, eventually, over_fake, request
from tests.server.test_admin import ADMIN_KEY, admin
from tests.server.test_tenants import KEY, OTHER

TENANTS = f"tenants: [{{name: acme, keys: [{KEY}], weight: 2}}, {{name: zenith, keys: [{OTHER}]}}]"


class Assets(HTMLParser):
    """What a page would load, and scripts in attributes, which its policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data") and not (value or "").startswith(("#", "data:")):
                self.loaded.append(f"{tag} {name}={value}")
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")


def test_the_page_loads_nothing_from_anywhere() -> None:
    html = page().html.decode()
    found = Assets()
    found.feed(html)
    assert (found.loaded, found.inline) == ([], [])
    assert "@import" not in html and "innerHTML" not in html and "localStorage" not in html
    assert set(re.findall(r"https?://[^\s\"'`)]+", html)) == {"http://www.w3.org/2000/svg"}


def test_the_page_s_policy_allows_its_own_script_and_style_and_nothing_else() -> None:
    shown = page()
    policy = shown.headers["content-security-policy"]
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", shown.html.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "connect-src 'self'" in policy and "unsafe" not in policy


async def test_the_page_is_served_without_a_key_and_names_no_tenant(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    async with over_fake(tenants=tmp_path / "tenants.yaml", admin_key=ADMIN_KEY) as (gateway, _):
        shown = await gateway.ask("/console", method="GET")
        assert shown.status == 200 and shown.headers["content-type"] == "text/html; charset=utf-8"
        assert shown.headers["content-security-policy"] == page().headers["content-security-policy"]
        assert shown.body == page().html and b"acme" not in shown.body
        assert b"acme" not in (await gateway.ask("/ready", method="GET")).body
        for key in (KEY, "", ADMIN_KEY + "0"):
            refused = await admin(gateway, "GET", "/live", key=key)
            assert refused.status == 401 and b"acme" not in refused.body


async def test_live_tells_who_waits_who_is_served_and_how_fast(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    options = {"tenants": tmp_path / "tenants.yaml", "admin_key": ADMIN_KEY, "policy": "mlfq", "slots": 1}
    async with over_fake(SLOW, admission={"ahead": 0}, **options) as (gateway, _):
        wires = []
        for key in (KEY, KEY, KEY, OTHER):
            body = chat(stream=True, max_tokens=400, ignore_eos=True)
            wire = await gateway.send(request("/v1/chat/completions", body, headers={"authorization": f"Bearer {key}"}))
            wires.append(wire)
            if len(wires) == 1:
                await wire.head()
        line = gateway.server.lines.by_model["fake"]
        await eventually(lambda: len(line.lanes) == 3, "three wait")
        live = (await admin(gateway, "GET", "/live")).json()
        await asyncio.gather(*(wire.close() for wire in wires))
    assert live["lines"] == [
        {
            "model": "fake",
            "waiting": 3,
            "running": 1,
            "by_tenant": {"acme": 2, "zenith": 1},
            "other_tenants": 0,
            "by_lane": {"level0": 3},
        }
    ]
    (worker,) = live["workers"]
    assert (worker["id"], worker["role"], worker["state"], worker["in_flight"]) == ("worker-0", "both", "ready", 1)
    summary = {"states": {"ready": 1}, "slots": 1, "in_flight": 1, "beyond_slots": 0, "models": ["fake"]}
    summary |= {"flex": 0, "slack": 0}
    used = live["fleet"].pop("efficiency")
    assert used["batch"] == 1.0 and used["joules"] is used["gpu_use"] is used["compression"] is None
    assert live["fleet"] == summary | {"total": 1, "next_after": None}
    assert live["service"]["acme"] > 0 and live["weights"] == {"acme": 2.0}
    assert live["policy"] == {"name": "mlfq", "options": {}} and live["store"] == {"up": True, "replicas": 1}
    assert len(live["ttft"]["counts"]) == len(live["ttft"]["bounds"]) + 1


async def test_counts_grow_with_what_is_done() -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        before = (await admin(gateway, "GET", "/live")).json()
        assert (await gateway.ask("/v1/chat/completions", chat(stream=True, ignore_eos=True))).status == 200
        await eventually(gateway.at_rest)
        after = (await admin(gateway, "GET", "/live")).json()
    assert (before["outcomes"], after["outcomes"]) == ({}, {"ok": 1})
    assert sum(after["ttft"]["counts"]) == 1 and sum(after["itl"]["counts"]) >= 1
    assert after["tokens"]["completion"] == 8 and after["at_s"] > before["at_s"]


async def test_what_the_page_offers_can_be_chosen() -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        offered = (await admin(gateway, "GET", "/policies")).json()["policies"]
        assert offered == choices() and [entry["name"] for entry in offered] == list(POLICIES)
        for entry in offered:
            options = {option["name"]: option["default"] for option in entry["options"]}
            chosen = await admin(gateway, "PUT", "/policy", {"policy": entry["name"], "options": options})
            assert chosen.json()["policy"] == entry["name"], chosen.body


async def test_several_processes_of_a_gateway_are_shown_as_one(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    options = {"tenants": tmp_path / "tenants.yaml", "admin_key": ADMIN_KEY}
    async with over_fake(**options) as (gateway, _):
        headers = {"authorization": f"Bearer {KEY}"}
        assert (await gateway.ask("/v1/chat/completions", chat(stream=True), headers=headers)).status == 200
        await eventually(gateway.at_rest)
        one = orjson.loads(gateway.server.console.published())
    waiting = {"model": "far", "waiting": 3, "running": 1, "by_tenant": {"zenith": 3}, "other_tenants": 0}
    other = {
        **one,
        "gap": one["gap"] + 7,
        "lines": [{**one["lines"][0], "waiting": 2, "by_tenant": {"acme": 2}}, {**waiting, "by_lane": {"all": 3}}],
        "busy": {"worker-0": 5},
    }
    both = joined(one, other)
    assert both["outcomes"] == {"ok": 2} and both["gap"] == one["gap"] + 7
    assert both["service"]["acme"] == 2 * one["service"]["acme"]
    assert sum(both["ttft"]["counts"]) == 2 and both["ttft"]["bounds"] == one["ttft"]["bounds"]
    assert both["busy"] == {"worker-0": 5}
    assert [(line["model"], line["waiting"], line["by_tenant"]) for line in both["lines"]] == [
        ("fake", 2, {"acme": 2}),
        ("far", 3, {"zenith": 3}),
    ]
    assert both["policy"] == one["policy"] and both["at_s"] == one["at_s"]


async def test_of_a_large_fleet_a_part_is_told_and_of_many_tenants_the_weights_of_those_who_are_served(
    tmp_path: Path,
) -> None:
    tenants = [{"name": f"t{number}", "keys": [f"key-of-tenant-{number:06d}"], "weight": 2} for number in range(1000)]
    (tmp_path / "tenants.json").write_bytes(orjson.dumps({"tenants": tenants}))
    async with over_fake(admin_key=ADMIN_KEY, tenants=tmp_path / "tenants.json") as (gateway, _):
        fleet = gateway.server.fleet
        for number in range(300):
            state = WorkerState.DOWN if number % 100 == 7 else WorkerState.READY
            member = Member(Worker(f"w{number:03d}", "http://127.0.0.1:9", slots=4), EngineClient("http://127.0.0.1:9"))
            member.models = ("other",)
            fleet.enroll(member)
            fleet.put(member, state)
        headers = {"authorization": "Bearer key-of-tenant-000007"}
        assert (await gateway.ask("/v1/chat/completions", chat(), headers=headers)).status == 200

        async def names(query: str) -> tuple[list[str], dict[str, Any]]:
            live = (await admin(gateway, "GET", f"/live?{query}")).json()
            assert live["weights"] == {"t7": 2.0}
            return [worker["id"] for worker in live["workers"]], live["fleet"]

        page, told = await names("limit=50&after=w099")
        assert page == [f"w{number}" for number in range(100, 150)] and told["next_after"] == "w149"
        assert told["states"] == {"ready": 298, "down": 3} and told["slots"] == 256 + 297 * 4
        assert await names("limit=50&state=down") == (["w007", "w107", "w207"], told | {"total": 3, "next_after": None})
        assert await names("search=29&limit=1") == (["w029"], told | {"total": 13, "next_after": "w029"})


def test_what_an_engine_tells_of_its_hardware() -> None:
    page = "\n".join(
        (
            'evenhand_engine_energy_joules{device="GPU-1",pid="7"} 1.5e3',
            'evenhand_engine_energy_joules{device="package-0"} 12.0',
            'evenhand_engine_energy_joules{device="bad"} NaN',
            'evenhand_engine_gpu_use{device="GPU-1"} 0.5',
            'evenhand_engine_gpu_use{device="GPU-2"} 1.0',
            "evenhand_engine_weight_compression 3.5",
        )
    )
    assert hardware_in(page) == Hardware({"GPU-1": 1500.0, "package-0": 12.0}, 0.75, 3.5)
    assert hardware_in("nothing 1") == Hardware()


def test_the_fleet_s_efficiency_counts_a_shared_device_once() -> None:
    assert efficiency([]) == dict.fromkeys(("kv_usage", "batch", "gpu_use", "compression", "joules")) | {"devices": 0}
    members = []
    for number, (joules, use) in enumerate((({"GPU-1": 10.0}, 0.5), ({"GPU-1": 11.0, "GPU-2": 4.0}, None))):
        member = Member(Worker(f"w{number}", "http://127.0.0.1:9", slots=4), EngineClient("http://127.0.0.1:9"))
        member.state, member.hardware = WorkerState.READY, Hardware(joules, use, 2.0 * number)
        member.load.kv_usage, member.load.others = 0.5, 4 * number
        members.append(member)
    told = efficiency(members)
    assert told["joules"] == 15.0 and told["devices"] == 2
    assert (told["kv_usage"], told["batch"], told["gpu_use"], told["compression"]) == (0.5, 0.5, 0.5, 2.0)
