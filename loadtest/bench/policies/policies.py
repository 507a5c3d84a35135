"""The policies on a real engine, against stock vLLM on the same machine: the same calls to each, in turns."""

import argparse
import shlex
import sys

from loadtest.bench.policies import policies_bench

POLICIES = "fcfs,mlfq,vtc,gittins"
CONTEXT_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which policies and how much; the other options are those of the comparison itself."""
    parser.add_argument(
        "--policies", default=POLICIES, help=f"beside stock vLLM, NAME[:KEY=VALUE…] (default {POLICIES})"
    )
    parser.add_argument("--engine-args", default="", help="handed to every engine, as one string")
    policies_bench.add_arguments(parser)
    for action in parser._actions:  # the targets are made here, of real engines
        if action.dest == "target":
            action.required, action.help = False, argparse.SUPPRESS
    parser.set_defaults(
        context=CONTEXT_TOKENS,
        length_scale=0.3,
        prompt_scale=0.17,
        loads="1.2",
        slots="8",
        limit=1000,
        repetitions=5,
        tenant_xargs=True,
    )


def targets(args: argparse.Namespace) -> list[str]:
    """Stock vLLM first, the baseline."""
    return [target("stock", "", args), *(target(label(name), name, args) for name in args.policies.split(","))]


def target(name: str, policy: str, args: argparse.Namespace, model: str = "") -> str:
    """NAME=COMMAND that becomes a real engine. policy: "" for stock vLLM. model: "" for the benchmarks' tiny one."""
    start = f"{shlex.quote(sys.executable)} -m loadtest.bench.engines --port {{port}}"
    asked = f"--model {shlex.quote(model)} " * bool(model) + f"--policy {policy} " * bool(policy)
    return f"{name}={start} {asked}-- --max-num-seqs {{slots}} --max-model-len {args.context} {args.engine_args}"


def label(policy: str) -> str:
    """A policy with its options as the name of a target, which has no `=`."""
    return policy.replace("=", "-")


def run(args: argparse.Namespace) -> int:
    """Starts the engines, compares, prints the page."""
    args.target = targets(args)
    return policies_bench.run(args)
