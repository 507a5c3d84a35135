"""`evenhand report`: files of records side by side, as text, Markdown or JSON."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from loadtest import report
from loadtest.records import Run, read

FORMATS = ("text", "markdown", "json")
_SUFFIXES = {".txt": "text", ".md": "markdown", ".json": "json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="records that `evenhand replay --out` wrote"
    )
    parser.add_argument("--out", type=Path, help="write here; .txt, .md or .json decides the format (default: screen)")
    parser.add_argument("--format", choices=FORMATS, help="default: text, or what --out ends with")
    parser.add_argument("--ttft", type=float, help="objective for the first token, seconds")
    parser.add_argument("--tpot", type=float, help="objective for the mean time per further token, seconds")
    parser.add_argument("--from", type=float, default=0.0, dest="from_s", help="leave out what was due before, seconds")
    parser.add_argument(
        "--to", type=float, default=float("inf"), dest="to_s", help="leave out what was due after, seconds"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 when a file cannot be read."""
    objective = (
        report.Objective(args.ttft or float("inf"), args.tpot or float("inf")) if args.ttft or args.tpot else None
    )
    summaries: dict[str, report.Summary] = {}
    runs: dict[str, Run] = {}
    try:
        for path in args.files:
            run_line, records = read(path)
            name = path.stem if path.stem not in summaries else str(path)
            summaries[name] = report.summarize(report.window(records, args.from_s, args.to_s), objective)
            if run_line is not None:
                runs[name] = run_line
        form = args.format or (_form_of(args.out) if args.out else "text")
        page = render(summaries, runs, form)
        if args.out:
            args.out.write_text(page)
        else:
            sys.stdout.write(page)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"evenhand report: {error}\n")
        return 2
    return 0


def _form_of(out: Path) -> str:
    form = _SUFFIXES.get(out.suffix)
    if form is None:
        raise ValueError(f"{out} ends with none of {', '.join(_SUFFIXES)}: rename it, or give --format.")
    return form


def render(summaries: Mapping[str, report.Summary], runs: Mapping[str, Run], form: str) -> str:
    """The whole report in one of FORMATS."""
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
