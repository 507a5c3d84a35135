"""What a line of a batch costs the gateway, and whether lines are lost when it is killed."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from loadtest.bench.batch.gateway import POLL_S, served, submit
from loadtest.bench.batch.goals import Figure, Goal
from loadtest.bench.gateway.relay_load import BenchmarkError, cpu_s
from loadtest.call import TraceCall

OVER = ("completed", "failed", "expired", "cancelled")
SLOTS = 1024
_CHAOS_ROW = re.compile(r"^\| (lines without an answer|lines with two answers) \| (\d+) \|", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class LineCost:
    """lines: of the batch. cpu_s: of the gateway. rss_bytes: the most that it held. seconds: from start to end."""

    lines: int
    cpu_s: float
    rss_bytes: int
    seconds: float

    def figures(self) -> list[Figure]:
        where = f"{self.lines:,} lines through one gateway, {self.seconds:.0f} s"
        each_ms, held_mb = 1000 * self.cpu_s / self.lines, self.rss_bytes / 1e6
        return [
            _bounded("processor time of the gateway per line", where, Goal(most=2.0, unit=" ms"), each_ms),
            _bounded("memory of the gateway", where, Goal(most=200.0, unit=" MB"), held_mb),
        ]


def _bounded(what: str, where: str, goal: Goal, value: float) -> Figure:
    return Figure(what, where, goal.told([value]), goal.text, "", goal.met([value]))


def line_cost(lines: int) -> LineCost:
    """What the gateway spends on a batch when the engine takes no time."""
    jobs = [TraceCall(str(number), 0.0, "batch", [number % 30_000 + 100] * 8, 8, 1) for number in range(lines)]
    with tempfile.TemporaryDirectory(prefix="evenhand-batch-") as folder:
        with served("instant", SLOTS, Path(folder), 0.5) as url:
            pid = _pid(url)
            before, began = cpu_s(pid), time.monotonic()
            batch_id = submit(url, jobs)
            batch: dict[str, Any] = {"status": ""}
            with httpx2.Client(base_url=url, timeout=60) as client:
                while batch["status"] not in OVER:
                    time.sleep(POLL_S)
                    batch = client.get(f"/v1/batches/{batch_id}").json()
            if batch["status"] != "completed" or batch["request_counts"]["completed"] != lines:
                raise BenchmarkError(f"the batch ended as {batch['status']}: {batch['request_counts']}")
            return LineCost(lines, cpu_s(pid) - before, _peak_bytes(pid), time.monotonic() - began)


def _pid(url: str) -> int:
    """The gateway's process, by the port that it listens on."""
    port = url.rpartition(":")[2]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().split(b"\0")
        if b"gateway" in words and port.encode() in words:
            return int(entry.parent.name)
    raise BenchmarkError("the gateway's process was not found")


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def killed(kills: int, lines: int) -> Sequence[Figure]:
    """The figures of `python -m tests.chaos batch`. BenchmarkError where the tests are not installed, or it fails."""
    command = [sys.executable, "-m", "tests.chaos", "batch", "--kills", str(kills), "--lines", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    counts = dict(_CHAOS_ROW.findall(done.stdout))
    if len(counts) != 2:
        raise BenchmarkError(f"{' '.join(command[1:])} gave no figures: {done.stderr[-500:]}")
    where = f"{kills} kills during {lines:,} lines"
    names = {"lines without an answer": "lines lost", "lines with two answers": "lines doubled"}
    return [Figure(names[row], where, count, "0", "", count == "0") for row, count in counts.items()]
