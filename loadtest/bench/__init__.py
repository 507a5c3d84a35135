"""`evenhand bench`: the commands that print the figures of docs/benchmarks."""

import argparse
import importlib
import signal
from collections.abc import Mapping
from typing import Any

# name: (module of this package with `add_arguments` and `run`, what it measures)
BENCHMARKS: Mapping[str, tuple[str, str]] = {
    "start": ("start", "seconds from the command to the first answer, of the gateway and of `serve`"),
    "ttft": ("gateway.ttft", "what the gateway adds to the time to the first token of a real engine"),
    "laptop": ("policies.laptop", "the bundled model on one core, beside stock vLLM and llama.cpp"),
    "gateway": ("gateway.gateway", "what the gateway costs on one core, beside nginx and any other gateway"),
    "gateway-cost": ("gateway.gateway_cost", "what a request and a chunk cost it, beside other checkouts"),
    "scale": ("scale.scale", "how a request's cost grows with workers, tenants, those waiting, and gateways"),
    "placement": ("scale.placement", "whether looking at a few workers places requests as well as at all"),
    "tls": ("gateway.tls", "what TLS costs the gateway for each streamed chunk"),
    "replicas": ("scale.replicas", "whether several gateways share an engine among tenants as one does"),
    "disaggregation": ("disaggregation", "prefill and decode apart, against two engines that do both"),
    "batch": ("batch.command", "batch work beside interactive traffic, and what a line costs"),
    "salt": ("gateway.salt", "what a prefix cache of its own for each tenant costs"),
    "fresh": ("fresh", "a fresh clone: make install, make serve, the first answer"),
    "schedule": ("plugin.schedule", "what the plug-in costs at each iteration, against stock vLLM"),
    "policies": ("policies.policies", "every policy on a real engine, against stock vLLM"),
    "compare": ("policies.compare", "three policies on the bundled model, as `evenhand compare` shows them"),
    "replay": ("replay", "the replay client beside others, the fake engine, the simulator's speed"),
    "simulator": ("iterations.simulator", "how near the simulator comes to a real engine"),
    "gpu-check": ("policies.gpu_check", "in ten minutes whether all works on this machine's GPU, as one table"),
    "iterations": ("iterations.iterations", "every policy inside real engines, on their own CPU time"),
}


def _module(name: str) -> Any:
    return importlib.import_module(f"loadtest.bench.{name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per benchmark."""
    chosen = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (module, purpose) in BENCHMARKS.items():
        one = chosen.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        _module(module).add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen benchmark; returns its exit code."""
    # What was started must stop, so a request to end is taken as a Ctrl-C, which event loops know how to end by.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    code: int = _module(BENCHMARKS[args.benchmark][0]).run(args)
    return code
