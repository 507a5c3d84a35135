"""The dashboards: as their table says, about metrics that exist, and every panel has data in a real Prometheus."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import yaml

from deploy.observability.dashboards import BOARDS, FOLDER, WIDTH, Query, built, panels
from loadtest.bench.bench_target import free_port
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from tests.deploy.queries import ROOT, RULES, known, only_real, plain, selectors
from tests.server.conftest import Running, Wire, chat, request, serving
from tests.server.test_admin import ADMIN_KEY

LIMIT_S = 120.0  # for a busy machine; 10 s on a quiet one
QUERIES = {
    f"{name}: {panel.title}: {query.name}": query
    for name, board in BOARDS.items()
    for panel in panels(board)
    for query in panel.queries
}


@pytest.mark.parametrize("name", BOARDS)
def test_the_dashboards_in_the_repository_are_those_of_the_table(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == built(BOARDS[name]), "run `make dashboards`"


def test_there_is_no_dashboard_that_nobody_makes() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(BOARDS)


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_panel_asks_for_metrics_that_exist(query: Query) -> None:
    asked = {name for name, _ in selectors(query.expr)}
    assert asked and asked <= known()


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_their_rows_and_do_not_overlap(name: str) -> None:
    board = json.loads(built(BOARDS[name]))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < WIDTH
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def config_for(gateway: Running, folder: Path) -> Path:
    """The configuration of the repository, with this gateway's address and in a hurry."""
    (folder / "key").write_text(ADMIN_KEY)
    text = (ROOT / "deploy" / "observability" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    for address in ("gateway:8000", "gateway:9000"):
        text = text.replace(address, f"127.0.0.1:{gateway.port}")
    text = text.replace("/run/secrets/admin_key", f"{folder}/key")
    config = yaml.safe_load(text)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"].startswith("evenhand")]
    config["scrape_configs"][1]["http_sd_configs"][0]["refresh_interval"] = "1s"
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.asynccontextmanager
async def prometheus(gateway: Running, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus here: install it (Debian and Ubuntu: apt install prometheus)")
    port = free_port()
    options = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={folder}/data", "--log.level=error"]
    with (folder / "log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            program, f"--config.file={config_for(gateway, folder)}", *options, stdout=log, stderr=log
        )
    try:
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False, timeout=60
        ) as client:
            yield client
    finally:
        server.terminate()
        await server.wait()


async def has_data(client: httpx2.AsyncClient, expr: str) -> bool:
    try:
        answer = await client.get("/query", params={"query": plain(expr, "10s")})
    except httpx2.TransportError:
        return False  # it is still starting
    return bool(answer.status_code == 200 and answer.json()["data"]["result"])


async def works(gateway: Running) -> list[Wire]:
    """Traffic of which some waits and some ends, and a request that is refused."""
    body = chat(stream=True, max_tokens=8000, ignore_eos=True)
    wires = [await gateway.send(request("/v1/chat/completions", body)) for _ in range(8)]
    await gateway.ask("/v1/chat/completions", chat(model="nobody"))
    return wires


async def all_have_data(gateway: Running, client: httpx2.AsyncClient, missing: dict[str, str]) -> None:
    end = time.monotonic() + LIMIT_S
    while missing and time.monotonic() < end:
        short = chat(model="any", stream=True, max_tokens=8, ignore_eos=True)
        await gateway.ask("/v1/chat/completions", short)
        missing = {what: expr for what, expr in missing.items() if not await has_data(client, expr)}
    assert not missing


async def test_every_panel_has_data_in_a_real_prometheus_that_finds_the_engines_by_itself(tmp_path: Path) -> None:
    cost = replace(PRESETS["quick"], iteration_s=0.02, max_seqs=2, prefix_block_tokens=8)
    setup = EngineSetup(cost=cost, plugin=True, policy="mlfq")
    options = {"admin_key": ADMIN_KEY, "policy": "mlfq", "slots": 2, "disaggregation": {"min_prompt_tokens": 1}}
    options |= {"cost": {"meter": True, "gpu_hour": 2.0}, "models": {"any": {"targets": "gone", "fallbacks": ["fake"]}}}
    options |= {"batch": {"folder": tmp_path / "batch"}}
    async with (
        FakeEngine(setup) as engine,
        FakeEngine(setup) as reader,
        serving(f"{engine.url},role=decode", f"{reader.url},role=prefill", **options) as gateway,
    ):
        async with prometheus(gateway, tmp_path) as client:
            wires = await works(gateway)
            wanted = {what: query.expr for what, query in QUERIES.items() if not only_real(query)}
            beside = {what: expr for what, expr in wanted.items() if what.endswith("with flex")}
            await all_have_data(gateway, client, {what: wanted[what] for what in wanted.keys() - beside.keys()})
            assert await has_data(client, 'vllm:num_requests_running{worker="worker-0", role="decode"}')
            for wire in wires:
                await wire.close()
            flex = chat(stream=True, max_tokens=8000, ignore_eos=True, service_tier="flex")
            wire = await gateway.send(request("/v1/chat/completions", flex))
            await all_have_data(gateway, client, beside)
            await wire.close()
