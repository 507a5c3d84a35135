"""What TLS costs the gateway for each streamed chunk: to the worker, to the client, and both, in turns with neither."""

import argparse
import asyncio
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console

from loadtest.bench.bench_target import free_port
from loadtest.bench.gateway.relay_load import cpu_s
from loadtest.bench.table import machine, markdown, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target

START_S = 60.0
# name: (TLS to the worker, TLS to clients)
SIDES: Mapping[str, tuple[bool, bool]] = {
    "plain HTTP": (False, False),
    "TLS to the worker": (True, False),
    "TLS to clients": (False, True),
    "TLS on both sides": (True, True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="of all four, in turns (default %(default)s)")
    parser.add_argument("--streams", type=int, default=48, help="at once (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each stream (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Starts two mock engines and four gateways, asks each in turn, prints the table."""
    with tempfile.TemporaryDirectory(prefix="evenhand-tls-") as name, ExitStack() as stack:
        cert = certificate(Path(name))
        os.environ["SSL_CERT_FILE"] = str(cert)  # our client's trust
        engines = {tls: stack.enter_context(engine(cert, tls=tls)) for tls in (False, True)}
        gateways = {side: stack.enter_context(gateway(cert, engines, *how)) for side, how in SIDES.items()}
        seen: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(args.rounds + 1):
            order = list(SIDES)[number % len(SIDES) :] + list(SIDES)[: number % len(SIDES)]
            for side in order:
                figure = chunk_us(*gateways[side], args, f"{number}-{side}")
                if number:  # the first round warms them up
                    seen[side].append(figure)
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(f"{args.rounds} rounds of {args.streams} streams of {args.tokens} tokens, a chunk each")
    console.print(table(seen))
    return 0


def table(seen: Mapping[str, Sequence[float]]) -> str:
    """Processor time of the gateway for each chunk, and its ratio to plain HTTP within a round."""
    plain = seen["plain HTTP"]
    rows = [
        [side, spread(figures, digits=1), spread([one / other for one, other in zip(figures, plain, strict=True)])]
        for side, figures in seen.items()
    ]
    return markdown(["connections", "CPU per chunk, µs", "÷ plain HTTP"], rows)


def certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key (P-256, as is usual)."""
    both, key = folder / "both.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(both)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    both.write_bytes(both.read_bytes() + key.read_bytes())
    return both


@contextmanager
def engine(cert: Path, *, tls: bool) -> Iterator[str]:
    """A mock engine that makes 100 tokens a second in each stream; yields its URL."""
    port = free_port()
    options = ["--ssl-certfile", str(cert)] if tls else []
    url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "loadtest.fake.engine", "--port", str(port), "--cost", "quick", *options]
    with program(argv, f"{url}/health"):
        yield url


@contextmanager
def gateway(cert: Path, engines: Mapping[bool, str], worker_tls: bool, client_tls: bool) -> Iterator[tuple[str, int]]:
    """Yields its URL and its process."""
    port = free_port()
    options = ["--tls-cert", str(cert)] if client_tls else []
    worker = engines[worker_tls] + ",slots=1024" + (f",ca={cert}" if worker_tls else "")
    argv = [sys.executable, "-m", "deploy.cli", "gateway", "--port", str(port), "--worker", worker, *options]
    url = f"http{'s' if client_tls else ''}://127.0.0.1:{port}"
    with program(argv, f"{url}/ready") as process:
        yield url, process


@contextmanager
def program(argv: Sequence[str], ready_url: str) -> Iterator[int]:
    """Runs it while the block does; yields its process once it answers with 200. RuntimeError if it does not."""
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        end = monotonic() + START_S
        while not _answers(ready_url):
            if monotonic() > end or process.poll() is not None:
                raise RuntimeError(f"{' '.join(argv)} does not answer at {ready_url}")
            sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5, context=ssl.create_default_context()) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def chunk_us(url: str, pid: int, args: argparse.Namespace, name: str) -> float:
    """Microseconds of the gateway's processor time for each chunk of one run. RuntimeError if a request failed."""
    calls = [TraceCall(f"{name}-{at}", 0.0, "", [100 + at] * 16, 16, args.tokens) for at in range(args.streams)]
    before = cpu_s(pid)
    records = asyncio.run(Client(Target(url, model="fake")).closed_loop(calls, args.streams))
    spent_s = cpu_s(pid) - before
    if failed := [record for record in records if not record.ok]:
        raise RuntimeError(f"{len(failed)} streams failed at {url}, the first with {failed[0].error}")
    return float(1e6 * spent_s / (args.streams * args.tokens))
