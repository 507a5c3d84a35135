"""What our own measuring can do: the replay client on one core beside others, the fake engine, the simulator."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deploy.model.model import cache_folder, obtain
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import cores, running
from loadtest.bench.gateway.relay_load import cpu_s
from loadtest.bench.table import machine, markdown, spread
from loadtest.records import load

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
LAG_GOAL_S = 0.001
_EACH = 8  # requests on each of many simulated workers
# `vllm bench serve`, which the command `vllm` of the CPU distribution does not start.
VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser\n"
    "parser = Parser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)
# {tokenizer}: a model's folder. {requests}, {streams}: how many in all, and at once. {folder}: for what it writes.
AIPERF = (
    "{program} profile --model fake --url {url} --endpoint-type completions --streaming --tokenizer {tokenizer} "
    "--request-count {requests} --concurrency {streams} --synthetic-input-tokens-mean {prompt} "
    "--synthetic-input-tokens-stddev 0 --output-tokens-mean {output} --output-tokens-stddev 0 "
    "--extra-inputs ignore_eos:true --use-server-token-count --ui none --artifact-dir {folder}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="tables to make, of %(default)s (default: all)", type=_parts
    )
    parser.add_argument("--streams", type=int, default=64, help="at once, beside other clients (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=256, help="of the shorter run beside others (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of every run, in turns (default: %(default)s)")
    parser.add_argument("--aiperf", metavar="PROGRAM", help="AIPerf's command, to measure it too")
    parser.add_argument("--no-vllm", action="store_true", help="leave out `vllm bench serve`")
    parser.add_argument(
        "--lag-streams",
        default="16,32,64,128,256,512,1024",
        help="streams to look for the lag with (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1000, help="simulated workers (default: %(default)s)")
    parser.add_argument("--trace", help="that is simulated, for example Azure's chat (default: workload C)")
    parser.add_argument("--limit", type=int, default=20_000, help="requests simulated (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the tables; 2 if a client cannot be run."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    try:
        with tempfile.TemporaryDirectory(prefix="evenhand-bench-") as folder:
            for name, table in PARTS.items():
                if name in args.parts:
                    console.print(table(args, Path(folder)))
    except (RuntimeError, OSError) as error:
        console.print(str(error), markup=False)
        return 2
    return 0


@contextmanager
def fake_engine(cost: str, streams: int) -> Iterator[tuple[str, int]]:
    """An engine without a model on the first core, with a slot for each stream; its URL and process."""
    port, core = free_port(), cores()[1]
    kv_tokens = streams * (PROMPT_TOKENS + 8 * OUTPUT_TOKENS)
    argv = ["taskset", "-c", f"{core}", sys.executable, "-m", "loadtest.fake.engine", "--port", f"{port}"]
    argv += ["--cost", cost, "--max-seqs", f"{streams}", "--kv-tokens", f"{kv_tokens}"]
    url = f"http://127.0.0.1:{port}"
    with running(argv, dict(os.environ), f"{url}/health") as log:
        yield url, _listener(log)


def _listener(log: Path) -> int:
    """The process that writes this log; `taskset` has become it."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "fd/1").resolve() == log.resolve():
                return int(process.name)
        except OSError:
            continue
    raise RuntimeError("the fake engine is gone")


@dataclass(frozen=True, slots=True)
class Used:
    """What a program took: processor seconds of it and of all that it started and waited for, and its memory."""

    cpu_s: float
    memory_bytes: int


def used(argv: Sequence[str], log: Path) -> Used:
    """A client's run on the last core. RuntimeError with its last words if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with log.open("wb") as out:
        process = subprocess.Popen(["taskset", "-c", f"{cores()[0]}", *argv], stdout=out, stderr=out, env=env)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(argv[:4])} … failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


# Beside others


def clients(args: argparse.Namespace, url: str, folder: Path) -> Mapping[str, str]:
    """Commands by name, with {requests} to be filled in."""
    lengths = {"prompt": PROMPT_TOKENS, "output": OUTPUT_TOKENS, "streams": args.streams, "requests": "{requests}"}
    tokenizer = obtain("tiny-random", cache_folder(), lambda _: None).path
    named = {"url": url, "folder": folder, "tokenizer": tokenizer, "program": args.aiperf, **lengths}
    python = shlex.quote(sys.executable)
    ours = f"{python} -m deploy.cli replay {folder}/trace.jsonl --url {url} --quiet --force --out {folder}/ours.jsonl"
    commands = {"evenhand replay": f"{ours} --concurrency {args.streams} --limit {{requests}}"}
    if not args.no_vllm:
        vllm = (
            f"{python} -c {shlex.quote(VLLM_BENCH)} --backend openai --base-url {url} --endpoint /v1/completions "
            f"--model fake --tokenizer {tokenizer} --dataset-name random --random-input-len {PROMPT_TOKENS} "
            f"--random-output-len {OUTPUT_TOKENS} --ignore-eos --max-concurrency {args.streams} --disable-tqdm"
        )
        commands["`vllm bench serve`"] = f"{vllm} --num-prompts {{requests}}"
    if args.aiperf:
        commands["AIPerf"] = AIPERF.format(**named)
    return commands


def write_trace(folder: Path, requests: int, output_tokens: int = OUTPUT_TOKENS) -> Path:
    """Requests all alike."""
    path = folder / "trace.jsonl"
    line = json.dumps({"prompt_tokens": PROMPT_TOKENS, "output_tokens": output_tokens})
    path.write_text(f"{line}\n" * requests)
    return path


def beside_others(args: argparse.Namespace, folder: Path) -> str:
    """Processor time per token. A short and a three times longer run: the difference has no start in it.

    The engine is one that all of them keep up with. Of a faster one a slow client reads many tokens at once, which
    costs it less for each, and tells the time of none.
    """
    short, long = args.requests, 3 * args.requests
    write_trace(folder, long)
    spent: dict[str, list[float]] = {}
    with fake_engine("gpu-7b", args.streams) as (url, _):
        for _ in range(args.repetitions):
            for name, command in clients(args, url, folder).items():
                first, second = (
                    used(shlex.split(command.replace("{requests}", f"{requests}")), folder / "client.log").cpu_s
                    for requests in (short, long)
                )
                spent.setdefault(name, []).append((second - first) / ((long - short) * OUTPUT_TOKENS))
    ours = spent["evenhand replay"]
    rows = []
    for name, each in spent.items():
        ratios = [other / mine for mine, other in zip(ours, each, strict=True)]
        per_core = [1 / one for one in each]
        rows.append([name, spread([1e6 * one for one in each], digits=1), spread(per_core, digits=0), spread(ratios)])
    head = ["client", "CPU per token, µs", "tokens/s that fill a core", "÷ ours"]
    about = (
        f"{args.streams} streams of {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} answer tokens, {args.repetitions} "
        f"repetitions in turns, each of {short} and {long} requests: the difference of the two. The engine sends at "
        "the pace of a 7B model on an A100, which every client keeps up with.\n"
    )
    return f"\n{about}\n{markdown(head, rows)}"


# Lag


def lags(args: argparse.Namespace, folder: Path) -> str:
    """How late the client's own event loop woke, by streams; a fake engine sends a token to all at the same moment."""
    rows, most = [], "none"
    for streams in map(int, args.lag_streams.split(",")):
        path = write_trace(folder, 4 * streams, 2 * OUTPUT_TOKENS)
        out = folder / "lag.jsonl"
        argv = [sys.executable, "-m", "deploy.cli", "replay", f"{path}", "--quiet", "--force", "--out", f"{out}"]
        seen = []
        for _ in range(args.repetitions):
            with fake_engine("quick", streams) as (url, _):
                used([*argv, "--url", url, "--concurrency", f"{streams}"], folder / "client.log")
            recorded = load(out)
            assert recorded.run is not None
            tokens = sum(one.output_tokens for one in recorded.records)
            seen.append((tokens / recorded.run.duration_s, recorded.run.loop_p99_s))
        rows.append([f"{streams}", spread([one for one, _ in seen], digits=0), spread([1e3 * lag for _, lag in seen])])
        if sorted(lag for _, lag in seen)[len(seen) // 2] <= LAG_GOAL_S:
            most = f"{streams} streams, {sorted(one for one, _ in seen)[len(seen) // 2]:,.0f} tokens/s"
    head = ["streams", "tokens/s", "own lag P99, ms"]
    return f"\n{markdown(head, rows)}\n\nAt most 1 ms late: {most}."


# The fake engine


def engine_speed(args: argparse.Namespace, folder: Path) -> str:
    """Chunks per second of the engine's processor time, and on the clock, with iterations that cost nothing."""
    streams = 256
    path = write_trace(folder, 4 * streams, 4 * OUTPUT_TOKENS)
    out = folder / "engine.jsonl"
    argv = [sys.executable, "-m", "deploy.cli", "replay", f"{path}", "--quiet", "--force", "--out", f"{out}"]
    per_cpu, per_s = [], []
    for _ in range(args.repetitions):
        with fake_engine("instant", streams) as (url, pid):
            before = cpu_s(pid)
            used([*argv, "--url", url, "--concurrency", f"{streams}"], folder / "client.log")
            spent = cpu_s(pid) - before
        recorded = load(out)
        assert recorded.run is not None
        chunks = sum(len(one.gaps_us) + 1 for one in recorded.records)
        per_cpu.append(chunks / spent)
        per_s.append(chunks / recorded.run.duration_s)
    rows = [[f"{streams} streams", spread(per_cpu, digits=0), spread(per_s, digits=0), "≥ 25,000"]]
    return "\n" + markdown(["fake engine", "chunks per second of its CPU", "chunks/s on the clock", "goal"], rows)


# The simulator


def simulated(args: argparse.Namespace, folder: Path) -> str:
    """A trace on one worker kept full; on many at its own times, and with some on each of them at any time."""
    trace = args.trace or "C"
    rows = []
    for name, workers, options in (
        ("1 worker, 256 on it", 1, ("--concurrency", "256")),
        (f"{args.workers} workers, at the trace's own times" if args.trace else f"{args.workers} workers, 5 requests/s",
         args.workers, () if args.trace else ("--rate", "5")),
        (f"{args.workers} workers, {_EACH} on each", args.workers, ("--concurrency", f"{_EACH * args.workers}")),
    ):  # fmt: skip
        argv = [sys.executable, "-m", "deploy.cli", "simulate", trace, "--workers", f"{workers}", "--limit"]
        argv += [f"{args.limit}", *options]
        log = folder / "simulated.log"
        took = used(argv, log)
        said = log.read_text()
        found = re.search(r"([\d,]+) requests in ([\d.]+) s, ([\d,]+) requests/s", said)
        if found is None:
            raise RuntimeError(f"the simulation said nothing of its speed:\n{said[-500:]}")
        rows.append([name, found[1], found[2], found[3], f"{took.memory_bytes / 1e6:,.0f}"])
    about = f"\n{trace if not args.trace else Path(trace).stem}, cost model gpu-7b, FCFS:\n\n"
    return about + markdown(["simulated", "requests", "seconds", "requests/s", "memory, MB"], rows)


PARTS: Mapping[str, Callable[[argparse.Namespace, Path], str]] = {
    "clients": beside_others,
    "lag": lags,
    "engine": engine_speed,
    "simulator": simulated,
}


def _parts(said: str) -> list[str]:
    names = said.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return names
