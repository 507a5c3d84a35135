"""The policies on a real engine, against stock vLLM on the same machine: the same calls to each, in turns."""

import argparse
import shlex
import sys

from loadtest import policies_bench

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
        length_scale=0.15,
        prompt_scale=0.25,
        loads="1.2",
        slots="8",
        limit=1000,
        repetitions=5,
        tenant_xargs=True,
    )


def run(args: argparse.Namespace) -> int:
    """Starts the engines, compares, prints the page."""
    extra = f"--max-num-seqs {{slots}} --max-model-len {args.context} {args.engine_args}"
    start = f"{shlex.quote(sys.executable)} -m deploy.benchmarks.engines --port {{port}}"
    args.target = [f"stock={start} -- {extra}"]
    for name in args.policies.split(","):
        label = name.replace("=", "-")  # a target is NAME=COMMAND
        args.target.append(f"{label}={start} --policy {name} -- {extra}")
    return policies_bench.run(args)
