"""`evenhand report`: files of records side by side, as text, Markdown, JSON, or one HTML page."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from loadtest import provenance
from loadtest.records import Run
from loadtest.report import report
from loadtest.report.comparison import Side, sides
from loadtest.report.page import page

FORMATS = ("text", "markdown", "json", "html")
_SUFFIXES = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[NAME=]FILE",
        help="records that `evenhand replay --out` wrote; the first is the baseline, the same NAME again a repetition",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write one HTML page that stands alone")
    parser.add_argument(
        "--out", type=Path, help="write here; .txt, .md, .json or .html decides the format (default: screen)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: text, or what --out ends with")
    parser.add_argument("--title", default="", help="of the page (default: the runs and their workload)")
    parser.add_argument("--ttft", type=float, help="objective for the first token, seconds")
    parser.add_argument("--tpot", type=float, help="objective for the mean time per further token, seconds")
    parser.add_argument("--from", type=float, default=0.0, dest="from_s", help="leave out what was due before, seconds")
    parser.add_argument(
        "--to", type=float, default=float("inf"), dest="to_s", help="leave out what was due after, seconds"
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


def _by_run(read: Sequence[Side]) -> tuple[dict[str, report.Summary], dict[str, Run]]:
    """A column per run: repetitions are numbered."""
    summaries: dict[str, report.Summary] = {}
    runs: dict[str, Run] = {}
    for side in read:
        for at, (loaded, summary) in enumerate(zip(side.runs, side.summaries, strict=True), 1):
            name = side.name if len(side.runs) == 1 else f"{side.name} {at}"
            summaries[name] = summary
            if loaded.run is not None:
                runs[name] = loaded.run
    return summaries, runs


def render(summaries: Mapping[str, report.Summary], runs: Mapping[str, Run], form: str) -> str:
    """The whole report as text, Markdown or JSON."""
    if form == "json":
        return msgspec.json.encode(summaries).decode() + "\n"
    table = report.markdown if form == "markdown" else report.text
    parts = [table(report.compare(summaries))]
    for name, summary in summaries.items():
        if len(summary.by_tenant) > 1:
            heading = f"## {name}: tenants" if form == "markdown" else f"{name}: tenants"
            parts.append(f"{heading}\n\n{table(report.tenants(summary))}")
    parts += [f"{name}: {report.client_lag(run)}" for name, run in runs.items()]
    return "\n\n".join(parts) + "\n"
