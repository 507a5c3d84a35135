"""The supervisor over real child processes: the fake engine, and programs that misbehave in one way each."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import pytest

from deploy.engine.canary import Canary, CanaryError
from deploy.engine.engine_args import EngineCommand, Ports
from deploy.engine.engine_log import LogFile, LogLine
from deploy.engine.worker import (
    MOVES,
    PORTS,
    EngineState,
    HealthCheck,
    Listeners,
    Timing,
    WorkerError,
    WorkerEvent,
    WorkerProcess,
    is_free,
    usable_ports,
)
from tests.deploy.processes import MARK, eventually, marked, new_mark

QUICK = Timing(start_s=120, probe_every_s=0.02, probe_timeout_s=5, watch_every_s=0.02, backoff_s=0.05, grace_s=1.0)
LIMIT_S = 120.0  # for a busy machine, or one that stands still
FAKE = [sys.executable, "-m", "loadtest.fake.engine", "--model", "toy", "--cost", "instant", "--port"]


@dataclass
class Watched:
    """A worker whose events are kept."""

    folder: Path
    mark: str = field(default_factory=new_mark)
    events: list[WorkerEvent] = field(default_factory=list)
    commands: list[EngineCommand] = field(default_factory=list)
    shown: list[LogLine] = field(default_factory=list)

    def worker(
        self,
        argv: Callable[[int], list[str]] = lambda port: [*FAKE, str(port)],
        timing: Timing = QUICK,
        canary: HealthCheck | None = None,
        cores: tuple[int, ...] = (),
    ) -> WorkerProcess:
        def build(ports: Ports) -> EngineCommand:
            url = f"http://127.0.0.1:{ports.http}"
            command = EngineCommand(tuple(argv(ports.http)), {MARK: self.mark}, url, cores, cores)
            self.commands.append(command)
            return command

        listeners = Listeners(self.events.append, lambda name, line: self.shown.append(line))
        log = LogFile(self.folder / "worker-0.log")
        return WorkerProcess("worker-0", build, canary or Canary("toy"), listeners, log, timing)

    def states(self) -> list[EngineState]:
        """Every state that was entered, in order."""
        entered: list[EngineState] = []
        for event in self.events:
            if not entered or entered[-1] is not event.state:
                entered.append(event.state)
        return entered

    async def until(self, state: EngineState, times: int = 1) -> WorkerEvent:
        return await self._event(lambda event: event.state is state, times)

    async def stage(self, detail: str) -> WorkerEvent:
        return await self._event(lambda event: event.detail == detail, 1)

    async def _event(self, wanted: Callable[[WorkerEvent], bool], times: int) -> WorkerEvent:
        async with asyncio.timeout(LIMIT_S):
            while True:
                reached = [event for event in self.events if wanted(event)]
                if len(reached) >= times:
                    return reached[times - 1]
                await asyncio.sleep(0.01)

    def engine_pid(self) -> int:
        return next(pid for pid, command in marked(self.mark).items() if "reaper.py" not in command)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    seen = Watched(tmp_path)
    yield seen
    assert marked(seen.mark) == {}, "a worker left processes behind"


@contextlib.asynccontextmanager
async def alive(worker: WorkerProcess) -> AsyncIterator[asyncio.Task[None]]:
    """Runs a worker and stops it as `evenhand serve` does."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, WorkerError):
            await asyncio.wait_for(task, LIMIT_S)


def says(text: str, then: str = "") -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-c", f"print({text!r}, flush=True)\n{then}"]


async def test_a_worker_is_tested_before_it_is_ready_and_stops_without_a_trace(watched: Watched) -> None:
    worker = watched.worker()
    async with alive(worker):
        ready = await watched.until(EngineState.READY)
        assert ready.url == watched.commands[0].url
        assert ready.detail == "The first five prime numbers are 2, 3, 5"
        assert watched.states() == [EngineState.STARTING, EngineState.CANARY, EngineState.READY]
    assert watched.states()[-1] is EngineState.STOPPED
    assert not await answers(ready.url)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no other core to run on")
@pytest.mark.parametrize("leaves", [False, True])
async def test_an_engine_whose_threads_leave_its_cores_is_warned_of_once_it_is_ready(
    leaves: bool, watched: Watched
) -> None:
    own, other, *_ = sorted(os.sched_getaffinity(0))
    program = (
        "import os, runpy, sys; os.sched_setaffinity(0, {CORE}); sys.argv = sys.argv[2:]; "
        "runpy.run_module('loadtest.fake.engine', run_name='__main__')"
    ).replace("CORE", str(other if leaves else own))
    worker = watched.worker(lambda port: [sys.executable, "-c", program, *FAKE[1:], str(port)], cores=(own,))
    async with alive(worker):
        await watched.until(EngineState.READY)
    warned = [line.text for line in watched.shown if "another engine's cores" in line.text]
    assert len(warned) == leaves
    assert not leaves or f" on {other}" in warned[0]


async def answers(url: str) -> bool:
    async with httpx2.AsyncClient(trust_env=False, timeout=LIMIT_S) as client:
        try:
            return (await client.get(url + "/health")).status_code == 200
        except httpx2.HTTPError:
            return False


async def test_a_killed_engine_is_replaced_at_the_same_address(watched: Watched) -> None:
    async with alive(watched.worker()):
        first = await watched.until(EngineState.READY)
        os.kill(watched.engine_pid(), signal.SIGKILL)
        dead = await watched.until(EngineState.DEAD)
        assert "was killed" in dead.detail
        assert "it starts again in" in dead.detail
        again = await watched.until(EngineState.READY, times=2)
        assert again.url == first.url
        assert await answers(again.url)


async def test_a_killed_leash_takes_its_engine_along_and_both_are_replaced(watched: Watched) -> None:
    async with alive(watched.worker()):
        await watched.until(EngineState.READY)
        leash = next(pid for pid, command in marked(watched.mark).items() if "reaper.py" in command)
        engine = watched.engine_pid()
        os.kill(leash, signal.SIGKILL)
        await watched.until(EngineState.READY, times=2)
        assert engine not in marked(watched.mark)


async def test_a_frozen_engine_is_taken_for_dead(watched: Watched) -> None:
    timing = replace(QUICK, probe_timeout_s=0.3, unanswered_s=3.0, grace_s=0.2)
    async with alive(watched.worker(timing=timing)):
        await watched.until(EngineState.READY)
        os.kill(watched.engine_pid(), signal.SIGSTOP)
        assert "has not answered for" in (await watched.until(EngineState.DEAD)).detail
        await watched.until(EngineState.READY, times=2)


async def test_an_engine_that_dies_at_its_first_start_is_an_error_with_its_cause_and_its_log(watched: Watched) -> None:
    error = "api_server.py: error: unrecognized arguments: --nonsense"
    with pytest.raises(WorkerError, match=r"worker-0 did not start: .*--nonsense.*worker-0\.log"):
        await watched.worker(says(error, "raise SystemExit(2)")).run()
    assert len(watched.commands) == 1
    assert error in (watched.folder / "worker-0.log").read_text()


async def test_an_engine_that_cannot_be_run_is_an_error(watched: Watched) -> None:
    with pytest.raises(WorkerError, match="cannot run /nowhere/python: No such file"):
        await watched.worker(lambda port: ["/nowhere/python"]).run()


async def test_later_failures_are_tried_again_with_growing_pauses(watched: Watched) -> None:
    starts = 0

    def healthy_once(port: int) -> list[str]:
        nonlocal starts
        starts += 1
        return [*FAKE, str(port)] if starts in (1, 4) else [sys.executable, "-c", "raise SystemExit(7)"]

    async with alive(watched.worker(healthy_once)):
        await watched.until(EngineState.READY)
        os.kill(watched.engine_pid(), signal.SIGKILL)
        await watched.until(EngineState.READY, times=2)
    deaths = [event.detail for event in watched.events if event.state is EngineState.DEAD]
    assert ["exit code 7" in detail for detail in deaths] == [False, True, True]


def test_pauses_double_up_to_a_cap() -> None:
    timing = Timing(backoff_s=1, backoff_most_s=60)
    assert [timing.backoff_after(deaths) for deaths in (1, 2, 3, 7, 500)] == [1, 2, 4, 60, 60]


class Wrong:
    """A canary that has heard nonsense."""

    async def check(self, client: httpx2.AsyncClient, url: str) -> str:
        raise CanaryError("the engine answered with nonsense")

    async def responds(self, client: httpx2.AsyncClient, url: str, timeout_s: float) -> bool:
        return True


async def test_an_engine_with_a_wrong_canary_never_becomes_ready(watched: Watched) -> None:
    with pytest.raises(WorkerError, match="nonsense"):
        await watched.worker(canary=Wrong()).run()
    assert watched.states() == [EngineState.STARTING, EngineState.CANARY, EngineState.STOPPED]


async def test_an_engine_that_is_not_ready_in_time_is_given_up(watched: Watched) -> None:
    timing = replace(QUICK, start_s=0.5)
    with pytest.raises(WorkerError, match="logged nothing for [01] s and is not ready.*--start-timeout"):
        await watched.worker(says("importing", "import time; time.sleep(600)"), timing).run()


STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('(A pid=1) INFO 11-21 04:51:26 [a.py:1] non-default args: {}', flush=True)\n"
    "time.sleep(600)"
)


async def test_an_engine_that_ignores_the_request_to_stop_is_killed_with_its_children(watched: Watched) -> None:
    async with alive(watched.worker(lambda port: [sys.executable, "-c", STUBBORN])):
        await watched.stage("reading the model's configuration")
        assert eventually(lambda: len(marked(watched.mark)) == 3)  # its child may still be on its way to its program
    assert marked(watched.mark) == {}


async def test_kill_gives_no_grace(watched: Watched) -> None:
    timing = replace(QUICK, grace_s=600.0)
    worker = watched.worker(lambda port: [sys.executable, "-c", STUBBORN], timing)
    async with alive(worker) as task:
        await watched.stage("reading the model's configuration")
        task.cancel()
        await asyncio.sleep(0)
        worker.kill()
        await asyncio.wait_for(asyncio.wait({task}), LIMIT_S)  # less than its grace


async def test_cancelling_again_and_again_does_not_leave_the_engine_behind(watched: Watched) -> None:
    async with alive(watched.worker(lambda port: [sys.executable, "-c", STUBBORN])) as task:
        await watched.stage("reading the model's configuration")
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0.05)


async def test_each_start_has_its_own_empty_folder_for_metrics_and_none_stays(watched: Watched) -> None:
    show = "import os; folder = os.environ['PROMETHEUS_MULTIPROC_DIR']; print('folder', folder, os.listdir(folder))"
    with pytest.raises(WorkerError):
        await watched.worker(lambda port: [sys.executable, "-c", show]).run()
    line = next(
        text for text in (watched.folder / "worker-0.log").read_text().splitlines() if text.startswith("folder")
    )
    _, folder, content = line.split(" ")
    assert content == "[]"
    assert folder not in folders_beside(folder)


def folders_beside(folder: str) -> set[str]:
    return {str(path) for path in Path(folder).parent.iterdir()}


LONG = "print('x' * 300_000 + '\\r50%\\r100%'); raise SystemExit(4)"


async def test_lines_longer_than_any_buffer_and_progress_bars_do_not_stop_the_log(watched: Watched) -> None:
    with pytest.raises(WorkerError, match="exit code 4"):
        await watched.worker(lambda port: [sys.executable, "-c", LONG]).run()
    assert (watched.folder / "worker-0.log").read_text().splitlines()[1:] == ["x" * 300_000, "50%", "100%"]


def test_no_move_leads_out_of_stopped_and_every_state_is_reachable() -> None:
    assert MOVES[EngineState.STOPPED] == frozenset()
    assert set(MOVES) == set(EngineState)
    assert {state for reachable in MOVES.values() for state in reachable} == set(EngineState)


def test_ports_stay_while_they_are_free() -> None:
    ports = usable_ports(None)
    assert ports.http in PORTS and ports.side_channel in PORTS, "an outgoing connection might take others meanwhile"
    assert ports.http != ports.side_channel
    assert usable_ports(ports) == ports
    with socket.create_server(("127.0.0.1", ports.http)):
        assert not is_free("127.0.0.1", ports.http)
        assert usable_ports(ports) != ports
    assert eventually(lambda: is_free("127.0.0.1", ports.http))


# A server whose core stands still: it is healthy, and has the requests and steps that the test writes into a file.
HOLLOW = """
import http.server, json, pathlib, sys, time

port, state = int(sys.argv[1]), pathlib.Path(sys.argv[2])

class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(state.read_bytes() if self.path == "/metrics" and state.exists() else b"")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked.get("max_tokens") == 1:
            time.sleep(3600)  # its core does not answer any more
        self.answer(json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Server).serve_forever()
"""


def metrics(running: int, steps: int) -> str:
    return f'vllm:num_requests_running{{engine="0"}} {running}.0\nevenhand_engine_steps_total {steps}.0\n'


@pytest.mark.parametrize(("running", "why"), [(3, "made no step for"), (0, "did not answer a test prompt within")])
async def test_an_engine_whose_core_hangs_under_a_live_server_is_replaced(
    watched: Watched, tmp_path: Path, running: int, why: str
) -> None:
    state = tmp_path / "metrics"
    timing = replace(QUICK, look_every_s=0.02, ask_every_s=0.1, hung_s=0.2)
    async with alive(watched.worker(lambda port: [sys.executable, "-c", HOLLOW, str(port), str(state)], timing)):
        await watched.until(EngineState.READY)
        first = watched.engine_pid()
        state.write_text(metrics(running, 5))
        dead = await watched.until(EngineState.DEAD)
        assert why in dead.detail and "it hangs" in dead.detail
        state.unlink()
        await watched.until(EngineState.READY, times=2)
        assert watched.engine_pid() != first


@pytest.mark.slow
async def test_a_start_may_take_as_long_as_its_log_says_new_things(watched: Watched, tmp_path: Path) -> None:
    loads = "import time\nfor part in range(24): print(f'Loading shards: {part}', flush=True); time.sleep(0.5)\n"
    timing = replace(QUICK, start_s=10.0)
    argv = [sys.executable, "-c", loads + HOLLOW]
    async with alive(watched.worker(lambda port: [*argv, str(port), str(tmp_path / "metrics")], timing)):
        await watched.until(EngineState.READY)


async def test_a_start_that_says_the_same_thing_again_and_again_is_given_up(watched: Watched) -> None:
    stuck = "import time\nwhile True: print('Waiting for 1 local core engine', flush=True); time.sleep(0.1)"
    with pytest.raises(WorkerError, match="it logged nothing for 1 s and is not ready"):
        await watched.worker(lambda port: [sys.executable, "-c", stuck], replace(QUICK, start_s=1.0)).run()
