"""The console in a real browser: what an operator sees and does, and what somebody without the key does not see."""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from scheduler.workers import Worker
from server.engine.client import EngineClient
from server.fleet.fleet import Member, WorkerState
from tests.server.batch.test_batches import client_of, ended, jsonl, part_done, submit
from tests.server.conftest import SLOW, Running, Wire, chat, eventually, over_fake, request
from tests.server.test_admin import ADMIN_KEY
from tests.server.test_tenants import KEY, OTHER

TENANTS = f"tenants: [{{name: acme, keys: [{KEY}], weight: 2}}, {{name: zenith, keys: [{OTHER}]}}]"
# As root Chromium has no sandbox of its own; the rest keeps it from asking the network for anything.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
PATIENCE_MS = 60_000
MOST_ELEMENTS = 1_000


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: install it (Debian and Ubuntu: apt install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=PATIENCE_MS)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Shown:
    """The open console. complaints: errors of its script, and what its security policy blocked."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    async def text(self, selector: str) -> str:
        return await self.page.locator(selector).inner_text()

    async def says(self, selector: str, words: str) -> None:
        await expect(self.page.locator(selector)).to_contain_text(words, timeout=PATIENCE_MS)

    async def log_in(self, key: str) -> None:
        await self.page.fill("#key", key)
        await self.page.press("#key", "Enter")

    async def picture(self, name: str) -> None:
        """Keeps a picture of the whole page, where one is asked for."""
        if folder := os.environ.get("EVENHAND_PICTURES"):
            await self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@contextlib.asynccontextmanager
async def shown(browser: Browser, gateway: Running, width: int, height: int, scheme: str) -> AsyncIterator[Shown]:
    context = await browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    opened = Shown(page)

    def complain(message: ConsoleMessage) -> None:
        if message.type == "error" and "status of 40" not in message.text:  # a refused key is told by the page itself
            opened.complaints.append(message.text)

    page.on("console", complain)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    await page.goto(f"http://127.0.0.1:{gateway.port}/console")
    yield opened
    await context.close()
    assert opened.complaints == []


@contextlib.asynccontextmanager
async def busy(tmp_path: Path) -> AsyncIterator[Running]:
    """A gateway of two tenants with one running request and three that wait."""
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    options = {"tenants": tmp_path / "tenants.yaml", "admin_key": ADMIN_KEY, "policy": "vtc", "slots": 2}
    options["cost"] = {"meter": True, "currency": "EUR", "models": {"*": {"input": 100, "output": 400}}}
    async with over_fake(SLOW, admission={"ahead": 0}, **options) as (gateway, _):
        wires: list[Wire] = []
        for key in (KEY, OTHER):
            await gateway.ask("/v1/chat/completions", chat(), headers={"authorization": f"Bearer {key}"})
        for key in (KEY, KEY, KEY, OTHER):
            body = chat(stream=True, max_tokens=8000, ignore_eos=True)  # longer than any of this takes
            wires.append(
                await gateway.send(request("/v1/chat/completions", body, headers={"authorization": f"Bearer {key}"}))
            )
        await eventually(lambda: len(gateway.server.lines.by_model["fake"].lanes) == 2, "two wait")
        yield gateway
        for wire in wires:
            await wire.close()


async def test_an_operator_sees_who_waits_changes_the_policy_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with chromium() as browser, busy(tmp_path) as gateway, shown(browser, gateway, 1360, 900, "light") as console:
        page = console.page
        await console.says("#fleet", "worker-0")
        assert "acme" not in await page.content()
        await console.log_in("not-the-admin-key")
        await console.says("#key-status", "The admin key is missing or wrong")

        await console.log_in(ADMIN_KEY)
        await console.says("#lines", "acme")
        await console.says("#shares", "acme")
        await console.says("#wait-sum", "2 requests wait")
        await console.says("#policy-now", "in force: vtc")
        await console.says("#kpis", "tokens/s")
        await console.says("#kpis", "no engine tells of energy")
        await console.says("#kpis", "KV cache in use")
        await console.picture("console-light")

        await page.check("[name=policy][value=mlfq]")
        await page.click("#policy-more summary")
        await page.fill("#option-levels", "none")
        await page.click("#policy-form button.main")
        await console.says("#policy-status", "levels")
        assert gateway.server.policy.name == "vtc"
        await page.fill("#option-levels", "4")
        await page.click("#policy-form button.main")
        await console.says("#policy-status", "In force: mlfq levels=4")
        assert (gateway.server.policy.name, gateway.server.policy.options) == ("mlfq", {"levels": "4"})

        await page.click("#name-more summary")
        await page.fill("#name-name", "gpt-4o-mini")
        await page.fill("#name-targets", "gone")
        await page.click("#name-form button.main")
        await console.says("#names-status", "no worker serves 'gone'; available: fake")
        await page.fill("#name-targets", "fake=3")
        await page.fill("#name-tenants", "acme, zenith")
        await page.click("#name-form button.main")
        await console.says("#names", "acme, zenith")
        await console.says("#names-status", "gpt-4o-mini is set")
        assert gateway.server.lines.names.table.names["gpt-4o-mini"].models == (("fake", 1.0),)
        await console.picture("console-names")
        await page.click("[data-drop]")
        await console.says("#names", "Every model goes by its own name")

        await console.says("#costs", "zenith")
        await console.says("#cost-sum", "EUR")
        await page.select_option("#cost-by", "model")
        await console.says("#costs", "fake")
        await console.picture("console-costs")

        await page.click("#fleet button")
        await console.says("#fleet", "draining")
        await page.click("#fleet button")
        await console.says("#fleet", "ready")

        await page.click("#lock")
        assert "acme" not in await page.content()
        held = await page.evaluate("[localStorage.length, sessionStorage.length, document.cookie.length]")
        assert held == [0, 0, 0]


async def test_on_a_dark_phone_everything_fits_and_the_chat_box_tells_its_times(tmp_path: Path) -> None:
    async with chromium() as browser, over_fake(SLOW, admin_key=ADMIN_KEY) as (gateway, _):
        async with shown(browser, gateway, 360, 740, "dark") as console:
            page = console.page
            await console.says("#fleet", "ready")
            await console.log_in(ADMIN_KEY)
            await console.says("#kpis", "Waiting")
            await page.fill("#length", "12")
            await page.check("#why")
            await page.fill("#ask", "Hello")
            await page.press("#ask", "Enter")
            await console.says(".trace", "goes to worker-0 (worker-0: ")
            await console.says(".meter:not(.trace)", "12 tokens")
            meter = await console.text(".meter:not(.trace)")
            assert "first token after" in meter and "tokens/s" in meter
            assert (await console.text(".said.model")).strip()

            await console.says("#shares", "open")
            wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0
            dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            await console.picture("console-phone")
            await page.click("#theme")
            assert dark != await page.evaluate("getComputedStyle(document.body).backgroundColor")


async def test_batches_are_shown_while_they_run_and_can_be_cancelled(tmp_path: Path) -> None:
    async with (
        chromium() as browser,
        over_fake(SLOW, slots=8, admin_key=ADMIN_KEY, batch={"folder": tmp_path}) as (
            gateway,
            _,
        ),
    ):
        async with shown(browser, gateway, 1280, 900, "light") as console, client_of(gateway) as client:
            await console.log_in(ADMIN_KEY)
            await console.says("#fleet", "ready")
            await expect(console.page.locator("#batch-card")).to_be_hidden()
            batch = await submit(client, jsonl(300))
            await part_done(client, batch.id, 2)
            await console.says("#batches", "in progress")
            await console.says("#batches", "/ 300")
            await console.says("#slack", "of the slots that the others leave")
            await console.says("#tiers", "flex")
            await console.picture("console-batches")
            await console.page.click("#batches button")
            await console.says("#batch-status", "is being cancelled")
            await console.says("#batches", "cancelled")
            assert (await ended(client, batch.id)).status == "cancelled"


async def test_an_operator_loads_and_unloads_an_adapter() -> None:
    setup = replace(SLOW, adapters=2, plugin=True)
    async with chromium() as browser, over_fake(setup, admin_key=ADMIN_KEY) as (gateway, engine):
        async with shown(browser, gateway, 1280, 900, "light") as console:
            page = console.page
            await console.log_in(ADMIN_KEY)
            await console.says("#adapters", "No LoRA adapters")
            await page.click("#adapter-more summary")
            for field, text in (("name", "sql"), ("model", "fake"), ("path", "/adapters/missing")):
                await page.fill(f"#adapter-{field}", text)
            await page.click("#adapter-form button.main")
            await console.says("#adapters-status", "it finds no adapter at /adapters/missing")
            await page.fill("#adapter-path", "/adapters/sql")
            await page.click("#adapter-form button.main")
            await console.says("#adapters-status", "sql can be asked for")
            await console.says("#adapters", "worker-0")
            assert engine.adapters.loaded == {"sql": "/adapters/sql"}
            await console.picture("console-adapters")
            await page.click("[data-unload]")
            await console.says("#adapters", "No LoRA adapters")
            assert not engine.adapters.loaded


@pytest.mark.slow
async def test_a_thousand_workers_and_ten_thousand_tenants_are_a_page_that_stays_small(tmp_path: Path) -> None:
    tenants = [{"name": f"t{number}", "keys": [f"key-of-tenant-{number:06d}"], "weight": 2} for number in range(9_999)]
    (tmp_path / "tenants.json").write_text(json.dumps({"tenants": [*tenants, {"name": "acme", "keys": [KEY]}]}))
    options = {"tenants": tmp_path / "tenants.json", "admin_key": ADMIN_KEY, "policy": "vtc"}
    async with chromium() as browser, over_fake(SLOW, **options) as (gateway, _):
        fleet = gateway.server.fleet
        for number in range(1, 1000):
            url = "http://127.0.0.1:9"
            member = Member(Worker(f"gpu-{number:04d}", url, slots=256), EngineClient(url), models=("llama",))
            member.load.observe(others=0, kv_usage=number % 100 / 100)
            fleet.enroll(member)
            fleet.put(member, WorkerState.DOWN if number % 400 == 7 else WorkerState.READY)
        keys = [{"authorization": f"Bearer key-of-tenant-{number:06d}"} for number in range(100)]
        body = chat(model="fake", max_tokens=2)
        await asyncio.gather(*(gateway.ask("/v1/chat/completions", body, headers=key) for key in keys))
        async with shown(browser, gateway, 1360, 900, "light") as console:
            page = console.page
            await console.says("#fleet-range", "1–20 of 1,000")
            await console.log_in(ADMIN_KEY)
            await console.says("#chips", "997 of 1,000 workers ready")
            await console.says("#fleet", "gpu-0007")
            await console.picture("console-large")
            await page.click("#fleet-next")
            await console.says("#fleet-range", "21–40 of 1,000")
            await page.click("#fleet-back")
            await console.says("#fleet-range", "1–20 of 1,000")
            await page.select_option("#fleet-state", "down")
            await console.says("#fleet-range", "1–3 of 3")
            await console.says("#fleet", "gpu-0807")
            await page.select_option("#fleet-state", "")
            await page.fill("#fleet-search", "0777")
            await console.says("#fleet-range", "1–1 of 1")
            await page.click("#fleet button")
            await console.says("#fleet", "draining")
            assert fleet.members["gpu-0777"].state is WorkerState.DRAINING
            await page.fill("#fleet-search", "")
            await console.says("#fleet-range", "1–20 of 1,000")
            assert await page.evaluate("document.querySelectorAll('*').length") < MOST_ELEMENTS
