"""Batch work inside one engine beside interactive traffic, on a work clock: vLLM's scheduler without a model.

The scenario is llm-d-batch-gateway's (issue 491): interactive requests in bursts and calms, and an endless batch. A
step takes what a cost model says of what vLLM's scheduler has put into it, so one command gives the same figures
anywhere. Compared are our service tiers, vLLM's own `priority` scheduling, and a cap on the batch's concurrency.
"""

import argparse
import sys

from loadtest.simulator.costmodel import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=90.0, help="of each burst and each calm (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="bursts, each with a calm after it (default %(default)s)")
    parser.add_argument("--cost", choices=sorted(PRESETS), default="gpu-7b", help="of a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    from loadtest.bench.plugin.slack_runs import outcomes, table

    sys.stdout.write(table(outcomes(args)) + "\n")
    return 0
