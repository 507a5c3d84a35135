"""What `evenhand bench slack` runs: vLLM's scheduler, which takes seconds to import, without a model."""

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from loadtest.bench.batch import PROMPT_TOKENS, interactive, output_length
from loadtest.bench.plugin.driven import (
    BLOCK_TOKENS,
    Rule,
    StepClock,
    build_scheduler,
    model_folder,
    request,
    seed_block_hashes,
)
from loadtest.bench.table import markdown, quantile
from loadtest.simulator.costmodel import PRESETS, CostModel

BACKLOG = 32  # requests of the batch that wait in the engine
START_S = 100.0  # what the clock shows at first


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a batch beside others. batch, people: whether there is one, and whether there are others.

    policy: of our scheduler, None for stock vLLM; priority: vLLM's own scheduling by priority. cap: most requests of
    the batch at a time, waiting ones included; None: as many as find room, and a backlog.
    """

    name: str
    policy: str | None = None
    priority: bool = False
    batch: bool = True
    people: bool = True
    cap: int | None = None


@dataclass(slots=True)
class Sent:
    """One interactive request. at: when each of its tokens came."""

    due_s: float
    at: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. recomputed: tokens computed beyond those needed, as a share."""

    ttft_p99_s: float
    gap_p99_s: float
    people_tokens: int
    batch_tokens: int
    seconds: float
    recomputed: float


class Engine:
    """One scheduler, stepped on a clock that the cost model moves."""

    def __init__(self, folder: Path, way: Way, cost: CostModel) -> None:
        self.clock = StepClock()
        self.cost = cost
        self.scheduler = build_scheduler(
            folder,
            way.policy,
            clock=self.clock,
            slots=cost.max_seqs,
            step_tokens=cost.max_batched_tokens,
            blocks=cost.kv_capacity_tokens // BLOCK_TOKENS,
        )
        if way.priority:
            self._by_priority()
        self.rule = Rule(self.scheduler)
        self.computed = 0
        self.needed = 0

    def _by_priority(self) -> None:
        """As `--scheduling-policy priority` starts it."""
        from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

        scheduler = self.scheduler
        scheduler.policy = SchedulingPolicy.PRIORITY
        scheduler.waiting = create_request_queue(scheduler.policy)
        for name in ("kv_holding_waiting", "skipped_waiting"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, create_request_queue(scheduler.policy))

    def step(self) -> list[tuple[str, int, bool]]:
        """One step: (request, new tokens, whether it is over)."""
        output = self.scheduler.schedule()
        prefill, decodes, context = 0, 0, 0
        for name, tokens in output.num_scheduled_tokens.items():
            live = self.scheduler.requests[name]
            if tokens == 1 and live.num_output_tokens:
                decodes += 1
                context += live.num_computed_tokens
            else:
                prefill += tokens
        self.computed += prefill + decodes
        result = self.rule.apply(output)
        if output.num_scheduled_tokens:
            self.clock.now += self.cost.duration_s(prefill, decodes, context)
        told = self.scheduler.update_from_output(output, result)
        return [
            (each.request_id, len(each.new_token_ids), each.finish_reason is not None)
            for client in told.values()
            for each in client.outputs
        ]


class Scenario:
    """One way over one list of arrivals."""

    def __init__(self, folder: Path, way: Way, cost: CostModel, arrivals: Sequence[Any], seconds: float) -> None:
        self.way = way
        self.seconds = seconds
        self.engine = Engine(folder, way, cost)
        self.coming = deque(arrivals if way.people else ())
        self.people: dict[str, Sent] = {}
        self.lengths: dict[str, int] = {}
        self.batch: set[str] = set()
        self.rng = Random(7)
        self.sent = self.batch_tokens = 0

    def add(self, name: str, output_tokens: int, *, flex: bool) -> None:
        tenant, tier = ("batch", "flex") if flex else ("people", "default")
        made = request(name, PROMPT_TOKENS, output_tokens, tenant=tenant, tier=tier)
        if self.way.priority:
            made.priority = int(flex)
        made.arrival_time = self.engine.clock.now
        self.lengths[name] = output_tokens
        self.engine.scheduler.add_request(made)

    def feed(self, begun: float) -> None:
        """What has arrived by now; and of the batch as much as keeps the engine supplied."""
        now = self.engine.clock.now
        while self.coming and begun + self.coming[0].at_s <= now:
            call = self.coming.popleft()
            self.people[call.id] = Sent(begun + call.at_s)
            self.add(call.id, call.output_tokens, flex=False)
        if not self.way.batch:
            return
        scheduler = self.engine.scheduler
        while self.wants_more(scheduler):
            self.sent += 1
            name = f"batch-{self.sent}"
            self.batch.add(name)
            self.add(name, output_length(self.rng), flex=True)

    def wants_more(self, scheduler: Any) -> bool:
        if self.way.cap is not None:
            return len(self.batch) < self.way.cap
        return bool(scheduler.get_request_counts()[1] < BACKLOG)

    def run(self) -> Outcome:
        engine, begun = self.engine, self.engine.clock.now
        while engine.clock.now - begun < self.seconds:
            self.feed(begun)
            if not engine.scheduler.has_requests():
                if not self.coming:
                    break
                engine.clock.now = max(engine.clock.now, begun + self.coming[0].at_s)
                continue
            self.take(engine.step())
        return self.outcome(engine.clock.now - begun)

    def take(self, told: list[tuple[str, int, bool]]) -> None:
        now = self.engine.clock.now
        for name, tokens, over in told:
            if name in self.batch:
                self.batch_tokens += tokens
                if over:
                    self.batch.remove(name)
            else:
                self.people[name].at.extend([now] * tokens)
            if over:
                self.engine.needed += PROMPT_TOKENS + self.lengths[name] - 1

    def outcome(self, seconds: float) -> Outcome:
        done = [sent for sent in self.people.values() if sent.at]
        gaps = [b - a for sent in done for a, b in zip(sent.at, sent.at[1:], strict=False)]
        running = sum(live.num_computed_tokens for live in self.engine.scheduler.requests.values())
        needed = self.engine.needed + running
        return Outcome(
            quantile([sent.at[0] - sent.due_s for sent in done], 0.99) if done else 0.0,
            quantile(gaps, 0.99) if gaps else 0.0,
            sum(len(sent.at) for sent in done),
            self.batch_tokens,
            seconds,
            max(0.0, self.engine.computed / needed - 1.0),
        )


def ways(cost: CostModel) -> Iterator[Way]:
    """What is compared."""
    yield Way("interactive alone", batch=False)
    yield Way("batch alone, stock vLLM", people=False)
    yield Way("service tiers", policy="fcfs")
    yield Way("vLLM `priority`", priority=True)
    yield Way("vLLM, 64 of the batch at a time", cap=cost.max_seqs // 4)


def outcomes(args: argparse.Namespace) -> dict[str, Outcome]:
    """Of each way, by its name."""
    cost = PRESETS[args.cost]
    arrivals = list(interactive(Random(args.seed), args.seconds, args.rounds))
    seconds = 2 * args.rounds * args.seconds
    seed_block_hashes()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(Path(folder))
        for way in ways(cost):
            sys.stderr.write(f"{way.name}\n")
            found[way.name] = Scenario(model, way, cost, arrivals, seconds).run()
    return found


def table(outcomes: dict[str, Outcome]) -> str:
    """One row for each way. What is left: the engine's own rate with a batch alone, less what people took of it."""
    alone, full = outcomes["interactive alone"], outcomes["batch alone, stock vLLM"]
    most_per_s = full.batch_tokens / full.seconds
    left_per_s = most_per_s - alone.people_tokens / alone.seconds
    rows = []
    for name, one in outcomes.items():
        batch_per_s = one.batch_tokens / one.seconds
        rows.append(
            [
                name,
                f"{one.ttft_p99_s * 1000:.0f} ({one.ttft_p99_s / alone.ttft_p99_s:.2f})",
                f"{one.gap_p99_s * 1000:.1f} ({one.gap_p99_s / alone.gap_p99_s:.2f})",
                f"{one.people_tokens / one.seconds:.0f}",
                f"{batch_per_s:.0f} ({batch_per_s / left_per_s:.2f})",
                f"{(one.people_tokens + one.batch_tokens) / one.seconds / (alone.people_tokens / alone.seconds):.2f}",
                f"{one.recomputed:.1%}",
            ]
        )
    head = ["way", "P99 TTFT, ms (÷ alone)", "P99 gap, ms (÷ alone)", "interactive tokens/s"]
    head += ["batch tokens/s (÷ what is left)", "all ÷ alone", "computed again"]
    return markdown(head, rows)
