"""The supervisor over a real vLLM with the bundled model."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from deploy.engine.canary import QUESTION, Canary
from deploy.engine.engine_args import EngineCommand, EnginePlan, Ports, cpu_dtype, divide_cores, engine_command
from deploy.engine.engine_log import LogFile
from deploy.engine.worker import EngineState, Listeners, Timing, WorkerEvent, WorkerProcess
from deploy.machine.machine import look
from deploy.model.model import BUNDLED, STORED_DTYPE, cache_folder, obtain
from scheduler.workers import Worker
from server.engine.access import Access
from server.fleet.fleet import Fleet, WorkerState
from tests.deploy.processes import MARK, in_session, marked, new_mark

pytestmark = [pytest.mark.engine, pytest.mark.slow]


async def test_a_real_engine_is_tested_survives_the_death_of_its_core_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mark, events = new_mark(), list[WorkerEvent]()

    async def until(state: EngineState, times: int) -> WorkerEvent:
        async with asyncio.timeout(240):
            while True:
                found = [event for event in events if event.state is state]
                if len(found) >= times:
                    return found[times - 1]
                await asyncio.sleep(0.1)

    worker = WorkerProcess(
        "worker-0",
        command_for(mark),
        Canary(BUNDLED),
        Listeners(events.append, lambda name, line: None),
        LogFile(tmp_path / "worker-0.log"),
        Timing(start_s=240, backoff_s=0.1),
    )
    running = asyncio.create_task(worker.run())
    try:
        ready = await until(EngineState.READY, 1)
        assert ready.detail.startswith("The first five prime numbers are 2, 3, 5")
        assert "loading the model" in [event.detail for event in events]
        sessions = {leash_of(mark)}
        os.kill(engine_core(*sessions), signal.SIGKILL)
        await until(EngineState.DEAD, 1)
        again = await until(EngineState.READY, 2)
        assert again.url == ready.url
        assert "2, 3, 5" in await answer(again.url)
        sessions.add(leash_of(mark))
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert worker.state is EngineState.STOPPED
    assert len(sessions) == 2
    assert [in_session(session) for session in sessions] == [{}, {}]


async def test_a_real_engine_whose_core_is_stopped_under_a_live_server_is_replaced(tmp_path: Path) -> None:
    mark, events = new_mark(), list[WorkerEvent]()
    timing = Timing(start_s=240, backoff_s=0.1, look_every_s=0.5, ask_every_s=2.0, hung_s=8.0)
    listeners = Listeners(events.append, lambda name, line: None)
    log = LogFile(tmp_path / "worker-0.log")
    worker = WorkerProcess("worker-0", command_for(mark), Canary(BUNDLED), listeners, log, timing)
    running = asyncio.create_task(worker.run())

    async def reached(state: EngineState, times: int) -> WorkerEvent:
        async with asyncio.timeout(240):
            while True:
                found = [event for event in events if event.state is state]
                if len(found) >= times:
                    return found[times - 1]
                await asyncio.sleep(0.1)

    try:
        ready = await reached(EngineState.READY, 1)
        os.kill(engine_core(leash_of(mark)), signal.SIGSTOP)
        async with httpx2.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{ready.url}/health")).status_code == 200  # vLLM sees nothing
        assert "it hangs" in (await reached(EngineState.DEAD, 1)).detail
        again = await reached(EngineState.READY, 2)
        assert "2, 3, 5" in await answer(again.url)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert marked(mark) == {}


OPEN, GUARDED = ("/health", "/metrics"), ("/v1/models", "/tokenize", "/invocations", "/version", "/load", "/docs")


async def test_a_real_engine_asks_for_its_key_wherever_it_computes_and_a_gateway_has_it(tmp_path: Path) -> None:
    mark, key, events = new_mark(), "a-key-of-this-engine-only", list[WorkerEvent]()
    ready = asyncio.Event()
    listeners = Listeners(lambda event: _note(event, events, ready), lambda name, line: None)
    log = LogFile(tmp_path / "worker-0.log")
    worker = WorkerProcess("worker-0", command_for(mark, key), Canary(BUNDLED), listeners, log, Timing(start_s=240))
    running = asyncio.create_task(worker.run())
    fleet = Fleet(probe_s=0.1)
    try:
        async with asyncio.timeout(240):
            await ready.wait()
        url = events[-1].url
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            for path in GUARDED:
                for headers in ({}, {"authorization": "Bearer another"}):
                    assert (await client.get(url + path, headers=headers)).status_code == 401, path
                    assert (await client.post(url + path, json={}, headers=headers)).status_code == 401, path
                assert (await client.get(url + path, headers={"authorization": f"Bearer {key}"})).status_code != 401
            for path in OPEN:
                assert (await client.get(url + path)).status_code == 200
        member, locked_out = fleet.add(Worker("has-it", url), Access(key)), fleet.add(Worker("has-not", url))
        async with asyncio.timeout(60):
            while True:
                if member.state is WorkerState.READY and locked_out.problem:
                    break
                await asyncio.sleep(0.05)
        assert locked_out.state is WorkerState.UNAUTHORISED
        assert marked(mark) and not any(key in command for command in marked(mark).values())
    finally:
        await fleet.close()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert key not in (tmp_path / "worker-0.log").read_text()


def _note(event: WorkerEvent, events: list[WorkerEvent], ready: asyncio.Event) -> None:
    events.append(event)
    if event.state is EngineState.READY:
        ready.set()


def command_for(mark: str, key: str = "") -> Callable[[Ports], EngineCommand]:
    source, machine = obtain(BUNDLED, cache_folder(), lambda line: None), look(os.environ)
    plan = EnginePlan(
        model=source.path,
        served_name=source.served_name,
        local=True,
        build="cpu",
        dtype=cpu_dtype(machine, STORED_DTYPE),
        policy="mlfq",
        cores=divide_cores(machine.cores, 1)[0],
        model_args=source.engine_args,
        key=key,
    )

    def build(ports: Ports) -> EngineCommand:
        command = engine_command(plan, ports, sys.executable)
        return replace(command, env={**command.env, MARK: mark})

    return build


def leash_of(mark: str) -> int:
    """The leash leads the session of all that one start has started."""
    return next(os.getsid(pid) for pid in marked(mark))


def engine_core(session: int) -> int:
    processes = in_session(session)
    assert len(processes) >= 3, processes  # reaper, server, core
    return next(pid for pid, command in processes.items() if "EngineCore" in command)


async def answer(url: str) -> str:
    body = {"model": BUNDLED, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 17}
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
        reply = await client.post(f"{url}/v1/chat/completions", json=body)
        return str(reply.json()["choices"][0]["message"]["content"])


def test_an_argument_that_vllm_refuses_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mark = new_mark()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    obtain(BUNDLED, cache_folder(), lambda line: None)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--engine-arg=--max-num-seqs=many"]
        + ["--state-folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, MARK: mark},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("evenhand serve: worker-0 did not start: vLLM refuses an engine argument")
    assert "--max-num-seqs: invalid int value: 'many'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert marked(mark) == {}
