"""/admin: its own key, workers, tenants and keys, the policy while requests wait."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.serve.gateway import plain
from loadtest.bench.bench_target import free_port
from loadtest.fake.engine import FakeEngine
from server.app import GatewayServer
from server.cluster.local_sync import WORKER
from server.settings import Settings, admin_address, read_settings
from tests.server.conftest import INSTANT, SLOW, Reply, Running, chat, eventually, over_fake, request, serving
from tests.server.test_tenants import KEY, OTHER

ADMIN_KEY = "admin-0123456789abcdef"


async def admin(gateway: Running, method: str, path: str, body: object = None, key: str = ADMIN_KEY) -> Reply:
    headers = {"authorization": f"Bearer {key}", "connection": "close"}
    return await gateway.ask("/admin" + path, body, method=method, headers=headers)


async def ask(gateway: Running, key: str, **fields: object) -> int:
    return (
        await gateway.ask("/v1/chat/completions", chat(**fields), headers={"authorization": f"Bearer {key}"})
    ).status


ROUTES = [
    ("GET", "/workers"), ("PUT", "/workers/w"), ("DELETE", "/workers/w"), ("POST", "/workers/w/drain"),
    ("POST", "/workers/w/resume"), ("GET", "/tenants"), ("GET", "/tenants/a"), ("PUT", "/tenants/a"),
    ("DELETE", "/tenants/a"), ("POST", "/tenants/a/keys"), ("DELETE", "/tenants/a/keys/0"), ("GET", "/policy"),
    ("PUT", "/policy"), ("DELETE", "/policy"), ("GET", "/models"), ("GET", "/models/a"), ("PUT", "/models/a"),
    ("DELETE", "/models/a"), ("GET", "/adapters"), ("GET", "/adapters/a"), ("PUT", "/adapters/a"),
    ("DELETE", "/adapters/a"), ("GET", "/usage"), ("GET", "/targets"), ("GET", "/live"), ("GET", "/policies"),
]  # fmt: skip


async def test_without_an_admin_key_everybody_is_refused() -> None:
    async with over_fake() as (gateway, _):
        for method, path in ROUTES:
            refused = await admin(gateway, method, path)
            assert (refused.status, refused.error["code"]) == (403, "forbidden"), (method, path)


async def test_with_a_key_it_is_off_the_port_that_clients_use() -> None:
    async with over_fake(admin_key=ADMIN_KEY, admin_port=free_port()) as (gateway, _):
        operators = Running(gateway.server, gateway.server.apart.port)
        assert operators.port != gateway.port
        for method, path in ROUTES:
            hidden = await admin(gateway, method, path)
            assert (hidden.status, hidden.error["code"]) == (404, "unknown_url"), (method, path)
        assert (await gateway.ask("/console", method="GET")).status == 404
        assert (await gateway.ask("/health", method="GET")).status == 200
        assert (await operators.ask("/console", method="GET")).status == 200
        assert (await admin(operators, "GET", "/workers")).status == 200
        assert (await admin(operators, "GET", "/workers", key=KEY)).status == 401
        assert (await operators.ask("/v1/chat/completions", chat())).status == 200, "the console asks as clients do"
        for wire in operators.wires:
            await wire.close()


def test_it_is_a_thousand_above_and_reached_from_here_alone_unless_said_otherwise() -> None:
    def address(**given: object) -> tuple[str, int] | None:
        settings = Settings(admin_key=ADMIN_KEY, **given)  # type: ignore[arg-type]  # any setting
        return admin_address(settings, settings.port)

    assert address() == ("127.0.0.1", 9000)
    assert address(host="0.0.0.0", port=65000) == ("127.0.0.1", 64000)
    assert address(admin_host="0.0.0.0", admin_port=81) == ("0.0.0.0", 81)
    assert address(port=80, admin_port=80) is None
    assert admin_address(Settings(), 8000) is None


def test_an_address_for_operators_that_others_reach_does_not_open_the_gateway() -> None:
    with pytest.raises(ValueError, match="allow"):
        GatewayServer(Settings(admin_key=ADMIN_KEY, admin_host="0.0.0.0"))


def test_a_taken_port_for_operators_is_said_with_a_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        for processes in ("1", "2"):
            command = [sys.executable, "-m", "server", "--port", f"{free_port()}", "--gateway-processes", processes]
            env = os.environ | {"EVENHAND_ADMIN_KEY": ADMIN_KEY, "EVENHAND_ADMIN_PORT": f"{number}"}
            ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
            assert ended.returncode == 1
            assert f"127.0.0.1:{number} for /admin" in ended.stderr and "EVENHAND_ADMIN_PORT" in ended.stderr


async def test_a_wrong_key_and_a_tenant_s_key_are_refused_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    async with over_fake(admin_key=ADMIN_KEY, tenants=path) as (gateway, _):
        for method, route in ROUTES:
            for key in (KEY, ADMIN_KEY + "0", ADMIN_KEY[:-1], ""):
                assert (await admin(gateway, method, route, key=key)).status == 401, (method, route)
            assert (await gateway.ask("/admin" + route, method=method)).status == 401
        assert await ask(gateway, ADMIN_KEY) == 401  # nor does the admin key open the models


async def test_a_tenant_lives_through_its_whole_life(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200  # open
            record = {"weight": 2, "keys": [KEY], "budget": {"tokens_per_day": 10**6}}
            made = await admin(gateway, "PUT", "/tenants/acme", record)
            assert made.status == 200
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 401  # not open any more
            assert await ask(gateway, KEY) == 200

            told = (await admin(gateway, "GET", "/tenants/acme")).json()
            assert told["weight"] == 2 and told["source"] == "store"
            assert [len(key["id"]) for key in told["keys"]] == [8]
            assert min(told["used"].values()) > 0
            listed = (await admin(gateway, "GET", "/tenants")).body
            assert KEY.encode() not in listed and b"sha256" not in listed

            assert (await admin(gateway, "PUT", "/tenants/acme", {"weight": 3})).json()["keys"] == told["keys"]
            assert await ask(gateway, KEY) == 200

            fresh = (await admin(gateway, "POST", "/tenants/acme/keys", {"retire_others_in_s": 0})).json()
            assert await ask(gateway, fresh["key"]) == 200
            assert await ask(gateway, KEY) == 401
            assert fresh["key"] not in (await admin(gateway, "GET", "/tenants/acme")).body.decode()
            assert (await admin(gateway, "DELETE", f"/tenants/acme/keys/{fresh['id']}")).status == 204
            assert await ask(gateway, fresh["key"]) == 401

            assert (await admin(gateway, "DELETE", "/tenants/acme")).status == 204
            assert (await admin(gateway, "GET", "/tenants/acme")).status == 404
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 401
    assert KEY not in caplog.text and fresh["key"] not in caplog.text and ADMIN_KEY not in caplog.text


@pytest.mark.parametrize(
    "limits", [{}, {"requests_per_minute": 1000}, {"budget": {"tokens_per_month": 10**6}}], ids=str
)
async def test_used_is_what_the_engine_counted_whatever_a_tenant_s_limits(limits: dict[str, object]) -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        assert (await admin(gateway, "PUT", "/tenants/acme", {"keys": [KEY]} | limits)).status == 200
        counted = 0
        for _ in range(2):
            headers = {"authorization": f"Bearer {KEY}"}
            reply = await gateway.ask("/v1/chat/completions", chat(max_tokens=7), headers=headers)
            counted += reply.json()["usage"]["total_tokens"]
            (listed,) = (await admin(gateway, "GET", "/tenants")).json()["tenants"]
            told = (await admin(gateway, "GET", "/tenants/acme")).json()
            assert listed["used"] == told["used"] and list(told["used"].values()) == [counted, counted]  # day and month


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/tenants/acme", {"keys": ["short"]}, 400),
        ("PUT", "/tenants/acme", {"weight": "heavy"}, 400),
        ("PUT", "/tenants/acme", {"name": "other"}, 400),
        ("PUT", "/tenants/acme", {"colour": 1}, 400),
        ("PUT", "/tenants/acme", b"{", 400),
        ("PUT", "/tenants/acme", b"[]", 400),
        ("PUT", "/tenants/a%20b", {}, 400),
        ("PUT", "/tenants/thief", {"keys": [KEY]}, 400),
        ("PUT", "/tenants/filed", {}, 409),
        ("DELETE", "/tenants/filed", None, 409),
        ("DELETE", "/tenants/nobody", None, 404),
        ("POST", "/tenants/nobody/keys", None, 404),
        ("POST", "/tenants/filed/keys", None, 409),
        ("DELETE", "/tenants/filed/keys/00000000", None, 404),
        ("POST", "/workers/nobody/drain", None, 404),
        ("DELETE", "/workers/nobody", None, 404),
        ("PUT", "/workers/w", {"url": "ftp://x"}, 400),
        ("PUT", "/workers/w", {}, 400),
        ("PUT", "/workers/w", {"url": "http://127.0.0.1:1", "slot": 8}, 400),
        ("PUT", "/workers/worker-0", {"url": "http://127.0.0.1:1"}, 400),
        ("PUT", "/policy", {"policy": "lifo"}, 400),
        ("PUT", "/policy", {"policy": "vtc", "options": {"speed": "9"}}, 400),
        ("PUT", "/policy", {"policy": "mlfq", "options": {"levels": "0"}}, 400),
        ("PUT", "/policy", {}, 400),
        ("PUT", "/policy", {"policy": "vtc", "option": {}}, 400),
        ("GET", "/nothing", None, 404),
        ("PATCH", "/policy", {}, 405),
    ],
)
async def test_nonsense_is_refused_with_an_error_that_quotes_no_key(
    tmp_path: Path, method: str, path: str, body: object, status: int
) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants: [{{name: filed, keys: [{KEY}]}}]")
    async with over_fake(admin_key=ADMIN_KEY, tenants=file) as (gateway, _):
        refused = await admin(gateway, method, path, body)
        assert refused.status == status
        assert KEY not in refused.error["message"]
        assert (await admin(gateway, "GET", "/policy")).json()["policy"] == "fcfs"
        assert await ask(gateway, KEY) == 200


async def test_a_drained_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with FakeEngine(SLOW) as one, FakeEngine(INSTANT) as other, serving(one.url, admin_key=ADMIN_KEY) as gateway:
        long = chat(max_tokens=50, stream=True, ignore_eos=True)
        running = await gateway.send(request("/v1/chat/completions", long))
        await running.head()
        assert (await admin(gateway, "POST", "/workers/worker-0/drain")).json()["state"] == "draining"
        added = await admin(gateway, "PUT", "/workers/spare", {"url": other.url, "slots": 8})
        assert added.status == 201
        await eventually(lambda: len(gateway.server.fleet.ready()) == 1)
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
        assert gateway.server.fleet.members["worker-0"].load.in_flight == 1
        while await running.chunk():
            pass
        assert (await admin(gateway, "DELETE", "/workers/spare")).status == 204
        assert (await admin(gateway, "POST", "/workers/worker-0/resume")).status == 200
        await eventually(lambda: gateway.server.fleet.ready())
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
        assert [worker["id"] for worker in (await admin(gateway, "GET", "/workers")).json()["workers"]] == ["worker-0"]


async def test_a_drain_is_not_inherited_by_another_worker_of_the_same_name() -> None:
    async with (
        FakeEngine(INSTANT) as one,
        FakeEngine(INSTANT) as other,
        serving(one.url, admin_key=ADMIN_KEY) as gateway,
    ):
        for engine in (other, one, one):  # at another address, and added anew at the same one
            assert (await admin(gateway, "POST", "/workers/worker-0/drain")).json()["state"] == "draining"
            assert (await admin(gateway, "DELETE", "/workers/worker-0")).status == 204
            assert (await admin(gateway, "PUT", "/workers/worker-0", {"url": engine.url})).status == 201
            await gateway.ready()
            await gateway.server.shared.records.read()
            assert gateway.server.fleet.ready()


async def test_the_policy_changes_under_load_and_nobody_loses_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants: [{{name: a, keys: [{KEY}]}}, {{name: b, keys: [{OTHER}], weight: 2}}]")
    options = {"admin_key": ADMIN_KEY, "tenants": file, "slots": 2, "admission": {"ahead": 0}}
    async with over_fake(SLOW, **options) as (gateway, _):
        fields = {"stream": True, "max_tokens": 6, "ignore_eos": True}
        asked = [asyncio.create_task(ask(gateway, (KEY, OTHER)[number % 2], **fields)) for number in range(24)]
        await eventually(lambda: gateway.waiting > 10)
        for policy, given in [("vtc", {}), ("mlfq", {"levels": "3"}), ("gittins", {}), ("vtc", {"within": "mlfq"})]:
            told = await admin(gateway, "PUT", "/policy", {"policy": policy, "options": given})
            assert (told.status, told.json()["policy"], told.json()["options"]) == (200, policy, given)
            assert {line.lanes.policy.name for line in gateway.server.lines.by_model.values()} == {policy}
        assert gateway.waiting > 0
        back = await admin(gateway, "DELETE", "/policy")
        assert back.json()["policy"] == "fcfs"
        assert await asyncio.gather(*asked) == [200] * 24


@pytest.mark.parametrize("name", ["admin_key", "redis_url"])
def test_a_wrong_secret_setting_is_named_and_not_shown(name: str) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        GatewayServer(read_settings({"admin_key": "swordfish"} if name == "admin_key" else {name: 7}, None, Settings))
    assert "swordfish" not in str(refused.value)


def test_settings_that_do_not_go_together_are_told_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clash = {"disaggregation": {"balance_roles": True}, "slo": {"models": {"large": {"tpot_s": 0.05}}}}
    with pytest.raises(ValueError, match="remove --balance-roles"):
        Settings.model_validate(clash)
    monkeypatch.setenv("EVENHAND_REDIS_URL", "redis://:swordfish@host")
    with pytest.raises(ValueError, match="^with latency objectives .* the objectives \\(slo\\)$") as refused:
        read_settings(clash | {"admin_key": "swordfish" * 2}, None, Settings)
    assert "swordfish" not in str(refused.value)


def test_an_address_that_is_no_redis_is_refused_without_its_password() -> None:
    with pytest.raises(ValueError, match="redis://") as refused:
        GatewayServer(Settings(redis_url="http://user:swordfish@host"))
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong", ["redis://a,redis://:swordfish@b", "[redis://:swordfish@b]", ["redis://a", {"b": "swordfish"}], [["a"]]]
)
def test_a_wrong_list_of_redis_servers_is_told_and_not_shown(wrong: object) -> None:
    with pytest.raises(ValueError, match="setting 'redis_url") as refused:
        read_settings({"redis_url": wrong}, None, Settings)
    assert "swordfish" not in str(refused.value)


@pytest.mark.parametrize("several", [["redis://a", "redis://b"], '["redis://a", "redis://b"]'])
def test_several_redis_servers_are_a_list_or_json(several: object) -> None:
    settings = read_settings({"redis_url": several}, None, Settings)
    assert plain(settings)["redis_url"] == ["redis://a", "redis://b"]
    assert plain(read_settings({"redis_url": "redis://a"}, None, Settings))["redis_url"] == ["redis://a"]
    assert "redis://" not in repr(settings)


async def test_prometheus_finds_the_engines_with_their_roles() -> None:
    async with FakeEngine(INSTANT) as engine, serving(engine.url, admin_key=ADMIN_KEY) as gateway:
        await admin(gateway, "PUT", "/workers/far", {"url": "http://127.0.0.1:1/engine/", "role": "decode"})
        listed = (await admin(gateway, "GET", "/targets")).json()
        await admin(gateway, "DELETE", "/workers/far")
    near, far = listed
    assert near == {"targets": [f"127.0.0.1:{engine.port}"], "labels": {"worker": "worker-0", "role": "both"}}
    labels = {"worker": "far", "role": "decode", "__metrics_path__": "/engine/metrics"}
    assert far == {"targets": ["127.0.0.1:1"], "labels": labels}


async def test_long_lists_have_pages_and_a_search(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    records = [{"name": f"team-{number:03}", "keys": [f"sk-{number:020}"]} for number in range(120)]
    path.write_text(json.dumps({"tenants": [*records, {"name": "other"}]}))
    async with over_fake(tenants=path, admin_key=ADMIN_KEY) as (gateway, _):

        async def page(query: str) -> tuple[list[str], int, str | None]:
            answer = (await admin(gateway, "GET", f"/tenants?{query}")).json()
            return [tenant["name"] for tenant in answer["tenants"]], answer["total"], answer["next_after"]

        assert await page("limit=2") == (["other", "team-000"], 121, "team-000")
        assert await page("limit=2&after=team-117") == (["team-118", "team-119"], 121, None)
        assert await page("search=eam-05&limit=100") == ([f"team-{number:03}" for number in range(50, 60)], 10, None)
        assert await page("after=zzz") == ([], 121, None)
        refused = await admin(gateway, "GET", "/tenants?limit=0")
        assert (refused.status, refused.error["param"]) == (400, "limit")
        assert refused.error["message"] == "Invalid 'limit': Input should be greater than or equal to 1."
        workers = (await admin(gateway, "GET", "/workers?search=nothing")).json()
        assert workers == {"workers": [], "total": 0, "next_after": None}


async def test_a_worker_whose_address_cannot_be_one_is_refused_and_not_kept() -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        for url in ("http://127.0.0.1:99999", "http://127.0.0.1:port", "http://:80"):
            reply = await admin(gateway, "PUT", "/workers/bad", {"url": url})
            assert reply.status == 400 and "is not an address" in reply.error["message"]
        assert await gateway.server.shared.local.records(WORKER) == {}
        assert set(gateway.server.fleet.members) == {"worker-0"}
