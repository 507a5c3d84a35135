"""Puts a gateway between a mock engine and a load generator (relay/*.c, compiled here) and watches what it costs.

The gateway has a core for itself; engine and load generator share another one, kept off it.
"""

import json
import os
import resource
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import cores

SOURCES = Path(__file__).parent / "relay"
START_S = 90.0
STOP_S = 10.0
QUIET_S = 5.0  # the longest wait for other programs to pause
QUIET_SHARE = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """Something that this benchmark needs is missing or does not work; the message says what to do."""


@dataclass(frozen=True, slots=True)
class LoadPhase:
    """One kind of load.

    connections: kept open, each asking anew when it has its answer; with `rate` (requests/s) at most so many at once.
    seconds: measured, after `warm_up_s`. chunks: of each streamed answer, 0 for answers in one piece; `interval_us`
    between two of them. weighs: the gateway's memory is read near the end. keys: a file of API keys, which requests
    take in turn. own_prompts: every request has a prompt of its own behind a common beginning.
    """

    connections: int
    seconds: float
    warm_up_s: float
    chunks: int = 0
    interval_us: int = 0
    rate: float = 0.0
    weighs: bool = False
    keys: Path | None = None
    own_prompts: bool = False

    def arguments(self) -> list[str]:
        options = {"-c": self.connections, "-d": self.seconds, "-w": self.warm_up_s}
        options |= {"-s": self.chunks} if self.chunks else {}
        options |= {"-i": self.interval_us} if self.interval_us else {}
        options |= {"-r": self.rate} if self.rate else {}
        switches = (["-k", str(self.keys)] if self.keys else []) + (["-n"] if self.own_prompts else [])
        return [str(part) for option in options.items() for part in option] + switches


@dataclass(frozen=True, slots=True)
class Observed:
    """What a phase showed.

    load: what the load generator counted. gateway_cpu_s: used by the gateway and all that it started.
    pss_bytes: the gateway's memory, if the phase weighs it. others: cores that other programs used.
    """

    load: Mapping[str, Any]
    gateway_cpu_s: float
    pss_bytes: int
    others: float


def program(*names: str, hint: str) -> str:
    """The first of these programs that is installed. BenchmarkError with a hint if none is."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    for name in names:
        if (found := shutil.which(name, path=path)) is not None:
            return found
    raise BenchmarkError(f"{names[0]} is not installed here: {hint}")


def compiled(name: str, folder: Path) -> Path:
    """relay/NAME.c as a program in `folder`. BenchmarkError if there is no compiler, or it refuses."""
    compiler = program("cc", "gcc", "clang", hint="install a C compiler (Debian and Ubuntu: apt install gcc libc6-dev)")
    target = folder / name
    command = [compiler, "-O2", "-o", str(target), str(SOURCES / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{name}.c does not compile here:\n{done.stderr[-2000:]}")
    return target


def open_files() -> int:
    """How many files a program may have open, as high as this user may set it; holds for what is started later."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


@contextmanager
def running(argv: Sequence[str], core: int, log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program on one core, while the block runs; what it says goes to `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        os.sched_setaffinity(process.pid, {core})
        yield process
    finally:
        tree = descendants(process.pid)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        for pid in reversed(tree):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        process.wait()


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                left += map(int, task.read_text().split())
            except OSError:  # it has just ended
                continue
    return found


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and all below it."""
    ticks = 0
    for one in descendants(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def pss_bytes(pid: int) -> int:
    """Memory of a process and all below it; a page that n processes share counts 1/n in each."""
    total = 0
    for one in descendants(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def busy_s() -> float:
    """Processor seconds that this machine has spent on anything."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS_PER_S


def wait_until_quiet() -> None:
    """Returns when other programs pause, or when that takes too long."""
    end = time.monotonic() + QUIET_S
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(0.5)
        if (busy_s() - before) / 0.5 < QUIET_SHARE * (os.cpu_count() or 1):
            return


class RelayBench:
    """The mock engine, and the load generator for the gateway in front of it. Use it in a `with` block."""

    def __init__(self, folder: Path, key: str) -> None:
        """BenchmarkError if its programs cannot be made."""
        self.folder = folder
        self.key = key
        self.gateway_core, self.core = cores()
        self.backend, self.loadgen = compiled("backend", folder), compiled("loadgen", folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def engine(self, *, fleet: bool = False) -> Iterator[None]:
        """The mock engine is there while the block runs; as a fleet, at every loopback address."""
        argv = [str(self.backend), str(self.port), *(["fleet"] if fleet else [])]
        with running(argv, self.core, self.folder / "backend.log", dict(os.environ)) as process:
            self._engine = process
            self.wait_for(self.port, process, self.folder / "backend.log")
            yield

    @contextmanager
    def gateway(self, name: str, argv: Sequence[str], port: int, env: Mapping[str, str]) -> Iterator[int]:
        """A gateway on its core while the block runs; yields its process id once it relays."""
        log = self.folder / f"{name}.log"
        with running(argv, self.gateway_core, log, env) as process:
            self.wait_for(port, process, log)
            yield process.pid

    def wait_for(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        """Returns when a chat is answered. BenchmarkError if it is not, with what the program said."""
        body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end, problem = time.monotonic() + START_S, "it answers something else"
        while process.poll() is None and time.monotonic() < end:
            try:
                with opener.open(request, timeout=3) as answer:
                    if b"@" in answer.read():
                        return
            except (urllib.error.URLError, OSError) as error:
                problem = str(error)
            time.sleep(0.02)
        said = log.read_text(errors="replace")[-1500:]
        raise BenchmarkError(f"{log.stem} does not relay ({problem}). It said:\n{said}")

    def load_command(self, phase: LoadPhase, port: int) -> list[str]:
        """The load generator's command line."""
        who = [] if phase.keys else ["-H", f"authorization: Bearer {self.key}"]
        return [str(self.loadgen), "-p", str(port), *who, *phase.arguments()]

    def observe(self, phase: LoadPhase, port: int, gateway_pid: int | None) -> Observed:
        """Runs a phase against a port. gateway_pid: the measured process, None for the engine itself."""
        command = self.load_command(phase, port)
        mine = [pid for pid in (self._engine.pid, gateway_pid) if pid is not None]
        began, busy, used = time.monotonic(), busy_s(), {pid: cpu_s(pid) for pid in mine}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.sched_setaffinity(process.pid, {self.core})
        memory = 0
        if gateway_pid is not None and phase.weighs:
            time.sleep(phase.warm_up_s + phase.seconds * 0.8)  # all connections are open then
            memory = pss_bytes(gateway_pid)
        out, err = process.communicate(timeout=phase.seconds + phase.warm_up_s + 60)
        if process.returncode != 0:
            raise BenchmarkError(f"the load generator failed: {err.decode(errors='replace').strip()}")
        load = json.loads(out)
        spent = {pid: cpu_s(pid) - used[pid] for pid in mine}
        others = busy_s() - busy - sum(spent.values()) - load["cpu_s"]
        return Observed(
            load,
            spent[gateway_pid] if gateway_pid is not None else 0.0,
            memory,
            max(0.0, others / (time.monotonic() - began)),
        )
