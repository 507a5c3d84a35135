"""One engine's iterations without a model: continuous batching under the real policies.

Chunked prefill, KV that runs short, preemption by recompute. Pure bookkeeping in the owner's time, so the fake engine
runs it against the clock and a simulator in virtual time.
The order of an iteration follows vLLM's V1 scheduler: running sequences first, then whoever waits, while tokens,
slots and KV last; nobody is taken in an iteration that had to preempt.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from loadtest.costmodel import CostModel
from loadtest.prefix_cache import PrefixCache
from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes


@dataclass(slots=True, eq=False)
class Running:
    """A job that holds a slot.

    to_compute: tokens (prompt, and after a preemption also output) that must be in KV before the next output token.
    computed: how many of them are.
    transferred: their KV comes over the wire from a prefill worker, so nothing is computed.
    """

    job: Job
    to_compute: int
    computed: int = 0
    transferred: bool = False

    @property
    def decoding(self) -> bool:
        return self.computed >= self.to_compute


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration computes. duration_s: how long it takes; producing: who has one more token at its end."""

    duration_s: float
    producing: Seq[Running]
    prefill_tokens: int


@dataclass(slots=True)
class Counts:
    """Totals since the start, for metrics."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    displaced: int = 0  # those of the preemptions that made room for a waiting job; the others, for memory
    prefix_queries: int = 0
    prefix_hits: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class ContinuousBatch:
    """Everything one engine holds: what waits (in `lanes`) and what runs."""

    def __init__(self, cost: CostModel, lanes: Lanes) -> None:
        self.cost = cost
        self.lanes = lanes
        self.counts = Counts()
        self.kv_used_tokens = 0
        self._running: dict[Job, Running] = {}
        self._transferred: set[Job] = set()
        self._blocks: dict[Job, Seq[int]] = {}
        cached = cost.prefix_block_tokens > 0
        self._prefixes = PrefixCache(cost.kv_capacity_tokens, cost.prefix_block_tokens) if cached else None

    def running(self) -> int:
        return len(self._running)

    def waiting(self) -> int:
        return len(self.lanes)

    def kv_usage(self) -> float:
        """Share of the KV capacity in use, 0 to 1."""
        return min(1.0, self.kv_used_tokens / self.cost.kv_capacity_tokens)

    def add(self, job: Job, now: float, *, transferred: bool = False, blocks: Seq[int] = ()) -> None:
        """A job arrives. ValueError if it can never fit.

        transferred: a prefill worker has computed its prompt. blocks: hashes of its prompt's blocks.
        """
        if job.prompt_tokens < 1:
            raise ValueError("A prompt has at least one token.")
        if job.prompt_tokens + 1 > self.cost.kv_capacity_tokens:
            raise ValueError(f"A prompt of {job.prompt_tokens} tokens exceeds the KV capacity.")
        if transferred:
            self._transferred.add(job)
        if blocks:
            self._blocks[job] = blocks
        self.lanes.push(job, now)

    def schedule(self, now: float) -> Iteration | None:
        """Choose the next iteration, or None when nothing can run."""
        self._displace(now)
        preempted = self._make_room_to_decode(now)
        budget = self.cost.max_batched_tokens
        producing = [running for running in self._running.values() if running.computed >= running.to_compute]
        decoding = len(producing)
        budget -= decoding
        prefilled = 0
        if decoding < len(self._running):
            for running in self._running.values():
                if running.computed < running.to_compute:
                    prefilled += self._prefill(running, budget - prefilled, producing)
        transfer_tokens = 0
        while not preempted and prefilled < budget and len(self._running) < self.cost.max_seqs:
            taken = self._take(now)
            if taken is None:
                break
            if taken.transferred:
                transfer_tokens += taken.to_compute
                taken.computed = taken.to_compute
                producing.append(taken)
            else:
                prefilled += self._prefill(taken, budget - prefilled, producing)
        if not producing and not prefilled:
            return None
        kv_tokens = self.kv_used_tokens if decoding else 0
        duration_s = self.cost.duration_s(prefilled, decoding, kv_tokens, transfer_tokens)
        return Iteration(duration_s, producing, prefilled)

    def complete(self, iteration: Iteration, now: float) -> list[Job]:
        """The iteration has ended: charge it, and name the jobs that have one more output token."""
        self.counts.prompt_tokens += iteration.prefill_tokens
        jobs = []
        serve, live = self.lanes.serve, self._running
        for running in iteration.producing:
            job = running.job
            if live.get(job) is running:  # not aborted meanwhile
                running.to_compute += 1
                running.computed = running.to_compute
                serve(job, 1, now)
                jobs.append(job)
        self.kv_used_tokens += len(jobs)
        self.counts.generation_tokens += len(jobs)
        return jobs

    def finish(self, job: Job, outcome: Outcome, now: float) -> None:
        """A job leaves, from wherever it is. KeyError if it is not here."""
        self.lanes.finish(job, outcome, now)
        self._transferred.discard(job)
        self._blocks.pop(job, None)
        running = self._running.pop(job, None)
        if running is not None:
            self._free(running)
        self.counts.finished[outcome.value] = self.counts.finished.get(outcome.value, 0) + 1

    def _take(self, now: float) -> Running | None:
        head = self.lanes.peek(now)
        if head is None:
            return None
        to_compute = head.prompt_tokens + head.output_tokens
        # One token more than the prompt: its first output token follows in the next iteration.
        if self.kv_used_tokens + to_compute + 1 > self.cost.kv_capacity_tokens and self._running:
            return None
        job = self.lanes.pop(now)
        running = Running(job, to_compute, transferred=job in self._transferred)
        self._transferred.discard(job)
        self._running[job] = running
        self.kv_used_tokens += to_compute
        self._reuse(running, now)
        return running

    def _reuse(self, running: Running, now: float) -> None:
        """Skip what the prefix cache holds; at least one token is computed, as in vLLM, to have logits."""
        blocks = self._blocks.get(running.job)
        if self._prefixes is None or blocks is None:
            return
        running.computed = min(self._prefixes.match(blocks), running.to_compute - 1)
        self._prefixes.keep(blocks)
        self.counts.prefix_queries += running.job.prompt_tokens
        self.counts.prefix_hits += running.computed
        self.counts.prompt_tokens += running.computed
        if running.computed:
            self.lanes.computed(running.job, running.computed, now)

    def _prefill(self, running: Running, budget: int, producing: list[Running]) -> int:
        chunk = min(budget, running.to_compute - running.computed)
        if chunk <= 0:
            return 0
        running.computed += chunk
        if running.computed >= running.to_compute:
            producing.append(running)
        return chunk

    def _displace(self, now: float) -> None:
        while len(self._running) >= self.cost.max_seqs:
            swap = self.lanes.displacement(now)
            if swap is None:
                return
            self.counts.displaced += 1
            self._preempt(swap[1], now)

    def _make_room_to_decode(self, now: float) -> bool:
        """Preempt the policy's worst until every decoding sequence has room for one more token."""
        preempted = False
        while self.kv_used_tokens + len(self._running) > self.cost.kv_capacity_tokens and len(self._running) > 1:
            victim = self.lanes.victim(now)
            if victim is None:
                break
            self._preempt(victim, now)
            preempted = True
        return preempted

    def _preempt(self, job: Job, now: float) -> None:
        self._free(self._running.pop(job))
        self.lanes.preempt(job, now)
        self.counts.preemptions += 1

    def _free(self, running: Running) -> None:
        self.kv_used_tokens -= running.to_compute
