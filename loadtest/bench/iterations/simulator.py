"""How near the simulator comes to a real engine: calibrated on probes, it foretells traces that it has not seen."""

import argparse
from pathlib import Path

from loadtest.bench.iterations.iterations import in_a_program
from loadtest.bench.policies.policies_bench import add_workload_arguments

PROGRAM = "loadtest.bench.iterations.simulator_error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser)
    parser.add_argument(
        "--policies", default="fcfs,mlfq,vtc,gittins:max_tokens=ignore", help="NAME[:KEY=VALUE…] (default: %(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=("steady", "cpu", "work"),
        default="steady",
        help="what a second is: the engine's own CPU time, corrected for the core's speed at that moment or not; or "
        "the steps and tokens that it computes, whose cost is then known exactly (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-tokens", type=int, help="size of the KV cache (default: every slot's whole context, and no more)"
    )
    parser.add_argument("--core", type=int, help="core for the engine (default: any)")
    parser.add_argument("--out", type=Path, default=Path("runs/simulator"), help="records (default: %(default)s)")
    parser.set_defaults(workloads="S,C", length_scale=0.3, prompt_scale=0.17, context=4096, loads="0.8", slots="8")
    parser.set_defaults(repetitions=5, limit=200)


def run(args: argparse.Namespace) -> int:
    """In a program of its own, since it imports vLLM."""
    return in_a_program(PROGRAM, add_arguments, args)
