"""The console: its page tells nothing and loads nothing, and what feeds it is for the admin key alone."""

import asyncio
import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

from scheduler.catalog import POLICIES
from server.operators.console import choices, joined, page
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
        one = (await admin(gateway, "GET", "/live")).json()
    waiting = {"model": "far", "waiting": 3, "running": 1, "by_tenant": {"zenith": 3}, "other_tenants": 0}
    other = {
        **one,
        "gap": one["gap"] + 7,
        "lines": [{**one["lines"][0], "waiting": 2, "by_tenant": {"acme": 2}}, {**waiting, "by_lane": {"all": 3}}],
        "workers": [{**one["workers"][0], "in_flight": 5}],
    }
    both = joined(one, other)
    assert both["outcomes"] == {"ok": 2} and both["gap"] == one["gap"] + 7
    assert both["service"]["acme"] == 2 * one["service"]["acme"]
    assert sum(both["ttft"]["counts"]) == 2 and both["ttft"]["bounds"] == one["ttft"]["bounds"]
    assert [worker["in_flight"] for worker in both["workers"]] == [5]
    assert [(line["model"], line["waiting"], line["by_tenant"]) for line in both["lines"]] == [
        ("fake", 2, {"acme": 2}),
        ("far", 3, {"zenith": 3}),
    ]
    assert both["policy"] == one["policy"] and both["at_s"] == one["at_s"]
