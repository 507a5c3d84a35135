"""The bundled model on one core, beside stock vLLM and llama.cpp's server: first tokens, throughput, memory, start.

All serve at the same time and are asked in turns, the same prompts; whoever is not asked sleeps. Each computes on one
core and has another for its HTTP server. llama.cpp reads the GGUF (Q4_1) that the bundled model is made from.
"""

import argparse
import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console

from deploy.machine.machine import text_of
from deploy.model.model import BUNDLED
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import cores, engine_program, running
from loadtest.bench.table import machine, markdown, spread
from loadtest.call import TraceCall
from loadtest.client.client import Client, Target
from loadtest.records import Record

OURS, STOCK, LLAMA = "evenhand serve", "stock vLLM", "llama.cpp"
PROMPTS_TOKENS = (20, 200, 1000)
STREAMS = (1, 4, 16)
ANSWER_TOKENS = 64
CONTEXT_TOKENS = 2048
QUESTION = "What is the capital of France?"
VOCABULARY = range(1000, 40_000)  # text; the first ids are special tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of all, in turns (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default %(default)s)")


@dataclass
class Side:
    """One server: where it is, its first answer and how long that took, and what was measured, by the row's name."""

    name: str
    url: str
    said: str
    start_s: float
    memory_gib: float
    seen: dict[str, list[float]] = field(default_factory=dict)

    def note(self, row: str, value: float) -> None:
        self.seen.setdefault(row, []).append(value)


def run(args: argparse.Namespace) -> int:
    """Starts all, asks them in turns, prints the table."""
    console, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        sides = [stack.enter_context(side(name)) for name in (OURS, STOCK, LLAMA) if is_there(name)]
        if len(sides) < len((OURS, STOCK, LLAMA)):
            progress.print("llama.cpp is left out: `pip install --no-deps xllamacpp` to have it measured, too")
        for number in range(args.rounds + 1):
            for one in sides if number % 2 else sides[::-1]:
                asyncio.run(measure(one, Random(f"{args.seed}:{number}"), warm_up=number == 0))
                progress.print(f"round {number} of {args.rounds}: {one.name}")
    console.print(machine())
    console.print(table(sides))
    console.print(f"\n{QUESTION}")
    for one in sides:
        console.print(f"- {one.name}: {one.said}")
    return 0


def is_there(name: str) -> bool:
    return name != LLAMA or find_spec("xllamacpp") is not None


def program(name: str, port: int) -> tuple[Sequence[str], dict[str, str]]:
    """The command of one side, and what it adds to the environment. Each may use two cores and computes on one."""
    compute, other = cores()
    here = ("taskset", "-c", f"{other},{compute}")
    if name == OURS:
        return (*here, sys.executable, "-m", "deploy.cli", "serve", "--port", str(port)), {}
    if name == STOCK:
        stock = engine_program(BUNDLED, None, port, ())
        return (*here, *stock.argv), dict(stock.env)
    slots = max(STREAMS)
    numbers = (str(number) for number in (port, slots, CONTEXT_TOKENS))
    return (*here, sys.executable, "-m", "loadtest.bench.policies.llama_server", *numbers), {}


@contextmanager
def side(name: str) -> Iterator[Side]:
    """One server while the block runs, once it has answered a question."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv, env = program(name, port)
    began = time.perf_counter()
    with running(argv, {**os.environ, **env}, f"{url}/{'ready' if name == OURS else 'health'}") as log:
        said = ask(url)
        start_s = time.perf_counter() - began
        yield Side(name, url, said, start_s, memory_gib(log))


def ask(url: str) -> str:
    """The answer to the question."""
    body = {"model": BUNDLED, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said: str = json.load(answer)["choices"][0]["message"]["content"]
        return said


def memory_gib(log: Path) -> float:
    """What all processes that write to `log`, or were started by one that does, hold in memory; shared pages once."""
    stats = {
        int(stat.parent.name): text_of(stat).rpartition(")")[2].split() for stat in Path("/proc").glob("[0-9]*/stat")
    }
    parents = {pid: int(fields[1]) for pid, fields in stats.items() if fields}
    mine = {pid for pid in parents if writes_to(pid) == str(log)}
    while below := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= below
    rollups = [text_of(Path(f"/proc/{pid}/smaps_rollup")) for pid in mine]
    return (
        sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")) / 2**20
    )


def writes_to(pid: int) -> str:
    """The file that is a process's standard output; "" for one that is gone or another user's."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


async def measure(one: Side, drawn: Random, *, warm_up: bool) -> None:
    """One round: a prompt of each length alone, then so many streams at once."""
    for tokens in PROMPTS_TOKENS:
        (record,) = await asked(one, [prompt(drawn, tokens)], 1, 2)
        if not warm_up:
            one.note(f"TTFT of {tokens} tokens, s", record.ttft_s or 0.0)
    for streams in STREAMS:
        records = await asked(one, [prompt(drawn, PROMPTS_TOKENS[0]) for _ in range(streams)], streams, ANSWER_TOKENS)
        end_s = max(record.sent_s + record.e2e_s for record in records)
        made = sum(record.output_tokens for record in records)
        if not warm_up:
            one.note(f"tokens/s, {streams} at once", made / (end_s - min(record.sent_s for record in records)))


def prompt(drawn: Random, tokens: int) -> list[int]:
    return [drawn.choice(VOCABULARY) for _ in range(tokens)]


async def asked(one: Side, prompts: Sequence[list[int]], at_once: int, answer_tokens: int) -> Sequence[Record]:
    """What came of these prompts. RuntimeError if one failed, or was not answered in full."""
    calls = [TraceCall(f"{at}", 0.0, "bench", ids, len(ids), answer_tokens) for at, ids in enumerate(prompts)]
    records = await Client(Target(one.url, model=BUNDLED)).closed_loop(calls, at_once)
    for record in records:
        if not record.ok or record.ttft_s is None or record.output_tokens != answer_tokens:
            raise RuntimeError(f"{one.name}: {record.ending.value}, {record.output_tokens} tokens: {record.error}")
    return records


def table(sides: Sequence[Side]) -> str:
    """Medians with their spread; behind each of the others', what ours is to it."""
    ours, *others = sides
    head = ["one core", *(one.name for one in sides), *(f"ours ÷ {one.name}" for one in others)]
    rows = [
        [
            row,
            *(spread(one.seen[row]) for one in sides),
            *(f"{median(ours.seen[row]) / median(one.seen[row]):.2f}" for one in others),
        ]
        for row in ours.seen
    ]
    for name, of in (("command → first answer, s", "start_s"), ("memory, GiB", "memory_gib")):
        values = [getattr(one, of) for one in sides]
        rows.append([name, *(f"{value:.1f}" for value in values), *(f"{values[0] / v:.2f}" for v in values[1:])])
    return markdown(head, rows)
