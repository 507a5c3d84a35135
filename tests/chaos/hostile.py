"""Malformed requests by the ten thousand, against a gateway that runs as a program.

None may be answered with 5xx, and none may leave anything behind. The bytes are those of tests/server/test_fuzz.py.
"""

import asyncio
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.chaos.figures import Figure, none
from tests.chaos.site import Program, all_ready, engine, gateway, metrics, running, summed, until
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
