"""One run of a replay, which a signal, too many errors or a full disk ends gracefully."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from time import perf_counter

import msgspec
import uvloop
from rich.console import Console

from loadtest import provenance
from loadtest.client.client import Client
from loadtest.client.samples import Sampler
from loadtest.records import Record, Recorded, Run, Writer
from loadtest.replay import progress
from loadtest.replay.prepare import Prepared
from loadtest.report import report

# Exit statuses.
ALL_WELL, SOME_FAILED, CANNOT_BEGIN, STOPPED, NOT_WRITTEN = 0, 1, 2, 3, 4
BY_SIGNAL = 128  # and the signal's number, as shells have it


class Done(msgspec.Struct, frozen=True):
    """What a run came to. failed: why its records are not whole, None if they are. status: the exit status."""

    recorded: Recorded
    failed: OSError | None
    status: int


def measure(prepared: Prepared, screen: Console) -> tuple[Sequence[Record], Run]:
    """Send everything; records as they ended, and how well the client kept its schedule. OSError where the records
    cannot be written."""
    done = measured(prepared, screen)
    if done.failed is not None:
        raise done.failed
    assert done.recorded.run is not None
    return done.recorded.records, done.recorded.run


def measured(prepared: Prepared, screen: Console) -> Done:
    """Send everything, or as much as is wanted until a signal comes."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    signals = Signals()
    with Writer(prepared.out, append=prepared.append) if prepared.out else nullcontext() as writer:
        client = Client(prepared.target, manner=prepared.manner, begin_s=prepared.offset_s)
        client.note = partial(_note, client, writer, prepared)
        # A collection of all that a long run has kept would be seen in every latency.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            uvloop.run(_send(client, prepared, screen, writer, signals))
        finally:
            gc.enable()
            gc.unfreeze()
        line = run_line(client, prepared, started_at)
        if writer:
            writer.finish(line)
    failed = writer.failed if writer else None
    return Done(Recorded.of(line, client.kept, []), failed, _status(client, signals, failed))


def _note(client: Client, writer: Writer | None, prepared: Prepared, record: Record) -> None:
    if writer is None:
        return
    writer.write(record)
    if writer.failed is not None:
        client.stop(f"{prepared.out} cannot be written: {writer.failed.strerror}")


def _status(client: Client, signals: "Signals", failed: OSError | None) -> int:
    if signals.number:
        return BY_SIGNAL + signals.number
    if failed is not None:
        return NOT_WRITTEN
    if client.stopped:
        return STOPPED
    return SOME_FAILED if client.progress.errors else ALL_WELL


class Signals:
    """The first SIGINT or SIGTERM ends the run in good order, the second leaves at once."""

    def __init__(self) -> None:
        self.number = 0

    def watch(self, client: Client) -> None:
        """From here on, where this is the main thread; the loop's end gives the signals back."""
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._came, number, client.stop)

    def _came(self, number: signal.Signals, stop: Callable[[str], None]) -> None:
        if self.number:
            os._exit(BY_SIGNAL + number)
        self.number = int(number)
        stop(f"by {number.name}")


async def _send(client: Client, prepared: Prepared, screen: Console, writer: Writer | None, signals: Signals) -> None:
    signals.watch(client)
    show = screen.is_terminal and not prepared.quiet
    sampler = (
        Sampler(prepared.metrics, writer.sample, perf_counter, period_s=prepared.sample_s, begin_s=prepared.offset_s)
        if writer is not None and prepared.metrics
        else None
    )
    async with sampler or nullcontext():
        await _send_beside(client, prepared, sampler, screen if show else None)


async def _send_beside(client: Client, prepared: Prepared, sampler: Sampler | None, screen: Console | None) -> None:
    """screen: where progress is shown, None for nowhere."""
    with progress.bar(client, screen) if screen is not None else nullcontext() as bar:
        beside = [asyncio.create_task(progress.watch(client, bar, prepared.total))] if bar else []
        if sampler is not None:
            beside.append(asyncio.create_task(sampler.run()))
        if prepared.concurrency:
            await client.closed_loop(prepared.calls, prepared.concurrency, drain_s=prepared.drain_s)
        else:
            await client.open_loop(prepared.calls, drain_s=prepared.drain_s)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


def run_line(client: Client, prepared: Prepared, started_at: str) -> Run:
    """What the client says of its own run."""
    lag, loop = report.spread(client.progress.lag_s), report.spread(client.progress.loop_s)
    return Run(
        target=prepared.target.url,
        workload=prepared.name,
        started_at=started_at,
        duration_s=round(client.kept.totals.end_s, 3),
        lag_p99_s=lag.p99,
        lag_max_s=client.progress.lag_s.max,
        loop_p99_s=loop.p99,
        loop_max_s=client.progress.loop_s.max,
        options=dict(prepared.options),
        late=client.progress.late,
        skipped=str(prepared.skipped) if prepared.skipped.count else "",
        command=provenance.command(),
        machine=provenance.machine(),
        versions=provenance.versions(),
        interrupted=bool(client.stopped),
        stopped=client.stopped,
        requests=client.progress.done,
        fidelity=prepared.fidelity,
        warmup_s=prepared.manner.warmup_s,
        concurrency=prepared.concurrency or 0,
    )
