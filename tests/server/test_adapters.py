"""LoRA adapters: loaded where requests for them go, a few at each worker, and unloaded for one another."""

import argparse
import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.fake.engine import FakeEngine
from server.__main__ import OPTIONS, add_arguments
from server.options import given
from server.request.adapters import read_adapter
from server.settings import Settings
from tests.server.conftest import INSTANT, MODEL, SLOW, Reply, Running, chat, completion, eventually, serving
from tests.server.test_admin import ADMIN_KEY, admin
from tests.server.test_shared import OwnRedis, own_redis  # noqa: F401 - a fixture
from tests.server.test_tenants import KEY, OTHER

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TWO = replace(INSTANT, adapters=2, plugin=True)


def folder(name: str) -> str:
    return f"/adapters/{name}"


def configured(*names: str, **more: Any) -> dict[str, Any]:
    return {name: {"model": MODEL, "path": folder(name), **more} for name in names}


@contextlib.asynccontextmanager
async def over(*engines: FakeEngine, adapters: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Running]:
    """A gateway over engines that have said how many adapters they keep."""
    urls = [engine.url for engine in engines]
    options = {"adapters": adapters or {}, "admin_key": ADMIN_KEY, "probe_s": 0.02} | settings
    async with serving(*urls, **options) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == len(engines), "all are ready")
        yield gateway


async def asked(gateway: Running, name: str, **fields: Any) -> Reply:
    return await gateway.ask(CHAT, chat(model=name) | fields)


def models_asked(engine: FakeEngine) -> list[str]:
    """The models of what clients asked; the gateway itself tells plug-ins the policy."""
    bodies = [seen.body for seen in engine.seen]
    return [body["model"] for body in bodies if "evenhand_policy" not in body.get("vllm_xargs", {})]


async def said_by_admin(gateway: Running, name: str) -> Any:
    return (await admin(gateway, "GET", f"/adapters/{name}")).json()


# ── one worker ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_adapter_is_loaded_for_the_first_request_and_stays() -> None:
    async with FakeEngine(TWO) as engine, over(engine, adapters=configured("sql")) as gateway:
        for stream in (False, True):
            reply = await asked(gateway, "sql", stream=stream)
            assert reply.status == 200, reply.body
        assert engine.adapters.loads == ["sql"] and engine.adapters.loaded == {"sql": folder("sql")}
        assert models_asked(engine) == ["sql", "sql"]
        assert (await gateway.ask(TEXT, completion(model="sql"))).json()["model"] == "sql"
        assert (await gateway.ask("/tokenize", {"model": "sql", "prompt": "one"})).status == 200
        metrics = await gateway.metrics()
        assert metrics["evenhand_adapter_loads_total", (("outcome", "loaded"),)] == 1
        assert metrics["evenhand_worker_adapters", (("worker", "worker-0"),)] == 1
        names = (("model", "sql"), ("name", "sql"), ("outcome", "ok"))
        assert metrics["evenhand_model_requests_total", names] == 4


async def test_many_who_ask_at_once_wait_for_one_load() -> None:
    setup = replace(TWO, adapter_load_s=0.05)
    async with FakeEngine(setup) as engine, over(engine, adapters=configured("sql")) as gateway:
        replies = await asyncio.gather(*(asked(gateway, "sql") for _ in range(12)))
        assert {reply.status for reply in replies} == {200}
        assert engine.adapters.loads == ["sql"]


async def test_a_client_that_leaves_ends_no_load_that_others_wait_for() -> None:
    setup = replace(TWO, adapter_load_s=0.1)
    async with FakeEngine(setup) as engine, over(engine, adapters=configured("sql")) as gateway:
        first = asyncio.create_task(asked(gateway, "sql"))
        await eventually(lambda: gateway.in_flight == 1)
        gateway.wires[0].reset()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await first
        assert (await asked(gateway, "sql")).status == 200
        assert engine.adapters.loads == ["sql"]


async def test_who_was_used_least_recently_leaves_and_what_runs_stays() -> None:
    setup = replace(SLOW, adapters=2, plugin=True)
    async with FakeEngine(setup) as engine, over(engine, adapters=configured("a", "b", "c")) as gateway:
        await asked(gateway, "a")
        await asked(gateway, "b")
        await asked(gateway, "a")
        running = asyncio.create_task(asked(gateway, "b", max_tokens=60))
        await eventually(lambda: engine.running)
        assert (await asked(gateway, "c")).status == 200
        assert engine.adapters.unloads == ["a"] and set(engine.adapters.loaded) == {"b", "c"}
        assert (await running).status == 200
        assert (await asked(gateway, "a")).status == 200
        assert engine.adapters.unloads == ["a", "b"] and not engine.adapters.overfull


async def test_more_adapters_in_use_than_a_worker_keeps_wait_for_one_another() -> None:
    setup = replace(SLOW, adapters=1, plugin=True)
    async with FakeEngine(setup) as engine, over(engine, adapters=configured("a", "b")) as gateway:
        long = asyncio.create_task(asked(gateway, "a", max_tokens=30))
        await eventually(lambda: engine.running)
        second = asyncio.create_task(asked(gateway, "b"))
        await eventually(lambda: gateway.waiting == 1)
        assert (await long).status == (await second).status == 200
        assert engine.adapters.loads == ["a", "b"] and not engine.adapters.overfull


async def test_ten_adapters_on_two_workers_with_two_places_each() -> None:
    """S-LoRA's situation. No engine ever has more than it keeps, and nobody is refused."""
    names = [f"a{number}" for number in range(10)]
    async with FakeEngine(TWO) as one, FakeEngine(TWO) as two, over(one, two, adapters=configured(*names)) as gateway:
        work = [names[number * 7 % 10] for number in range(60)]
        for start in range(0, 60, 6):
            replies = await asyncio.gather(*(asked(gateway, name) for name in work[start : start + 6]))
            assert {reply.status for reply in replies} == {200}
        assert not one.adapters.overfull and not two.adapters.overfull
        served = Counter(models_asked(one) + models_asked(two))
        assert served == Counter(work)


async def test_one_that_is_about_to_leave_gets_no_request() -> None:
    setup = replace(SLOW, adapters=2, plugin=True, adapter_load_s=0.02)
    adapters = configured("a", "b", "c")
    async with FakeEngine(setup) as engine, over(engine, adapters=adapters) as gateway:
        for name in ("a", "b"):
            await asked(gateway, name)
        replies = await asyncio.gather(*(asked(gateway, "abc"[number % 3], max_tokens=5) for number in range(30)))
        assert {reply.status for reply in replies} == {200} and not engine.adapters.overfull


async def test_requests_go_where_their_adapter_is() -> None:
    setup = replace(INSTANT, adapters=4, plugin=True)
    async with FakeEngine(setup) as one, FakeEngine(setup) as two:
        async with over(one, two, adapters=configured("a", "b", "c", "d")) as gateway:
            for _ in range(5):
                for name in "abcd":
                    await asked(gateway, name)
            assert sorted([*one.adapters.loads, *two.adapters.loads]) == ["a", "b", "c", "d"]


async def test_a_full_worker_s_adapter_is_loaded_at_another() -> None:
    setup = replace(SLOW, adapters=2, plugin=True, cost=replace(SLOW.cost, max_seqs=2))
    async with FakeEngine(setup) as one, FakeEngine(setup) as two:
        async with over(one, two, adapters=configured("a"), slots=2) as gateway:
            replies = await asyncio.gather(*(asked(gateway, "a", max_tokens=20) for _ in range(4)))
            assert {reply.status for reply in replies} == {200}
            assert one.adapters.loads == two.adapters.loads == ["a"]


async def test_adapters_and_their_model_share_one_line_in_policy_order() -> None:
    setup = replace(SLOW, adapters=2, plugin=True, cost=replace(SLOW.cost, max_seqs=1))
    async with FakeEngine(setup) as engine:
        async with over(engine, adapters=configured("a"), slots=1, admission={"ahead": 0}) as gateway:
            running = [asyncio.create_task(asked(gateway, MODEL, max_tokens=10))]
            await eventually(lambda: engine.running)
            for number, name in enumerate(("a", MODEL, "a"), 1):
                running.append(asyncio.create_task(asked(gateway, name)))
                await eventually(lambda waiting=number: gateway.waiting == waiting)
            assert {reply.status for reply in await asyncio.gather(*running)} == {200}
            assert models_asked(engine) == [MODEL, "a", MODEL, "a"]
            assert [model for model, _ in gateway.server.lines.depth()] == [MODEL]


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/adapters/missing", "/adapters/too-large"])
async def test_one_that_cannot_be_loaded_fails_alone(path: str) -> None:
    wrong = {"wrong": {"model": MODEL, "path": path}} | configured("good")
    async with FakeEngine(TWO) as one, FakeEngine(TWO) as two, over(one, two, adapters=wrong) as gateway:
        for _ in range(3):
            reply = await asked(gateway, "wrong")
            assert reply.status == 503 and reply.error["code"] == "adapter_unavailable"
            assert reply.error["message"] == "The adapter 'wrong' cannot be loaded at present." and path not in str(
                reply
            )
            assert int(reply.headers["retry-after"]) == 30
        assert (await asked(gateway, "good")).status == (await asked(gateway, MODEL)).status == 200
        told = (await said_by_admin(gateway, "wrong"))["workers"]
        why = f"it finds no adapter at {path}" if "missing" in path else "LoRA rank 64 is greater than max_lora_rank 8"
        assert all(worker["state"] == "refused" and why in worker["problem"] for worker in told.values()) and told
        ready = await gateway.ask("/ready", method="GET")
        assert ready.status == 200 and path not in ready.body.decode()
        assert "adapter 'wrong': worker worker-0 could not load it" in ready.json()["adapters"]["problems"][0]
        metrics = await gateway.metrics()
        assert metrics["evenhand_adapter_loads_total", (("outcome", "refused"),)] == 2


async def test_a_worker_without_lora_is_not_asked_again_and_another_serves() -> None:
    without = replace(INSTANT, plugin=False)
    async with FakeEngine(without) as one, FakeEngine(TWO) as two:
        async with over(one, two, adapters=configured("sql", "other")) as gateway:
            for name in ("sql", "other", "sql"):
                assert (await asked(gateway, name)).status == 200
            assert two.adapters.loads == ["sql", "other"] and not one.seen


async def test_engines_without_lora_say_what_to_start() -> None:
    for setup in (replace(INSTANT, plugin=True), INSTANT):
        async with FakeEngine(setup) as engine, over(engine, adapters=configured("sql")) as gateway:
            assert (await asked(gateway, "sql")).error["code"] == "adapter_unavailable"
            problem = (await said_by_admin(gateway, "sql"))["workers"]["worker-0"]["problem"]
            assert "start vLLM with --enable-lora" in problem
            assert (await asked(gateway, MODEL)).status == 200


async def test_an_engine_that_lost_its_adapters_loads_them_again() -> None:
    async with FakeEngine(TWO) as engine, over(engine, adapters=configured("sql")) as gateway:
        assert (await asked(gateway, "sql")).status == 200
        engine.adapters.lose()
        for stream in (True, False):
            assert (await asked(gateway, "sql", stream=stream)).status == 200
        assert engine.adapters.loads == ["sql", "sql"]


async def test_a_pinned_adapter_is_loaded_at_the_start_and_after_a_restart() -> None:
    adapters = configured("base", pinned=True) | configured("a", "b")
    async with FakeEngine(TWO) as engine, over(engine, adapters=adapters) as gateway:
        await eventually(lambda: engine.adapters.loaded)
        for name in ("a", "b"):
            assert (await asked(gateway, name)).status == 200
        assert set(engine.adapters.loaded) == {"base", "b"}
        engine.die()
        await eventually(lambda: not gateway.server.fleet.ready())
        await engine.listen()
        await eventually(lambda: engine.adapters.loaded)
        assert "base" in engine.adapters.loaded


async def test_an_adapter_that_a_fallback_or_an_alias_names() -> None:
    models = {
        "help": "sql",
        "safe": {"targets": "wrong", "fallbacks": ["sql"]},
    }
    adapters = configured("sql") | {"wrong": {"model": MODEL, "path": "/adapters/missing"}}
    async with FakeEngine(TWO) as engine, over(engine, adapters=adapters, models=models) as gateway:
        for name in ("help", "safe"):
            reply = await asked(gateway, name)
            assert reply.status == 200 and reply.json()["model"] == name
        assert engine.seen[-1].body["model"] == "sql"
        ready = (await gateway.ask("/ready", method="GET")).json()
        assert "model_names" not in ready


async def test_a_model_that_nobody_serves_has_adapters_that_nobody_serves() -> None:
    adapters = {"sql": {"model": "elsewhere", "path": "/adapters/sql"}}
    async with FakeEngine(TWO) as engine, over(engine, adapters=adapters) as gateway:
        assert (await asked(gateway, "sql")).error["message"] == "No worker serves 'sql' right now."
        ready = (await gateway.ask("/ready", method="GET")).json()
        assert ready["adapters"]["problems"] == ["adapter 'sql': no worker serves 'elsewhere'"]
        listed = (await gateway.ask("/v1/models", method="GET")).json()["data"]
        assert [entry["id"] for entry in listed] == [MODEL]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no-path", "write it as sql=MODEL:PATH"),
        ({"model": MODEL}, "object missing required field `path`"),
        ({"model": MODEL, "path": "/x", "rank": 8}, "unknown field `rank`"),
        ({"model": "sql", "path": "/x"}, "it has the name of its own model"),
        (["/x"], "write its model and path"),
    ],
)
def test_what_is_no_adapter_gets_a_sentence(value: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_adapter("sql", value)
    assert words in str(caught.value) and str(caught.value).startswith("adapter 'sql':")


# ── operators ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operator_loads_and_unloads_an_adapter_everywhere() -> None:
    async with FakeEngine(TWO) as one, FakeEngine(TWO) as two, over(one, two) as gateway:
        body = {"model": MODEL, "path": folder("sql")}
        put = await admin(gateway, "PUT", "/adapters/sql", body)
        assert put.status == 200 and put.json()["asked"] == {"worker-0": "loaded", "worker-1": "loaded"}
        assert one.adapters.loads == two.adapters.loads == ["sql"]
        listed = (await admin(gateway, "GET", "/adapters")).json()
        assert listed["total"] == 1 and listed["adapters"][0]["workers"] == {
            worker: {"state": "loaded", "running": 0} for worker in ("worker-0", "worker-1")
        }
        models = (await gateway.ask("/v1/models", method="GET")).json()["data"]
        assert {entry["id"]: entry.get("parent") for entry in models} == {MODEL: None, "sql": MODEL}
        assert "root" not in models[-1]
        missing = await admin(gateway, "PUT", "/adapters/sql", body | {"path": "/adapters/missing"})
        assert missing.status == 400 and (await asked(gateway, "sql")).status == 200, "it is served as before"
        moved = await admin(gateway, "PUT", "/adapters/sql", body | {"path": folder("sql-2")})
        assert moved.status == 200 and one.adapters.loaded == two.adapters.loaded == {"sql": folder("sql-2")}
        assert not any(seen.body.get("load_inplace") for seen in (*one.seen, *two.seen)), "vLLM would read it each step"
        assert (await admin(gateway, "DELETE", "/adapters/sql")).status == 204
        assert not one.adapters.loaded and not two.adapters.loaded
        assert (await asked(gateway, "sql")).error["code"] == "model_not_found"
        assert (await admin(gateway, "GET", "/adapters/sql")).status == 404


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("x", {"model": MODEL, "path": "/adapters/missing"}, 400, "it finds no adapter at /adapters/missing"),
        ("x", {"model": MODEL, "path": "/adapters/too-large"}, 400, "LoRA rank 64 is greater than max_lora_rank 8"),
        ("x", {"model": "other", "path": "/a"}, 400, "no worker serves 'other'; available: fake"),
        ("x", {"model": MODEL}, 400, "missing required field `path`"),
        (MODEL, {"model": "other", "path": "/a"}, 400, "no worker serves 'other'"),
        ("alias", {"model": MODEL, "path": "/a"}, 409, "is the name of a model already"),
    ],
)
async def test_what_an_operator_cannot_load_is_not_kept(name: str, body: Any, status: int, words: str) -> None:
    async with FakeEngine(TWO) as engine, over(engine, models={"alias": MODEL}) as gateway:
        put = await admin(gateway, "PUT", f"/adapters/{name}", body)
        assert put.status == status and words in put.error["message"], put.body
        assert not (await admin(gateway, "GET", "/adapters")).json()["adapters"] and not engine.adapters.loaded


async def test_one_of_the_settings_is_removed_there() -> None:
    async with FakeEngine(TWO) as engine, over(engine, adapters=configured("sql")) as gateway:
        gone = await admin(gateway, "DELETE", "/adapters/sql")
        assert gone.status == 409 and "comes from the settings" in gone.error["message"]


async def test_tenants_see_and_use_their_own_adapters(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(
        f"tenants:\n  - {{name: a, keys: [{{key: {KEY}}}]}}\n  - {{name: b, keys: [{{key: {OTHER}}}]}}\n"
    )
    adapters = configured("secret", tenants=["a"]) | configured("common")
    async with FakeEngine(TWO) as engine, over(engine, adapters=adapters, tenants=tenants) as gateway:
        for key, seen in ((KEY, {MODEL, "common", "secret"}), (OTHER, {MODEL, "common"})):
            headers = {"authorization": f"Bearer {key}"}
            told = (await gateway.ask("/v1/models", method="GET", headers=headers)).json()["data"]
            assert {entry["id"] for entry in told} == seen
            reply = await gateway.ask(CHAT, chat(model="secret"), headers=headers)
            assert reply.status == (200 if "secret" in seen else 404)
            unknown = await gateway.ask(CHAT, chat(model="nothing"), headers=headers)
            assert ("secret" in unknown.error["message"]) <= ("secret" in seen)


async def test_gateways_share_adapters_and_one_s_unloading_harms_no_request_of_the_other(
    own_redis: OwnRedis,  # noqa: F811 - the fixture
) -> None:
    settings: dict[str, Any] = {"redis_url": own_redis.url, "sync_s": 0.05}
    async with FakeEngine(replace(INSTANT, adapters=1, plugin=True)) as engine:
        async with over(engine, **settings) as one, over(engine, **settings) as other:
            for name in ("a", "b"):
                put = await admin(one, "PUT", f"/adapters/{name}", {"model": MODEL, "path": folder(name)})
                assert put.status == 200, put.body
            await eventually(lambda: len(other.server.adapters.records) == 2)
            for gateway in (one, other, one, other):
                for name in ("a", "b"):
                    assert (await asked(gateway, name)).status == 200
            assert not engine.adapters.overfull
            assert (await admin(other, "DELETE", "/adapters/a")).status == 204
            await eventually(lambda: "a" not in one.server.adapters.records)
            assert (await asked(one, "a")).status == 404


async def test_an_engine_s_own_adapter_is_a_model_until_it_is_managed() -> None:
    async with FakeEngine(TWO) as engine:
        engine.adapters.loaded["own"] = folder("own")
        async with over(engine) as gateway:
            assert (await asked(gateway, "own")).status == 200
            body = {"model": MODEL, "path": folder("own")}
            assert (await admin(gateway, "PUT", "/adapters/own", body)).status == 200
            assert (await asked(gateway, "own")).status == 200
            assert [model for model, _ in gateway.server.lines.depth()] == [MODEL] and not engine.adapters.loads


async def test_where_adapters_belong_to_tenants_what_no_record_names_is_not_served() -> None:
    async with FakeEngine(TWO) as engine:
        engine.adapters.loaded["left"] = folder("left")
        async with over(engine, lora={"unmanaged": False}) as gateway:
            assert (await asked(gateway, "left")).error["code"] == "model_not_found"
            assert (await asked(gateway, MODEL)).status == 200


async def test_an_operator_cannot_load_more_than_a_worker_keeps() -> None:
    async with FakeEngine(TWO) as engine, over(engine, adapters=configured("a", "b", pinned=True)) as gateway:
        await eventually(lambda: len(engine.adapters.loaded) == 2, "both are loaded")
        put = await admin(gateway, "PUT", "/adapters/c", {"model": MODEL, "path": folder("c")})
        assert put.status == 400 and "all its 2 adapter slots are pinned or in use" in put.error["message"]
        assert set(engine.adapters.loaded) == {"a", "b"}


def test_the_command_line_names_adapters() -> None:
    args = ["--adapter", "sql=fake:/adapters/sql", "--adapters-per-worker", "4"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = Settings(**given(parser.parse_args(args), Settings, OPTIONS))
    assert settings.lora.per_worker == 4
    assert read_adapter("sql", settings.adapters["sql"]).path == "/adapters/sql"
