"""What requests cost: GPU-seconds that add up to the workers' busy time, prices, hourly rows, /admin/usage."""

import asyncio
import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from scheduler.workers import Worker
from server.app import GatewayServer
from server.cluster.usage import UsageBook, as_csv, hours, shelf_of
from server.engine.client import EngineClient
from server.fleet.fleet import Member
from server.observe.cost import HOUR_S, CostMeter, UsageKey, Used, money
from server.request.call import Phase, Ticket
from server.settings import CostSettings, Settings, read_settings
from server.store.store import MemoryStore
from tests.server.calls import ticket_of
from tests.server.conftest import INSTANT, SLOW, Reply, Running, chat, eventually, over_fake, request, serving
from tests.server.test_admin import ADMIN_KEY, admin
from tests.server.test_shared import OwnRedis, exchanged, own_redis, two_gateways  # noqa: F401 - a fixture
from tests.server.test_tenants import KEY, OTHER

CHAT = "/v1/chat/completions"
NOON = 1_795_953_600.0  # 2026-11-29 12:00 UTC
PRICES = {"meter": True, "currency": "EUR", "models": {"fake": {"input": 1.0, "cached": 0.5, "output": 4.0}}}


async def usage(gateway: Running, query: str = "") -> Reply:
    return await admin(gateway, "GET", f"/usage{query}")


# ── the estimate ────────────────────────────────────────────────────────────────────────────────────────────────────


class Moments:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def running(meter: CostMeter, clock: Moments, number: int, worker: str = "w", gpus: int = 1) -> Ticket:
    """A ticket that has just got a place."""
    ticket = ticket_of(clock, number=number, tenant=f"t{number}")
    ticket.worker = worker
    ticket.member = Member(Worker(worker, "http://w", gpus=gpus), EngineClient("http://w"))
    meter.got_place(ticket)
    ticket.move(Phase.PREFILLING)
    return ticket


def finish(meter: CostMeter, ticket: Ticket) -> None:
    if ticket.phase is Phase.PREFILLING:
        ticket.move(Phase.DECODING)
    ticket.move(Phase.DONE)
    meter.ended(ticket, "ok")


def metered(clock: Moments, **prices: Any) -> CostMeter:
    return CostMeter(CostSettings(**prices), clock, lambda: NOON, factors={}, labels=3)


EVENTS = st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(0, 5), st.integers(0, 50)), max_size=40)


@given(EVENTS, st.integers(1, 4))
def test_gpu_seconds_add_up_to_the_time_in_which_the_worker_was_busy(
    events: list[tuple[float, int, int]], gpus: int
) -> None:
    clock = Moments()
    meter = metered(clock)
    live: dict[int, Ticket] = {}
    busy_s = 0.0
    for count, (pause_s, which, tokens) in enumerate(events):
        clock.now += pause_s
        busy_s += pause_s * gpus if live else 0.0
        if which in live:
            live[which].tokens += tokens
            finish(meter, live.pop(which))
        else:
            live[which] = running(meter, clock, count, gpus=gpus)
    for ticket in live.values():
        finish(meter, ticket)
    assert sum(used.gpu_s for used in meter.rows.values()) == pytest.approx(busy_s)
    assert all(used.gpu_s >= 0 for used in meter.rows.values())


def test_a_request_pays_for_the_tokens_that_were_computed_for_it() -> None:
    clock = Moments()
    meter = metered(clock, gpu_hour=3600.0)
    long, short = running(meter, clock, 1), running(meter, clock, 2)
    long.tokens, short.tokens = 195, 45  # beside a prompt of 10 each: 400 and 100 weighted tokens
    clock.now += 10.0
    finish(meter, short)
    finish(meter, long)
    costs = {key.tenant: used.cost for key, used in meter.rows.items()}
    assert costs == {"t2": pytest.approx(2.0), "t1": pytest.approx(8.0)}


def test_an_idle_worker_costs_nobody_anything_and_one_without_tokens_its_time() -> None:
    clock = Moments()
    meter = metered(clock)
    clock.now += 100.0
    alone = running(meter, clock, 1)
    clock.now += 2.0
    finish(meter, alone)
    clock.now += 100.0
    assert [used.gpu_s for used in meter.rows.values()] == [pytest.approx(2.0)]


def test_prices_are_of_the_name_the_model_or_all_else_of_the_gpu_time() -> None:
    prices = CostSettings(
        gpu_hour=2.0,
        models={"chat": {"input": 1, "output": 4}, "m": {"input": 2, "cached": 0.5, "output": 8}},  # type: ignore[dict-item]
    )
    used = Used(1, 1_000_000, 400_000, 500_000, 3600.0)
    assert money(prices, used, ("chat", "m", "*")) == pytest.approx(1 + 2)
    assert money(prices, used, ("other", "m", "*")) == pytest.approx(2 * 0.6 + 0.5 * 0.4 + 4)
    assert money(prices, used, ("other", "another", "*")) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "cost, sentence",
    [
        ({"models": {"m": {"input": -1}}}, "setting 'cost.models.m.input'"),
        ({"models": {"m": {"inputs": 1}}}, "setting 'cost.models.m.inputs'"),
        ({"gpu_hour": float("inf")}, "setting 'cost.gpu_hour'"),
        ({"models": "cheap"}, "setting 'cost.models'"),
    ],
)
def test_a_price_that_is_none_is_refused_in_a_sentence(cost: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        read_settings({"cost": cost}, None, Settings)
    assert "\n" not in str(error.value)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranges_are_in_utc_and_a_date_is_its_whole_day() -> None:
    noon = int(NOON // HOUR_S)
    assert hours("", "", NOON + 60) == (noon - 23, noon + 1)
    assert hours("2026-11-28", "2026-11-29", NOON) == (noon - 36, noon + 12)
    assert hours("2026-11-29T10:30", "2026-11-29T11:30+00:00", NOON) == (noon - 2, noon)
    for begin, end, sentence in (
        ("yesterday", "", "'from' is a date or a time, such as 2026-11-29"),
        ("2026-11-30", "2026-11-29", "'from' .* must be before 'to'"),
        ("2020-01-01", "2026-01-01", "a range may span at most 366 days"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hours(begin, end, NOON)
    assert shelf_of(noon) == "usage:2026-11-29" != shelf_of(noon - 13)


class SlowStore(MemoryStore):
    """Others have their turn while it writes."""

    async def shelve(self, *words: Any) -> None:
        await asyncio.sleep(0)
        await super().shelve(*words)


async def test_rows_may_be_asked_for_while_they_are_written() -> None:
    wall = Moments()
    book = UsageBook(metered(Moments()), SlowStore(lambda: 0.0), "a", wall)
    wall.now = NOON
    noon = int(NOON // HOUR_S)
    for hour in range(noon - 4, noon + 1):
        book.meter.rows[UsageKey(hour, "x", "m", "default")] = Used(1, 10, 0, 5, 0.5, 0.25)
    answers = await asyncio.gather(*(book.used(noon - 4, noon + 1, ("tenant",)) for _ in range(3)))
    assert [total["requests"] for _, total in answers] == [5, 5, 5]


async def test_a_request_that_moves_is_charged_what_it_had_of_each_worker() -> None:
    clock = Moments()
    meter = metered(clock)
    ticket = running(meter, clock, 1, "first")
    clock.now += 2.0
    ticket.member = Member(Worker("second", "http://w"), EngineClient("http://w"))
    meter.got_place(ticket)
    clock.now += 3.0
    finish(meter, ticket)
    assert sum(used.gpu_s for used in meter.rows.values()) == pytest.approx(5.0)
    assert not meter._pots, "of workers in which nothing runs nothing is kept"


async def test_rows_are_kept_by_hour_and_added_up_over_gateways_that_write_them_again() -> None:
    store, wall = MemoryStore(lambda: 0.0), Moments()
    books = [UsageBook(metered(Moments()), store, name, wall) for name in ("a", "b")]
    wall.now = NOON
    noon = int(NOON // HOUR_S)
    for book in books:
        for hour, tenant in ((noon - 1, "x"), (noon, "x"), (noon, "y")):
            book.meter.rows[UsageKey(hour, tenant, "m", "default")] = Used(1, 10, 0, 5, 0.5, 0.25)
        await book.write()
        await book.write()
    wall.now += 2 * HOUR_S
    for book in books:
        await book.write()
        assert not book.meter.rows, "what is over is the store's alone"
    rows, total = await books[0].used(noon - 1, noon + 1, ("tenant",))
    assert [(row["tenant"], row["requests"], row["gpu_seconds"]) for row in rows] == [("x", 4, 2.0), ("y", 2, 1.0)]
    assert (total["requests"], total["cost"]) == (6, 1.5)
    rows, _ = await books[1].used(noon, noon + 1, ("hour", "model"))
    assert [(row["hour"], row["model"], row["requests"]) for row in rows] == [("2026-11-29T12:00Z", "m", 4)]
    assert next(csv.reader(io.StringIO(as_csv(rows, ("hour", "model")))))[:3] == ["hour", "model", "requests"]


# ── through sockets ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operator_reads_what_each_tenant_cost(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(
        f"tenants: [{{name: acme, keys: [{KEY}]}}, {{name: zenith, keys: [{OTHER}]}}]"
    )
    settings = {"tenants": tmp_path / "tenants.yaml", "admin_key": ADMIN_KEY, "cost": PRICES}
    async with over_fake(models={"chat": "fake"}, **settings) as (gateway, _):
        for key, model in ((KEY, "fake"), (KEY, "chat"), (OTHER, "fake")):
            for stream in (False, True):
                body = chat(model=model, stream=stream, ignore_eos=True)
                assert (await gateway.ask(CHAT, body, headers={"authorization": f"Bearer {key}"})).status == 200
        told = (await usage(gateway)).json()
        assert told["currency"] == "EUR" and [row["tenant"] for row in told["rows"]] == ["acme", "zenith"]
        acme, zenith = told["rows"]
        assert (acme["requests"], acme["output_tokens"], zenith["requests"]) == (4, 32, 2)
        assert acme["cost"] == pytest.approx(acme["prompt_tokens"] * 1e-6 + 32 * 4e-6, abs=1e-6)
        assert told["total"]["requests"] == 6 and told["total"]["gpu_seconds"] > 0
        assert acme["gpu_seconds"] + zenith["gpu_seconds"] == pytest.approx(told["total"]["gpu_seconds"], abs=2e-3)
        by_model = (await usage(gateway, "?by=model,tier")).json()["rows"]
        assert [(row["model"], row["tier"], row["requests"]) for row in by_model] == [
            ("chat", "default", 2),
            ("fake", "default", 4),
        ]
        table = await usage(gateway, "?by=tenant&format=csv")
        assert table.headers["content-type"] == "text/csv; charset=utf-8"
        assert [row["tenant"] for row in csv.DictReader(io.StringIO(table.body.decode()))] == ["acme", "zenith"]
        for query, param in (("?by=colour", "by"), ("?from=then", "from"), ("?format=xls", "format")):
            refused = await usage(gateway, query)
            assert (refused.status, refused.error["param"]) == (400, param)
        metrics = await gateway.metrics()
        assert metrics["evenhand_tenant_cost_total", (("tenant", "acme"),)] == pytest.approx(acme["cost"], abs=1e-6)
        assert ("evenhand_tenant_gpu_seconds_total", (("tenant", "zenith"),)) in metrics


async def test_nothing_is_metered_unless_it_is_asked_for() -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        refused = await usage(gateway)
        assert (refused.status, refused.error["code"]) == (404, "not_metered")
        assert not any(name.startswith("evenhand_tenant_cost") for name, _ in await gateway.metrics())


async def test_a_request_that_failed_or_was_left_has_used_its_worker_all_the_same() -> None:
    async with over_fake(SLOW, admin_key=ADMIN_KEY, cost={"meter": True, "gpu_hour": 3600.0}) as (gateway, _):
        left = await gateway.send(request(CHAT, chat(stream=True, max_tokens=4000, ignore_eos=True)))
        await left.head()
        await left.close()
        await eventually(lambda: not gateway.in_flight)
        (row,) = (await usage(gateway)).json()["rows"]
        assert (
            row["requests"] == 1
            and row["gpu_seconds"] > 0
            and row["cost"] == pytest.approx(row["gpu_seconds"], abs=2e-3)
        )


async def test_a_request_that_another_worker_answers_is_charged_the_time_there() -> None:
    """One GPU each would not show whose time it was."""
    async with FakeEngine(INSTANT) as broken, FakeEngine(SLOW) as well:
        broken.faults = Faults(error_status=500)
        urls = (broken.url, f"{well.url},gpus=1000")
        async with serving(*urls, probe_s=60.0, admin_key=ADMIN_KEY, cost={"meter": True}) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
            before = after = 0.0
            while not broken.seen:
                before = after
                assert (await gateway.ask(CHAT, chat(ignore_eos=True))).status == 200
                after = (await usage(gateway)).json()["total"]["gpu_seconds"]
            assert after - before > 1.0


async def test_rows_of_all_gateways_are_in_the_store_and_outlive_them(own_redis: OwnRedis) -> None:  # noqa: F811 - the fixture
    async with two_gateways(own_redis.url, cost=PRICES) as (one, other):
        for gateway in (one, other):
            assert (await gateway.ask(CHAT, chat())).status == 200
        assert other.server.usage is not None
        await other.server.usage.write()
        assert (await usage(one)).json()["total"]["requests"] == 2
    async with serving(redis_url=own_redis.url, admin_key=ADMIN_KEY, cost=PRICES) as one:
        assert (await usage(one)).json()["total"]["requests"] == 2, "the last rows were written at the end"


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_budget_in_money_ends_when_it_is_spent_and_is_shared(own_redis: OwnRedis) -> None:  # noqa: F811 - the fixture
    headers = {"authorization": f"Bearer {KEY}"}
    async with two_gateways(own_redis.url, cost=PRICES) as (one, other):
        record = {"keys": [KEY], "budget": {"cost_per_day": 50e-6}}  # one answer of 8 tokens costs 32e-6 and its prompt
        assert (await admin(one, "PUT", "/tenants/acme", record)).status == 200
        await eventually(lambda: other.server.shared.tenants.named("acme"), "the tenant is known at the other")
        body = chat(ignore_eos=True)
        assert [(await one.ask(CHAT, body, headers=headers)).status for _ in range(3)] == [200, 200, 429]
        await exchanged(one, other)
        refused = await other.ask(CHAT, body, headers=headers)
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert refused.error["message"] == "You exceeded your budget of 5e-05 a day."
        assert int(refused.headers["retry-after"]) <= 86400
        used = (await admin(other, "GET", "/tenants/acme")).json()["used"]
        spent = [amount for period, amount in used.items() if period.startswith("cost_")]
        assert len(spent) == 2 and spent[0] == spent[1] == pytest.approx(2 * 47e-6, abs=20e-6)


async def test_a_budget_in_money_is_refused_where_nothing_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants: [{{name: acme, keys: [{KEY}], budget: {{cost_per_month: 5}}}}]")
    with pytest.raises(ValueError, match="tenant 'acme' has a budget in money, but costs are not metered"):
        GatewayServer(Settings(tenants=file))
    GatewayServer(Settings(tenants=file, cost=CostSettings(meter=True)))
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        refused = await admin(gateway, "PUT", "/tenants/acme", {"budget": {"cost_per_day": 1}})
        assert (refused.status, refused.error["param"]) == (400, "budget")
