"""Workers are killed and stopped under load, and the promise is checked from the clients' side.

    python -m tests.chaos --seed 1 --blows 20

Three fake engines in processes of their own, a gateway before them, clients that never pause. Every answer must be the
undisturbed one, token for token, as one well-formed stream; and at the end nothing may be left of any request.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.plan import Blow, Event, plan
from tests.server.conftest import Reply, Running, chat, completion, eventually, request, serving

WORKERS, CLIENTS = 3, 8
START_S = 60.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEALTH = {"probe_timeout_s": 1.0, "stall_s": 5.0, "failures": 100, "canary": "answers"}
# Streams that are still going when a worker is hit: some hundred milliseconds each.
ENGINE = ("--cost", "quick", "--mean-answer-tokens", "1000000")


@dataclass
class Worker:
    """A fake engine's process, always at one port."""

    port: int = 0
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = [sys.executable, "-m", "loadtest.fake_engine", "--port", str(self.port), *ENGINE]
        self.process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert self.process.stderr is not None
        async with asyncio.timeout(START_S):
            said = (await self.process.stderr.readline()).decode()
        self.port = int(said.rpartition(":")[2])

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Report:
    """What the clients saw. wrong: requests whose answer was not the undisturbed one, with what was wrong.

    pauses_s: the longest gap between two chunks of each stream.
    """

    seed: int
    answers: Counter[str] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)
    failovers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)

    def as_json(self) -> str:
        pauses = sorted(self.pauses_s)
        told = asdict(self) | {"answers": dict(self.answers), "blows": dict(self.blows)}
        told["pauses_s"] = {
            name: round(pauses[min(len(pauses) - 1, int(len(pauses) * share))], 3)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        }
        return json.dumps(told)


@dataclass(frozen=True)
class Question:
    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


def questions(seed: int) -> list[Question]:
    """Chats and completions, streams and whole answers, short and long."""
    dice = random.Random(seed)
    asked = []
    for number in range(16):
        path, make = dice.choice([(CHAT, chat), (COMPLETIONS, completion)])
        fields: dict[str, Any] = {"max_tokens": dice.randrange(5, 120)}
        text = f"Question {number} of {seed}: " + "why? " * dice.randrange(30)
        fields |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        if number % 4:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        asked.append(Question(path, make(**fields)))
    return asked


def told(question: Question, reply: Reply) -> Any:
    """What an answer says, without what differs between two runs: ids and times. AssertionError if it is ill-formed."""
    assert reply.status == 200, reply.body[:300]
    if not question.stream:
        answer = reply.json()
        return [[{**choice} for choice in answer["choices"]], answer["usage"]]
    *events, usage, done = reply.events
    assert done == "[DONE]" and usage["choices"] == []
    assert len({event["id"] for event in events}) == 1, "one stream has one id"
    choices = [choice for event in events for choice in event["choices"]]
    assert sum(bool(choice.get("delta", {}).get("role")) for choice in choices) == (question.path == CHAT)
    assert [choice for choice in choices if choice["finish_reason"]] == choices[-1:], "one end, at the end"
    return [choices, usage["usage"]]


def _first_difference(said: Any, expected: Any) -> str:
    for at, (one, other) in enumerate(zip(said[0], expected[0], strict=False)):
        if one != other:
            return f"choice {at} is {one} in place of {other}"
    return f"{len(said[0])} choices, {said[1]} in place of {len(expected[0])}, {expected[1]}"


class Chaos:
    """One run."""

    def __init__(self, seed: int, blows: int) -> None:
        self.events = plan(seed, WORKERS, blows)
        self.report = Report(seed)
        self.questions = questions(seed)
        self.dice = random.Random(seed)
        self.workers = [Worker() for _ in range(WORKERS)]

    async def run(self) -> Report:
        try:
            await asyncio.gather(*(worker.start() for worker in self.workers))
            urls = [worker.url for worker in self.workers]
            async with serving(*urls, probe_s=0.1, health=HEALTH) as self.gateway:
                await self._all_ready()
                self.expected = [
                    told(asked, await self.gateway.ask(asked.path, asked.body)) for asked in self.questions
                ]
                await self._disturbed()
        finally:
            await asyncio.gather(*(worker.kill() for worker in self.workers if worker.process is not None))
        return self.report

    async def _disturbed(self) -> None:
        over = asyncio.Event()
        clients = [asyncio.create_task(self._client(over)) for _ in range(CLIENTS)]
        try:
            for event in self.events:
                await asyncio.sleep(event.pause_s)  # the plan's own time
                await self._strike(event)
        finally:
            over.set()
            await asyncio.gather(*clients)
        metrics = await self.gateway.metrics()
        self.report.failovers = {
            labels[0][1]: int(count) for (name, labels), count in metrics.items() if name == "evenhand_failovers_total"
        }

    async def _strike(self, event: Event) -> None:
        worker = self.workers[event.worker]
        self.report.blows[event.blow.value] += 1
        if event.blow is Blow.KILL:
            await worker.kill()
            await asyncio.sleep(event.away_s)
            await worker.start()
        else:
            worker.signal(signal.SIGSTOP)
            # Long enough to be noticed: three probes that nobody answers.
            await eventually(lambda: len(self.gateway.server.fleet.ready()) < WORKERS, "the stop is noticed")
            await asyncio.sleep(event.away_s)
            worker.signal(signal.SIGCONT)
        await self._all_ready()

    async def _all_ready(self) -> None:
        await eventually(lambda: len(self.gateway.server.fleet.ready()) == WORKERS, "all workers are ready", START_S)

    async def _client(self, over: asyncio.Event) -> None:
        while not over.is_set():
            number = self.dice.randrange(len(self.questions))
            asked = self.questions[number]
            try:
                said = told(asked, await self._ask(asked, self.gateway))
                right = said == self.expected[number]
                problem = "" if right else f"{asked}: {_first_difference(said, self.expected[number])}"
            except (AssertionError, OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
                problem = f"{asked}: {error!r}"
            self.report.answers["wrong" if problem else "right"] += 1
            if problem:
                self.report.wrong.append(problem[:1000])

    async def _ask(self, asked: Question, gateway: Running) -> Reply:
        wire = await gateway.send(request(asked.path, asked.body))
        reply = await wire.head()
        if reply.headers.get("transfer-encoding") != "chunked":
            reply.body = await wire.reader.readexactly(int(reply.headers["content-length"]))
        else:
            longest, last = 0.0, time.monotonic()
            while chunk := await wire.chunk():
                reply.body += chunk
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            self.report.pauses_s.append(longest)
        await wire.close()
        gateway.wires.remove(wire)
        return reply
