"""Everything is restarted in turn under load, as a deployment does it: gateways behind a load balancer, and workers.

A gateway gets SIGTERM and nothing else. A worker is drained through /admin, gets SIGTERM when it has nothing any more,
and takes requests again when it is back. Half of the clients keep their connection as long as the gateway lets them.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.balancer import Balancer
from tests.chaos.figures import Figure, none, quantile_ms
from tests.chaos.load import Client, Seen, questions
from tests.chaos.site import Program, admin, all_ready, engine, gateway, metrics, redis, running, summed, until

WORKERS, GATEWAYS = 3, 2
LAME_DUCK_S, DRAIN_S = 2.0, 0.5
COST = ("--cost", "gpu-7b", "--mean-answer-tokens", "1000000")


@dataclass
class Report:
    """restarts: of gateways and of workers. kept: requests on a connection that had carried one before."""

    seen: Seen = field(default_factory=Seen)
    restarts: dict[str, int] = field(default_factory=lambda: {"gateways": 0, "workers": 0})
    kept: int = 0
    problems: list[str] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        pauses = [stream.longest_s for stream in self.seen.streams]
        return [
            Figure("restarted", ", ".join(f"{name} {count}" for name, count in self.restarts.items())),
            Figure("answers, of which on a kept connection", f"{self.seen.asked}, {self.kept}"),
            none("of them failed or different", self.seen.wrong),
            none("programs that did not end well", self.problems),
            Figure(
                "longest silence in a stream, P50, P99 and longest",
                ", ".join(quantile_ms(pauses, share) for share in (0.5, 0.99, 1.0)),
            ),
        ]


class Rolling:
    """One run: `rounds` times every gateway and every worker."""

    def __init__(self, seed: int, rounds: int, *, clients: int = 12, lame_duck_s: float = LAME_DUCK_S) -> None:
        self.rounds, self.lame_duck_s = rounds, lame_duck_s
        self.report = Report()
        asked = questions(seed, least=20, most=200)
        self.clients = [Client(asked, seed + number) for number in range(clients)]

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="evenhand-rolling-") as name:
            async with self._site(Path(name)), Balancer(self.gateways).listening() as self.balancer:
                await self._disturbed()
        return self.report

    @asynccontextmanager
    async def _site(self, folder: Path) -> AsyncIterator[None]:
        self.engines = [engine(folder, number, *COST) for number in range(WORKERS)]
        store = redis(folder)
        settings = {
            "redis_url": f"redis://127.0.0.1:{store.port}/0",
            "lame_duck_s": self.lame_duck_s,
            "health": {"drain_s": DRAIN_S, "canary": "answers"},
            "probe_s": 0.2,
            "allow_open": True,
        }
        workers = [f"{program.url},slots=64" for program in self.engines]
        self.gateways = [gateway(folder, number, workers, settings) for number in range(GATEWAYS)]
        async with running(*self.engines, store), running(*self.gateways):
            await all_ready(self.gateways, WORKERS)
            yield

    async def _disturbed(self) -> None:
        first = self.clients[0]
        await first.learn(self.balancer.port)
        over = asyncio.Event()
        tasks = []
        for number, client in enumerate(self.clients):
            client.expected, client.seen = first.expected, self.report.seen
            ask = client.keep_asking_on_one if number % 2 else client.keep_asking
            tasks.append(asyncio.create_task(ask(self.balancer.port, over)))
        try:
            for _ in range(self.rounds):
                for number in range(WORKERS):
                    await self._restart_worker(number)
                for program in self.gateways:
                    await self._restart_gateway(program)
        finally:
            over.set()
            await asyncio.gather(*tasks)
        self.report.kept = sum(client.kept for client in self.clients)

    async def _restart_gateway(self, program: Program) -> None:
        if code := await program.end():
            self.report.problems.append(f"{program.name} ended with {code}")
        await program.start()
        await all_ready([program], WORKERS)
        await self.balancer.look()
        self.report.restarts["gateways"] += 1

    async def _restart_worker(self, number: int) -> None:
        program, worker = self.engines[number], f"worker-{number}"
        await admin(self.gateways[0].port, "POST", f"/workers/{worker}/drain")

        async def idle() -> bool:
            samples = [await metrics(one.port) for one in self.gateways]
            up = sum(summed(one, "evenhand_worker_up", worker=worker) for one in samples)
            busy = sum(summed(one, "evenhand_worker_in_flight", worker=worker) for one in samples)
            return not up and not busy

        await until(idle, f"{worker} has nothing any more")
        await program.end()
        await program.start()
        await admin(self.gateways[0].port, "POST", f"/workers/{worker}/resume")
        await all_ready(self.gateways, WORKERS)
        self.report.restarts["workers"] += 1
