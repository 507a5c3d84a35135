"""`evenhand report`: files of records side by side, as text, Markdown, JSON, or one HTML page."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from loadtest import provenance
from loadtest.records import Recorded
from loadtest.report import report
from loadtest.report.comparison import Side, load_warning, sides
from loadtest.report.page import page
from loadtest.report.trust import trust

FORMATS = ("text", "markdown", "json", "csv", "html")
_SUFFIXES = {".txt": "text", ".md": "markdown", ".json": "json", ".csv": "csv", ".html": "html"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[NAME=]FILE",
        help="records of `evenhand replay --out`; the first is the baseline, the same NAME again is a repetition",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write a self-contained HTML page")
    parser.add_argument(
        "--out",
        type=Path,
        help="output file; its ending .txt, .md, .json, .csv or .html sets the format (default: screen)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="output format (default: by the ending of --out, otherwise text)"
    )
    parser.add_argument("--title", default="", help="title of the page (default: the runs and their workload)")
    parser.add_argument("--ttft", type=float, help="TTFT objective, seconds")
    parser.add_argument("--tpot", type=float, help="TPOT objective, seconds")
    parser.add_argument(
        "--from",
        type=float,
        dest="from_s",
        help="leave out requests due before this time, seconds (default: the run's --warmup)",
    )
    parser.add_argument(
        "--to", type=float, default=float("inf"), dest="to_s", help="leave out requests due after this time, seconds"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 when a file cannot be read."""
    objective = report.Objective.of(args.ttft, args.tpot)
    try:
        read = sides(args.files, objective, args.from_s, args.to_s)
        if args.html:
            args.html.write_text(page(read, objective, title=args.title, command=provenance.command()), "utf-8")
        form = args.format or (_form_of(args.out) if args.out else "text")
        if form == "html":
            text = page(read, objective, title=args.title, command=provenance.command())
        else:
            text = render(*_by_run(read), form)
            warning = load_warning(read) if form in ("text", "markdown") else ""
            text += f"\n{warning}\n" if warning else ""
        if args.out:
            args.out.write_text(text, "utf-8")
        elif not args.html or args.format:
            sys.stdout.write(text)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"evenhand report: {error}\n")
        return 2
    return 0


def _form_of(out: Path) -> str:
    form = _SUFFIXES.get(out.suffix)
    if form is None:
        raise ValueError(f"{out} ends with none of {', '.join(_SUFFIXES)}: rename it, or give --format.")
    return form


def _by_run(read: Sequence[Side]) -> tuple[dict[str, report.Summary], dict[str, Recorded]]:
    """A column per run: repetitions are numbered."""
    summaries: dict[str, report.Summary] = {}
    runs: dict[str, Recorded] = {}
    for side in read:
        for at, (loaded, summary) in enumerate(zip(side.runs, side.summaries, strict=True), 1):
            name = side.name if len(side.runs) == 1 else f"{side.name} {at}"
            summaries[name] = summary
            runs[name] = loaded
    return summaries, runs


def render(summaries: Mapping[str, report.Summary], runs: Mapping[str, Recorded], form: str) -> str:
    """The whole report as text, Markdown, JSON or CSV."""
    if form == "json":
        told = {name: msgspec.to_builtins(one) | _trust(runs[name]) for name, one in summaries.items()}
        return msgspec.json.encode(told).decode() + "\n"
    if form == "csv":
        return _csv(summaries)
    table = report.markdown if form == "markdown" else report.text
    parts = [f"{name}: {trust(run)}" if len(runs) > 1 else f"{trust(run)}" for name, run in runs.items()]
    parts.append(table(report.compare(summaries)))
    for name, summary in summaries.items():
        if len(summary.by_tenant) > 1:
            heading = f"## {name}: tenants" if form == "markdown" else f"{name}: tenants"
            parts.append(f"{heading}\n\n{table(report.tenants(summary))}")
    parts += [
        f"{name}: {report.client_lag(run.run)}"
        for name, run in runs.items()
        if run.run is not None and run.run.loop_max_s
    ]
    return "\n\n".join(parts) + "\n"


def _trust(run: Recorded) -> dict[str, object]:
    said = trust(run)
    interrupted = run.run is not None and run.run.interrupted
    return {"trust": {"doubts": said.doubts, "facts": said.facts, "interrupted": interrupted}}


def _csv(summaries: Mapping[str, report.Summary]) -> str:
    """A row per run and number, in seconds, tokens and requests: `run,measure,value`."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", "measure", "value"])
    for name, summary in summaries.items():
        rows.writerows([name, measure, f"{value:.9g}"] for measure, value in _numbers("", msgspec.to_builtins(summary)))
    return text.getvalue()


def _numbers(prefix: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _numbers(f"{prefix}.{key}" if prefix else str(key), one)
    elif isinstance(value, int | float):
        yield prefix, float(value)
