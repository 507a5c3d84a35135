"""Engines and gateways that a benchmark starts, and stops whatever happens.

`python -m loadtest.bench.engines --port P [--policy NAME[:KEY=VALUE…]] [-- ENGINE ARGS]` becomes one engine, stock
vLLM without --policy, for benchmarks that start their targets by a command line.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deploy.engine.engine_args import EngineCommand, EnginePlan, cpu_dtype, engine_command
from deploy.engine.worker import usable_ports
from deploy.machine.gpu_plan import Share
from deploy.machine.machine import look
from deploy.model.model import cache_folder, obtain, stored_dtype
from loadtest.bench.bench_target import free_port

START_S = 400.0


def answers(url: str) -> bool:
    """Whether `url` answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def cores() -> tuple[int, int]:
    """(core for an engine, core for everything else): the last and the first that this process may use."""
    mine = sorted(os.sched_getaffinity(0))
    return mine[-1], mine[0]


@contextmanager
def running(argv: Sequence[str], env: dict[str, str], health: str, limit_s: float = START_S) -> Iterator[Path]:
    """A program that answers at `health` when it is ready; yields its log. RuntimeError if it ends before.

    What its log said last goes to standard error when the block fails.
    """
    with tempfile.TemporaryDirectory(prefix="evenhand-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            began = time.monotonic()
            while not answers(health):
                if process.poll() is not None or time.monotonic() - began > limit_s:
                    raise RuntimeError(f"{' '.join(argv[:6])} … did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.05)
            try:
                yield log
            except Exception:
                sys.stderr.write(log.read_text(errors="replace")[-2000:])
                raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    pass
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def engine_program(model: str, policy: str | None, port: int, args: Sequence[str]) -> EngineCommand:
    """One real engine on the last core. `policy` None: stock vLLM, without the plug-in."""
    machine = look(os.environ)
    if machine.engine is None:
        raise RuntimeError("vLLM is not installed here: run `make install`")
    source = obtain(model, cache_folder(), lambda text: None)
    name, *options = (policy or "fcfs").split(":")
    plan = EnginePlan(
        model=source.path,
        served_name=source.served_name,
        local=True,
        build=machine.engine.build,
        dtype=cpu_dtype(machine, stored_dtype(model, cache_folder())) if machine.engine.build == "cpu" else "",
        policy=name,
        policy_options=dict(option.partition("=")[::2] for option in options),
        cores=(cores()[0],),
        share=Share(machine.gpus[:1]) if machine.gpus else None,
        model_args=source.engine_args,
        user_args=tuple(args),
    )
    command = engine_command(plan, replace(usable_ports(None), http=port), sys.executable)
    argv = list(command.argv)
    if policy is None:
        for option in ("--scheduler-cls", "--additional-config", "--distributed-executor-backend"):
            if option in argv:
                at = argv.index(option)
                del argv[at : at + 2]
    return replace(command, argv=tuple(argv))


@contextmanager
def engine(model: str, *, policy: str | None, args: Sequence[str] = ()) -> Iterator[str]:
    """An engine that runs while the block does; yields its URL."""
    command = engine_program(model, policy, free_port(), args)
    with tempfile.TemporaryDirectory(prefix="evenhand-metrics-") as metrics:
        env = {**os.environ, **command.env, "PROMETHEUS_MULTIPROC_DIR": metrics}
        with running(command.argv, env, f"{command.url}/health"):
            yield command.url


@contextmanager
def gateway(*args: str) -> Iterator[str]:
    """A gateway on the first core; yields its URL once a worker is ready."""
    port = free_port()
    argv = ["taskset", "-c", str(cores()[1]), sys.executable, "-m", "deploy.cli", "gateway", "--port", str(port), *args]
    url = f"http://127.0.0.1:{port}"
    with running(argv, dict(os.environ), f"{url}/ready", 120):
        yield url


def main() -> None:
    """Replaces this program by the engine."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.engines")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--policy", help="our plug-in with this policy, NAME[:KEY=VALUE…] (default: stock vLLM)")
    parser.add_argument("--model", default="tiny-random")
    parser.add_argument("args", nargs="*", help="handed to vLLM")
    given = parser.parse_args()
    command = engine_program(given.model, given.policy, given.port, given.args)
    metrics = tempfile.mkdtemp(prefix="evenhand-metrics-")
    os.execve(command.argv[0], command.argv, {**os.environ, **command.env, "PROMETHEUS_MULTIPROC_DIR": metrics})


if __name__ == "__main__":
    main()
