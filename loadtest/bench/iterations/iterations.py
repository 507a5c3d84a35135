"""Every policy inside real engines, against stock vLLM, on a clock of the engines' own CPU time."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loadtest.bench.policies.policies_bench import add_workload_arguments

POLICIES = "fcfs,mlfq,vtc,gittins:max_tokens=ignore"
PROGRAM = "loadtest.bench.iterations.iteration_runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser)
    parser.add_argument(
        "--policies", default=POLICIES, help="NAME[:KEY=VALUE…], beside stock vLLM (default: %(default)s)"
    )
    parser.add_argument(
        "--isolation",
        action="store_true",
        help="instead: a light tenant's first token, alone and beside a flood, with the first workload",
    )
    parser.add_argument("--light", type=float, default=0.2, help="its load by saturation (default: %(default)s)")
    parser.add_argument("--flood", type=float, default=10.0, help="the flood's, by its own (default: %(default)s)")
    parser.add_argument(
        "--step-ms",
        type=float,
        help="let a step take so long, and its tokens as --tokens-per-step says: the same on any machine "
        "(default: the engine's own CPU time)",
    )
    parser.add_argument(
        "--tokens-per-step", type=float, default=256.0, help="tokens that take as long as a step (default: %(default)s)"
    )
    parser.add_argument(
        "--without-model",
        action="store_true",
        help="with --step-ms: take tokens from a rule instead of the model, which changes no figure and is faster",
    )
    parser.add_argument(
        "--kv-tokens", type=int, help="size of the KV cache (default: every slot's whole context, and no more)"
    )
    parser.add_argument("--core", type=int, help="core for the engines, which run one at a time (default: any)")
    parser.add_argument("--taught", type=int, default=1000, help="lengths that gittins knows (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/iterations"), help="records (default: %(default)s)")
    parser.set_defaults(length_scale=0.3, prompt_scale=0.17, context=4096, loads="1.2", slots="8", limit=1000)
    parser.set_defaults(repetitions=5)


def run(args: argparse.Namespace) -> int:
    """In a program of its own, since it imports vLLM. 2 if the options make no sense together."""
    if args.without_model and args.step_ms is None:
        sys.stderr.write("Without a model there is no CPU time to measure: give --step-ms too.\n")
        return 2
    return in_a_program(PROGRAM, add_arguments, args)


def in_a_program(
    program: str, add_arguments: Callable[[argparse.ArgumentParser], None], args: argparse.Namespace
) -> int:
    """Runs a Python module with the options as they were given here; returns its exit code."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command = [sys.executable, "-m", program]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value is True:
            command.append(action.option_strings[-1])
        elif value not in (None, False):
            command += [action.option_strings[-1], str(value)]
    return subprocess.run(command).returncode
