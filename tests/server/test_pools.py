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
from scheduler.placement import Rules
from scheduler.tiers import TieredLanes
from scheduler.workers import Role, Worker
from server.admission.dispatch import Dispatcher
from server.engine.client import EngineClient
from server.fleet.fleet import Fleet, Member, WorkerState
from server.request.call import Phase, Ticket
from tests.server.calls import placed, ticket_of
from tests.server.test_dispatch import in_virtual_time

SLOTS = {Role.PREFILL: 2, Role.DECODE: 4}
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
# (prompt tokens, output tokens) at most: one tenant's work is the prefill worker's, the other's the decode worker's.
SHAPES = {"reader": (400, 5), "writer": (20, 60)}


class Floor:
    """A dispatcher over engines that are only names, and what each tenant has got from them."""

    def __init__(self, policy: str, workers: dict[Role, int]) -> None:
        self.clock = asyncio.get_running_loop().time
        self.fleet = Fleet()
        for role, count in workers.items():
            for number in range(count):
                worker = Worker(f"{role.value}-{number}", "http://127.0.0.1:9", role, SLOTS[role])
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
            await asyncio.sleep(0.002 * ticket.call.prompt_tokens)
            if ticket.split is not None:
                ticket.split.read()
            ticket.move(Phase.DECODING)
            for _ in range(output_tokens):
                await asyncio.sleep(0.02)
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


def test_without_shares_the_reader_gets_more_than_any_bound_allows() -> None:
    async def run() -> None:
        floor = Floor("fcfs", {Role.PREFILL: 1, Role.DECODE: 1})
        await floor.run(600)
        assert max(floor.leads) - min(floor.leads) > 2 * floor.bound

    in_virtual_time(run())
