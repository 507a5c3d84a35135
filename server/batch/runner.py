"""Runs batches: takes their leases, sends their lines where engines have room, writes results before counting them.

A line's life: open in the store, in flight here, its result in the store. A gateway that is killed leaves lines open
that were in flight; they run once more, and whoever records a line's result first is the one who counts.
"""

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.batch.batches import Batches
from server.batch.content import Ready, Reply, answered, not_run, read
from server.batch.files import NoSpace
from server.batch.objects import Batch, BatchLine, LineError, Result, Status
from server.batch.store import LeaseLost
from server.batch.validation import Checker

log = logging.getLogger("evenhand.batch")

TICK_S = 0.25  # between two looks at room, status and deadline
LEASE_S = 5.0
IDLE_S = 5.0  # between two looks for batches that another process has made
SWEEP_S = 3600.0
READ_AHEAD = 512  # lines in memory, ordered by their prompts so that equal beginnings are computed once
BURST = 32  # lines that start before the queue is looked at again
PAGE = 1000
RETRY_S = (1.0, 30.0)  # the first pause of a line that found no room, and the longest
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # worth another try: nothing is wrong with the request
OUTCOMES = ("answered", "failed", "retried")
MOST_TRIES = 8  # of a line that engines fail on; refusals for want of room do not count


class Engines(Protocol):
    """Where lines run: the gateway, without its sockets."""

    def served(self, tenant: str, model: str) -> bool:
        """Whether a tenant may use a model that is served here."""

    def room(self, model: str, running: int) -> int:
        """How many more lines may start now, beside those that run already."""

    async def ask(self, tenant: str, endpoint: str, body: bytes, request_id: str) -> Reply:
        """One request. Never raises, but for cancellation."""


@dataclass(slots=True)
class _Work:
    """A batch that is being run.

    ready: lines that may start, the next one last. later: when lines that are to be tried again are due.
    results: answered, not yet recorded. after: the last line that was read from the store.
    """

    batch: Batch
    ready: list[Ready] = field(default_factory=list)
    later: list[tuple[float, Ready]] = field(default_factory=list)
    running: dict[asyncio.Task[None], Ready] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    tries: dict[int, int] = field(default_factory=dict)
    after: int = 0
    exhausted: bool = False

    @property
    def done(self) -> bool:
        return self.exhausted and not (self.ready or self.later or self.running or self.results)


class Runner(Collector):
    """Runs all batches of the store that no other gateway runs. owner: this process's name among them."""

    def __init__(self, batches: Batches, engines: Engines, owner: str, clock: Callable[[], float]) -> None:
        self.batches = batches
        self.engines = engines
        self.owner = owner
        self.clock = clock
        self.lines: Counter[str] = Counter()
        self.in_flight = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._swept_at = float("-inf")

    async def run(self) -> None:
        """Runs until it is cancelled; lines in flight are then given up, and stay open in the store."""
        try:
            while True:
                await self._look()
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self.batches.changed.wait()
                    self.batches.changed.clear()
                except TimeoutError:
                    continue
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _look(self) -> None:
        for batch in await self.batches.running():
            if batch.id not in self._tasks and await self._lease(batch.id):
                task = self._tasks[batch.id] = asyncio.create_task(self._drive(batch.id), name=f"run {batch.id}")
                task.add_done_callback(partial(self._ended, batch.id))
        if self.clock() - self._swept_at > SWEEP_S:
            self._swept_at = self.clock()
            if removed := await self.batches.sweep():
                log.info("removed %d files past their expiry", removed)

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[batch_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("batch %s stopped and will be taken up again: %r", batch_id, error, exc_info=error)

    async def _lease(self, batch_id: str) -> bool:
        return await self.batches.call(self.batches.store.lease, batch_id, self.owner, self.batches.wall(), LEASE_S)

    async def _drive(self, batch_id: str) -> None:
        """From wherever the batch stands to its end, or until another gateway has its lease."""
        steps = {
            Status.VALIDATING: self._validate,
            Status.IN_PROGRESS: self._work,
            Status.CANCELLING: self._cancel,
            Status.FINALIZING: self._finalize,
        }
        while (batch := await self._renewed(batch_id)) is not None and batch.status in steps:
            try:
                await steps[batch.status](batch)
            except (NoSpace, sqlite3.OperationalError) as error:
                log.error("batch %s pauses: %s", batch_id, error)
                await asyncio.sleep(IDLE_S)
            except LeaseLost:
                log.warning("another gateway runs batch %s now", batch_id)
                return

    async def _renewed(self, batch_id: str) -> Batch | None:
        """The batch as it stands, None once another gateway runs it."""
        if not await self._lease(batch_id):
            return None
        return await self.batches.call(self.batches.store.batch, batch_id)

    async def _moved(self, batch: Batch, status: Status, **changes: object) -> bool:
        """Whether the batch was still as it is known here; if not, it was cancelled or is another gateway's."""
        moved = batch.moved(status, int(self.batches.wall()), **changes)
        return await self.batches.call(self.batches.store.update, moved, batch.status, self.owner)

    # validating
    async def _validate(self, batch: Batch) -> None:
        checker = Checker(
            batch.endpoint, self.batches.settings.max_requests, partial(self.engines.served, batch.tenant)
        )
        try:
            file = self.batches.files.open(batch.input_file_id)
        except FileNotFoundError:
            gone = LineError("file_not_found", f"The input file {batch.input_file_id} was deleted.")
            await self._moved(batch, Status.FAILED, errors=(gone,))
            return
        with file:
            lines = checker.lines(file)
            while page := await self.batches.call(_page, lines):
                await self.batches.call(self.batches.store.add_lines, batch.id, self.owner, page)
                if not await self._lease(batch.id):
                    raise LeaseLost(batch.id)
        if checker.errors:
            await self.batches.call(self.batches.store.forget_lines, batch.id)
            await self._moved(batch, Status.FAILED, errors=tuple(checker.errors))
        else:
            await self._moved(batch, Status.IN_PROGRESS, total=checker.count)

    # in progress
    async def _work(self, batch: Batch) -> None:
        """Runs lines until all have results, the window ends, or somebody cancels the batch."""
        work = _Work(batch)
        looked_at = self.clock()
        try:
            while not work.done:
                await self._read_ahead(work)
                await self._start(work)
                await self._wait(work)
                await self._flush(work)
                if self.clock() - looked_at < TICK_S:
                    continue
                looked_at = self.clock()
                now = await self._renewed(batch.id)
                if now is None:
                    raise LeaseLost(batch.id)
                if now.status is not Status.IN_PROGRESS:
                    return
                if self.batches.wall() >= batch.expires_at:
                    await self._give_up(work)
                    await self._close(now, "batch_expired", "The completion window ended before this request ran.")
                    return
            await self._moved(batch, Status.FINALIZING)
        finally:
            await self._give_up(work)

    async def _read_ahead(self, work: _Work) -> None:
        now = self.clock()
        due = [ready for at, ready in work.later if at <= now]
        work.later = [(at, ready) for at, ready in work.later if at > now]
        work.ready += due
        if work.ready or work.exhausted:
            return
        store, files = self.batches.store, self.batches.files
        lines = await self.batches.call(store.open_lines, work.batch.id, work.after, READ_AHEAD)
        work.exhausted = len(lines) < READ_AHEAD
        if lines:
            work.after = lines[-1].number
            with files.open(work.batch.input_file_id) as file:
                work.ready = await self.batches.call(read, file.fileno(), lines)

    async def _start(self, work: _Work) -> None:
        """Starts as many lines as there is room for, in bursts, so that each sees what the ones before have taken."""
        while work.ready:
            room = min(BURST, self.engines.room(work.ready[-1].model, len(work.running)))
            if room <= 0 or len(work.results) > PAGE:
                return
            for _ in range(min(room, len(work.ready))):
                ready = work.ready.pop()
                task = asyncio.create_task(self._line(work, ready), name=f"line {ready.line.number}")
                work.running[task] = ready
                task.add_done_callback(partial(_finished, work))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _wait(self, work: _Work) -> None:
        if not work.running:
            if not work.done and not (work.ready and self.engines.room(work.ready[-1].model, 0) > 0):
                await asyncio.sleep(TICK_S)
            return
        await asyncio.wait(work.running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)

    async def _line(self, work: _Work, ready: Ready) -> None:
        """One request, and what becomes of its answer."""
        batch, line = work.batch, ready.line
        request_id = f"batch_req_{batch.id[6:]}_{line.number}"
        self.in_flight += 1
        try:
            reply = await self.engines.ask(batch.tenant, batch.endpoint, ready.body, request_id)
        finally:
            self.in_flight -= 1
        tries = work.tries.get(line.number, 0)
        if reply.status in AGAIN and (reply.status in (429, 503) or tries + 1 < MOST_TRIES):
            work.tries[line.number] = tries + 1
            self.lines["retried"] += 1
            pause_s = min(RETRY_S[1], RETRY_S[0] * 2 ** min(tries, 5))
            work.later.append((self.clock() + max(pause_s, min(RETRY_S[1], reply.retry_after_s or 0.0)), ready))
            return
        work.tries.pop(line.number, None)
        ok = 200 <= reply.status < 300
        self.lines["answered" if ok else "failed"] += 1
        work.results.append(Result(line.number, ok, answered(line, reply)))

    async def _flush(self, work: _Work) -> None:
        """Records what was answered. It stays in memory, and no further line starts, while the disk is full."""
        if not work.results:
            return
        results = work.results[:]
        try:
            await self.batches.call(self.batches.store.record, work.batch.id, self.owner, results)
        except sqlite3.OperationalError as error:
            log.error("batch %s cannot record results and pauses: %s", work.batch.id, error)
            await asyncio.sleep(IDLE_S)
            return
        del work.results[: len(results)]

    async def _give_up(self, work: _Work) -> None:
        """Ends what is in flight; answers that are there are recorded."""
        for task in work.running:
            task.cancel()
        await asyncio.gather(*work.running, return_exceptions=True)
        await self._flush(work)

    # the end
    async def _cancel(self, batch: Batch) -> None:
        await self._close(batch, "batch_cancelled", "The batch was cancelled before this request ran.")

    async def _close(self, batch: Batch, code: str, message: str) -> None:
        """Ends a batch before all of its lines have run: those that have not get an error in the error file."""
        store = self.batches.store
        while lines := await self.batches.call(store.open_lines, batch.id, 0, PAGE):
            missed = [Result(line.number, False, not_run(line, code, message)) for line in lines]
            await self.batches.call(store.record, batch.id, self.owner, missed)
        over = Status.CANCELLED if batch.status is Status.CANCELLING else Status.EXPIRED
        await self._write(batch, over)

    async def _finalize(self, batch: Batch) -> None:
        await self._write(batch, Status.COMPLETED)

    async def _write(self, batch: Batch, status: Status) -> None:
        """Writes output and error file. Their ids follow from the batch's, so that writing them again replaces them."""
        output = await self.batches.call(self._write_results, batch, ok=True)
        errors = await self.batches.call(self._write_results, batch, ok=False)
        if not await self._moved(batch, status, output_file_id=output, error_file_id=errors):
            return  # the results are still needed
        await self.batches.call(self.batches.store.forget_lines, batch.id)
        log.info("batch %s is %s", batch.id, status.value)

    def collect(self) -> Iterator[Metric]:
        lines = CounterMetricFamily("evenhand_batch_lines", "Requests of batches by outcome.", labels=("outcome",))
        for outcome in OUTCOMES:
            lines.add_metric((outcome,), self.lines[outcome])
        yield lines
        waiting = "Requests of batches that run or wait for a slot."
        yield GaugeMetricFamily("evenhand_batch_lines_in_flight", waiting, self.in_flight)
        yield GaugeMetricFamily("evenhand_batches_running", "Batches that this gateway runs.", len(self._tasks))

    def _write_results(self, batch: Batch, *, ok: bool) -> str | None:
        """The file's id; None if there is nothing to write."""
        store, files = self.batches.store, self.batches.files
        page = store.results(batch.id, ok=ok, after=0, limit=PAGE)
        if not page:
            return None
        kind = "output" if ok else "error"
        file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"
        with files.writing(file_id) as file:
            while page:
                file.writelines(result.text + b"\n" for result in page)
                page = store.results(batch.id, ok=ok, after=page[-1].number, limit=PAGE)
        store.remove_file(file_id)
        size = files.path(file_id).stat().st_size
        self.batches.keep(file_id, batch.tenant, f"{batch.id}_{kind}.jsonl", "batch_output", size)
        return file_id


def _page(lines: Iterator[BatchLine]) -> list[BatchLine]:
    return list(islice(lines, PAGE))


def _finished(work: _Work, task: asyncio.Task[None]) -> None:
    """A line that failed inside the gateway ends with an error: the batch must not end without it."""
    ready = work.running.pop(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a line of batch %s failed inside the gateway", work.batch.id, exc_info=error)
        said = not_run(ready.line, "internal_error", "The gateway failed on this request; see its log for the reason.")
        work.results.append(Result(ready.line.number, False, said))
