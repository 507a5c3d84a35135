"""`make pictures`: the pictures of the documents: the console of a gateway under load, and a report.

Needs Chromium, and Pillow, which the engine's environment has; the load takes some minutes.
"""

import argparse
import asyncio
import contextlib
import functools
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from PIL import Image
from playwright.async_api import Browser, Page

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from scheduler.workers import Role
from server.request.tenants import HASHED, digest_of
from tests.server.conftest import Running, serving
from tests.server.test_admin import ADMIN_KEY
from tests.server.test_console_in_browser import chromium, shown

ROOT = Path(__file__).resolve().parent.parent
FLEET = (Role.PREFILL, Role.DECODE, Role.DECODE)
COST = replace(PRESETS["gpu-7b"], iteration_s=0.03, max_seqs=12, prefix_block_tokens=16)
COLOURS = 96
DESK, PHONE = (1280, 900), (390, 844)
REPORT = (1180, 1500)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks: requests per second, tokens of a prompt and of an answer on average."""

    name: str
    weight: int
    rate_per_s: float
    prompt_tokens: int
    answer_tokens: int
    limits: str = ""

    @property
    def key(self) -> str:
        return f"key-of-{self.name}-for-the-pictures"

    @property
    def hashed(self) -> str:
        return HASHED + digest_of(self.key.encode()).hex()


TENANTS = (
    Tenant("search", 2, 1.6, 900, 40),
    Tenant("assistant", 2, 0.9, 300, 120),
    Tenant("batch", 1, 1.4, 500, 100),
    Tenant("research", 1, 0.25, 1500, 300, limits=", concurrency: 3"),
)


async def asks(tenant: Tenant, url: str, seconds: float, seed: int) -> None:
    """Its requests, as a Poisson process whose rate doubles for a third of the time."""
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()
    began = loop.time()
    limits = httpx2.Limits(max_connections=None)
    async with (
        httpx2.AsyncClient(base_url=url, timeout=None, trust_env=False, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        while (passed := (loop.time() - began) / seconds) < 1:
            rate_per_s = tenant.rate_per_s * (2 if 0.4 < passed < 0.7 and tenant.name == "batch" else 1)
            await asyncio.sleep(chance.expovariate(rate_per_s))
            group.create_task(one_request(tenant, client, chance))


async def one_request(tenant: Tenant, client: httpx2.AsyncClient, chance: random.Random) -> None:
    length = min(2 * tenant.prompt_tokens, round(chance.expovariate(1 / tenant.prompt_tokens)))
    words = " ".join(f"w{chance.randrange(200)}" for _ in range(length // 2))
    body = {
        "model": "fake" if chance.random() > 0.01 else "other",
        "messages": [{"role": "system", "content": 100 * tenant.name}, {"role": "user", "content": words}],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 1 + round(chance.expovariate(1 / tenant.answer_tokens)),
    }
    headers = {"authorization": f"Bearer {tenant.key}"}
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        async for _ in answer.aiter_bytes():
            if chance.random() < 0.0005:  # it leaves
                return


@contextlib.asynccontextmanager
async def gateway_and_engines(folder: Path) -> AsyncIterator[Running]:
    described = [f"{{name: {one.name}, weight: {one.weight}, keys: [{one.hashed}]{one.limits}}}" for one in TENANTS]
    (folder / "tenants.yaml").write_text(f"tenants: [{', '.join(described)}]")
    async with contextlib.AsyncExitStack() as stack:
        setup = EngineSetup(cost=COST, plugin=True, policy="vtc")
        engines = [await stack.enter_async_context(FakeEngine(setup)) for _ in FLEET]
        workers = [f"{engine.url},role={role.value}" for engine, role in zip(engines, FLEET, strict=True)]
        options = {"tenants": folder / "tenants.yaml", "admin_key": ADMIN_KEY, "policy": "vtc", "slots": COST.max_seqs}
        yield await stack.enter_async_context(serving(*workers, **options))


@contextlib.asynccontextmanager
async def consoles(browser: Browser, gateway: Running) -> AsyncIterator[dict[str, Page]]:
    """As an operator has it open, in three ways; its curves begin when it is opened."""
    async with contextlib.AsyncExitStack() as stack:
        opened = {}
        for name, size, scheme in (("light", DESK, "light"), ("dark", DESK, "dark"), ("phone", PHONE, "dark")):
            console = await stack.enter_async_context(shown(browser, gateway, *size, scheme))
            await console.log_in(ADMIN_KEY)
            opened[name] = console.page
        yield opened


async def under_load(browser: Browser, folder: Path, work: Path, seconds: float) -> None:
    async with gateway_and_engines(work) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        load = [asyncio.create_task(asks(one, url, seconds, seed)) for seed, one in enumerate(TENANTS)]
        await asyncio.sleep(0.25 * seconds)
        async with consoles(browser, gateway) as opened:
            await asyncio.sleep(0.7 * seconds)
            for name, page in opened.items():
                await page.screenshot(path=folder / f"console-{name}.png", full_page=name != "phone")
        await asyncio.gather(*load)


async def report(browser: Browser, folder: Path, work: Path) -> None:
    argv = [sys.executable, "-m", "deploy.cli", "compare", "--engine", "simulated", "--out", str(work / "compare")]
    await asyncio.to_thread(functools.partial(subprocess.run, argv, check=True, cwd=work, stdout=subprocess.DEVNULL))
    page = await browser.new_page(viewport={"width": REPORT[0], "height": REPORT[1]}, color_scheme="light")
    await page.goto(f"file://{work / 'compare' / 'page.html'}")
    await page.screenshot(path=folder / "report.png")
    await page.close()


async def taken(folder: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="evenhand-pictures-") as work:
        async with chromium() as browser:
            await report(browser, folder, Path(work))
            await under_load(browser, folder, Path(work), seconds)


def shrink(folder: Path) -> None:
    """Pictures to a palette: what is drawn here has few colours. The rarest, a thin line's, must not be merged."""
    for picture in folder.glob("*.png"):
        Image.open(picture).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long the load lasts (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asyncio.run(taken(args.out.resolve(), args.seconds))
    shrink(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
