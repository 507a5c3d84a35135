"""What the plug-in costs at each iteration, against stock vLLM's scheduler driven in the same program."""

import argparse
import subprocess
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="handed to tests/engine/bench_schedule.py")


def run(args: argparse.Namespace) -> int:
    """Runs it in a program of its own, since it imports vLLM."""
    return subprocess.run([sys.executable, "-m", "tests.engine.bench_schedule", *args.rest]).returncode
