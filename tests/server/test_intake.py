"""What clients may take before anybody knows who they are, and what is left when they go: memory and connections."""

import asyncio
import gc
import os
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.connection.intake import BodyBudget, Connections, connections_allowed
from server.connection.protocol import ClientExchange, GatewayProtocol
from server.settings import EdgeSettings
from tests.server.conftest import (
    SLOW,
    Running,
    Wire,
    chat,
    eventually,
    over_fake,
    over_script,
    plain,
    request,
    says,
    serving,
)

CHAT = "/v1/chat/completions"
KEY, OTHER = "test-key-0123456789", "other-key-0123456789"
LONG = {"max_tokens": 2000, "ignore_eos": True}
BIG = 300_000


def held(gateway: Running) -> int:
    return gateway.server.edge.bodies.held


def keyed(key: str, body: object = None, **headers: str) -> bytes:
    return request(CHAT, body, headers={"authorization": f"Bearer {key}", **headers})


def unfinished(key: str, size: int, sent: int) -> bytes:
    """A head that announces a body, and the body's beginning."""
    return keyed(key, **{"content-length": str(size)}) + b" " * sent


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}, {{name: other, keys: [{OTHER}]}}]")
    return path


@pytest.fixture
def no_collector() -> Any:
    """What is freed is freed at once, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left(kind: type) -> list[Any]:
    # By type: `isinstance` asks objects for their `__class__`, and some of other packages answer that with a warning.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


async def mid_head(gateway: Running) -> Wire:
    return await gateway.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 5000)


async def mid_body(gateway: Running) -> Wire:
    wire = await gateway.send(request(CHAT, headers={"content-length": str(2 * BIG)}) + b" " * BIG)
    await eventually(lambda: held(gateway) == BIG, "the body's beginning was received")
    return wire


async def mid_chunked_body(gateway: Running) -> Wire:
    chunk = b"%x\r\n%b\r\n" % (BIG, b" " * BIG)
    wire = await gateway.send(request(CHAT, headers={"transfer-encoding": "chunked"}) + chunk)
    await eventually(lambda: held(gateway) == BIG, "the body's beginning was received")
    return wire


async def waiting(gateway: Running) -> Wire:
    before = gateway.waiting
    wire = await gateway.send(request(CHAT, chat(user=" " * BIG, **LONG)))
    await eventually(lambda: gateway.in_flight and (gateway.waiting > before or not before), "it waits")
    return wire


async def mid_stream(gateway: Running) -> Wire:
    wire = await gateway.send(request(CHAT, chat(stream=True, user=" " * BIG, **LONG)))
    await wire.head()
    return wire


async def pipelined(gateway: Running) -> Wire:
    wire = await gateway.send(request(CHAT, chat(stream=True, **LONG)) + request(CHAT, chat(user=" " * 50_000)) * 2)
    await wire.head()
    return wire


async def not_relayed(gateway: Running) -> Wire:
    wire = await gateway.send(request("/health", " " * 50_000, method="GET"))
    await wire.answer()
    return wire


STATES = [mid_head, mid_body, mid_chunked_body, waiting, mid_stream, pipelined, not_relayed]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_a_dropped_connection_frees_its_memory_without_the_collector(
    state: Callable[[Running], Any], no_collector: None
) -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, _):
        for how in ("reset", "close"):
            wire = await state(gateway)
            gateway.wires.remove(wire)
            wire.reset() if how == "reset" else await wire.close()
            del wire
            await eventually(lambda: not gateway.server.uvicorn.server_state.connections, "it is gone")
            await eventually(gateway.at_rest)
            await eventually(
                lambda: not left(GatewayProtocol) and not left(ClientExchange), "nothing refers to it any more"
            )
            assert held(gateway) == 0


async def test_a_wrong_key_is_refused_before_the_body_comes(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, engine):
        for key in ("wrong-key-0123456789", ""):
            wire = await gateway.send(unfinished(key, 20_000_000, 0))
            reply = await wire.answer()
            assert reply.status == 401 and reply.headers["connection"] == "close"
            assert reply.error["code"] == "invalid_api_key"
        expecting = keyed("wrong-key-0123456789", **{"content-length": "100", "expect": "100-continue"})
        assert (await (await gateway.send(expecting)).head()).status == 401, "its body is not asked for"
        chunked = keyed("wrong-key-0123456789", **{"transfer-encoding": "chunked"})
        wire = await gateway.send(chunked + b"20000\r\n" + b" " * 0x20000 + b"\r\n")
        assert (await wire.answer()).status == 401
        assert held(gateway) == 0 and not engine.seen


async def test_a_client_that_goes_on_sending_still_reads_why_it_was_refused(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, _):
        wire = await gateway.send(unfinished("wrong-key-0123456789", 4_000_000, 0))
        for _ in range(40):
            await wire.send(b" " * 100_000)
        assert (await wire.answer()).status == 401
        assert await wire.closed()


async def test_a_small_body_with_a_wrong_key_keeps_its_connection(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, _):
        wire = await gateway.connect()
        for key, status in (("wrong-key-0123456789", 401), (KEY, 200), ("", 401), (KEY, 200)):
            await wire.send(keyed(key, chat()))
            assert (await wire.answer()).status == status
        await wire.send(keyed("", chat()) + keyed(KEY, chat()))
        assert [(await wire.answer()).status for _ in range(2)] == [401, 200]


async def test_a_key_in_a_trailer_opens_nothing(tenants: Path) -> None:
    body = request(CHAT, chat()).partition(b"\r\n\r\n")[2]
    chunks = b"%x\r\n%b\r\n0\r\nauthorization: Bearer %b\r\n\r\n" % (len(body), body, KEY.encode())
    async with over_fake(tenants=tenants) as (gateway, engine):
        wire = await gateway.send(request(CHAT, headers={"transfer-encoding": "chunked"}) + chunks)
        assert (await wire.answer()).status == 401
        wire = await gateway.send(keyed(KEY, **{"transfer-encoding": "chunked"}) + chunks)
        assert (await wire.answer()).status == 200, "a trailer does no harm"
        assert len(engine.seen) == 1


async def test_a_head_that_is_known_opens_nothing_once_its_key_is_gone_and_no_key_is_kept(tenants: Path) -> None:
    async with over_fake(tenants=tenants) as (gateway, _):
        wire = await gateway.connect()
        for status in (200, 200):
            await wire.send(keyed(KEY, chat()))
            assert (await wire.answer()).status == status
        edge = gateway.server.edge
        assert len(edge.heads) == 1, "the second request did not need the parser"
        kept = [
            edge.heads,
            *(connection.headers for connection in left(GatewayProtocol)),
            *(one.headers for one in left(ClientExchange)),
        ]
        assert KEY not in repr(kept)
        gateway.server.shared.tenants.set_file(())
        await wire.send(keyed(KEY, chat()))
        assert (await wire.answer()).status == 401


async def test_bodies_share_one_budget_and_a_tenant_leaves_room_for_others(tenants: Path) -> None:
    edge = {"max_body_bytes": 400_000, "max_held_bytes": 1_000_000}
    async with over_fake(tenants=tenants, edge=edge) as (gateway, _):
        wires = [await gateway.send(unfinished(KEY, 400_000, 380_000)) for _ in range(2)]
        await eventually(lambda: held(gateway) == 760_000)
        third = await gateway.send(unfinished(KEY, 400_000, 100_000))
        reply = await third.answer()
        assert reply.status == 429 and reply.error["code"] == "overloaded" and reply.headers["retry-after"] == "1"
        assert (await (await gateway.send(keyed(OTHER, chat()))).answer()).status == 200
        assert held(gateway) == 760_000
        for wire in wires:
            wire.reset()
        await eventually(lambda: held(gateway) == 0)
        assert (await (await gateway.send(keyed(KEY, chat()))).answer()).status == 200


async def test_a_body_counts_until_its_answer_is_complete() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, _):
        running = await mid_stream(gateway)
        line = await waiting(gateway)
        await eventually(lambda: held(gateway) > 2 * BIG)
        assert held(gateway) < 2 * BIG + 1000, "each is there once"
        running.reset()
        line.reset()
        await eventually(lambda: held(gateway) == 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1200)), max_size=40))
def test_the_budget_is_never_exceeded_and_gives_back_all(asked: list[tuple[str, int]]) -> None:
    budget = BodyBudget(1000)
    taken = [(name, size) for name, size in asked if budget.take(name, size)]
    for name in "abc":
        own = sum(size for who, size in taken if who == name)
        assert own <= 800
    assert budget.held == sum(size for _, size in taken) < 1000
    for name, size in taken:
        budget.give_back(name, size)
    assert budget.held == 0 and not budget._by_tenant


@pytest.mark.parametrize("most", [1024, 1279])
def test_a_budget_that_the_largest_body_exceeds_is_no_setting(most: int) -> None:
    with pytest.raises(ValueError, match="5/4 of max_body_bytes"):
        EdgeSettings(max_body_bytes=1024, max_held_bytes=most)
    assert EdgeSettings(max_body_bytes=1024, max_held_bytes=1280)


# connections
@asynccontextmanager
async def crowded(most: int, **settings: Any) -> AsyncIterator[Running]:
    async with over_fake(SLOW, edge={"max_connections": most}, **settings) as (gateway, _):
        yield gateway


async def test_beyond_the_most_connections_the_longest_idle_one_goes() -> None:
    async with crowded(3) as gateway:
        served = await gateway.send(request("/health", method="GET"))
        await served.answer()
        silent = await gateway.connect()
        dribbling = await gateway.send(b"POST /v1/chat")
        await eventually(lambda: gateway.server.edge.open.count == 3)
        assert (await (await gateway.send(request(CHAT, chat()))).answer()).status == 200
        assert await served.closed() and gateway.server.edge.open.count == 3
        assert (await (await gateway.send(request(CHAT, chat()))).answer()).status == 200
        assert await silent.closed()
        dribbling.reset()


async def test_a_connection_with_a_request_is_never_closed_for_another() -> None:
    async with crowded(2) as gateway:
        streams = [await gateway.send(request(CHAT, chat(stream=True, max_tokens=30))) for _ in range(2)]
        await eventually(lambda: gateway.in_flight == 2)
        for _ in range(5):
            reply = await (await gateway.send(request("/health", method="GET"))).answer()
            assert reply.status == 503 and reply.error["code"] == "too_many_connections"
            assert reply.headers["connection"] == "close" and reply.headers["retry-after"] == "1"
        for wire in streams:
            assert (await wire.answer()).events[-1] == "[DONE]"
        assert (await (await gateway.send(request("/health", method="GET"))).answer()).status == 200


async def test_without_a_valid_key_no_connection_is_held(tenants: Path) -> None:
    async with crowded(4, tenants=tenants) as gateway:
        held_open = [await gateway.send(unfinished("wrong-key-0123456789", 1000, 10)) for _ in range(4)]
        await eventually(lambda: gateway.server.edge.open.count == 4)
        assert (await (await gateway.send(keyed(KEY, chat()))).answer()).status == 200
        assert await held_open[0].closed()


def test_the_limit_of_open_files_bounds_connections(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1_000_000
    fit = (hard - 128) // 2
    try:
        assert connections_allowed(100) == 100
        assert connections_allowed(None) == min(16_384, fit)
        assert not caplog.text
        assert connections_allowed(fit + 1) == fit
        assert "ulimit -n" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class _Spare:
    def __init__(self) -> None:
        self.gone = False

    def give_way(self) -> None:
        self.gone = True


def test_who_was_idle_again_last_stays_longest() -> None:
    open = Connections(2, lambda: 0.0)
    first, second, third = _Spare(), _Spare(), _Spare()
    assert open.opened(first) and open.opened(second)
    open.spare.pop(first)
    open.spare[first] = None
    assert open.opened(third)
    assert second.gone and not first.gone


async def test_when_the_gateway_has_no_file_left_no_worker_is_blamed() -> None:
    async with over_script(says(plain(b'{"ok":1}')), probe_s=30.0) as (gateway, engine):
        wire = await gateway.connect()
        await eventually(lambda: gateway.server.edge.open.count == 1)
        member = next(iter(gateway.server.fleet.members.values()))
        await member.engine.close()  # no kept connection helps it out
        await asyncio.sleep(0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            await wire.send(request(CHAT, chat()))
            reply = await wire.answer()
            gateway.server.fleet.look_now(member)  # a probe meets the same
            await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert reply.status == 503 and reply.error["code"] == "out_of_files"
        assert gateway.server.fleet.ready() == [member] and member.misses == 0 and not member.breaker.failures
        await wire.send(request(CHAT, chat()))
        assert (await wire.answer()).status == 200 and len(engine.asked) == 1


async def test_no_worker_is_needed_to_refuse() -> None:
    async with serving() as gateway:
        assert (await gateway.ask(CHAT, chat())).status == 503
