"""How long a gateway, and `evenhand serve` with engines, take from the command to the first answer."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence

from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import answers, running
from loadtest.bench.fresh import ask
from loadtest.bench.table import machine, markdown, spread

SERVES = {"serve": (), "serve, split": ("--prefill-workers", "1", "--decode-workers", "1")}
SERVE_GOALS = {"serve": "≤ 20", "serve, split": "≤ 30"}
HEAVY = ("torch", "vllm", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="gateways to start (default 9)")
    parser.add_argument("--serves", type=int, default=2, metavar="N", help="of each `serve` to start (default 2)")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if the gateway loads what it must not."""
    console = Console(highlight=False, soft_wrap=True)
    starts = [start_s() for _ in range(args.repetitions)]
    loaded = heavy_modules()
    served = [(name, [answer_s(options) for _ in range(args.serves)]) for name, options in SERVES.items()]
    console.print(machine())
    console.print(
        markdown(
            ["what", "measured", "goal"],
            [
                ["gateway: command → /health, s", spread(starts), "< 2"],
                ["of torch, vllm, transformers, numpy it imports", ", ".join(loaded) or "none", "none"],
                *(
                    [f"{name}: command → answer, s", spread(taken, digits=1), SERVE_GOALS[name]]
                    for name, taken in served
                ),
            ],
        )
    )
    return 1 if loaded else 0


def start_s() -> float:
    """One start: seconds from the spawn to the first answer of /health."""
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "gateway", "--port", str(port), "--worker", "http://127.0.0.1:9"],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"the gateway ended with exit code {process.returncode}")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def answer_s(options: Sequence[str]) -> float:
    """One `evenhand serve` of the bundled model: seconds until it has answered a chat, with every engine ready."""
    port = free_port()
    argv = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), *options]
    began = time.perf_counter()
    with running(argv, dict(os.environ), f"http://127.0.0.1:{port}/ready"):
        while missing_role(port) or "Paris" not in (ask(port) or ""):
            time.sleep(0.05)
        return time.perf_counter() - began


def missing_role(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60) as ready:
        return "missing_roles" in json.load(ready)


def heavy_modules() -> list[str]:
    """Which of the heavy packages the gateway's own modules import."""
    program = f"import sys, server.__main__; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
