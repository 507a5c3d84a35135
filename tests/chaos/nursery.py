"""Starts vLLM API servers in seconds: one process imports vLLM, and every engine is a fork of it.

A start of vLLM on a CPU is mostly imports, three times over: API server, EngineCore and Worker. A run that ends dozens
of engines would spend its time there. What runs in the forks is vLLM's own program, unchanged but for `fork` in place
of `spawn`, which vLLM takes on CPUs for the sake of OpenMP's settings; these are the same for all processes here.
"""

import asyncio
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.engine.reaper import PR_SET_CHILD_SUBREAPER, prctl
from tests.chaos.site import POLL_S, STOP_S, Program

IMPORT_S = 300.0


class Nursery:
    """The process that has imported vLLM. One at a time asks it."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.env = env
        self.log = log
        self.ended: dict[int, asyncio.Future[int]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._born: asyncio.Queue[int] = asyncio.Queue()
        self._lock = asyncio.Lock()

    async def fork(self, arguments: Sequence[str], log: Path) -> int:
        """The process id of a new engine, which leads a session of its own."""
        async with self._lock:
            if self._process is None:
                await self._begin()
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps([list(arguments), str(log)]).encode() + b"\n")
            return await asyncio.wait_for(self._born.get(), IMPORT_S)

    async def _begin(self) -> None:
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.chaos.nursery", stdin=-1, stdout=-1, stderr=out, env=os.environ | self.env
            )
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        async for line in self._process.stdout:
            pid, code = json.loads(line)
            if code is None:
                self.ended[pid] = asyncio.get_running_loop().create_future()
                self._born.put_nowait(pid)
            else:
                self.ended[pid].set_result(code)

    async def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
            await self._reading


@dataclass
class Forked(Program):
    """An engine that the nursery starts. command: the arguments of vLLM's API server."""

    nursery: Nursery = field(kw_only=True)
    born: int = 0

    async def start(self) -> None:
        self.born = await self.nursery.fork(self.command, self.log)
        end = asyncio.get_running_loop().time() + self.start_s
        while not await self.there():
            if self.nursery.ended[self.born].done() or asyncio.get_running_loop().time() > end:
                raise RuntimeError(f"{self.name} does not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(10 * POLL_S)  # between two looks

    @property
    def pid(self) -> int:
        return self.born

    async def kill(self) -> None:
        if not self.born:
            return
        with suppress(ProcessLookupError):
            while True:  # until none of its processes is left that could hold its port
                os.killpg(self.born, signal.SIGKILL)
                await asyncio.sleep(POLL_S)

    async def end(self) -> int:
        os.kill(self.born, signal.SIGTERM)
        return await asyncio.wait_for(self.nursery.ended[self.born], STOP_S)


def main() -> None:
    """Reads orders, a line each, until stdin ends; writes [process id, null] for a fork and its exit code later."""
    import multiprocessing

    import vllm.entrypoints.launchers.api_server.entry as server
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    context = multiprocessing.get_context("fork")
    for module in list(sys.modules.values()):
        if module.__name__.startswith("vllm.") and hasattr(module, "get_mp_context"):
            module.get_mp_context = lambda: context  # type: ignore[attr-defined]
    sys.stderr.write("vLLM is imported\n")
    sys.stderr.flush()
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a killed engine leaves becomes a child of this process
    children: set[int] = set()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        _tell_of_the_ended(children)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            arguments, log = json.loads(line)
            pid = os.fork()
            if not pid:
                _become(server, arguments, log)
            children.add(pid)
            _say(pid, None)


def _tell_of_the_ended(children: set[int]) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] in children:  # else it was an engine's own, which has outlived it
                children.discard(ended[0])
                _say(ended[0], os.waitstatus_to_exitcode(ended[1]))


def _say(pid: int, code: int | None) -> None:
    sys.stdout.write(json.dumps([pid, code]) + "\n")
    sys.stdout.flush()


def _become(server: Any, arguments: Sequence[str], log: str) -> None:
    """Does not return: it ends the process, or raises."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(number, target)
    sys.argv = ["vllm", *arguments]
    server.main()
    os._exit(0)


if __name__ == "__main__":
    main()
