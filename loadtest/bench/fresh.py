"""From a fresh clone to the first answer: `make install`, then `make serve` until a chat answer has come."""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.table import machine, markdown

LIMIT_S = 1800.0
QUESTION = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", default=str(Path(__file__).parents[2]), help="what to clone (default: this)")


def run(args: argparse.Namespace) -> int:
    """Clones, installs, serves, asks; prints the table. The clone and its model are removed."""
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="evenhand-fresh-") as folder:
        clone = Path(folder) / "evenhand"
        subprocess.run(["git", "clone", "-q", args.repository, str(clone)], check=True)
        env = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "XDG_STATE_HOME": f"{folder}/state"}
        began = time.perf_counter()
        subprocess.run(["make", "install"], cwd=clone, env=env, check=True, stdout=subprocess.DEVNULL)
        installed = time.perf_counter()
        subprocess.run(["make", "install"], cwd=clone, env=env, check=True, stdout=subprocess.DEVNULL)
        again = time.perf_counter()
        served_s, said = first_answer(clone, env)
    rows = [
        ["fresh `make install`, s", f"{installed - began:.0f}"],
        ["`make install` again, s", f"{again - installed:.2f}"],
        ["`make serve` → first whole chat answer, s", f"{served_s:.0f}"],
    ]
    console.print(machine())
    console.print(markdown(["what (one run; downloads depend on the network)", "measured"], rows))
    console.print(f"{QUESTION} {said}")
    return 0 if "Paris" in said else 1


def first_answer(clone: Path, env: dict[str, str]) -> tuple[float, str]:
    """Seconds from `make serve` to the end of the first answer, and the answer."""
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        ["make", "serve", f"ARGS=--port {port}"], cwd=clone, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while (said := ask(port)) is None:
            if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                raise RuntimeError("`make serve` did not come up")
            time.sleep(0.05)
        return time.perf_counter() - began, said
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def ask(port: int) -> str | None:
    """The answer to the question, None while there is none."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            said: str = json.load(answer)["choices"][0]["message"]["content"]
            return said
    except OSError:  # not listening yet, or 503 while the engine starts
        return None
