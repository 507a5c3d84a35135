"""How long a gateway takes from its command to its first answer, and what it has loaded by then."""

import argparse
import signal
import subprocess
import sys
import time

from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import answers
from loadtest.bench.table import machine, markdown, spread

HEAVY = ("torch", "vllm", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="starts to measure (default 9)")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if the gateway loads what it must not."""
    console = Console(highlight=False, soft_wrap=True)
    starts = [start_s() for _ in range(args.repetitions)]
    loaded = heavy_modules()
    console.print(machine())
    console.print(
        markdown(
            ["what", "measured", "goal"],
            [
                ["gateway: command → /health, s", spread(starts), "< 2"],
                ["of torch, vllm, transformers, numpy it imports", ", ".join(loaded) or "none", "none"],
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


def heavy_modules() -> list[str]:
    """Which of the heavy packages the gateway's own modules import."""
    program = f"import sys, server.__main__; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
