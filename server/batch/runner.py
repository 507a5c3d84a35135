"""Runs batches: claims their lines, sends them where engines have room, writes results before counting them.

All gateways that share a store run lines of the same batches. A line's life: open in the store, claimed by one gateway,
in flight there, its result in the store. When a gateway is killed, what it had claimed is open again once its lease
has ended; lines that were in flight run once more. One gateway at a time, under the batch's lease, checks its input and
writes its files.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import BinaryIO, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.batch.batches import Batches
from server.batch.content import Ready, Reply, answered, not_run, read
from server.batch.files import FilesUnavailable, NoSpace
from server.batch.objects import RUNNING, Batch, BatchLine, LineError, Result, Status
from server.batch.pace import Pace
from server.batch.store import LeaseLost, StoreUnavailable
from server.batch.validation import Checker
from server.request.errors import ServiceError

log = logging.getLogger("evenhand.batch")

TICK_S = 0.25  # between two looks at room, status and deadline
LEASE_S = 5.0
LOOK_S = 1.0  # between two looks for batches that another gateway has made or left
PAUSE_S = 5.0  # of a batch whose files or store fail: it may be cancelled meanwhile, or its window may end
SWEEP_S = 3600.0
READ_AHEAD = 512  # lines in memory, ordered by their prompts so that equal beginnings are computed once
BURST = 32  # lines that start before the queue is looked at again
PAGE = 1000
RESULTS = 200  # that are in memory while a file is written
RETRY_S = (1.0, 30.0)  # the first pause of a line that found no room, and the longest
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # worth another try: nothing is wrong with the request
OUTCOMES = ("answered", "failed", "retried")
AWAY = (NoSpace, FilesUnavailable, StoreUnavailable)  # it will be better later
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
    results: answered, not yet recorded. claimed_at: when lines were last claimed in vain. looked_at: when the batch's
    status was last read. complete: no line of the batch is without a result, here or at another gateway. away: the
    store does not answer.
    """

    batch: Batch
    ready: list[Ready] = field(default_factory=list)
    later: list[tuple[float, Ready]] = field(default_factory=list)
    running: dict[asyncio.Task[None], Ready] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    tries: dict[int, int] = field(default_factory=dict)
    claimed_at: float = float("-inf")
    looked_at: float = float("-inf")
    complete: bool = False
    away: bool = False
    pace: Pace = field(default_factory=Pace)

    @property
    def held(self) -> int:
        """Lines that were claimed and have no result in the store."""
        return len(self.ready) + len(self.later) + len(self.running) + len(self.results)

    def numbers(self) -> set[int]:
        """Of the lines that are held."""
        lines = [*self.ready, *(ready for _, ready in self.later), *self.running.values()]
        return {ready.line.number for ready in lines} | {result.number for result in self.results}


class Runner(Collector):
    """Runs all batches of the store, beside other gateways. owner: this process's name among them, used once."""

    def __init__(self, batches: Batches, engines: Engines, owner: str, clock: Callable[[], float]) -> None:
        self.batches = batches
        self.engines = engines
        self.owner = owner
        self.clock = clock
        self.read_ahead = READ_AHEAD
        self.pause_s = PAUSE_S
        self.tick_s = TICK_S
        self.lines: Counter[str] = Counter()
        self.in_flight = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._works: dict[str, _Work] = {}
        self._unserved: dict[str, str] = {}  # batches whose lines are left to others, and the model that they need
        self._paused: dict[str, str | None] = {}  # what waits for a store, and the code of its error

    async def run(self) -> None:
        """Runs until it is cancelled; lines in flight are then given up, and stay open in the store."""
        try:
            while True:
                try:
                    await self.batches.check()
                    await self._look()
                    self._resumed("batches")
                except AWAY as error:
                    await self._pause("batches", error, self.pause_s)
                try:
                    async with asyncio.timeout(LOOK_S):
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
            if batch.id not in self._tasks and not self._is_unserved(batch):
                task = self._tasks[batch.id] = asyncio.create_task(self._drive(batch.id), name=f"run {batch.id}")
                task.add_done_callback(partial(self._ended, batch.id))

    async def sweep(self) -> None:
        """Removes old files every hour, until it is cancelled: a slow store of files must hold up no batch."""
        await self.batches.usable.wait()
        while True:
            try:
                if removed := await self.batches.sweep():
                    log.info("removed %d files past their expiry", removed)
                self._resumed("the removal of old files")
                await asyncio.sleep(SWEEP_S)
            except AWAY as error:
                await self._pause("the removal of old files", error, max(self.pause_s, error.retry_after_s or 0.0))

    async def _pause(self, what: str, error: ServiceError, seconds: float) -> None:
        """Waits until a store may answer again. Says why once, not at each try."""
        if self._paused.get(what) != error.code:
            log.error("%s paused: %s", what, error)
            self._paused[what] = error.code
        await asyncio.sleep(seconds)

    def _resumed(self, what: str) -> None:
        if self._paused.pop(what, None) is not None:
            log.info("%s resumed", what)

    def _is_unserved(self, batch: Batch) -> bool:
        """Whether all that is to be done is to run lines for which no worker is known here."""
        model = self._unserved.get(batch.id)
        if model is None:
            return False
        if batch.status is Status.IN_PROGRESS and not self._late(batch) and self.engines.room(model, 0) <= 0:
            return True
        del self._unserved[batch.id]
        return False

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[batch_id]
        self._paused.pop(f"batch {batch_id}", None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("batch %s stopped and will be taken up again: %r", batch_id, error, exc_info=error)

    async def _drive(self, batch_id: str) -> None:
        """From wherever the batch stands to its end, or until what is to be done now is another gateway's."""
        store = self.batches.store
        try:
            while (batch := await self.batches.call(store.batch, batch_id)) is not None and batch.status in RUNNING:
                try:
                    if not await self._step(batch):
                        return
                    self._resumed(f"batch {batch_id}")
                except AWAY as error:
                    await self._pause(f"batch {batch_id}", error, self.pause_s)
                except LeaseLost:
                    log.warning("other gateways have taken over what this one had of batch %s", batch_id)
                    return  # it is looked at again soon
        except AWAY as error:
            log.error("batch %s pauses: %s", batch_id, error)
        finally:
            with suppress(*AWAY):
                await self.batches.call(store.leave, batch_id, self.owner)

    async def _step(self, batch: Batch) -> bool:
        """What is to be done now. False if another gateway does it."""
        if batch.status is Status.IN_PROGRESS and not self._late(batch):
            await self._work(batch)
            return batch.id not in self._unserved
        if not await self._lease(batch.id):
            return False
        steps = {
            Status.VALIDATING: self._validate,
            Status.IN_PROGRESS: self._expire,
            Status.CANCELLING: self._cancel,
            Status.FINALIZING: self._finalize,
        }
        async with self._renewing(partial(self._keep_lease, batch.id)):
            await steps[batch.status](batch)
        return True

    def _late(self, batch: Batch) -> bool:
        return self.batches.wall() >= batch.expires_at

    async def _lease(self, batch_id: str) -> bool:
        return await self.batches.call(self.batches.store.lease, batch_id, self.owner, LEASE_S)

    @asynccontextmanager
    async def _renewing(self, renew: Callable[[], Awaitable[None]]) -> AsyncIterator["asyncio.Task[None]"]:
        """Renews what the store grants for `LEASE_S`, in a task beside the block: waiting for a slow disk must not lose
        it. The task ends only when it is lost."""

        async def renewal() -> None:
            while True:
                await asyncio.sleep(self.tick_s)
                with suppress(*AWAY):  # nobody can renew then, and the store gives everybody more time
                    await renew()

        task = asyncio.create_task(renewal(), name="renew a lease")
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_lease(self, batch_id: str) -> None:
        if not await self._lease(batch_id):
            raise LeaseLost(batch_id)

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
            file = await self.batches.content(self.batches.files.open, batch.input_file_id)
        except FileNotFoundError:
            gone = LineError("file_not_found", f"The input file {batch.input_file_id} was deleted.")
            await self._moved(batch, Status.FAILED, errors=(gone,))
            return
        with file:
            lines = checker.lines(file)
            while page := await self.batches.content(_page, lines):
                await self.batches.call(self.batches.store.add_lines, batch.id, self.owner, page)
                await self._keep_lease(batch.id)
        if checker.errors:
            await self._moved(batch, Status.FAILED, errors=tuple(checker.errors))
        else:
            await self._moved(batch, Status.IN_PROGRESS, total=checker.count)

    # in progress
    async def _work(self, batch: Batch) -> None:
        """Runs lines until all have results, the window ends, or somebody cancels the batch."""
        work, store = _Work(batch), self.batches.store
        self._works[batch.id] = work
        await self.batches.call(store.join, batch.id, self.owner, LEASE_S)
        renew = partial(self.batches.call, store.renew, batch.id, self.owner, LEASE_S)
        try:
            async with self._renewing(renew) as renewal:
                if not await self._run_lines(work, renewal):
                    return
            if work.complete:
                moved = batch.moved(Status.FINALIZING, int(self.batches.wall()), total=batch.total)
                await self.batches.call(store.update, moved, batch.status)
        finally:
            del self._works[batch.id]
            await self._give_up(work)

    async def _run_lines(self, work: _Work, renewal: "asyncio.Task[None]") -> bool:
        """Until no line is left or the window ends. False once the lines are not to run here any more."""
        while not work.complete and not self._late(work.batch):
            try:
                if not await self._refresh(work):
                    return False
                self._answers(work)
            except AWAY as error:
                self._answers(work, error)
            if renewal.done():
                renewal.result()  # raises LeaseLost
            if not work.away:
                await self._start(work)
            if self._nobody_serves(work):
                return False
            await self._wait(work)
        return True

    @staticmethod
    def _answers(work: _Work, error: Exception | None = None) -> None:
        """Notes whether the store answers. While it does not, no further line starts; those in flight go on, and
        their answers wait in memory."""
        if error is not None and not work.away:
            log.error("batch %s pauses: %s", work.batch.id, error)
        elif error is None and work.away:
            log.info("batch %s goes on", work.batch.id)
        work.away = error is not None

    async def _refresh(self, work: _Work) -> bool:
        """Tells the store what was answered, and gets lines from it. False once the batch is not in progress."""
        await self._flush(work)
        if self.clock() - work.looked_at >= self.tick_s:
            now = await self.batches.call(self.batches.store.batch, work.batch.id)
            if now is None or now.status is not Status.IN_PROGRESS:
                return False
            work.looked_at = self.clock()
            self._measure(work, now)
        await self._read_ahead(work)
        return True

    def _measure(self, work: _Work, now: Batch) -> None:
        """Notes how far a batch has come, and says so once it will be late."""
        late = work.pace.late
        work.pace.note(self.clock(), now.completed + now.failed, now.total, now.expires_at - self.batches.wall())
        if work.pace.late and not late:
            log.warning("batch %s will miss its window: %d of %d requests are left", now.id, work.pace.left, now.total)

    async def _read_ahead(self, work: _Work) -> None:
        now = self.clock()
        due = [ready for at, ready in work.later if at <= now]
        work.later = [(at, ready) for at, ready in work.later if at > now]
        work.ready += due
        if work.ready or now - work.claimed_at < self.tick_s:
            return
        store = self.batches.store
        known = work.numbers()
        claimed = await self.batches.call(store.claim, work.batch.id, self.owner, len(known) + self.read_ahead)
        if lines := [line for line in claimed if line.number not in known]:
            try:
                work.ready = await self.batches.content(self._requests, work.batch.input_file_id, lines)
            except FileNotFoundError:
                gone = f"The input file {work.batch.input_file_id} is gone."
                work.results += [Result(line.number, False, not_run(line, "file_not_found", gone)) for line in lines]
                self.lines["failed"] += len(lines)
            return
        work.claimed_at = now
        if not work.held:
            work.complete = not await self.batches.call(store.unfinished, work.batch.id)

    def _requests(self, file_id: str, lines: list[BatchLine]) -> list[Ready]:
        file = self.batches.files.open(file_id)
        with file:
            return read(file, lines)

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

    def _nobody_serves(self, work: _Work) -> bool:
        """Whether the lines that are claimed had better be left to a gateway that has a worker for them."""
        if work.running or work.results or not work.ready:
            return False
        model = work.ready[-1].model
        if self.engines.room(model, 0) > 0:
            return False
        log.info("no worker serves %r: batch %s waits for one, or for another gateway", model, work.batch.id)
        self._unserved[work.batch.id] = model
        return True

    async def _wait(self, work: _Work) -> None:
        if not work.running:
            if not work.complete and (work.away or not work.ready):
                await asyncio.sleep(self.tick_s)
            return
        await asyncio.wait(work.running, timeout=self.tick_s, return_when=asyncio.FIRST_COMPLETED)

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
        """Records what was answered."""
        while results := work.results[:PAGE]:
            await self.batches.call(self.batches.store.record, work.batch.id, self.owner, results)
            del work.results[: len(results)]

    async def _give_up(self, work: _Work) -> None:
        """Ends what is in flight; answers that are there are recorded."""
        for task in work.running:
            task.cancel()
        await asyncio.gather(*work.running, return_exceptions=True)
        try:
            await self._flush(work)
        except (LeaseLost, *AWAY) as error:
            log.warning(
                "%d answers of batch %s are lost, their lines run again: %r", len(work.results), work.batch.id, error
            )

    # the end
    async def _expire(self, batch: Batch) -> None:
        await self._close(batch, "batch_expired", "The completion window ended before this request ran.")

    async def _cancel(self, batch: Batch) -> None:
        await self._close(batch, "batch_cancelled", "The batch was cancelled before this request ran.")

    async def _close(self, batch: Batch, code: str, message: str) -> None:
        """Ends a batch before all of its lines have run: those that have not get an error in the error file. Lines of
        other gateways are waited for, until they are recorded or given up."""
        store = self.batches.store
        await self.batches.call(store.join, batch.id, self.owner, LEASE_S)
        while await self.batches.call(store.unfinished, batch.id):
            await self._keep_lease(batch.id)
            await self.batches.call(store.renew, batch.id, self.owner, LEASE_S)
            lines = await self.batches.call(store.claim, batch.id, self.owner, PAGE)
            missed = [Result(line.number, False, not_run(line, code, message)) for line in lines]
            await self.batches.call(store.record, batch.id, self.owner, missed)
            if not lines:
                await asyncio.sleep(self.tick_s)
        over = Status.CANCELLED if batch.status is Status.CANCELLING else Status.EXPIRED
        await self._write(batch, over)

    async def _finalize(self, batch: Batch) -> None:
        await self._write(batch, Status.COMPLETED)

    async def _write(self, batch: Batch, status: Status) -> None:
        """Writes output and error file. Their ids follow from the batch's, so that writing them again replaces them."""
        output = await self._write_results(batch, ok=True)
        errors = await self._write_results(batch, ok=False)
        if await self._moved(batch, status, output_file_id=output, error_file_id=errors):
            log.info("batch %s is %s", batch.id, status.value)

    async def _write_results(self, batch: Batch, *, ok: bool) -> str | None:
        """The file's id; None if there is nothing to write."""
        store = self.batches.store
        page = await self.batches.call(store.results, batch.id, ok=ok, after=0, limit=RESULTS)
        if not page:
            return None
        kind = "output" if ok else "error"
        file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"
        async with self._writing(file_id) as file:
            written = size = 0
            while page:
                await self._keep_lease(batch.id)
                await self.batches.content(file.writelines, [result.text + b"\n" for result in page])
                written += len(page)
                size += sum(len(result.text) + 1 for result in page)
                page = await self.batches.call(store.results, batch.id, ok=ok, after=page[-1].number, limit=RESULTS)
            # Another gateway may have ended the batch while this one stood still: its results are gone then.
            now = await self.batches.call(store.batch, batch.id)
            if now is None or now.status not in RUNNING or written != (now.completed if ok else now.failed):
                raise LeaseLost(batch.id)
        await self._keep_lease(batch.id)  # a large file may take a while to upload
        await self.batches.call(self._keep, batch, file_id, f"{batch.id}_{kind}.jsonl", size)
        return file_id

    @asynccontextmanager
    async def _writing(self, file_id: str) -> AsyncIterator[BinaryIO]:
        """As `Files.writing`, off the event loop: a disk, a shared folder or an object store may take its time."""
        writing = self.batches.files.writing(file_id)
        file = await self.batches.content(writing.__enter__)
        try:
            yield file
        except BaseException as error:
            await self.batches.content(writing.__exit__, type(error), error, error.__traceback__)
            raise
        else:
            await self.batches.content(writing.__exit__, None, None, None)

    def _keep(self, batch: Batch, file_id: str, filename: str, size: int) -> None:
        self.batches.store.remove_file(file_id)
        self.batches.keep(file_id, batch.tenant, filename, "batch_output", size)

    def collect(self) -> Iterator[Metric]:
        lines = CounterMetricFamily("evenhand_batch_lines", "Requests of batches by outcome.", labels=("outcome",))
        for outcome in OUTCOMES:
            lines.add_metric((outcome,), self.lines[outcome])
        yield lines
        waiting = "Requests of batches that run or wait for a slot."
        yield GaugeMetricFamily("evenhand_batch_lines_in_flight", waiting, self.in_flight)
        late = sum(work.pace.late for work in self._works.values())
        yield GaugeMetricFamily("evenhand_batches_late", "Batches that miss their window at the present pace.", late)
        yield GaugeMetricFamily("evenhand_batches_running", "Batches that this gateway runs.", len(self._tasks))


def _page(lines: Iterator[BatchLine]) -> list[BatchLine]:
    return list(islice(lines, PAGE))


def _finished(work: _Work, task: asyncio.Task[None]) -> None:
    """A line that failed inside the gateway ends with an error: the batch must not end without it."""
    ready = work.running.pop(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a line of batch %s failed inside the gateway", work.batch.id, exc_info=error)
        said = not_run(ready.line, "internal_error", "The gateway failed on this request; see its log for the reason.")
        work.results.append(Result(ready.line.number, False, said))
