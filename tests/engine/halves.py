"""`evenhand serve` with real prefill and decode engines on a tiny model whose every token depends on all before it."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx2

from loadtest.bench.bench_target import free_port
from server.fleet.fleet import is_idle
from tests.deploy.processes import MARK, in_session, marked, new_mark

START_S = 280.0
ASK_S = 120.0
CONTEXT_TOKENS = 1024
KV_LEASE_S = 15.0  # what `serve` tells its engines
ARGUMENTS = (
    "--dtype=float32", "--enforce-eager", f"--max-model-len={CONTEXT_TOKENS}", "--max-num-seqs=8",
    "--max-num-batched-tokens=256",
)  # fmt: skip
SETTINGS = "probe_s: 0.1\ndisaggregation: {min_prompt_tokens: 1}\n"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

Json = dict[str, Any]


@dataclass(frozen=True)
class Half:
    """An engine as a process. leash: the session of all that belongs to it."""

    url: str
    server_pid: int
    leash: int

    def kill(self) -> None:
        """What runs the model dies at once; the HTTP server finds out."""
        pid = next(pid for pid, command in in_session(self.leash).items() if "EngineCore" in command)
        os.kill(pid, signal.SIGKILL)

    def kill_server(self) -> None:
        """What has the connections dies at once."""
        os.kill(self.server_pid, signal.SIGKILL)

    def is_asleep(self) -> bool:
        """Whether none of its threads runs or wants to at this moment."""
        stats = [stat for pid in in_session(self.leash) for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.read_text().rpartition(")")[2].split()[0] != "R" for stat in stats)


@dataclass(frozen=True)
class Cores:
    """Where threads of one engine may run: the one that computes, and each different set of all of them."""

    computing: frozenset[int]
    all: set[frozenset[int]]


@dataclass(frozen=True)
class Halves:
    """A running `serve` with so many workers.

    folder: of the model, which is served under its name. logs: the engines', which have their roles in their names.
    """

    url: str
    mark: str
    folder: Path
    workers: int
    logs: Path
    key: str

    def engines(self, role: str) -> list[Half]:
        """Those of one role that listen at present, `prefill` or `decode`."""
        texts = [log.read_text(errors="replace") for log in self.logs.glob(f"*/{role}-*.log")]
        ports = {found[-1] for text in texts if (found := re.findall(r"non-default args: .*?'port': (\d+)", text))}
        found = []
        for pid, command in marked(self.mark).items():
            port = re.search(r"api_server.* --port (\d+)", command)
            if port and port[1] in ports and os.getpgid(pid) != pid:  # the leash has the same words
                found.append(Half(f"http://127.0.0.1:{port[1]}", pid, os.getsid(pid)))
        return found

    def headers(self, at: str | None) -> dict[str, str]:
        """With the key that engines ask for; clients of the gateway have none."""
        return {"authorization": f"Bearer {self.key}"} if at else {}

    def cores(self) -> list[Cores]:
        """Where each engine's threads may run, by what the kernel says of every one of them."""
        found = []
        for leash in sorted({os.getsid(pid) for pid, command in marked(self.mark).items() if "api_server" in command}):
            processes = in_session(leash)
            core = next(pid for pid, command in processes.items() if "EngineCore" in command)
            tasks = [int(task.name) for pid in processes for task in Path(f"/proc/{pid}/task").iterdir()]
            every = {frozenset(os.sched_getaffinity(task)) for task in tasks}
            found.append(Cores(frozenset(os.sched_getaffinity(core)), every))
        return found

    @property
    def prefills(self) -> list[Half]:
        return self.engines("prefill")

    @property
    def decodes(self) -> list[Half]:
        return self.engines("decode")

    async def ask(self, path: str, body: Mapping[str, Any], *, at: str | None = None) -> Json:
        """An answer in one piece, of the gateway or of the engine `at`."""
        async with httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as client:
            told = {"model": self.folder.name, **body}
            answer = await client.post((at or self.url) + path, json=told, headers=self.headers(at))
        assert answer.status_code == 200, answer.text
        parsed: Json = answer.json()
        return parsed

    async def stream(self, path: str, body: Mapping[str, Any], *, at: str | None = None) -> list[Json]:
        """A stream's events, without the last."""
        told = {"model": self.folder.name, "stream": True, **body}
        async with httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as client:
            url, headers = (at or self.url) + path, self.headers(at)
            async with client.stream("POST", url, json=told, headers=headers) as answer:
                assert answer.status_code == 200, await answer.aread()
                lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    async def one_engine(self, path: str, body: Mapping[str, Any], half: Half | None = None) -> Json:
        """What an engine says that has neither read the prompt before nor fetched its KV."""
        salt = f"one engine {time.monotonic_ns()}"
        return await self.ask(path, {"cache_salt": salt, **body}, at=(half or self.decodes[0]).url)

    async def metric(self, name: str, *, at: str | None = None, **labels: str) -> float:
        """The sum of a metric over all labels that are not given."""
        async with httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as client:
            text = (await client.get(f"{at or self.url}/metrics")).text
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        rows = [row for row in text.splitlines() if re.match(rf"{re.escape(name)}(\{{|\s)", row)]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows if all(label in row for label in wanted))

    async def metric_of(self, engines: Sequence[Half], name: str, **labels: str) -> float:
        """The sum over these engines."""
        return sum([await self.metric(name, at=half.url, **labels) for half in engines])

    async def nothing_held(self, *among: Half, limit_s: float = KV_LEASE_S + 45.0) -> None:
        """Returns when none of these engines, or of all, runs, holds waiting or keeps KV of anything, as it says."""
        async with httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as client:

            async def idle() -> bool:
                halves = among or (*self.prefills, *self.decodes)
                told = [(await client.get(f"{half.url}/metrics")).text for half in halves]
                return len(told) > 0 and all(map(is_idle, told))

            await until(idle, limit_s, "no engine holds anything")

        async def at_rest() -> bool:
            names = ("evenhand_worker_in_flight", "evenhand_worker_pending_tokens", "evenhand_queue_depth")
            return not any([await self.metric(name) for name in names])

        await until(at_rest, 60.0, "the gateway holds nothing")

    async def all_ready(self) -> None:
        """Returns when every worker takes requests."""

        async def ready() -> bool:
            return await self.metric("evenhand_worker_up") == self.workers

        await until(ready, START_S, f"{self.workers} workers are ready")


async def rests(half: Half) -> None:
    """Returns once it was seen asleep often. A thread that spins never sleeps, however busy the machine is."""
    seen = 0

    async def often() -> bool:
        nonlocal seen
        seen += half.is_asleep()
        return seen >= 20

    await until(often, 60.0, f"{half.url} sleeps while it has nothing to do")


async def until(condition: Any, limit_s: float, what: str) -> None:
    """Returns once the coroutine function says yes; a server that is not there says no."""
    end = time.monotonic() + limit_s
    while True:
        try:
            if await condition():
                return
        except (httpx2.TransportError, StopIteration, IndexError, FileNotFoundError, ProcessLookupError):
            pass  # it is just dying, or being born
        assert time.monotonic() < end, f"still not after {limit_s} s: {what}"
        await asyncio.sleep(0.05)  # between two looks at other processes


def token_ids(count: int, seed: int) -> list[int]:
    """A prompt that nobody has asked before."""
    drawn = random.Random(seed)
    return [drawn.randrange(100, 40_000) for _ in range(count)]


def choices(answer: Json) -> list[Json]:
    """What an answer says, without ids and times."""
    return [{**choice} for choice in answer["choices"]]


def text_of(events: Sequence[Json]) -> str:
    """What a stream says."""
    said = [choice for event in events for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in said)


@contextmanager
def serving(model: Path, folder: Path, prefill: int, decode: int, both: int = 0) -> Iterator[Halves]:
    """`evenhand serve` with so many engines of each kind, under VTC; at its end it must leave nothing behind."""
    mark, port, key = new_mark(), free_port(), token_hex(16)
    (folder / "settings.yaml").write_text(SETTINGS)
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--model", str(model)]
    command += ["--prefill-workers", str(prefill), "--decode-workers", str(decode), "--workers", str(both)]
    command += ["--kv-cache-gib", "1"]
    command += ["--policy", "vtc", "--config", str(folder / "settings.yaml"), "--state-folder", str(folder / "state")]
    command += [f"--engine-arg={argument}" for argument in ARGUMENTS]
    log = folder / "serve.log"
    env = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "EVENHAND_ENGINE_KEY": key}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        end = time.monotonic() + START_S
        while b"\nReady: " not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.1)
        yield Halves(f"http://127.0.0.1:{port}", mark, model, prefill + decode + both, folder / "state", key)
    finally:
        process.terminate()
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, log.read_text()[-5000:]
    assert marked(mark) == {}
