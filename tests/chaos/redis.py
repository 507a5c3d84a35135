"""Redis is killed and comes back empty, again and again, under load at two gateways that share an engine through it.

The engine has less room than is asked for, so a fair policy has something to decide. After each return it is measured
when both gateways know again what all tenants have used and where their service stands; and in the end whether the
shares were those of the weights and a limit was kept.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.figures import Figure, none
from tests.chaos.load import Client, Seen, questions, told_on_its_own
from tests.chaos.site import UNHURRIED, Program, engine, redis, running, summed, tenant_file
from tests.server.conftest import MODEL, Running, eventually, request, serving

SLOTS = 6
WEIGHTS = {"one": 1.0, "two": 2.0}
CLIENTS = {"one": (8, 4), "two": (4, 8)}  # at each of the gateways: more than there are slots, and not alike
KNOCK_S = 0.25
LIMITED, PER_MINUTE = "limited", 60.0
KEYS = {name: f"sk-redis-{name}-0123456789" for name in (*WEIGHTS, LIMITED)}
SYNC_S = 0.1
GOAL_S, SHARE_GOAL = 5.0, 0.05
LOOK_S = 0.02
BETWEEN_S = (1.0, 2.0)  # a Redis that is back stays so long, and is away as long


@dataclass
class Report:
    """reconciled_s: after each return. exchanges: meanwhile, of the gateway with more. shares: of the weighted tokens,
    by tenant. admitted: of the limited tenant."""

    seen: dict[str, Seen] = field(default_factory=dict)
    reconciled_s: list[float] = field(default_factory=list)
    exchanges: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    admitted: int = 0
    refused: int = 0
    most: float = 0.0

    def figures(self) -> list[Figure]:
        answers = sum(seen.answers.total() for seen in self.seen.values())
        slowest, share = max(self.reconciled_s), self.shares["two"]
        expected = WEIGHTS["two"] / sum(WEIGHTS.values())
        off = abs(share - expected) / expected
        return [
            Figure("Redis killed, and back empty", f"{len(self.reconciled_s)} times"),
            Figure("answers", f"{answers}"),
            none("of them failed or different", self.wrong),
            Figure(
                "until both gateways know all use and service again, median and longest, s",
                f"{sorted(self.reconciled_s)[len(self.reconciled_s) // 2]:.2f}, {slowest:.2f}",
                f"≤ {GOAL_S:.0f}",
                slowest <= GOAL_S,
            ),
            Figure(
                f"share of the tenant that should have {expected:.1%} of the service",
                f"{share:.1%}",
                f"off by ≤ {SHARE_GOAL:.0%} of it",
                off <= SHARE_GOAL,
            ),
            Figure(
                f"requests admitted of a tenant with {PER_MINUTE:.0f} a minute, of {self.admitted + self.refused} sent",
                f"{self.admitted}",
                f"≤ {self.most:.0f}: its rate, one bucket, and half a bucket for being at two gateways",
                self.admitted <= self.most,
            ),
        ]


class RedisChaos:
    """One run."""

    def __init__(self, seed: int, restarts: int) -> None:
        self.restarts = restarts
        self.dice = random.Random(seed)
        self.asked = questions(seed, least=10, most=60)
        self.report = Report(seen={name: Seen() for name in WEIGHTS})
        self.gateways: tuple[Running, ...]

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="evenhand-redis-") as name:
            folder = Path(name)
            options = ("--cost", "gpu-7b", "--max-seqs", f"{SLOTS}", "--mean-answer-tokens", "1000000")
            worker, self.redis = engine(folder, 0, *options), redis(folder)
            async with running(worker, self.redis), self._serving(folder, worker):
                await self._disturbed()
        return self.report

    @asynccontextmanager
    async def _serving(self, folder: Path, worker: Program) -> AsyncIterator[None]:
        budget = {"tokens_per_day": 10**12}
        tenants = [
            {"name": name, "keys": [KEYS[name]], "weight": weight, "budget": budget} for name, weight in WEIGHTS.items()
        ]
        limited = {"name": LIMITED, "keys": [KEYS[LIMITED]], "requests_per_minute": PER_MINUTE, "budget": budget}
        settings = {
            "redis_url": f"redis://127.0.0.1:{self.redis.port}/0",
            "tenants": tenant_file(folder, [*tenants, limited]),
            "policy": "vtc",
            "sync_s": SYNC_S,
            "health": UNHURRIED,
            "slots": SLOTS,
        }
        async with serving(worker.url, **settings) as one, serving(worker.url, **settings) as other:
            self.gateways = (one, other)
            await eventually(lambda: all(_replicas(gateway) == 2 for gateway in self.gateways), "they know each other")
            yield

    async def _disturbed(self) -> None:
        clients = await self._clients()
        before = await self._served()
        over, began = asyncio.Event(), time.monotonic()
        tasks = [asyncio.create_task(client.keep_asking(self.gateways[at].port, over)) for client, at in clients]
        tasks += [asyncio.create_task(self._knock(gateway, over)) for gateway in self.gateways]
        try:
            for _ in range(self.restarts):
                await asyncio.sleep(self.dice.uniform(*BETWEEN_S))  # the plan's own time
                await self.redis.kill()
                await asyncio.sleep(self.dice.uniform(*BETWEEN_S))  # the plan's own time
                await self.redis.start()
                self.report.reconciled_s.append(await self._reconciled())
            served = {name: amount - before[name] for name, amount in (await self._served()).items()}
            self.report.shares = {name: amount / sum(served.values()) for name, amount in served.items()}
        finally:
            over.set()
            await asyncio.gather(*tasks)
        self.report.most = (time.monotonic() - began) * PER_MINUTE / 60 + 1.5 * PER_MINUTE + 2
        self.report.wrong += [problem for seen in self.report.seen.values() for problem in seen.wrong]

    async def _clients(self) -> list[tuple[Client, int]]:
        """(client, its gateway); those of a tenant count together."""
        first = Client(self.asked, 0, key=KEYS["one"])
        await first.learn(self.gateways[0].port)
        self.report.seen["one"].tokens = sum(expected[1]["total_tokens"] for expected in first.expected)
        clients = []
        for name, counts in CLIENTS.items():
            for at, count in enumerate(counts):
                for number in range(count):
                    client = Client(self.asked, len(clients) + number, key=KEYS[name])
                    client.expected, client.seen = first.expected, self.report.seen[name]
                    clients.append((client, at))
        return clients

    async def _knock(self, gateway: Running, over: asyncio.Event) -> None:
        """The limited tenant, who asks for more than it may have."""
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
        data = request("/v1/completions", body, headers={"authorization": f"Bearer {KEYS[LIMITED]}"})
        while not over.is_set():
            reply, _ = await told_on_its_own(gateway.port, data)
            self.report.admitted += reply.status == 200
            self.report.refused += reply.status == 429
            if reply.status not in (200, 429):
                self.report.wrong.append(f"the limited tenant got {reply.status}: {reply.body[:200]!r}")
            await asyncio.sleep(KNOCK_S)  # its own pace

    async def _reconciled(self) -> float:
        """Seconds from Redis' return until all that had happened by then is known at both gateways."""
        began, before = time.monotonic(), self._exchanges()
        used = {name: seen.tokens for name, seen in self.report.seen.items()}
        charged = {name: max(self._service(gateway, name) for gateway in self.gateways) for name in WEIGHTS}

        def known() -> bool:
            return all(
                gateway.server.shared.replicas.up
                and _replicas(gateway) == 2
                and all(_used(gateway, name) >= tokens for name, tokens in used.items())
                and all(self._service(gateway, name) >= service for name, service in charged.items())
                for gateway in self.gateways
            )

        await eventually(known, "both gateways know all again")
        self.report.exchanges.append(max(now - then for now, then in zip(self._exchanges(), before, strict=True)))
        return time.monotonic() - began

    def _exchanges(self) -> list[int]:
        return [gateway.server.shared.replicas.exchanges for gateway in self.gateways]

    @staticmethod
    def _service(gateway: Running, tenant: str) -> float:
        return gateway.server.lines.by_model[MODEL].lanes.service(tenant)

    async def _served(self) -> dict[str, float]:
        """Weighted tokens by tenant, as the gateways have counted them."""
        samples = [await gateway.metrics() for gateway in self.gateways]
        name = "evenhand_tenant_service_total"
        return {tenant: sum(summed(one, name, tenant=tenant) for one in samples) for tenant in WEIGHTS}


def _replicas(gateway: Running) -> int:
    return gateway.server.shared.replicas.count


def _used(gateway: Running, tenant: str) -> int:
    return max(gateway.server.shared.gate.usage(tenant).values(), default=0)
