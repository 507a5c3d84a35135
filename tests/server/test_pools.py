"""Tenants share two pools under one account: VTC's bounds hold over both together, in virtual time.

Sheng et al. prove them for one engine. What a tenant can be ahead by is what it may have in flight, here in both pools:
M counts a request's prompt and its final output from the moment it has its two places until its answer is complete.
"""

import asyncio
import random
from collections import Counter

import pytest
from msgspec.structs import replace

from scheduler.catalog import build
from scheduler.objectives import Objectives
from scheduler.placement import Rules
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker
from server.admission.dispatch import Dispatcher
from server.admission.predictor import Predictor
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member, WorkerState
from server.observe.slo import SloTargets
from server.request.call import Phase, Ticket
from server.settings import SloSettings
from tests.server.calls import placed, ticket_of
from tests.server.conftest import in_virtual_time

SLOTS = {Role.PREFILL: 2, Role.DECODE: 4}
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
# (prompt tokens, output tokens) at most: one tenant's work is the prefill worker's, the other's the decode worker's.
SHAPES = {"reader": (400, 5), "writer": (20, 60)}


class Floor:
    """A dispatcher over engines that are only names, and what each tenant has got from them."""

    def __init__(self, policy: str, workers: dict[Role, int], *, hands_over: bool = False) -> None:
        self.clock = asyncio.get_running_loop().time
        self.fleet = Fleet()
        for role, count in workers.items():
            for number in range(count):
                name = f"{role.value}-{number}"
                worker = Worker(name, "http://127.0.0.1:9", role, SLOTS[role], hands_over=hands_over)
                self.fleet.enroll(Member(worker, EngineClient(worker.url), WorkerState.READY, ("fake",)))
        self.line = Dispatcher(
            "fake",
            TieredLanes(build(policy, {})),
            self.fleet,
            max_waiting=10_000,
            queue_timeout_s=None,
            clock=self.clock,
            rules=Rules(min_prompt_tokens=1),
        )
        self.random = random.Random(7)
        self.service: Counter[str] = Counter()
        self.leads: list[float] = []
        self.gaps: list[float] = []
        self.in_flight_tokens = self.most_in_flight_tokens = 0
        self.over = False
        self.reading: Counter[str] = Counter()
        self.count = 0

    def ticket(self, tenant: str) -> tuple[Ticket, int]:
        """A request, and how long its answer will be."""
        prompt_tokens, output_tokens = (self.random.randint(1, most) for most in SHAPES[tenant])
        self.count += 1
        bare = ticket_of(self.clock, number=self.count, tenant=tenant)
        call = replace(bare.call, prompt_tokens=prompt_tokens, max_tokens=output_tokens)
        return ticket_of(self.clock, call, number=self.count), output_tokens

    async def visit(self, tenant: str) -> None:
        ticket, output_tokens = self.ticket(tenant)
        async with placed(self.line, ticket):
            ticket.move(Phase.PREFILLING)
            self.weigh(tenant, PROMPT_WEIGHT * ticket.call.prompt_tokens)
            self.hold(ticket.call.prompt_tokens + output_tokens)
            reader = ticket.worker if ticket.split is None else ticket.split.prefill.worker.id
            self.reading[reader] += 1
            await asyncio.sleep(0.002 * ticket.call.prompt_tokens)
            self.reading[reader] -= 1
            if ticket.split is not None:
                ticket.split.kv = b"{}"
                ticket.split.read()
                if ticket.visit is not None:
                    ticket.visit.read(self.clock())
            ticket.move(Phase.DECODING)
            for _ in range(output_tokens):
                await asyncio.sleep(0.2 if self.reading[ticket.worker] else 0.02)  # prompts hold answers up
                ticket.uncharged += 1
                ticket.tokens += 1
                self.line.charge.append(ticket)
                self.weigh(tenant, OUTPUT_WEIGHT)
                self.line.settle(self.clock())
            self.hold(-ticket.call.prompt_tokens - output_tokens)

    def hold(self, tokens: int) -> None:
        self.in_flight_tokens += tokens
        self.most_in_flight_tokens = max(self.most_in_flight_tokens, self.in_flight_tokens)

    def weigh(self, tenant: str, service: float) -> None:
        """Notes how far one tenant is ahead of the other while both have something waiting."""
        self.service[tenant] += service
        both_wait = set(self.line._waiting_of) == set(SHAPES)
        self.over = self.over or (bool(self.leads) and not both_wait)
        if both_wait and not self.over:
            self.leads.append(self.service["reader"] - self.service["writer"])
            counters = [account.counter for _, account, waits in self.line.lanes.standings() if waits]
            self.gaps.append(max(counters, default=0.0) - min(counters, default=0.0))

    async def run(self, each: int) -> None:
        order = [*SHAPES] * each
        await asyncio.gather(*(self.visit(tenant) for tenant in order))

    @property
    def bound(self) -> float:
        """U, with M as it turned out."""
        longest_prompt = max(prompt_tokens for prompt_tokens, _ in SHAPES.values())
        return max(PROMPT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * self.most_in_flight_tokens)


@pytest.mark.parametrize("workers", [{Role.PREFILL: 1, Role.DECODE: 1}, {Role.PREFILL: 2, Role.DECODE: 2}], ids=str)
def test_vtc_bounds_hold_over_both_pools_together(workers: dict[Role, int]) -> None:
    async def run() -> None:
        floor = Floor("vtc", workers)
        await floor.run(600)
        assert sum(floor.service.values()) > 20 * floor.bound, "too short to show anything"
        assert floor.line.placed["apart"] > 100 and floor.line.placed["prefill_busy"] > 0
        assert max(floor.gaps) <= floor.bound  # Lemma 4.3
        assert max(floor.leads) - min(floor.leads) <= 2 * floor.bound  # Theorem 4.4
        assert all(
            not member.load.in_flight and not member.load.pending_tokens for member in floor.fleet.members.values()
        )

    in_virtual_time(run())


def test_vtc_bounds_hold_where_prediction_places_requests_on_engines_that_do_both() -> None:
    async def run() -> None:
        floor = Floor("vtc", {Role.PREFILL: 1, Role.DECODE: 1}, hands_over=True)
        errors: list[float] = []
        targets = SloTargets(SloSettings(ttft_s=2.0, tpot_s=0.03), unset=Objectives())
        floor.line.predictor = Predictor(targets, 1, floor.clock, errors.append)
        await floor.run(600)
        assert sum(floor.service.values()) > 20 * floor.bound, "too short to show anything"
        assert floor.line.placed["apart"] + floor.line.placed["together"] == 1200
        assert max(floor.gaps) <= floor.bound  # Lemma 4.3
        assert max(floor.leads) - min(floor.leads) <= 2 * floor.bound  # Theorem 4.4
        assert len(errors) == 1200
        for member in floor.fleet.members.values():
            assert not member.load.in_flight and not member.load.pending_tokens and not member.load.arriving_tokens
            assert member.load.forecast is not None and not member.load.forecast.answers

    in_virtual_time(run())


def test_long_prompts_keep_every_prefill_worker_of_one_decode_worker_busy() -> None:
    async def run() -> None:
        floor = Floor("fcfs", {Role.PREFILL: 3, Role.DECODE: 1})
        tickets = []
        for number in range(3):
            bare = ticket_of(floor.clock, number=number)
            tickets.append(ticket_of(floor.clock, replace(bare.call, prompt_tokens=12_000), number=number))
            await floor.line.take(tickets[-1])
        splits = [ticket.split for ticket in tickets if ticket.split is not None]
        assert {split.prefill.worker.id for split in splits} == {f"prefill-{number}" for number in range(3)}
        for split in splits[:2]:  # two prompts are read and not fetched yet: more than may be on its way
            split.kv = b"{}"
            split.read()
        bare = ticket_of(floor.clock, number=9)
        fourth = asyncio.create_task(
            floor.line.take(ticket_of(floor.clock, replace(bare.call, prompt_tokens=12_000), number=9))
        )
        await asyncio.sleep(1.0)
        assert not fourth.done()
        splits[0].arrived()
        splits[1].arrived()
        await asyncio.wait_for(fourth, 5.0)

    in_virtual_time(run())


def test_without_shares_the_reader_gets_more_than_any_bound_allows() -> None:
    async def run() -> None:
        floor = Floor("fcfs", {Role.PREFILL: 1, Role.DECODE: 1})
        await floor.run(600)
        assert max(floor.leads) - min(floor.leads) > 2 * floor.bound

    in_virtual_time(run())
