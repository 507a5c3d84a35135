"""A long run at a gentle rate, in which something fails every so often: what grows, what is stuck, what is miscounted.

Two gateways over a Redis and three engines. One gateway is never restarted, so its memory can be followed; all else
dies, freezes or is restarted in turn. Clients ask whole answers and streams, leave in the middle, and meet a limit.
"""

import asyncio
import logging
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.chaos.figures import Figure, none
from tests.chaos.load import BROKEN, Client, questions, told_on_its_own
from tests.chaos.site import (
    Program,
    admin,
    all_ready,
    engine,
    gateway,
    metrics,
    redis,
    running,
    summed,
    tenant_file,
    until,
)
from tests.server.conftest import Wire, request

log = logging.getLogger("tests.chaos")

ENGINES = 3
SAMPLE_S, SETTLE_S = 5.0, 15.0
NEWS_S = 60.0  # between two lines about how it goes
# A run of an hour shares its machine with other work: who is slow for a few seconds is not dead.
HEALTH = {"probe_timeout_s": 5.0, "stall_s": 20.0, "failures": 100, "canary": "answers"}
WARM_SHARE = 0.25  # of the run, whose memory is not looked at: caches fill
GROWTH_GOAL = 0.03  # of the memory, an hour
LIMITED, LEAVING, COUNTED = "limited", "leaving", ("steady", "light")
KEYS = {name: f"sk-soak-{name}-0123456789" for name in (*COUNTED, LIMITED, LEAVING)}
RARE = 6.0  # requests a minute that the limited tenant may send
BLOWS = ("kill an engine", "stop an engine", "kill Redis", "restart a gateway")


def slope_per_h(points: list[tuple[float, float]]) -> float:
    """Least squares through (seconds, value): how much the value grows in an hour."""
    count = len(points)
    if count < 2:
        return 0.0
    middle_s, middle = (sum(axis) / count for axis in zip(*points, strict=True))
    spread = sum((at - middle_s) ** 2 for at, _ in points)
    return 3600.0 * sum((at - middle_s) * (value - middle) for at, value in points) / spread


class Soak:
    """One run of `run_s` seconds: `per_s` requests a second, and a blow every `blow_s`."""

    def __init__(self, seed: int, run_s: float, per_s: float, blow_s: float, settle_s: float = SETTLE_S) -> None:
        self.run_s, self.per_s, self.blow_s, self.settle_s = run_s, per_s, blow_s, settle_s
        self.dice = random.Random(seed)
        asked = questions(seed)
        self.clients = {name: Client(asked, seed + at, key=KEYS[name]) for at, name in enumerate(COUNTED)}
        self.question = asked[1]  # of those who leave or are limited
        self.blows: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()  # at the gateway that stays, by how it ended for the client
        self.problems: list[str] = []
        self.rss: list[tuple[float, float]] = []
        self.files: list[int] = []
        self.in_service: list[int] = [0, 1]
        self.least_ready = ENGINES  # workers that every gateway has once it is there

    async def run(self) -> list[Figure]:
        with tempfile.TemporaryDirectory(prefix="evenhand-soak-") as name:
            async with self._site(Path(name)):
                await all_ready(self.gateways, self.least_ready)
                for client in self.clients.values():
                    await client.learn(self.gateways[0].port)
                    client.seen.tokens = sum(expected[1]["total_tokens"] for expected in client.expected)
                self.sent["ok"] += sum(len(client.expected) for client in self.clients.values())
                await self._load()
                return [*await self._figures(), *self._told()]

    @asynccontextmanager
    async def _site(self, folder: Path) -> AsyncIterator[None]:
        self.engines = [engine(folder, number, "--cost", "gpu-7b") for number in range(ENGINES)]
        self.redis = redis(folder)
        workers = [f"{program.url},slots=32" for program in self.engines]
        self.gateways = [self._gateway(folder, number, workers) for number in range(2)]
        async with running(*self.engines, self.redis), running(*self.gateways):
            yield

    def _gateway(self, folder: Path, number: int, workers: Sequence[str]) -> Program:
        much = {"tokens_per_day": 10**12}
        tenants = [{"name": name, "keys": [key], "budget": much} for name, key in KEYS.items()]
        tenants[2]["requests_per_minute"] = RARE
        settings = {
            "redis_url": f"redis://127.0.0.1:{self.redis.port}/0",
            "policy": "vtc",
            "tenants": str(tenant_file(folder, tenants)),
            "sync_s": 0.5,
            "probe_s": 1.0,
            "health": HEALTH,
            "lame_duck_s": 1.0,
        }
        return gateway(folder, number, workers, settings)

    async def _load(self) -> None:
        began, over = time.monotonic(), asyncio.Event()
        watch, blows = asyncio.create_task(self._watch(began)), asyncio.create_task(self._strike(over))
        asked: set[asyncio.Task[None]] = set()
        try:
            due = began
            while (due := due + self.dice.expovariate(self.per_s)) < began + self.run_s:
                await asyncio.sleep(max(0.0, due - time.monotonic()))  # the plan's own time
                task = asyncio.create_task(self._one())
                asked.add(task)
                task.add_done_callback(asked.discard)
        finally:
            over.set()
            watch.cancel()
            await asyncio.wait([watch, blows, *asked])

    async def _one(self) -> None:
        """A request of any tenant, to any gateway that is in service."""
        number = self.dice.choice(self.in_service)
        try:
            ended = await self._ended(self.gateways[number].port)
        except BROKEN as error:
            ended = "broken"
            self.problems.append(f"a request that was to be left or refused: {error!r}")
        if number == 0:
            self.sent[ended] += 1

    async def _ended(self, port: int) -> str:
        """How one ended for its client."""
        kind = self.dice.choices((*COUNTED, LEAVING, LIMITED), (5, 3, 1, 1))[0]
        if kind not in self.clients:
            return await (self._leave(port) if kind == LEAVING else self._knock(port))
        client = self.clients[kind]
        wrong = client.seen.answers["wrong"]
        await client.ask(port)
        return "ok" if client.seen.answers["wrong"] == wrong else "wrong"

    async def _leave(self, port: int) -> str:
        """A client that goes after a few chunks, by a reset."""
        wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
        headers = {"authorization": f"Bearer {KEYS[LEAVING]}"}
        await wire.send(request(self.question.path, self.question.body, headers=headers))
        status = (await wire.head()).status
        for _ in range(self.dice.randrange(4)):
            if not await wire.chunk():  # on a busy machine the whole answer may come in few pieces
                break
        wire.reset()
        return "left" if status == 200 else f"{status}"

    async def _knock(self, port: int) -> str:
        """A client that is often at its limit."""
        headers = {"authorization": f"Bearer {KEYS[LIMITED]}"}
        reply, _ = await told_on_its_own(port, request(self.question.path, self.question.body, headers=headers))
        if reply.status == 429 and "retry-after" in reply.headers:
            return "limited"
        if reply.status != 200:
            self.problems.append(f"the limited tenant got {reply.status}: {reply.body[:200]!r}")
        return "ok" if reply.status == 200 else f"{reply.status}"

    # blows

    async def _strike(self, over: asyncio.Event) -> None:
        """One blow after the other; what is struck when the run is over is still mended."""
        blows = (self._kill_engine, self._stop_engine, self._kill_redis, self._restart_gateway)
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self.dice.uniform(0.5, 1.5) * self.blow_s)
                return
            at = self.dice.choices(range(len(blows)), (4, 2, 2, 1))[0]
            try:
                await blows[at]()
            except (TimeoutError, RuntimeError, OSError) as error:
                self.problems.append(f"{BLOWS[at]}: {error!r}")
            self.blows[BLOWS[at]] += 1

    async def _kill_engine(self) -> None:
        program = self.dice.choice(self.engines)
        await program.kill()
        await program.start()
        await all_ready(self.gateways, self.least_ready)

    async def _stop_engine(self) -> None:
        program = self.dice.choice(self.engines)
        program.signal(signal.SIGSTOP)
        await until(self._one_is_out, "a stopped engine is noticed")
        program.signal(signal.SIGCONT)
        await all_ready(self.gateways, self.least_ready)

    async def _one_is_out(self) -> bool:
        ready = [summed(await metrics(program.port), "evenhand_worker_up") for program in self.gateways]
        return max(ready) < ENGINES

    async def _kill_redis(self) -> None:
        await self.redis.kill()
        await asyncio.sleep(self.dice.uniform(0.1, 3.0))  # the plan's own time
        await self.redis.start()

    async def _restart_gateway(self) -> None:
        """As behind a load balancer: nothing new comes, it ends, a new one takes its place."""
        self.in_service = [0]
        code = await self.gateways[1].end()
        if code:
            self.problems.append(f"a gateway ended with {code} after SIGTERM")
        await self.gateways[1].start()
        await all_ready(self.gateways, self.least_ready)
        self.in_service = [0, 1]

    # figures

    async def _watch(self, began: float) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            program = self.gateways[0]
            self.rss.append((time.monotonic() - began, float(program.rss_bytes())))
            self.files.append(program.open_files())
            if len(self.files) % round(NEWS_S / SAMPLE_S) == 0:
                self._say(time.monotonic() - began)

    def _say(self, after_s: float) -> None:
        answers = sum((client.seen.answers for client in self.clients.values()), Counter[str]())
        first, last = self.rss[0][1] / 1e6, self.rss[-1][1] / 1e6
        log.info(
            "%.0f min: answers %s, blows %d, memory %.1f → %.1f MB, files %d, problems %s",
            after_s / 60,
            dict(answers),
            self.blows.total(),
            first,
            last,
            self.files[-1],
            self.problems[-1:],
        )

    async def _figures(self) -> list[Figure]:
        seen = [client.seen for client in self.clients.values()]
        wrong = [problem for one in seen for problem in one.wrong]
        steady = [(at, value) for at, value in self.rss if at > WARM_SHARE * self.run_s]
        grows, first = slope_per_h(steady), steady[0][1]
        share = grows / first
        stuck = await self._after_a_while(self._held, "nothing is left of any request")
        counted = await self._after_a_while(self._differences, "gateways and clients count alike")
        complaints = [line for program in self.gateways for line in program.complaints()]
        return [
            Figure("answers compared with the undisturbed ones", f"{sum(one.asked for one in seen)}"),
            none("of them failed or different", wrong),
            Figure(
                "memory of the gateway that stays, MB at a quarter of the run and at its end",
                f"{first / 1e6:.1f} → {steady[-1][1] / 1e6:.1f}",
            ),
            Figure(
                "its slope, of it an hour", f"{share:+.2%}", f"between ± {GROWTH_GOAL:.0%}", abs(share) <= GROWTH_GOAL
            ),
            none(f"requests that something still holds {self.settle_s:.0f} s after the last", stuck),
            none("counters that do not conserve", counted),
            none("lines in the gateways' logs with an error or a stack", complaints),
            none("other surprises", self.problems),
        ]

    def _told(self) -> list[Figure]:
        blows = ", ".join(f"{name} {count}" for name, count in sorted(self.blows.items()))
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self.sent.items()))
        longest = max(client.seen.longest_s for client in self.clients.values())
        return [
            Figure("blows", blows),
            Figure("requests at the gateway that stays, by their end", ends),
            Figure("longest answer, s", f"{longest:.1f}"),
            Figure("files that it had open, at most and at the end", f"{max(self.files)}, {self.files[-1]}"),
        ]

    async def _after_a_while(
        self, wrong: Callable[[], Awaitable[list[str]]], what: str, settle_s: float | None = None
    ) -> list[str]:
        """What is wrong still once there was time for nothing to be."""

        async def right() -> bool:
            return not await wrong()

        with suppress(TimeoutError):
            await until(right, what, settle_s or self.settle_s)
        return await wrong()

    async def _held(self) -> list[str]:
        """What is left of any request."""
        held = []
        for program in self.gateways:
            samples = await metrics(program.port)
            for name in ("evenhand_worker_in_flight", "evenhand_queue_depth", "evenhand_worker_pending_tokens"):
                held.append((program.name, name, summed(samples, name)))
        for program in self.engines:
            samples = await metrics(program.port)
            for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                held.append((program.name, name, summed(samples, name)))
        return [f"{program}: {name} {value:.0f}" for program, name, value in held if value]

    async def _differences(self) -> list[str]:
        """Requests by outcome and tokens by tenant, as the gateways and as the clients have counted them."""
        samples = await metrics(self.gateways[0].port)
        told = Counter[str]()
        for (name, labels), value in samples.items():
            has = dict(labels)
            if name == "evenhand_requests_total" and has["route"].startswith("/v1/") and value:
                told[has["outcome"]] += int(value)
        # Who leaves as the last chunk is sent may have the whole answer without having read it.
        pairs = {
            "ok or cancelled": (told["ok"] + told["cancelled"], self.sent["ok"] + self.sent["left"]),
            "refused at a limit": (told["rate_limit_exceeded"], self.sent["limited"]),
            "all": (told.total(), self.sent.total()),
        }
        for name, client in self.clients.items():
            for program in self.gateways:
                used = (await admin(program.port, "GET", f"/tenants/{name}"))["used"]
                pairs[f"tokens of {name} at {program.name}"] = (max(used.values()), client.seen.tokens)
        return [f"{what}: {one} counted, {other} seen" for what, (one, other) in pairs.items() if one != other]
