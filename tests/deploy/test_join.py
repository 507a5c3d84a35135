"""`evenhand worker` as a program: it joins gateways over Redis, and leaves without costing anybody an answer."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deploy.engine.engine_args import EnginePlan
from deploy.serve.join import Joining, JoinSettings, address_towards
from deploy.serve.preflight import PreflightError
from deploy.serve.screen import ScreenLog
from scheduler.workers import Role
from server.fleet.fleet import WorkerState
from server.store.redis_store import RedisStore
from server.store.store import MemoryStore
from tests.deploy import worker_program
from tests.deploy.processes import MARK, eventually, marked, new_mark
from tests.deploy.serve_program import surroundings
from tests.server.conftest import LIMIT_S, Running, completion, request, serving
from tests.server.conftest import eventually as soon

ENGINE = "{python} -m loadtest.fake.engine --port {port} --model {model} --cost quick"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


class Fleet:
    """Workers as programs, and how to find whatever they leave running."""

    def __init__(self, model: Path, redis_url: str) -> None:
        self.mark = new_mark()
        self.model = model
        self.redis_url = redis_url
        self.programs: list[asyncio.subprocess.Process] = []

    async def start(self, name: str, role: str, *more: str) -> asyncio.subprocess.Process:
        argv = [*more, "--model", str(self.model), "--redis-url", self.redis_url, "--role", role, "--name", name]
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.deploy.worker_program", *argv, "--state-folder", str(self.model.parent)),
            env={
                **os.environ,
                MARK: self.mark,
                "TEST_ENGINE": ENGINE,
                "EVENHAND_READY_FILE": str(self.ready_file(name)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.programs.append(program)
        return program

    def ready_file(self, name: str) -> Path:
        return self.model.parent / f"{name}.ready"


@contextlib.asynccontextmanager
async def fleet_of(model: Path, redis_url: str) -> AsyncIterator[tuple[Fleet, Running]]:
    fleet = Fleet(model, redis_url)
    async with serving(redis_url=redis_url, disaggregation={"min_prompt_tokens": 1}) as gateway:
        gateway.server.shared.store._timeout_s = LIMIT_S  # type: ignore[attr-defined]  # it is Redis
        try:
            yield fleet, gateway
        finally:
            for program in fleet.programs:
                with contextlib.suppress(ProcessLookupError):
                    program.kill()
                await program.communicate()
            assert eventually(lambda: not marked(fleet.mark)), "an engine outlived its worker"


def state_of(gateway: Running, name: str) -> WorkerState | None:
    member = gateway.server.fleet.members.get(name)
    return None if member is None else member.state


async def test_workers_join_with_their_roles_and_leave_when_their_answers_are_complete(
    model: Path, redis_url: str
) -> None:
    async with fleet_of(model, redis_url) as (fleet, gateway):
        reader, writer = [await fleet.start(name, name) for name in ("prefill", "decode")]
        await soon(lambda: len(gateway.server.fleet.ready()) == 2, "both have joined")
        roles = {name: member.worker.role for name, member in gateway.server.fleet.members.items()}
        assert roles == {"prefill": Role.PREFILL, "decode": Role.DECODE}

        long = completion(prompt=[7] * 50, max_tokens=1500, ignore_eos=True, stream=True)
        wire = await gateway.send(request("/v1/completions", long))
        assert (await wire.head()).status == 200
        writer.send_signal(signal.SIGTERM)
        await soon(lambda: state_of(gateway, "decode") is WorkerState.DRAINING, "the gateway knows that it is leaving")
        text = b"".join([chunk async for chunk in chunks(wire)])
        assert text.endswith(b"data: [DONE]\n\n") and text.count(b'"text"') == 1500
        assert await asyncio.wait_for(writer.wait(), LIMIT_S) == 0
        said = (await writer.stdout.read()).decode() if writer.stdout else ""
        assert "Leaving: running answers may finish" in said and "Traceback" not in said
        assert await gateway.server.shared.store.workers() == {
            "prefill": (await gateway.server.shared.store.workers())["prefill"]
        }
        reader.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(reader.wait(), LIMIT_S) == 0
        assert await gateway.server.shared.store.workers() == {}


async def chunks(wire: object) -> AsyncIterator[bytes]:
    while chunk := await wire.chunk():  # type: ignore[attr-defined]
        yield chunk


async def test_its_heartbeats_end_in_whatever_moment_they_are(tmp_path: Path) -> None:
    """Whoever stops a worker waits for them, also when something has just changed."""
    plan = EnginePlan(model="toy", served_name="toy", local=True, build="cpu", dtype="float32", policy="fcfs")
    settings = JoinSettings(redis_url="redis://127.0.0.1:1/0", state_folder=tmp_path, name="w")
    joining = Joining(settings, plan, MemoryStore(lambda: 0.0), surroundings())
    for steps in range(10):
        beats = asyncio.create_task(joining._beat())
        await asyncio.sleep(0.01)  # it waits for a change, or for its time
        joining._changed.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        beats.cancel()
        await asyncio.wait({beats}, timeout=LIMIT_S)
        assert beats.cancelled(), f"they were cancelled {steps} steps after a change, and went on"


def two_free_ports() -> int:
    """The first of two neighbours."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


async def test_a_second_signal_ends_it_at_once(model: Path, redis_url: str) -> None:
    async with fleet_of(model, redis_url) as (fleet, gateway):
        port = two_free_ports()
        worker = await fleet.start("both", "both", "--engine-port", str(port), "--address", "auto")
        await gateway.ready()
        assert gateway.server.fleet.members["both"].worker.url == f"http://127.0.0.1:{port}"
        assert fleet.ready_file("both").read_text() == f"http://127.0.0.1:{port}"
        endless = completion(prompt=[7] * 50, max_tokens=8000, ignore_eos=True, stream=True)
        wire = await gateway.send(request("/v1/completions", endless))
        await wire.head()
        worker.send_signal(signal.SIGINT)
        await soon(lambda: state_of(gateway, "both") is WorkerState.DRAINING)
        worker.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(worker.wait(), LIMIT_S) == 130
        assert not fleet.ready_file("both").exists()
        wire.reset()


def test_of_several_addresses_it_takes_the_one_towards_redis() -> None:
    assert address_towards("redis://127.0.0.1:6379/0") == "127.0.0.1"
    assert address_towards("rediss://user:secret@[::ffff:127.0.0.1]") in {"127.0.0.1", "::ffff:127.0.0.1"}
    with pytest.raises(PreflightError, match=r"no route to the Redis server nobody\.invalid"):
        address_towards("redis://nobody.invalid:6379/0")
    with pytest.raises(ValueError, match="give --address HOST"):
        address_towards("unix:///run/redis.sock")


async def test_what_it_logs_carries_its_own_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """While Redis is away it says so once, and not as if a gateway had said it."""
    plan = EnginePlan(model="toy", served_name="toy", local=True, build="cpu", policy="fcfs")
    settings = JoinSettings(redis_url="redis://127.0.0.1:1/0", state_folder=tmp_path, name="w")
    store = RedisStore("redis://127.0.0.1:1/0")
    joining = Joining(settings, plan, store, surroundings())
    beats = asyncio.create_task(joining._beat())
    await soon(lambda: joining._away, "it knows that Redis is away")
    beats.cancel()
    await asyncio.wait({beats})
    await store.close()
    (record,) = [record for record in caplog.records if record.name == "evenhand.worker"]
    assert record.getMessage().startswith("Redis does not answer") and ".." not in record.getMessage()
    ScreenLog(joining._screen, "w").emit(record)
    assert capsys.readouterr().out.startswith("w")


@pytest.fixture
def refused(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `evenhand worker` says, run in this process, before it starts anything."""

    def run(*args: str, **environ: str) -> str:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        chosen = [] if "--model" in args else ["--model", str(model)]
        assert worker_program.main([*chosen, *args]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("evenhand worker: ")
        return said

    return run


def test_a_port_that_cannot_be_had_is_refused_before_anything_starts(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--redis-url", "redis://127.0.0.1:1/0", "--engine-port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in said


@pytest.mark.parametrize(
    ("args", "environ", "sentence"),
    [
        ([], {}, "a worker joins its gateways through Redis: give --redis-url URL"),
        (["--redis-url", "nonsense"], {}, "write it as redis://HOST:PORT/0"),
        (["--redis-url", "redis://127.0.0.1:1/0", "--role", "cook"], {}, "setting 'role'"),
        (["--redis-url", "redis://127.0.0.1:1/0", "--role", "decode"], {"TEST_NIXL": "no"}, "NIXL, which is not"),
        (["--redis-url", "redis://127.0.0.1:1/0", "--model", "/no/such"], {}, "there is no model folder at /no/such"),
        (["--redis-url", "redis://127.0.0.1:1/0", "--model", "a", "--model", "b"], {}, "one engine of one model"),
        (
            ["--balance-roles", "--slo-tpot", "0.03"],
            {},
            "remove --balance-roles (disaggregation",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    args: list[str], environ: dict[str, str], sentence: str, refused: Callable[..., str]
) -> None:
    assert sentence in refused(*args, **environ)
