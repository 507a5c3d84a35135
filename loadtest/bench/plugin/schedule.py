"""What the plug-in costs at each iteration, against stock vLLM's scheduler driven in the same program."""

import argparse
import subprocess
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--waiting", nargs="+", default=["10000", "100000"], metavar="N", help="requests in line")
    parser.add_argument("--policies", nargs="+", default=["fcfs", "mlfq", "vtc", "gittins"], metavar="POLICY")
    parser.add_argument("--blocks", default="20", metavar="N", help="timed blocks of 20 steps (default 20)")


def run(args: argparse.Namespace) -> int:
    """Runs loadtest/bench/plugin/schedule_cost.py in a program of its own, since it imports vLLM."""
    command = [sys.executable, "-m", "loadtest.bench.plugin.schedule_cost", "--waiting", *args.waiting]
    return subprocess.run([*command, "--policies", *args.policies, "--blocks", args.blocks]).returncode
