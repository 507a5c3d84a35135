"""What a flood by one tenant does to another's first token, on a real engine: stock vLLM and each policy."""

import argparse

from deploy.benchmarks import policies
from loadtest import isolation_bench

POLICIES = "vtc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """As those of the comparison of policies, and how heavy the flood is."""
    policies.add_engine_arguments(parser, POLICIES, isolation_bench.add_arguments)
    parser.set_defaults(workloads="C", limit=150)


def run(args: argparse.Namespace) -> int:
    """Starts the engines, measures, prints the page."""
    args.target = policies.targets(args)
    return isolation_bench.run(args)
