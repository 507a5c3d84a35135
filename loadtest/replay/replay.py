"""`evenhand replay`: send a trace or a named workload to a server, on time, and keep a record of every request."""

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console

from loadtest import provenance
from loadtest.records import Record, Recorded
from loadtest.replay import options, sweep
from loadtest.replay.measure import ALL_WELL, CANNOT_BEGIN, NOT_WRITTEN, Done, measure, measured
from loadtest.replay.options import add_when
from loadtest.replay.prepare import CannotReplay, Prepared, calls_of, prepare, served
from loadtest.report import report
from loadtest.report.comparison import side_of, sides
from loadtest.report.page import page
from loadtest.report.trust import trust

__all__ = ["CannotReplay", "Prepared", "add_arguments", "add_when", "calls_of", "measure", "prepare", "run", "served"]

add_arguments = options.add_arguments


def run(args: argparse.Namespace) -> int:
    """The exit status: 0 when every request ended well, 1 when some did not, 2 when the run could not begin, 3 when it
    stopped itself, 4 when its records could not be written, 130 and 143 after SIGINT and SIGTERM."""
    errors = Console(stderr=True)
    if args.html and not args.out:
        args.out = args.html.with_suffix(".jsonl")
    try:
        if args.sweep:
            return sweep.run(args, errors)
        prepared = prepare(args)
    except (CannotReplay, ValueError, OSError) as error:
        errors.print(f"evenhand replay: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return CANNOT_BEGIN
    done = measured(prepared, errors)
    for line in closing(prepared, done.recorded):
        sys.stdout.write(line + "\n")
    return done.status if not args.html else max(done.status, _page(args, prepared, done, errors))


def _page(args: argparse.Namespace, prepared: Prepared, done: Done, errors: Console) -> int:
    """Writes the page from the file of records, or from memory where that could not be written."""
    try:
        whole = sides([str(prepared.out)], prepared.objective) if done.failed is None else []
        read = whole or [side_of(prepared.name, done.recorded, prepared.objective)]
        args.html.write_text(page(read, prepared.objective, command=provenance.command()), "utf-8")
    except OSError as error:
        errors.print(
            f"evenhand replay: the page cannot be written: {error}", style="red", markup=False, highlight=False
        )
        return NOT_WRITTEN
    sys.stdout.write(f"Page: {args.html}\n")
    return ALL_WELL


def closing(prepared: Prepared, recorded: Recorded) -> Iterator[str]:
    """What is said at the end of a run."""
    summary = report.summarize_run(recorded, prepared.objective)
    yield f"{trust(recorded)}\n"
    yield report.text(report.compare({prepared.name: summary}))
    if len(summary.by_tenant) > 1:
        yield "\n" + report.text(report.tenants(summary))
    if recorded.run is not None:
        yield "\n" + report.client_lag(recorded.run)
    failure = next((record for record in recorded.records if not record.ok), None)
    if failure is not None:
        yield f"First failure: {failure.ending.value}, {failure.error or 'no reason given'}{_advice(failure)}"
    if prepared.out:
        yield f"Records: {prepared.out}"


def _advice(failure: Record) -> str:
    """What to do about a failure that an option causes."""
    if failure.status in (401, 403):
        return "\nThe server does not accept the API key: check --key, or the first key in --tenants."
    if failure.status in (400, 422) and "ignore_eos" in failure.error:
        return "\nThe server does not know `ignore_eos`: give --free-length, and answers end on their own."
    return ""
