"""`docker compose up` with nothing but a clone and a key: asked, watched, disturbed, changed, and taken down again.

The tests share one project and run in this order; each leaves it serving.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx2
import pytest
import yaml
from openai import OpenAI
from playwright.async_api import expect

from deploy.machine.cores import cpu_list
from tests.containers.conftest import MARKS, NewSite
from tests.containers.site import LIMIT_S, QUESTION, ROOT, START_S, Site, ready_workers, until
from tests.server.test_console_in_browser import PATIENCE_MS, chromium

pytestmark = MARKS
SERVICES = ("gateway", "redis", "worker", "prometheus")  # Grafana's image has no stand-in
LONG = 400  # tokens; long enough for a container to be killed before they are there
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"  # no other token is nearly as likely as the next number


@pytest.fixture(scope="module")
def site(new_site: NewSite) -> Iterator[Site]:
    site = new_site("compose")
    site.up(*SERVICES)
    until(lambda: ready_workers(site) == 1, "the gateway has found the worker")
    yield site


def test_it_answers(site: Site) -> None:
    assert "Paris" in site.answer()
    client = OpenAI(base_url=f"{site.url}/v1", api_key="none", timeout=LIMIT_S)
    events = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    assert "Paris" in "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert site.metric("evenhand_requests_total") >= 2


def test_nobody_has_more_rights_than_it_needs(site: Site) -> None:
    """Docker's own record of each container, and what its processes may do."""
    users = {"gateway": "10001", "worker": "10001", "redis": "999", "prometheus": "65534"}
    for service in SERVICES:
        (container,) = site.containers(service)
        about = site.inspect(container)["HostConfig"]
        assert about["CapDrop"] == ["ALL"] and not about["Privileged"], service
        assert about["ReadonlyRootfs"] is (service != "prometheus"), service
        status = site.inside(service, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [users[service]] * 4, service
        assert int(fields["CapEff"], 16) == 0 and int(fields["CapBnd"], 16) == 0, service
        assert fields["NoNewPrivs"] == "1", service
    for published in site.inspect(site.containers("gateway")[0])["NetworkSettings"]["Ports"].values():
        assert {place["HostIp"] for place in published} == {"127.0.0.1"}


async def test_an_operator_sees_the_worker_in_the_console(site: Site) -> None:
    (worker,) = site.admin("/admin/workers").json()["workers"]
    assert httpx2.get(f"http://127.0.0.1:{site.ports['EVENHAND_ADMIN_PORT']}/admin/workers").status_code == 401
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{site.ports['EVENHAND_ADMIN_PORT']}/console")
        await page.fill("#key", site.admin_key)
        await page.press("#key", "Enter")
        await expect(page.locator("#fleet")).to_contain_text(worker["id"], timeout=PATIENCE_MS)
        await expect(page.locator("#policy-now")).to_contain_text("vtc", timeout=PATIENCE_MS)


def engines_scraped(site: Site) -> int:
    """Engines of which Prometheus has metrics."""
    targets = site.prometheus("targets")["activeTargets"]
    return sum(target["health"] == "up" for target in targets if target["labels"]["job"] == "evenhand-engine")


def test_prometheus_scrapes_everything_and_evaluates_every_rule(site: Site) -> None:
    until(lambda: engines_scraped(site) == 1, "the engine is scraped")
    jobs = {target["labels"]["job"] for target in site.prometheus("targets")["activeTargets"]}
    assert jobs == {"evenhand-gateway", "evenhand-engine", "prometheus"}
    written = yaml.safe_load((ROOT / "deploy/observability/prometheus/rules.yml").read_text(encoding="utf-8"))["groups"]

    def health() -> list[str]:
        return [rule["health"] for group in site.prometheus("rules")["groups"] for rule in group["rules"]]

    until(lambda: health() == ["ok"] * sum(len(group["rules"]) for group in written), "every rule has been evaluated")


def test_redis_restarts_under_traffic_and_nobody_notices(site: Site) -> None:
    stop, codes = threading.Event(), list[int]()

    def client(number: int) -> None:
        for at in count():
            if stop.is_set():
                return
            codes.append(site.ask(f"{QUESTION} {number}.{at}", max_tokens=8).status_code)

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client, number) for number in range(2)]
        until(lambda: len(codes) >= 5, "traffic")
        site.compose("restart", "redis")
        asked = len(codes)
        until(lambda: len(codes) >= asked + 15, "traffic goes on")
        stop.set()
        for one in clients:
            one.result(timeout=LIMIT_S)
    assert codes == [200] * len(codes)
    until(lambda: ready_workers(site) == 1, "the worker is known again")


def test_a_second_worker_joins_and_a_killed_one_costs_no_answer(site: Site) -> None:
    """The one that answers most is killed in the middle of it; the other goes on with each stream, word for word."""
    with site.stream(COUNTING, LONG) as undisturbed:
        expected = undisturbed.read().text
    site.up("--scale", "worker=2", "--no-recreate", "worker")
    until(lambda: ready_workers(site) == 2, "both are ready", START_S)
    for worker in site.containers("worker"):
        threads = site.engine.said("exec", worker, "sh", "-c", "cat /proc/[0-9]*/task/[0-9]*/status 2>/dev/null")
        allowed = [cpu_list(text) for text in re.findall(r"^Cpus_allowed_list:\t(\S+)$", threads, re.MULTILINE)]
        assert all(cores == os.sched_getaffinity(0) for cores in allowed), "two workers do not meet on one core"

    def ask(begun: threading.Barrier) -> str:
        with site.stream(COUNTING, LONG) as stream:
            begun.wait(timeout=LIMIT_S)
            return stream.read().text

    begun = threading.Barrier(5)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, begun) for _ in range(4)]
        begun.wait(timeout=LIMIT_S)
        busiest = max(site.admin("/admin/workers").json()["workers"], key=lambda worker: worker["in_flight"])
        site.engine.run("kill", busiest["id"].partition("-")[0])
        assert [one.result(timeout=LIMIT_S) for one in asked] == [expected] * 4
    assert site.metric('evenhand_failovers_total{outcome="resumed"') >= 1
    assert "Paris" in site.answer()
    site.compose("rm", "--stop", "--force", "worker")
    site.up("--scale", "worker=1", "worker")
    until(lambda: ready_workers(site) == 1, "the new one has joined")


def test_a_gateway_that_is_stopped_finishes_its_answers(site: Site) -> None:
    (gateway,) = site.containers("gateway")
    with site.stream(COUNTING, 120) as stream, ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(site.engine.run, "stop", "--time", "45", gateway)
        assert stream.read().done and stream.text.startswith(" 14, 15, 16")
        stopping.result(timeout=LIMIT_S)
    assert site.inspect(gateway)["State"]["ExitCode"] == 0
    site.up("gateway")
    until(lambda: ready_workers(site) == 1, "it has found the worker")
    assert "Paris" in site.answer()


def test_a_new_admin_key_reaches_prometheus(site: Site) -> None:
    site.new_admin_key()
    site.up("gateway", "prometheus")
    until(lambda: engines_scraped(site) == 1, "the engine is scraped with the new key")
    assert site.admin("/admin/workers").status_code == 200


def test_a_worker_on_two_networks_and_another_port_is_healthy(site: Site, tmp_path: Path) -> None:
    """Of its addresses it takes the one towards Redis."""
    override = {"networks": ["fleet", "front"], "environment": {"EVENHAND_ENGINE_PORT": "8200"}}
    (tmp_path / "two.yml").write_text(json.dumps({"services": {"worker": override}}))
    site.files.append(tmp_path / "two.yml")
    site.up("worker")
    (worker,) = site.containers("worker")
    networks = site.inspect(worker)["NetworkSettings"]["Networks"]
    assert len(networks) == 2
    address = networks[f"{site.name}_fleet"]["IPAddress"]
    until(lambda: ready_workers(site) == 1, "it has joined")
    assert site.inside("worker", "cat", "/tmp/evenhand-ready") == f"http://{address}:8200"
    assert "Paris" in site.answer()


def test_down_leaves_nothing(site: Site) -> None:
    assert all(site.left().values())
    site.compose("--profile", "*", "down", "--volumes")
    assert not any(site.left().values())
