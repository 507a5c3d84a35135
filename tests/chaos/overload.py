"""Ten times what the engine can do is asked for: what is still answered, what it costs, and what the refused are told.

One engine without a model and a gateway, both as programs. First as many clients as keep the engine full: the peak.
Then an open flood of one tenant's requests, whatever is answered, and beside it patient tenants, each of whom asks for
one answer after the other and, where it is refused, comes back after the Retry-After that it was told.
"""

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.chaos.figures import Figure, none, quantile_ms
from tests.chaos.load import BROKEN, told_on_its_own
from tests.chaos.site import UNHURRIED, Program, engine, gateway, running, tenant_file
from tests.server.conftest import MODEL, request

SLOTS, TOKENS, MAX_WAITING = 8, 20, 40
PEAK_S, WARM_S, SAMPLE_S = 15.0, 5.0, 1.0  # seconds: the peak is taken over; until memory is looked at; between looks
FLOOD, PATIENT = "flood", 20  # a tenant's name; how many tenants are patient
THINK_S = 2.0  # a patient tenant's pause after an answer
GOODPUT_GOAL, RSS_GOAL, PROMPT_S, TRUE_GOAL = 0.95, 0.05, 0.1, 0.99


class Told(NamedTuple):
    """One answer: when it was asked for, its seconds, its status, the Retry-After it came with (0: none)."""

    at: float
    took_s: float
    status: int
    retry_after_s: int


def key_of(tenant: str) -> str:
    return f"sk-overload-{tenant}-0123456789"


@dataclass
class Report:
    """peak: answers a second at a full engine. offered: requests sent in the flood, the patient ones too."""

    times: float
    seconds: float
    peak: float = 0.0
    flood: list[Told] = field(default_factory=list)
    patient: list[Told] = field(default_factory=list)
    came_back: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        told = self.flood + self.patient
        good = [one for one in told if one.status == 200]
        refused = [one for one in told if one.status == 429]
        odd = [one for one in told if one.status not in (200, 429) or (one.status == 429 and not one.retry_after_s)]
        goodput = len(good) / self.seconds
        prompt_s = sorted(one.took_s for one in refused)[int(0.99 * len(refused))]
        first, last = self.rss[len(self.rss) // 4], self.rss[-1]
        bound_s = 1.25 * (MAX_WAITING + 2 * SLOTS) / self.peak
        slow_s = sorted(one.took_s for one in good)[int(0.99 * len(good))]
        back = self.came_back
        true = back["in"] / max(1, back.total())
        return [
            Figure("peak: answers a second with a full engine", f"{self.peak:.1f}"),
            Figure("offered, × the peak", f"{len(told) / self.seconds / self.peak:.1f}"),
            Figure(
                "answers a second under it, of the peak", f"{goodput / self.peak:.1%}", f"≥ {GOODPUT_GOAL:.0%}",
                goodput >= GOODPUT_GOAL * self.peak,
            ),
            Figure(
                f"whole answers, P99: all that may wait ({MAX_WAITING}) and run ({SLOTS}) at that pace, and a quarter",
                f"{slow_s:.2f} s", f"≤ {bound_s:.2f} s", slow_s <= bound_s,
            ),
            Figure(
                f"429 for the other {len(refused)}, P50 and P99",
                f"{quantile_ms([one.took_s for one in refused], 0.5)}, {prompt_s * 1000:.0f} ms",
                f"≤ {PROMPT_S * 1000:.0f} ms", prompt_s <= PROMPT_S,
            ),
            Figure(
                f"of {back.total()} who came back after their Retry-After, let in", f"{true:.1%}",
                f"≥ {TRUE_GOAL:.0%}", true >= TRUE_GOAL,
            ),
            Figure("Retry-After, s, P50 and longest", ", ".join(map(str, _middle_and_longest(refused)))),
            Figure(
                "memory of the gateway, MB, at a quarter of the time and at the end",
                f"{first / 1e6:.1f} → {last / 1e6:.1f}",
                f"grows by ≤ {RSS_GOAL:.0%}", last <= first * (1 + RSS_GOAL),
            ),
            none("neither 200 nor a 429 with Retry-After", [*odd, *self.broken]),
        ]  # fmt: skip


def _middle_and_longest(refused: list[Told]) -> tuple[int, int]:
    ordered = sorted(one.retry_after_s for one in refused)
    return ordered[len(ordered) // 2], ordered[-1]


class Overload:
    """One run. times: offered ÷ the peak. seconds: for which the flood lasts."""

    def __init__(self, times: float, seconds: float, policy: str, *, peak_s: float = PEAK_S) -> None:
        self.report = Report(times, seconds)
        self.policy, self.peak_s = policy, peak_s
        self.port = 0
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="evenhand-overload-") as name:
            folder = Path(name)
            worker = engine(folder, 0, "--cost", "gpu-7b", "--max-seqs", f"{SLOTS}")
            tenants = [FLOOD, *(f"patient-{number}" for number in range(PATIENT))]
            settings = {
                "tenants": str(tenant_file(folder, [{"name": name, "keys": [key_of(name)]} for name in tenants])),
                "policy": self.policy,
                "admission": {"max_waiting": MAX_WAITING},
                "health": UNHURRIED,
            }
            front = gateway(folder, 0, [f"{worker.url},slots={SLOTS}"], settings)
            self.port = front.port
            async with running(worker), running(front):
                self.report.peak = await self._peak()
                await self._flood(front)
                self.report.broken += front.complaints()
        return self.report

    async def _one(self, tenant: str) -> Told:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True}
        data = request("/v1/completions", body, headers={"authorization": f"Bearer {key_of(tenant)}"})
        at = time.monotonic()
        reply, _ = await told_on_its_own(self.port, data)
        return Told(at, time.monotonic() - at, reply.status, int(reply.headers.get("retry-after", 0)))

    async def _peak(self) -> float:
        """Answers a second with twice as many clients as slots."""
        ends: list[float] = []
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set():
                assert (await self._one(FLOOD)).status == 200
                ends.append(time.monotonic())

        clients = [asyncio.create_task(client()) for _ in range(2 * SLOTS)]
        began = time.monotonic()
        await asyncio.sleep(self.peak_s)  # what is measured
        over.set()
        await asyncio.gather(*clients)
        return sum(end <= began + self.peak_s for end in ends) / self.peak_s

    async def _flood(self, front: Program) -> None:
        """The flood, the patient tenants, and a look at the gateway's memory now and then."""
        report, per_s = self.report, self.report.times * self.report.peak
        began = time.monotonic()
        end = began + report.seconds
        others = [asyncio.create_task(self._patient(f"patient-{number}", end)) for number in range(PATIENT)]
        others.append(asyncio.create_task(self._look(front, end)))
        sent = 0
        while (now := time.monotonic()) < end:
            while sent < (now - began) * per_s:
                sent += 1
                task = asyncio.create_task(self._send(FLOOD))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            await asyncio.sleep(0.005)  # the flood's own rhythm
        await asyncio.gather(*others, *self._asking)

    async def _send(self, tenant: str) -> None:
        try:
            self.report.flood.append(await self._one(tenant))
        except BROKEN as error:
            self.report.broken.append(repr(error))

    async def _patient(self, tenant: str, end: float) -> None:
        """One answer after the other; what is refused is asked for again after the time that was told."""
        waited = False
        while time.monotonic() < end:
            try:
                told = await self._one(tenant)
            except BROKEN as error:
                self.report.broken.append(repr(error))
                return
            self.report.patient.append(told)
            if waited:
                self.report.came_back["in" if told.status == 200 else "refused"] += 1
            waited = told.status == 429
            await asyncio.sleep(told.retry_after_s if waited else THINK_S)  # as it was told; or its own rhythm

    async def _look(self, front: Program, end: float) -> None:
        await asyncio.sleep(WARM_S)  # every tenant and every connection has been there once
        while time.monotonic() < end:
            self.report.rss.append(front.rss_bytes())
            await asyncio.sleep(SAMPLE_S)
