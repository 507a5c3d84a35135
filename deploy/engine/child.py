"""A child process that ends with its parent (see reaper.py), and its output line by line."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

LEASH = Path(__file__).with_name("reaper.py")
COLLECTING_S = 5.0  # what the leash may take, after its grace, to collect all that it killed
DYING_S = 1.0  # how long after a failed request its child may turn out to be the cause

T = TypeVar("T")


class ChildEnded(Exception):
    """The child ended while something was expected of it. `exit_code` is 128 + the signal if a signal ended it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


class ChildProcess:
    """A running command with everything that it started, as one process group."""

    def __init__(self, process: asyncio.subprocess.Process, reading: asyncio.Task[None]) -> None:
        self.pid = process.pid
        self._process = process
        self._reading = reading

    async def or_end(self, doing: Coroutine[Any, Any, T]) -> T:
        """What `doing` gives; ChildEnded if the child ends first, by when all of its output has been heard."""
        work = asyncio.create_task(doing)
        ended = asyncio.create_task(self._ended())
        try:
            await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and (work.exception() is None or not await self._ends_soon(ended)):
                return work.result()
            raise ChildEnded(await ended)
        finally:
            for task in (work, ended):
                task.cancel()
            await asyncio.gather(work, ended, return_exceptions=True)

    async def _ends_soon(self, ended: asyncio.Task[int]) -> bool:
        """A dying engine refuses connections before it is gone, and its own last words say more than the refusal."""
        await asyncio.wait({ended}, timeout=DYING_S)
        return ended.done()

    async def _ended(self) -> int:
        exit_code = await self._process.wait()
        await asyncio.shield(self._reading)
        return exit_code if exit_code >= 0 else 128 - exit_code

    def kill(self) -> None:
        """Ends the whole group at once. Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, and kills what has not after `grace_s`; returns when nothing of it is left."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s + COLLECTING_S)
        self.kill()
        await self._process.wait()
        await asyncio.wait({self._reading}, timeout=COLLECTING_S)
        self._reading.cancel()


@contextlib.asynccontextmanager
async def running(
    argv: Sequence[str],
    env: Mapping[str, str],
    grace_s: float,
    heard: Callable[[str], None],
    cores: Sequence[int] = (),
) -> AsyncIterator[ChildProcess]:
    """Runs `argv` in exactly `env`; `heard` gets each line that it writes. Nothing of it is left when the block is.

    cores: the only ones on which it may run; empty for all. OSError if no process can be started.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LEASH), str(grace_s), ",".join(map(str, cores)) or "-"),
        *argv,
        stdin=asyncio.subprocess.PIPE,  # the leash: the kernel closes it when this process ends, however it ends
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # so that a Ctrl-C in the terminal reaches us alone
        env=dict(env),
    )
    assert process.stdout is not None
    child = ChildProcess(process, asyncio.create_task(hear(process.stdout, heard)))
    try:
        yield child
    finally:
        await uninterrupted(child.stop(grace_s))


async def hear(stream: asyncio.StreamReader, heard: Callable[[str], None]) -> None:
    """Splits a stream into lines of any length; a progress bar's carriage returns end lines too."""
    rest = b""
    while chunk := await stream.read(65_536):
        *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            heard(line.decode(errors="replace"))
    if rest:
        heard(rest.decode(errors="replace"))


async def uninterrupted(doing: Awaitable[None]) -> None:
    """Finishes `doing` whatever is cancelled meanwhile, and passes the cancellation on afterwards."""
    work = asyncio.ensure_future(doing)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            cancelled = error
    work.result()
    if cancelled is not None:
        raise cancelled
