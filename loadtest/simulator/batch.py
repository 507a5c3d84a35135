"""One engine's iterations without a model: continuous batching under the real policies.

Chunked prefill, KV that runs short, preemption by recompute of what the prefix cache has lost meanwhile. Pure
bookkeeping in the owner's time, so the fake engine runs it against the clock and a simulator in virtual time.
The order of an iteration follows vLLM's V1 scheduler and our plug-in in it: running sequences first, then whoever
waits, while tokens, slots and KV last; nobody is taken in an iteration in which KV was short for those that run.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice

from loadtest.simulator.costmodel import CostModel
from loadtest.simulator.kv_blocks import KvBlocks
from scheduler.batching import prompt_cap
from scheduler.jobs import Job, Outcome, Tier
from scheduler.kept_blocks import Kept
from scheduler.memory_peak import FuturePeak, Running
from scheduler.policy import Policy
from scheduler.slack import StepLoad
from scheduler.step_cost import pairs_of
from scheduler.step_limit import LOOKED_AT, Batch, Limit, Prompt, StepLimit
from scheduler.tiers import TieredLanes

_MOST_BLOCKS = 1 << 20  # of one sequence: keeps the ids of different ones apart
_OWN = 1 << 80  # above the ids of all prompts


@dataclass(slots=True, eq=False)
class BatchEntry:
    """A job that waits or runs.

    tokens: of its prompt and of what it has said.
    computed: how many of them are in KV, or will be when this iteration ends; the last one said is not.
    prompt: ids of its prompt's blocks, where they are known. own: the id of its first block where they are not.
    transferred: the KV of its prompt comes over the wire from a prefill worker, so nothing is computed.
    blocks: what it holds, empty while it waits. started: it has had a slot.
    """

    job: Job
    tokens: int
    prompt: Seq[int]
    own: int
    transferred: bool
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    started: bool = False

    def ids(self, first: int, last: int) -> list[int]:
        """Of its blocks from `first` up to `last`, which is not one of them."""
        known = len(self.prompt)
        return [self.prompt[at] if at < known else self.own + at for at in range(first, last)]


@dataclass(slots=True, eq=False)
class Iteration:
    """What one iteration computes. duration_s: how long it takes; producing: who has one more token at its end.

    steady: nothing but decoding by all that run, so the next iterations are alike until one arrives, ends or needs
    memory that is not there. began_at, load: for who learns what iterations cost, if this is one to learn from.
    """

    duration_s: float
    producing: Seq[BatchEntry]
    prefill_tokens: int
    steady: bool = False
    began_at: float = 0.0
    load: StepLoad | None = None


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


@dataclass(slots=True)
class _Step:
    """An iteration while it is put together.

    left: tokens that may still be computed. chunks: how many of each. kv_tokens: read by those that decode. pairs: of a
    prompt token that is computed and one before it.
    started: who comes into the batch. short: there was too little KV for those that run.
    cap: most tokens that one sequence may take, None for no cap.
    """

    left: int
    cap: int | None = None
    chunks: dict[BatchEntry, int] = field(default_factory=dict)
    producing: list[BatchEntry] = field(default_factory=list)
    decoding: int = 0
    prefill_tokens: int = 0
    kv_tokens: int = 0
    pairs: float = 0.0
    transfer_tokens: int = 0
    started: int = 0
    short: bool = False

    def add(self, entry: BatchEntry, chunk: int) -> None:
        """So many tokens of it are computed."""
        computed = entry.computed
        self.chunks[entry] = chunk
        self.left -= chunk
        if chunk == 1 and computed:
            self.decoding += 1
            self.kv_tokens += computed
        else:
            self.prefill_tokens += chunk
            self.pairs += pairs_of(chunk, computed)
        entry.computed = computed = computed + chunk
        if computed == entry.tokens:
            self.producing.append(entry)

    def load(self) -> StepLoad:
        """As an engine that times its steps sees it."""
        load = StepLoad()
        for entry, chunk in self.chunks.items():
            if chunk == 1 and entry.job.output_tokens:
                load.sequences += 1
                load.context += entry.computed
            else:
                load.add_prompt(chunk, entry.computed - chunk)
        return load

    @property
    def flex_tokens(self) -> int:
        """Of the tokens that are computed, those of the flex tier."""
        return sum(chunk for entry, chunk in self.chunks.items() if entry.job.tier is Tier.FLEX)

    def drop(self, entry: BatchEntry) -> None:
        """It is not computed after all, if it was going to be."""
        chunk = self.chunks.pop(entry, 0)
        if not chunk:
            return
        if entry.computed == entry.tokens:
            self.producing.remove(entry)
        entry.computed -= chunk
        self.left += chunk
        if chunk == 1 and entry.computed:
            self.decoding -= 1
            self.kv_tokens -= entry.computed
        else:
            self.prefill_tokens -= chunk
            self.pairs -= pairs_of(chunk, entry.computed)


class ContinuousBatch:
    """Everything one engine holds: what waits (in `lanes`) and what runs."""

    def __init__(self, cost: CostModel, lanes: TieredLanes, limit: StepLimit | None = None) -> None:
        """limit: of prompts, by the answers that run beside them."""
        self.cost = cost
        self.lanes = lanes
        self._limit = limit
        lanes.feed(cost.max_seqs)
        self.counts = Counts()
        self._size = cost.block_tokens
        self._all = max(1, cost.kv_capacity_tokens // self._size)
        self._kv = KvBlocks(self._all)
        self._kept: Kept[int] = Kept(self._all, self._size, self._kv.has, self._kv.free_anew)
        self._cached = cost.prefix_block_tokens > 0
        self._entries: dict[Job, BatchEntry] = {}
        self._running: dict[Job, BatchEntry] = {}
        self._arrived = 0
        self._memory_bound = False
        self._peak = self._future_peak()

    def _future_peak(self) -> FuturePeak | None:
        order = self.lanes.policy.order
        return FuturePeak(order.rest_tokens, 1 / self._size) if order.admission == "peak" else None

    def switch(self, policy: Policy, now: float) -> None:
        """As `Lanes.switch`."""
        self.lanes.switch(policy, now)
        self._peak = self._future_peak()

    def running(self) -> int:
        return len(self._running)

    def waiting(self) -> int:
        return len(self.lanes)

    @property
    def kv_used_tokens(self) -> int:
        """Tokens in blocks that are held, in whole blocks."""
        return (self._all - self._kv.free) * self._size

    def kv_usage(self) -> float:
        """Share of the KV capacity in use, 0 to 1."""
        return min(1.0, 1.0 - self._kv.free / self._all)

    def keep(self, tokens: int) -> None:
        """KV that belongs to no job here takes room from here on, or, below zero, no longer does."""
        blocks = self._blocks_for(abs(tokens))
        if tokens > 0:
            self._kv.take(blocks)
        else:
            self._kv.let_go([KvBlocks.NAMELESS] * blocks)

    def add(
        self, job: Job, now: float, *, transferred: bool = False, passed_on: bool = False, blocks: Seq[int] = ()
    ) -> None:
        """A job arrives. ValueError if it can never fit.

        transferred: a prefill worker has computed its prompt. passed_on: and made the first token, which is out
        already. blocks: ids of its prompt's full blocks, equal where two
        prompts begin alike; without them it shares nothing with others.
        """
        if job.prompt_tokens < 1:
            raise ValueError("A prompt has at least one token.")
        if job.prompt_tokens + 1 > self.cost.kv_capacity_tokens:
            raise ValueError(f"A prompt of {job.prompt_tokens} tokens exceeds the KV capacity.")
        self._arrived += 1
        own = _OWN + self._arrived * _MOST_BLOCKS
        self._entries[job] = BatchEntry(job, job.prompt_tokens + job.output_tokens, blocks, own, transferred)
        if passed_on and self._limit is not None:
            self._limit.made_elsewhere(job, now)
        self.lanes.push(job, now)

    def schedule(self, now: float) -> Iteration | None:
        """Choose the next iteration, or None when nothing can run."""
        barred: set[Job] = set()
        if len(self.lanes):
            self._note_progress()
            barred = self._displace(now)
        limit = self._step_limit(now)
        cap = self._prompt_cap(limit, now) if len(self.lanes) else None
        if limit is not None:
            cap = limit.each_tokens if cap is None else min(cap, limit.each_tokens)
        most = self.cost.max_batched_tokens if limit is None else limit.step_tokens
        step = _Step(most, cap=cap)
        self._go_on(step, now)
        if not step.short and len(self.lanes):
            self._take_in(step, barred, now)
        self._kept.after(most - step.left, self.lanes.__contains__)
        self._memory_bound = not barred and step.left > 0 and self._stopped_at_memory(step, now)
        if not step.chunks and not step.producing:
            # All that it did was to send somebody away: vLLM's next iteration follows at once.
            return self.schedule(now) if step.short or barred else None
        flex_tokens = step.flex_tokens if self.lanes.running(Tier.FLEX) else 0
        self.lanes.stepped(now, most - step.left - flex_tokens)
        duration_s = self.cost.duration_s(
            step.prefill_tokens, step.decoding, step.kv_tokens, step.transfer_tokens, step.started, step.pairs
        )
        load = self._to_learn_from(step)
        steady = not barred and self._steady(step)
        return Iteration(duration_s, step.producing, step.prefill_tokens, steady, now, load)

    def _step_limit(self, now: float) -> Limit | None:
        """The bound on what prompts take of the next iteration; those that are read then come last in it."""
        if self._limit is None or not self._running:
            return None
        batch, reading, lanes = Batch(), [], self.lanes
        for job, entry in self._running.items():
            unread = entry.tokens - entry.computed
            if unread > 1:
                reading.append(job)
                if job.tier is not Tier.FLEX or lanes.is_reserved(job):
                    batch.prompts.append(Prompt(unread, entry.computed))
            else:
                batch.answers.append((job, job.output_tokens))
                batch.context += entry.computed
        if not reading and not len(lanes):
            return None
        self._put_waiting_into(batch)
        limit = self._limit.of(batch, now, self.cost.max_batched_tokens)
        if limit is not None:
            for job in reading:
                self._running[job] = self._running.pop(job)
        return limit

    def _put_waiting_into(self, batch: Batch) -> None:
        for job in islice(self.lanes.waiting_jobs(), LOOKED_AT):  # in order of arrival, as in the plug-in
            if job.tier is Tier.FLEX and not self.lanes.is_due(job):
                continue
            if self._entries[job].transferred or not job.restart_tokens:
                batch.answers.append((job, job.output_tokens))
                batch.arrived += 1
            else:
                batch.waiting.append(Prompt(job.restart_tokens, job.cached_tokens))

    def _to_learn_from(self, step: _Step) -> StepLoad | None:
        if self._limit is None or step.transfer_tokens:
            return None
        load = step.load()
        reads = load.prompt_tokens + load.sequences > len(step.chunks)
        return load if self._limit.learns_from(reads=reads) else None

    def _steady(self, step: _Step) -> bool:
        alone = not (step.prefill_tokens or step.transfer_tokens or step.started or step.short)
        waits = len(self.lanes) > 0 and not self.lanes.keeps_order
        # One token of a prompt may be all that the limit gives it: that makes nobody a token, and is not repeated.
        decoding = step.decoding == len(step.producing) == len(self._running)
        return alone and 0 < step.left and decoding and not waits

    def repeats(self, iteration: Iteration) -> int:
        """How many iterations after a steady one are sure to find memory for all: no more than needs be looked at."""
        return max(0, self._kv.free // len(iteration.producing) - 1) * self._size if iteration.steady else 0

    def durations_s(self, iteration: Iteration, repeats: int) -> list[float]:
        """How long each of so many iterations after a steady one, which has just been scheduled, takes."""
        sequences = len(iteration.producing)
        kv_tokens = sum(entry.computed for entry in iteration.producing) - sequences
        last = kv_tokens + repeats * sequences
        return [self.cost.duration_s(0, sequences, kv) for kv in range(kv_tokens + sequences, last + 1, sequences)]

    def repeat(self, iteration: Iteration, ends: Seq[float]) -> None:
        """A steady iteration and those that repeat it end at these times, each time but not with the last of them all.

        What `complete` and `schedule` would do in turns, so many times: the next iteration is under way afterwards.
        """
        self._learn(iteration, ends[0])
        times, size = len(ends), self._size
        for entry in iteration.producing:
            entry.tokens += times
            entry.computed += times
            more = self._blocks_for(entry.computed) - len(entry.blocks)
            if more:
                self._kv.take(more)
                entry.blocks += [KvBlocks.NAMELESS] * more
            if entry.computed % size < times:
                self._name(entry)
        self.counts.generation_tokens += times * len(iteration.producing)
        self._kept.after(times * len(iteration.producing), self.lanes.__contains__)
        self._serve(iteration, ends)

    def _serve(self, iteration: Iteration, ends: Seq[float]) -> None:
        """Charges a token for each of these times; where the lanes keep a shadow account, it follows step by step."""
        jobs = [entry.job for entry in iteration.producing]
        serve = self.lanes.serve
        if self.lanes.shadow is None:
            for job in jobs:
                serve(job, len(ends), ends[-1])
            return
        for end in ends:
            for job in jobs:
                serve(job, 1, end)
            self.lanes.stepped(end, len(jobs))

    def complete(self, iteration: Iteration, now: float) -> list[Job]:
        """The iteration has ended: charge it, and name the jobs that have one more output token."""
        self.counts.prompt_tokens += iteration.prefill_tokens
        self._learn(iteration, now)
        jobs = []
        serve, live = self.lanes.serve, self._running
        for entry in iteration.producing:
            job = entry.job
            if job in live:  # not aborted meanwhile
                entry.tokens += 1
                serve(job, 1, now)
                jobs.append(job)
        if self._limit is not None:
            for job in jobs:
                self._limit.made(job, now)
        self.counts.generation_tokens += len(jobs)
        return jobs

    def _learn(self, iteration: Iteration, ended_at: float) -> None:
        """How long it took, once: those that repeat it end later."""
        load, iteration.load = iteration.load, None
        if load is not None and self._limit is not None:
            self._limit.model.learn(load, ended_at - iteration.began_at)

    def finish(self, job: Job, outcome: Outcome, now: float) -> None:
        """A job leaves, from wherever it is. KeyError if it is not here."""
        entry = self._entries.pop(job)
        self.lanes.finish(job, outcome, now)
        if self._limit is not None:
            self._limit.ended(job)
        self._note_left()
        if self._running.pop(job, None) is not None:
            self._kv.let_go(entry.blocks)
        self.counts.finished[outcome.value] = self.counts.finished.get(outcome.value, 0) + 1

    def _go_on(self, step: _Step, now: float) -> None:
        """Those that run compute their next token, or the next part of their prompt."""
        size = self._size
        for entry in tuple(self._running.values()):
            if step.left <= 0:
                return
            if step.short and entry.job not in self._running:
                continue
            end = entry.tokens
            chunk = end - entry.computed
            if chunk > step.left or (step.cap is not None and chunk > step.cap):
                chunk = step.left if step.cap is None else min(step.left, step.cap)
                end = entry.computed + chunk
            if end > len(entry.blocks) * size and not self._grow(entry, end, step, now):
                return
            step.add(entry, chunk)
            if end % size < chunk:
                self._name(entry)

    def _grow(self, entry: BatchEntry, tokens: int, step: _Step, now: float) -> bool:
        """Gives it blocks for so many tokens, if need be those of the policy's worst; False if that is itself.

        One that is alone takes more than there is, for it could never end otherwise.
        """
        more = self._blocks_for(tokens) - len(entry.blocks)
        while more > self._kv.free and len(self._running) > 1:
            victim = self.lanes.victim(now)
            if victim is None:
                break
            step.short = True
            step.drop(self._running[victim])
            self._preempt(victim, now)
            if victim is entry.job:
                return False
        self._kv.take(more)
        entry.blocks += [KvBlocks.NAMELESS] * more
        return True

    def _take_in(self, step: _Step, barred: set[Job], now: float) -> None:
        """Whoever waits and fits. barred: has just been displaced, and is not taken back within the same iteration."""
        while step.left > 0 and len(self._running) < self.cost.max_seqs:
            job = self.lanes.peek(now)
            if job is None or job in barred:
                return
            entry = self._entries[job]
            shared = self._shared(entry)
            if self._running and not (self._stays_within(entry, shared) and self._room(entry, shared) <= self._kv.free):
                return
            self.lanes.pop(now)
            self._running[job] = entry
            self._reuse(entry, shared, now)
            step.started += 1
            self._begin(entry, step, now)

    def _room(self, entry: BatchEntry, shared: Seq[int]) -> int:
        """Blocks that it takes from the free ones when it starts."""
        return self._blocks_for(entry.tokens) - len(shared) + self._kv.idle(shared)

    def _stays_within(self, entry: BatchEntry, shared: Seq[int]) -> bool:
        """Whether the batch is expected to fit into memory to its end with this one, if the policy asks for that."""
        if self._peak is None:
            return True
        running = [
            Running(one.job, len(one.blocks), max(len(one.blocks), self._blocks_for(one.tokens)))
            for one in self._running.values()
        ]
        free, wanted = self._kv.free, self._room(entry, shared)
        return self._peak.fits(entry.job, running, free=free, used=self._all - free, wanted=lambda: (wanted,))

    def _stopped_at_memory(self, step: _Step, now: float) -> bool:
        """Whether the head of the line did not start because there was too little KV for it."""
        job = self.lanes.peek(now)
        if job is None or (not step.short and len(self._running) >= self.cost.max_seqs):
            return False
        entry = self._entries[job]
        lacks = self._room(entry, self._shared(entry)) > self._kv.free
        return lacks or (self._peak is not None and self._peak.holds_back(job))

    def _begin(self, entry: BatchEntry, step: _Step, now: float) -> None:
        if entry.transferred:
            entry.transferred = False  # but what is preempted is computed
            step.transfer_tokens += entry.tokens
            self._grow(entry, entry.tokens, step, now)
            entry.computed = entry.tokens
            step.producing.append(entry)
        else:
            chunk = min(entry.tokens - entry.computed, step.left)
            if step.cap is not None:
                chunk = min(chunk, step.cap)
            self._grow(entry, entry.computed + chunk, step, now)
            step.add(entry, chunk)
        self._name(entry)

    def _shared(self, entry: BatchEntry) -> list[int]:
        """Its first blocks that are still there; at least one token is computed, as in vLLM, to have logits."""
        if not self._cached or entry.transferred:
            return []
        most = (entry.tokens - 1) // self._size
        ids = entry.ids(0, most if entry.started else min(most, len(entry.prompt)))
        return ids[: self._kv.known(ids)]

    def _reuse(self, entry: BatchEntry, shared: list[int], now: float) -> None:
        self._kv.hold(shared)
        entry.blocks = shared
        entry.computed = len(shared) * self._size
        if entry.started or not entry.prompt:
            entry.started = True
            return
        entry.started = True
        self.counts.prefix_queries += entry.tokens
        self.counts.prefix_hits += entry.computed
        self.counts.prompt_tokens += entry.computed
        if entry.computed:
            self.lanes.computed(entry.job, entry.computed, now)

    def _name(self, entry: BatchEntry) -> None:
        """Its blocks that are full now can be found by others."""
        if not self._cached:
            return
        full = entry.computed // self._size
        first = full
        while first and entry.blocks[first - 1] == KvBlocks.NAMELESS:
            first -= 1
        for at, block in zip(range(first, full), entry.ids(first, full), strict=True):
            entry.blocks[at] = self._kv.name(block)

    def _note_progress(self) -> None:
        """Tells the policy how far prompts that are read over several iterations have come."""
        for entry in self._running.values():
            if not entry.job.output_tokens and entry.computed < entry.tokens:
                self.lanes.read(entry.job, entry.computed)

    def _displace(self, now: float) -> set[Job]:
        """Makes room for the heads of the line that the policy wants to run in place of those who do."""
        barred: set[Job] = set()
        if not (self._memory_bound or len(self._running) >= self.cost.max_seqs):
            return barred
        tokens, heads = self.cost.max_batched_tokens, []
        while tokens > 0 and (swap := self.lanes.displacement(now, self._running.__contains__)) is not None:
            head, victim = swap
            self.counts.displaced += 1
            named = [block for block in self._running[victim].blocks if block != KvBlocks.NAMELESS]
            self._kept.displaced(victim, named)
            self._preempt(victim, now)
            barred.add(victim)
            heads.append(self.lanes.pop(now))
            tokens -= max(1, head.restart_tokens)
            if self._memory_bound:
                break
        for head in reversed(heads):
            self.lanes.put_back(head, now)
        return barred

    def _prompt_cap(self, limit: Limit | None, now: float) -> int | None:
        """Tokens that a prompt may take, so that a better-ranked head starts in this iteration; None: no cap."""
        if self._memory_bound or len(self._running) >= self.cost.max_seqs:
            return None
        reading = [entry for entry in self._running.values() if entry.tokens - entry.computed > 1]
        head = self.lanes.outranks(now, [entry.job for entry in reading])
        if head is None:
            return None
        unread = [entry.tokens - entry.computed for entry in reading]
        if limit is not None:
            return prompt_cap(limit.prompt_tokens, 0, unread, head.restart_tokens)
        return prompt_cap(self.cost.max_batched_tokens, len(self._running) - len(reading), unread, head.restart_tokens)

    def _preempt(self, job: Job, now: float) -> None:
        entry = self._running.pop(job)
        self._kv.let_go(entry.blocks)
        entry.blocks = []
        entry.computed = 0
        self._note_left()
        self.lanes.preempt(job, now)
        self.counts.preemptions += 1

    def _note_left(self) -> None:
        if self._peak is not None:
            self._peak.left()

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._size)
