"""Hostile requests against a gateway that runs as a program: malformed ones by the ten thousand, then valid ones.

None of the malformed may be answered with 5xx, and none may leave anything behind. The bytes are those of
tests/server/test_fuzz.py. The valid ones mean no good, each in its own way, and two honest tenants beside them must not
notice.
"""

import asyncio
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.chaos.figures import Figure, none, quantile_ms
from tests.chaos.site import (
    Program,
    all_ready,
    ask,
    engine,
    gateway,
    metrics,
    running,
    summed,
    tenant_file,
    until,
)
from tests.server.conftest import Wire, chat, completion, request, serving
from tests.server.test_fuzz import STATUS, Sent, built, mutated, tell

AT_ONCE = 10
ROUNDS = 20  # between two looks at what the gateway holds
WARM_ROUNDS = 4
GROWTH_GOAL = 0.05
REST_S = 30.0


@dataclass
class Report:
    """answers: by status; one request may have several, or none. memory, files: of the gateway, after each round."""

    tried: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        told = ", ".join(f"{status}: {count}" for status, count in sorted(self.answers.items()))
        first, last = self.memory[WARM_ROUNDS], self.memory[-1]
        # Connections to the engine are kept for the next request, now one more, now one less of them.
        most, least = max(self.files[: WARM_ROUNDS + 1]), min(self.files[-WARM_ROUNDS:])
        return [
            Figure("malformed requests tried", f"{self.tried:,}"),
            Figure("answers by status", told),
            none("5xx, and times when the gateway said nothing more", self.wrong),
            none("left of any of them: requests that run or wait, lines of errors or stacks in the log", self.left),
            Figure(
                "memory of the gateway, MB, after a fifth of them and after all",
                f"{first / 1e6:.1f} → {last / 1e6:.1f}",
                f"grows by ≤ {GROWTH_GOAL:.0%}", last <= first * (1 + GROWTH_GOAL),
            ),
            Figure(
                "files that it has open: most in the first fifth, fewest in the last", f"{most} → {least}",
                "no more", least <= most,
            ),
        ]  # fmt: skip


class Hostile:
    """One run: at least so many requests."""

    def __init__(self, number: int, requests: int) -> None:
        self.seed, self.requests = number, requests
        self.report = Report()

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="evenhand-hostile-") as name:
            folder = Path(name)
            worker = engine(folder, 0, "--cost", "instant")
            edge = {"head_timeout_s": 2.0, "body_timeout_s": 2.0}
            front = gateway(folder, 0, [worker.url], {"edge": edge, "allow_open": True})
            async with running(worker), running(front):
                await all_ready([front], 1)
                for number in range(ROUNDS):
                    await asyncio.to_thread(self._round, front.port, number)
                    await self._look(front)
                self.report.left += front.complaints()
        return self.report

    def _round(self, port: int, number: int) -> None:
        """A part of the requests. What hypothesis would shrink is only noted."""
        report, enough = self.report, self.requests * (number + 1) // ROUNDS

        @seed(self.seed * 1000 + number)
        @settings(
            max_examples=10**6, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists((built() | mutated() | st.binary(max_size=200)).map(Sent), min_size=AT_ONCE, max_size=AT_ONCE))
        def send(requests: list[Sent]) -> None:
            if report.tried >= enough:
                raise Enough
            for sent in requests:
                self._one(port, sent)

        with suppress(Enough):
            send()

    def _one(self, port: int, sent: Sent) -> None:
        report = self.report
        report.tried += 1
        try:
            statuses = [int(status) for status in STATUS.findall(tell(port, sent.data))]
        except TimeoutError:
            report.wrong.append(f"no answer and no end: {sent}")
            return
        report.answers.update(statuses)
        report.wrong += [f"{status}: {sent}" for status in statuses if status >= 500]

    async def _look(self, front: Program) -> None:
        """What the gateway holds, once it is at rest."""

        async def rests() -> bool:
            samples = await metrics(front.port)
            held = ("evenhand_worker_in_flight", "evenhand_queue_depth", "evenhand_worker_pending_tokens")
            return not any(summed(samples, name) for name in held)

        try:
            await until(rests, "nothing runs or waits", REST_S)
        except TimeoutError as error:
            self.report.left.append(str(error))
        self.report.memory.append(front.rss_bytes())
        self.report.files.append(front.open_files())


class Enough(Exception):
    """A round has sent its part."""


CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HOSTILE, HONEST = "hostile-key-000000000", ("honest-key-1-0000000", "honest-key-2-0000000")
ENGINES = 3
ALONE_S = 15.0
PAUSE_S = 0.25  # of an honest client between two requests
CLIENTS = 6  # of the hostile tenant
SLOWER = 2.0  # than P99 alone is delayed
STOPS = {
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]
}
LONG = {"tools": [{"type": "function", "function": {"name": "f", "description": "A" * 600_000}}]}
Body = dict[str, object]

# A name, a route, a body, and whether the client leaves after the first bytes of the answer.
Kind = tuple[str, str, Callable[[], Body], bool]
# What a hostile tenant sends.
VALID: list[Kind] = [
    ("metadata that looks like a failure", RESPONSES, lambda: _response(metadata={"finish_reason": "abort"}), False),
    ("usage as a name", RESPONSES, lambda: _response(user="usage"), False),
    ("an engine's error", CHAT, lambda: chat(**STOPS), False),
    ("an engine's error in a stream", CHAT, lambda: chat(stream=True, **STOPS), False),
    ("a stream that the engine cuts", RESPONSES, lambda: _response(stream=True, top_logprobs=30), False),
    ("many tokens in an event, then gone", CHAT, lambda: _stream(stream_interval=50, max_tokens=200), True),
    ("a large tool list, then gone", CHAT, lambda: _stream(**LONG), True),
    ("hidden prompts", COMPLETIONS, lambda: completion(prompt=["a"] * 55, max_tokens=1), False),
    ("a field that steers", CHAT, lambda: chat(ec_transfer_params={"peer_host": "10.0.0.1"}), False),
    ("background", RESPONSES, lambda: _response(background=True), False),
]


def _response(**fields: object) -> Body:
    return {"model": "fake", "input": "Hello", "max_output_tokens": 4} | fields


def _stream(**fields: object) -> Body:
    return chat(stream=True, ignore_eos=True, **fields)


@dataclass
class Bystanders:
    """What the honest tenants saw. alone, beside: seconds that their requests took."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    workers: list[float] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        limit_s = SLOWER * sorted(self.alone)[int(0.99 * len(self.alone))]
        late = [f"{took:.3f} s" for took in self.beside if took > limit_s]
        return [
            Figure(
                "valid hostile requests", ", ".join(f"{name}: {count}" for name, count in sorted(self.sent.items()))
            ),
            Figure("requests of honest tenants, alone and beside them", f"{len(self.alone)}, {len(self.beside)}"),
            none("of them failed", self.failed),
            Figure(
                "fewest workers that were ready", f"{min(self.workers):.0f}", f"{ENGINES}", min(self.workers) == ENGINES
            ),
            Figure(
                "time of an honest request, P50 and P99: alone; beside them",
                f"{_both(self.alone)}; {_both(self.beside)}",
            ),
            none(f"of them later than {SLOWER:g} × P99 alone", late),
        ]


def _both(values_s: list[float]) -> str:
    return f"{quantile_ms(values_s, 0.5)}, {quantile_ms(values_s, 0.99)}"


class Valid:
    """One run: honest tenants alone, then so many seconds beside a hostile one."""

    def __init__(self, number: int, seconds: float) -> None:
        self.dice, self.seconds = random.Random(number), seconds
        self.seen = Bystanders()

    async def run(self) -> Bystanders:
        with tempfile.TemporaryDirectory(prefix="evenhand-hostile-") as name:
            folder = Path(name)
            keys = {"hostile": HOSTILE, "honest-1": HONEST[0], "honest-2": HONEST[1]}
            tenants = tenant_file(folder, [{"name": name, "keys": [key]} for name, key in keys.items()])
            engines = [engine(folder, number, "--cost", "gpu-7b") for number in range(ENGINES)]
            settings = {"tenants": str(tenants), "policy": "vtc", "health": {"failures": 5, "canary": "answers"}}
            front = gateway(folder, 0, [one.url for one in engines], settings)
            async with running(*engines, front):
                await all_ready([front], ENGINES)
                await self._honest(front.port, ALONE_S, self.seen.alone)
                await self._beside(front.port)
        return self.seen

    async def _beside(self, port: int) -> None:
        over = asyncio.Event()
        hostile = [asyncio.create_task(self._attack(port, over)) for _ in range(CLIENTS)]
        looking = asyncio.create_task(self._look(port, over))
        await self._honest(port, self.seconds, self.seen.beside)
        over.set()
        await asyncio.gather(*hostile, looking)

    async def _honest(self, port: int, seconds: float, times: list[float]) -> None:
        end = time.monotonic() + seconds

        async def client(key: str) -> None:
            while time.monotonic() < end:
                began = time.monotonic()
                reply = await ask(port, CHAT, chat(max_tokens=8), headers={"authorization": f"Bearer {key}"})
                times.append(time.monotonic() - began)
                if reply.status != 200:
                    self.seen.failed.append(f"{reply.status} {reply.body[:200]!r}")
                await asyncio.sleep(PAUSE_S)  # its own pace

        await asyncio.gather(*(client(key) for key in HONEST))

    async def _attack(self, port: int, over: asyncio.Event) -> None:
        while not over.is_set():
            kind = self.dice.choice(VALID)
            self.seen.sent[kind[0]] += 1
            await _send(port, kind)

    async def _look(self, port: int, over: asyncio.Event) -> None:
        while not over.is_set():
            self.seen.workers.append(summed(await metrics(port), "evenhand_worker_up"))
            await asyncio.sleep(0.1)  # between two looks


TIMES = 5  # that each kind of request is sent
HELD_GOAL_S = 0.005


async def longest_holds() -> list[Figure]:
    """The longest that a valid hostile request holds the gateway's event loop, and with it everybody else's answers.

    CPU time of one pass of the loop, in this process, so that other work on the machine does not count.
    """
    held: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="evenhand-hostile-") as name:
        folder = Path(name)
        tenants = tenant_file(folder, [{"name": "hostile", "keys": [HOSTILE]}])
        worker = engine(folder, 0, "--cost", "instant")
        async with running(worker), serving(worker.url, tenants=tenants) as front:
            for kind in VALID:
                passes = [await _longest_pass(front.port, kind) for _ in range(TIMES)]
                held[kind[0]] = sorted(passes)[TIMES // 2]
    worst = max(held, key=held.__getitem__)
    return [
        Figure(
            f"longest that one of them holds the event loop, CPU, median of {TIMES}: {worst}",
            f"{1000 * held[worst]:.1f} ms",
            f"≤ {1000 * HELD_GOAL_S:.0f} ms",
            held[worst] <= HELD_GOAL_S,
        )
    ]


async def _longest_pass(port: int, kind: Kind) -> float:
    sender = threading.Thread(target=lambda: asyncio.run(_send(port, kind)))
    sender.start()
    longest, before = 0.0, time.thread_time()
    while sender.is_alive():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    return longest


async def _send(port: int, kind: Kind) -> None:
    _, path, body, leaves = kind
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
    await wire.send(request(path, body(), headers={"authorization": f"Bearer {HOSTILE}"}))
    await (wire.head() if leaves else wire.answer())
    wire.reset()
