"""Workers that lean to the side that is short: when, one at a time, and that requests follow."""

import contextlib
from collections.abc import AsyncIterator

from loadtest.fake.engine import FakeEngine
from scheduler.balance import Swing
from scheduler.workers import Role, Worker
from server.engine.client import EngineClient
from server.fleet.balancer import Balancer, loads
from server.fleet.fleet import Fleet, Member, WorkerState
from tests.server.conftest import Running, completion, eventually, serving
from tests.server.test_handover import QUICK


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def fleet_of(**roles: str) -> Fleet:
    fleet = Fleet()
    for name, role in roles.items():
        worker = Worker(name, "http://127.0.0.1:9", Role(role), slots=10, hands_over=role == "both")
        fleet.enroll(Member(worker, EngineClient(worker.url), WorkerState.READY, ("fake",)))
    return fleet


def test_loads_are_shares_of_what_a_side_can_take() -> None:
    fleet = fleet_of(p="prefill", d="decode", e="decode", b="both")
    fleet.members["p"].load.pending_tokens = 500
    fleet.members["d"].load.in_flight, fleet.members["e"].load.in_flight = 10, 5
    fleet.members["b"].load.in_flight = 9
    assert loads(fleet.ready(), 1000) == (0.5, 0.75)
    fleet.lean(fleet.members["b"], Role.DECODE)
    assert loads(fleet.ready(), 1000) == (0.5, 0.8)
    assert loads([], 1000) == (0.0, 0.0)


def test_one_worker_at_a_time_leans_and_not_twice_within_a_while() -> None:
    clock, fleet = Clock(), fleet_of(p="prefill", d="decode", a="both", b="both")
    told: list[None] = []
    fleet.changed.append(lambda: told.append(None))
    balancer = Balancer(fleet, 1000, clock=clock, swing=Swing(hold_s=10.0))
    p, a, b = (fleet.members[name] for name in "pab")
    p.load.pending_tokens = 2000
    balancer.look()
    assert (a.role, b.role, len(told)) == (Role.PREFILL, Role.BOTH, 1)
    balancer.look()
    assert (a.role, b.role) == (Role.PREFILL, Role.PREFILL), "two share what is still too much for them"
    p.load.pending_tokens = 0
    clock.now += 9.9
    balancer.look()
    assert (a.role, b.role) == (Role.PREFILL, Role.PREFILL)
    clock.now += 0.2
    balancer.look()
    balancer.look()
    assert (a.role, b.role, len(told)) == (Role.BOTH, Role.BOTH, 4)
    assert balancer.changes == {Role.PREFILL: 2, Role.BOTH: 2}


def test_a_worker_without_a_connector_and_one_with_a_role_stay_what_they_are() -> None:
    fleet = fleet_of(p="prefill", d="decode")
    plain = Worker("plain", "http://127.0.0.1:9", Role.BOTH)
    fleet.enroll(Member(plain, EngineClient(plain.url), WorkerState.READY, ("fake",)))
    fleet.members["p"].load.pending_tokens = 10**6
    Balancer(fleet, 1000, clock=Clock()).look()
    assert [member.role for member in fleet.members.values()] == [Role.PREFILL, Role.DECODE, Role.BOTH]


@contextlib.asynccontextmanager
async def three() -> AsyncIterator[tuple[Running, dict[str, FakeEngine]]]:
    async with FakeEngine(QUICK) as p, FakeEngine(QUICK) as d, FakeEngine(QUICK) as b:
        workers = (f"{p.url},role=prefill,id=p", f"{d.url},role=decode,id=d", f"{b.url},id=b,kv=yes")
        settings = {"disaggregation": {"min_prompt_tokens": 1}}
        async with serving(*workers, ready=False, **settings) as gateway:
            await eventually(lambda: len(gateway.server.fleet.ready()) == 3)
            yield gateway, {"p": p, "d": d, "b": b}


async def test_requests_follow_a_worker_to_its_side_and_back() -> None:
    async with three() as (gateway, engines):
        fleet, members = gateway.server.fleet, gateway.server.fleet.members

        async def ask(number: int) -> None:
            reply = await gateway.ask("/v1/completions", completion(prompt=[number] * 100, max_tokens=3))
            assert reply.status == 200

        fleet.lean(members["b"], Role.PREFILL)
        fleet.put(members["p"], WorkerState.DRAINING)
        await ask(10)
        assert len(engines["b"].seen) == 1 and engines["b"].seen[-1].body["max_tokens"] == 1
        assert engines["d"].fetched == 1
        fleet.lean(members["b"], Role.DECODE)
        fleet.put(members["p"], WorkerState.READY)
        fleet.put(members["d"], WorkerState.DRAINING)
        await ask(11)
        assert engines["b"].fetched == 1 and len(engines["p"].seen) == 1
        fleet.lean(members["b"], Role.BOTH)
        await ask(12)
        assert len(engines["p"].seen) == 1, "a worker that leans nowhere takes requests whole"
