"""Three policies on the bundled model under a load of ShareGPT's shape: the table and picture of docs/benchmarks."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from deploy import compare
from loadtest import provenance
from loadtest.bench.bench_target import CannotStart
from loadtest.bench.table import machine
from loadtest.replay.replay import CannotReplay
from loadtest.report import report
from loadtest.report.comparison import rows
from loadtest.report.page import page

_WIDTH, _HEIGHT = 1180, 1500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser)
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="write compare.md and compare.png here")
    parser.add_argument("--chromium", default="chromium", help="the browser for the picture (default: %(default)s)")
    parser.set_defaults(workload="S", engine="real", policies="fcfs,mlfq,vtc", length_scale=0.1, context=1024)
    parser.set_defaults(limit=40, loads="1.2", saturating_rounds=5, ttft=5.0, tpot=0.5, out=Path("runs/bench-compare"))


def run(args: argparse.Namespace) -> int:
    """0, or 2 when an engine or the browser cannot be started."""
    screen = Console(stderr=True)
    try:
        # Before minutes are spent on what it is to show.
        browser = _browser(args.chromium, args.pages) if args.pages else ""
        comparison = compare.PolicyComparison(args, screen)
        read = comparison.run()
        html = args.out / "page.html"
        html.write_text(page(read, comparison.objective, command=provenance.command()), "utf-8")
        text = f"{machine()}\n\n{report.markdown(rows(read))}\n"
        if args.pages:
            (args.pages / "compare.md").write_text(text)
            picture(html, args.pages / "compare.png", browser)
    except (CannotStart, CannotReplay, ValueError, OSError, RuntimeError) as error:
        screen.print(f"evenhand bench compare: {error}", style="red", markup=False, highlight=False)
        return 2
    sys.stdout.write(f"{text}\n{html}\n")
    return 0


def _browser(chromium: str, pages: Path) -> str:
    """Its path; the folder of the pages is there then. RuntimeError without the browser."""
    program = shutil.which(chromium)
    if program is None:
        raise RuntimeError(f"{chromium} is not installed here: give --chromium, or leave out --pages.")
    pages.mkdir(parents=True, exist_ok=True)
    return program


def picture(html: Path, png: Path, program: str) -> None:
    """What a person sees first of a page. RuntimeError if the browser fails."""
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--disable-background-networking", "--disable-sync"]
        command += [f"--window-size={_WIDTH},{_HEIGHT}", f"--screenshot={png.resolve()}", html.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not png.is_file():
        raise RuntimeError(f"{program} made no picture: {done.stderr[-500:]}")
