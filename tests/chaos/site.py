"""What a chaos run is over: engines without a model, gateways and a Redis, as programs, each at a port of its own."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench.bench_target import free_port
from tests.conftest import redis_server
from tests.server.conftest import Reply, Wire, request
from tests.server.test_admin import ADMIN_KEY

START_S, STOP_S = 120.0, 120.0
POLL_S = 0.02
# Blows come faster than streams end on a busy machine, so one may meet several.
HEALTH = {"probe_timeout_s": 1.0, "stall_s": 5.0, "failures": 100, "attempts": 6, "canary": "answers"}
# Where no worker is stopped: one that is slow because all is slow is not dead.
UNHURRIED = HEALTH | {"probe_timeout_s": 10.0}
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def ask(port: int, path: str, body: object = None, **how: Any) -> Reply:
    """One request on a connection of its own."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
    try:
        await wire.send(request(path, body, **how))
        return await wire.answer()
    finally:
        await wire.close()


async def admin(port: int, method: str, path: str, body: object = None) -> Any:
    """What /admin answers; AssertionError if it refuses."""
    reply = await ask(port, f"/admin{path}", body, method=method, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert reply.status < 300, reply.body[:300]
    return reply.json() if reply.body else None


async def until(condition: Callable[[], Awaitable[object]], what: str, limit_s: float = START_S) -> None:
    """Returns once the condition holds. TimeoutError if it does not within the limit."""
    end = time.monotonic() + limit_s
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(f"still not after {limit_s:.0f} s: {what}")
        await asyncio.sleep(POLL_S)  # between two looks


async def metrics(port: int) -> Samples:
    """Every sample of a gateway by name and labels."""
    text = (await ask(port, "/metrics", method="GET")).body.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def summed(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    wanted = set(labels.items())
    return sum(value for (sample, has), value in samples.items() if sample == name and wanted <= set(has))


@dataclass
class Program:
    """A process at a port of its own, which it keeps through every restart.

    path: answers with 200 once the program is there; "" for one that speaks no HTTP. log: what all its lives have said.
    start_s: how long its start may take.
    """

    name: str
    command: Sequence[str]
    log: Path
    port: int
    path: str
    env: Mapping[str, str] = field(default_factory=dict)
    start_s: float = START_S
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it is there. RuntimeError with its last words if it does not come."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EVENHAND_")}
        with self.log.open("ab") as out:
            # A session of its own: what it starts itself is struck with it.
            self.process = await asyncio.create_subprocess_exec(
                *self.command, stdout=out, stderr=out, env=clean | dict(self.env), start_new_session=True
            )
        end = time.monotonic() + self.start_s
        while not await self.there():
            if self.process.returncode is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} does not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(POLL_S)  # between two looks

    async def there(self) -> bool:
        try:
            if self.path:
                return (await ask(self.port, self.path, method="GET")).status == 200
            await Wire(*await asyncio.open_connection("127.0.0.1", self.port)).close()
            return True
        except (OSError, EOFError):
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        """To it and to all that it has started."""
        os.killpg(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL, whatever it is doing; also one that is stopped, and what an ended one has left."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            await self.process.wait()

    async def end(self) -> int:
        """SIGTERM, and its exit code. TimeoutError if it does not end."""
        assert self.process is not None
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), STOP_S)

    def rss_bytes(self) -> int:
        """What it holds in memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """The most that it held in memory since `forget_peak`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this kernel does not tell the most memory of a process")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def complaints(self) -> list[str]:
        """Lines of its log that no run should have: errors, but for the one that Redis is away."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if ("ERROR" in line and "evenhand.replicas" not in line) or "Traceback" in line]


def engine(folder: Path, number: int, *options: str) -> Program:
    """An engine without a model."""
    port = free_port()
    command = [sys.executable, "-m", "loadtest.fake.engine", "--port", str(port), *options]
    return Program(f"engine-{number}", command, folder / f"engine-{number}.log", port, "/health")


def redis(folder: Path, *, kept: bool = False) -> Program:
    """A Redis that keeps nothing on disk, or all, before it answers."""
    port = free_port()
    disk = ["--appendonly", "yes", "--appendfsync", "always"] if kept else ["--appendonly", "no"]
    options = ["--bind", "127.0.0.1", "--save", "", *disk, "--dir", str(folder)]
    return Program("redis", [str(redis_server()), "--port", str(port), *options], folder / "redis.log", port, "")


def object_store(folder: Path) -> Program:
    """An S3 server that keeps everything in memory."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    return Program("s3", command, folder / "s3.log", port, "/moto-api/")


def gateway(
    folder: Path,
    number: int,
    workers: Sequence[str],
    settings: Mapping[str, Any],
    env: Mapping[str, str] = MappingProxyType({}),
) -> Program:
    """A gateway over these workers, with a settings file of its own. env: more variables."""
    port, name = free_port(), f"gateway-{number}"
    config = folder / f"{name}.yaml"
    told = {"port": port, "admin_port": port, "replica": name, "workers": list(workers), "health": HEALTH} | dict(
        settings
    )
    config.write_text(yaml.safe_dump(told))
    command = [sys.executable, "-m", "server", "--config", str(config)]
    return Program(name, command, folder / f"{name}.log", port, "/ready", {"EVENHAND_ADMIN_KEY": ADMIN_KEY, **env})


def tenant_file(folder: Path, tenants: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": list(tenants)}))
    return path


async def all_ready(gateways: Sequence[Program], workers: int) -> None:
    """Returns when each of these gateways gives requests to so many workers."""

    async def ready() -> bool:
        return all([summed(await metrics(one.port), "evenhand_worker_up") >= workers for one in gateways])

    await until(ready, "all workers are ready")


@asynccontextmanager
async def running(*programs: Program) -> AsyncIterator[None]:
    """These programs, started together; gone at the end, whatever state they are in."""
    try:
        await asyncio.gather(*(program.start() for program in programs))
        yield
    finally:
        for program in programs:
            with suppress(ProcessLookupError):
                await program.kill()
