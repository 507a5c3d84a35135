"""Workers are killed and stopped under load, and the promise is checked from the clients' side.

Three fake engines in processes of their own, a gateway before them, clients that never pause. Every answer must be the
undisturbed one, token for token, as one well-formed stream; and at the end nothing may be left of any request.
"""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from loadtest.simulator.costmodel import PRESETS
from server.fleet.fleet import RunningAnswer
from server.observe.observer import Observer
from server.relay.relay import Pipe, Stream
from server.request.call import Ticket
from tests.chaos.figures import Figure, none, quantile_ms
from tests.chaos.greedy import TIE, Judge
from tests.chaos.load import Client, Pause, Question, Seen, Tell, questions, told
from tests.chaos.plan import FOUR, Blow, Event, Part, plan
from tests.chaos.site import HEALTH, START_S, Program, engine, running
from tests.server.conftest import eventually, serving

log = logging.getLogger("tests.chaos.workers")

WORKERS = 3
SIGNALS = {Blow.KILL: signal.SIGKILL, Blow.STOP: signal.SIGSTOP, Blow.TERM: signal.SIGTERM}
NOTICE_S = 60.0
STREAMS_S = 600.0  # for those that are wanted beyond the last blow
COST = "gpu-7b"
LONGEST_TOKENS = 250  # prompt and answer of any of the questions, rounded up
# Where all is well a stream says something at every iteration; one that is moved waits for the one that runs, too.
PREFILL_S = PRESETS[COST].duration_s(LONGEST_TOKENS, 0, 0) + 2 * PRESETS[COST].iteration_s


@dataclass(frozen=True)
class Setting:
    """What is struck, and how. prefill_s: what one takes, None where nobody knows. told: how an answer is read.

    judge: of well-formed answers that are not the undisturbed ones, where such may be right. It asks the first worker.
    rests: clients rest while a worker starts, where that takes a minute of all the cores there are.
    parts: processes that are struck, in turn. process_of: which process of a worker is this part. close: ends what
    started the workers.
    """

    workers: Callable[[Path], list[Program]]
    questions: list[Question]
    kinds: Sequence[Blow] = FOUR
    probe_s: float = 0.1
    health: Mapping[str, Any] = field(default_factory=lambda: HEALTH)
    prefill_s: float | None = PREFILL_S
    told: Tell = told
    judge: Judge | None = None
    rests: bool = False
    parts: Sequence[Part] = (Part.ALL,)
    process_of: Callable[[Program, Part], int] = lambda program, part: program.pid
    close: Callable[[], Awaitable[None]] | None = None


def without_a_model(seed: int) -> Setting:
    """Three fake engines."""
    options = ("--cost", COST, "--mean-answer-tokens", "1000000")

    def workers(folder: Path) -> list[Program]:
        return [engine(folder, number, *options) for number in range(WORKERS)]

    return Setting(workers, questions(seed))


@dataclass(frozen=True, slots=True)
class Struck:
    """A blow that was dealt to a worker. began, noticed: when, and when the gateway had it out; monotonic."""

    worker: str
    blow: Blow
    began: float
    noticed: float
    part: Part = Part.ALL


@dataclass
class Report:
    """What the clients saw. moved: requests that another worker went on with, and whose they were before. met: requests
    that ran at a worker when it was struck, by route and kind.

    gaps: of each answer that is right without being the undisturbed one, how far below the best its tokens are.
    """

    prefill_s: float | None = PREFILL_S
    seen: Seen = field(default_factory=Seen)
    blows: list[Struck] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)
    failovers: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, float] | None = None

    @property
    def kinds(self) -> Counter[str]:
        return Counter(struck.blow.value for struck in self.blows)

    @property
    def parts(self) -> Counter[str]:
        return Counter(f"{struck.blow.value} {struck.part.value}" for struck in self.blows)

    def pauses(self, blow: Blow) -> list[tuple[Pause, Struck]]:
        """The silences of moved streams that a blow of this kind made, each with it."""
        found = []
        for stream in self.seen.streams:
            failed = self.moved.get(stream.request_id)
            for struck in self.blows:
                if struck.worker == failed and struck.blow is blow:
                    pause = stream.around(struck.began, struck.noticed)
                    found += [(pause, struck)] if pause is not None else []
        return found

    def figures(self) -> list[Figure]:
        """Beside their goals. The goal for pauses: what is left after the failure was noticed is one prefill."""
        answers, kinds = self.seen.answers, ", ".join(f"{name}: {count}" for name, count in sorted(self.parts.items()))
        figures = [
            Figure("blows", kinds),
            Figure(
                "requests that a blow met", ", ".join(f"{name}: {count}" for name, count in sorted(self.met.items()))
            ),
            Figure("answers, of which streams", f"{answers.total()}, {len(self.seen.streams)}"),
            none("of them failed or different", self.seen.wrong),
            Figure(
                "went on at another worker, asked again", f"{self.failovers['resumed']}, {self.failovers['retried']}"
            ),
        ]
        if self.gaps is not None:
            figures += self._rounded(self.gaps)
        for blow in [blow for blow in Blow if self.kinds[blow.value]]:
            figures += self._pauses(blow)
        return figures

    def _rounded(self, gaps: dict[str, float]) -> list[Figure]:
        elsewhere = sum(request in self.moved for request in gaps)
        return [
            Figure(
                "not the undisturbed ones, yet greedy up to rounding; of them went on or were asked again elsewhere",
                f"{len(gaps)}, {elsewhere}",
            ),
            Figure(
                f"their least likely token, below the best one (difference of logarithms, wrong above {TIE})",
                f"{max(gaps.values(), default=0.0):.1e}",
            ),
        ]

    def _pauses(self, blow: Blow) -> list[Figure]:
        pauses = self.pauses(blow)
        late = [pause.ended - max(pause.began, struck.noticed) for pause, struck in pauses]
        noticed = [struck.noticed - struck.began for struck in self.blows if struck.blow is blow]
        silent = [pause.s for pause, _ in pauses]
        goal, met = "", True
        if self.prefill_s is not None and late:
            goal = f"P99 ≤ one prefill, {self.prefill_s * 1000:.0f} ms"
            met = sorted(late)[int(0.99 * len(late))] <= self.prefill_s
        return [
            Figure(f"{blow.value}: until it was noticed, median and longest", _two(noticed, 0.5, 1.0)),
            Figure(
                f"{blow.value}: silence of the {len(silent)} streams that were moved, P50, P99", _two(silent, 0.5, 0.99)
            ),
            Figure(f"{blow.value}: of it after it was noticed, P50 and P99", _two(late, 0.5, 0.99), goal, met),
        ]


def _has_far_to_go(leg: RunningAnswer) -> bool:
    """Whether it is a stream in its first half, so that a blow that is dealt now finds it running."""
    return isinstance(leg, Stream) and leg.speaks and 2 * leg.ticket.tokens < (leg.ticket.call.max_tokens or 0)


def _two(values_s: list[float], one: float, other: float) -> str:
    return f"{quantile_ms(values_s, one)}, {quantile_ms(values_s, other)}"


class Chaos:
    """One run: blows by a plan that follows from the seed, and so many clients until at least `streams` have ended."""

    def __init__(
        self,
        seed: int,
        blows: int,
        *,
        clients: int = 8,
        streams: int = 0,
        setting: Setting | None = None,
        longest_s: float = inf,
    ) -> None:
        """longest_s: no blow begins later than that after the first."""
        self.setting = setting = setting or without_a_model(seed)
        self.seed, self.blows, self.longest_s = seed, blows, longest_s
        self.report = Report(setting.prefill_s)
        self.streams = streams
        self.going = asyncio.Event()
        judged = setting.judge is not None
        self.clients = [
            Client(setting.questions, seed + number, tell=setting.told, judged=judged) for number in range(clients)
        ]

    async def run(self) -> Report:
        setting = self.setting
        with tempfile.TemporaryDirectory(prefix="evenhand-chaos-") as folder:
            self.workers = setting.workers(Path(folder))
            self.events = plan(self.seed, len(self.workers), self.blows, setting.kinds, setting.parts)
            async with contextlib.AsyncExitStack() as stack:
                if setting.close is not None:
                    stack.push_async_callback(setting.close)
                await stack.enter_async_context(running(*self.workers))
                urls = [worker.url for worker in self.workers]
                async with serving(*urls, probe_s=setting.probe_s, health=setting.health) as self.gateway:
                    await self._all_ready()
                    await self._disturbed()
        return self.report

    async def _disturbed(self) -> None:
        first, *others = self.clients
        await first.learn(self.gateway.port)
        for client in self.clients:
            client.expected, client.seen = first.expected, self.report.seen
        self.gateway.server.gateway.observers.add(_Moves(self.report.moved))
        over = asyncio.Event()
        self.going.set()
        asking = [
            asyncio.create_task(client.keep_asking(self.gateway.port, over, self.going)) for client in self.clients
        ]
        try:
            end = time.monotonic() + self.longest_s
            for event in self.events:
                if time.monotonic() > end:
                    break
                await asyncio.sleep(event.pause_s)  # the plan's own time
                await self._strike(event)
            await eventually(self._enough, f"{self.streams} streams", STREAMS_S)
        finally:
            over.set()
            self.going.set()
            await asyncio.gather(*asking)
        self.report.failovers = Counter(self.gateway.server.gateway.failover.outcomes)
        if self.setting.judge is not None:
            await self._judge(self.setting.judge)

    async def _judge(self, judge: Judge) -> None:
        """What the other answers are, by an engine that nobody asks anything else now."""
        port, seen = self.workers[0].port, self.report.seen
        for question, said in zip(self.setting.questions, self.clients[0].expected, strict=True):
            learned = await judge.verdict(port, question, said)
            assert not learned.problem, f"an undisturbed answer: {learned.problem}"
        self.report.gaps = {}
        for other in seen.others:
            verdict = await judge.verdict(port, other.question, other.said)
            if verdict.problem:
                seen.wrong.append(f"{other.question}: {verdict.problem}; {other.problem}"[:1000])
            else:
                self.report.gaps[other.request_id] = verdict.gap

    def _enough(self) -> bool:
        return len(self.report.seen.streams) >= self.streams

    async def _strike(self, event: Event) -> None:
        worker, name = self.workers[event.worker], f"worker-{event.worker}"
        member = self.gateway.server.fleet.members[name]
        await eventually(lambda: any(map(_has_far_to_go, member.legs)), f"{name} is in the middle of a stream", START_S)
        for leg in member.legs:
            if isinstance(leg, Pipe):
                call = leg.ticket.call
                self.report.met[f"{call.route.path}, {'streamed' if call.stream else 'whole'}"] += 1
        began = time.monotonic()
        await self._hit(worker, event)
        log.info(
            "blow %d of %d: %s %s of %s",
            len(self.report.blows) + 1,
            len(self.events),
            event.blow.value,
            event.part.value,
            name,
        )
        await eventually(self._one_is_out, f"the {event.blow.value} of {event.part.value} is noticed", NOTICE_S)
        self.report.blows.append(Struck(name, event.blow, began, time.monotonic(), event.part))
        await asyncio.sleep(event.away_s)
        await self._mend(event, worker)

    async def _hit(self, worker: Program, event: Event) -> None:
        if event.part is not Part.ALL:
            os.kill(self.setting.process_of(worker, event.part), SIGNALS[event.blow])
        elif event.blow is Blow.KILL:
            await worker.kill()
        elif event.blow is Blow.STOP:
            worker.signal(signal.SIGSTOP)
        else:
            await worker.end()

    def _one_is_out(self) -> bool:
        return len(self.gateway.server.fleet.ready()) < len(self.workers)

    async def _mend(self, event: Event, worker: Program) -> None:
        if event.blow is Blow.STOP:
            worker.signal(signal.SIGCONT)
        else:
            await worker.kill()  # what it may have left
            if self.setting.rests:
                self.going.clear()
            await worker.start()
        await self._all_ready()
        self.going.set()

    async def _all_ready(self) -> None:
        ready = self.gateway.server.fleet.ready
        await eventually(lambda: len(ready()) == len(self.workers), "all workers are ready", START_S)


class _Moves(Observer):
    """Notes which answers another worker had to bring to an end, and whose they were."""

    def __init__(self, moved: dict[str, str]) -> None:
        self.moved = moved

    def ended(self, ticket: Ticket, outcome: str) -> None:
        if ticket.avoid:
            self.moved[ticket.call.id] = ticket.avoid
