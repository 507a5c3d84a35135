"""The images that the Dockerfile and docker-compose.yml start from: those of a registry, else stand-ins made here.

A machine without a registry of images may still have package mirrors. Then Debian's packages and this machine's CPython
stand for the official images, under their names: with the users, folders and entry points on which the project relies,
in versions that may be older.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.containers.engine import Engine

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).parent / "standins"
BOOKWORM = "evenhand-standin/bookworm"
# Packages that pip finds in folders of this machine reach a build over loopback, always at this port: the address is
# part of a stand-in, and another one would build everything anew.
FILES_PORT = 18099
HOST_NETWORK = "services:\n" + "".join(
    f"  {name}: {{build: {{network: host}}}}\n" for name in ("gateway", "worker", "prefill", "decode")
)
PULL_S = 300.0
NO_PACKAGES = 75  # bookworm.sh: the mirror of Debian's packages does not answer, or not with all of them


def names() -> dict[str, str]:
    """The images of others that the tests need: what each is, and its name in our files."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    tag = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tag is not None
    return {"python": f"python:{tag[1]}"} | {name: services[name]["image"] for name in ("redis", "prometheus")}


@contextlib.contextmanager
def base_images(engine: Engine, folder: Path) -> Iterator[Path | None]:
    """Makes them available; yields the Compose file that builds on stand-ins need, None with the official images.

    Skips with the reason where neither can be had.
    """
    missing = {what: name for what, name in names().items() if not has(engine, name)}
    why = next((why for name in missing.values() if (why := pull(engine, name))), "")
    if why and not (os.geteuid() == 0 and shutil.which("debootstrap")):
        pytest.skip(f"no registry of images answers, and there is no debootstrap to do without: {why}")
    if why:
        for what, name in missing.items():
            make(engine, what, name, folder)
    if not is_standin(engine, names()["python"]):
        yield None
        return
    override = folder / "host-network.yml"
    override.write_text(HOST_NETWORK)
    with package_folders():
        yield override


def has(engine: Engine, image: str) -> bool:
    return engine.run("image", "inspect", image, check=False).returncode == 0


def pull(engine: Engine, image: str) -> str:
    """Why it cannot be pulled, empty if it was."""
    try:
        done = engine.run("pull", "--quiet", image, check=False, limit_s=PULL_S)
    except subprocess.TimeoutExpired:
        return f"{image} was not there after {PULL_S:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [image])[-1]


def is_standin(engine: Engine, image: str) -> bool:
    return has(engine, BOOKWORM) and engine.said(
        "image", "inspect", "--format", "{{index .RootFS.Layers 0}}", image
    ) == (engine.said("image", "inspect", "--format", "{{index .RootFS.Layers 0}}", BOOKWORM))


def make(engine: Engine, what: str, name: str, folder: Path) -> None:
    """Builds one stand-in, with the engine's first builder, which every client has."""
    if not has(engine, BOOKWORM):
        with (folder / "bookworm.tar").open("wb") as archive:
            made = subprocess.run([STANDINS / "bookworm.sh", folder], stdout=archive, check=False)
        if made.returncode == NO_PACKAGES:
            pytest.skip("no registry of images answers, and Debian's packages for stand-ins cannot be had either")
        assert made.returncode == 0, (folder / "debootstrap.log").read_text(errors="replace")[-3000:]
        engine.run("import", str(folder / "bookworm.tar"), BOOKWORM)
        (folder / "bookworm.tar").unlink()
    context = folder / what
    shutil.copytree(STANDINS, context)
    if what == "python":
        copy_python(context)
    file = context / f"{what}.Dockerfile"
    engine.run("build", "--network", "host", "--tag", name, "--file", str(file), str(context), DOCKER_BUILDKIT="0")
    shutil.rmtree(context)


def copy_python(context: Path) -> None:
    """This machine's CPython, without what pip has installed into it, and what pip is told here."""
    left_out = ("__pycache__", "test", "idlelib", "tkinter", "turtledemo", "*.a", "site-packages")
    for part in ("bin", "include", "lib"):
        ignored = shutil.ignore_patterns(*left_out)
        shutil.copytree(Path(sys.base_prefix) / part, context / "local" / part, symlinks=True, ignore=ignored)
    local = context / "local"
    for program in local.joinpath("bin").iterdir():
        if program.name != "python3.11":
            program.unlink()
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to("python3.11")
    for kept in ("pip", "setuptools", "_distutils_hack", "distutils-precedence.pth"):
        for source in Path(sys.base_prefix, "lib/python3.11/site-packages").glob(f"{kept}*"):
            copy = shutil.copytree if source.is_dir() else shutil.copy
            target = local / "lib/python3.11/site-packages" / source.name
            target.parent.mkdir(exist_ok=True)
            copy(source, target)  # type: ignore[operator]
    for file in local.glob("lib/python3.11/_sysconfigdata_*.py"):
        file.write_text(file.read_text().replace(sys.base_prefix, "/usr/local"))
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", context / "certificates.pem")
    (context / "pip.conf").write_text(pip_settings())


@cache
def pip_config() -> dict[str, list[str]]:
    """pip's settings of this machine that say where packages are."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = re.findall(r"^(?:global|:env:)\.(index-url|extra-index-url|find-links)='(.*)'$", told, re.MULTILINE)
    return {name: value.split() for name, value in reversed(pairs)}


def folders() -> list[Path]:
    """The folders of this machine among them."""
    places = [value.removeprefix("file://") for values in pip_config().values() for value in values]
    return [Path(place) for place in places if place.startswith("/")]


def pip_settings() -> str:
    """The same for a build, which reaches the folders over loopback."""
    served = {str(place): f"http://127.0.0.1:{FILES_PORT}{place}/" for place in folders()}
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    for name, values in pip_config().items():
        lines.append(f"{name} = {' '.join(served.get(value.removeprefix('file://'), value) for value in values)}")
    return "\n".join(lines) + "\n"


class PackageFiles(SimpleHTTPRequestHandler):
    """The folders under their own paths, and what lies beside them: an index links to that."""

    def translate_path(self, path: str) -> str:
        self.directory = "/"
        file = Path(super().translate_path(path))
        return str(file) if any(file.is_relative_to(place.parent) for place in folders()) else os.devnull

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing."""


@contextlib.contextmanager
def package_folders() -> Iterator[None]:
    """Serves the folders on loopback, for as long as images are built."""
    if not folders():
        yield
        return
    with ThreadingHTTPServer(("127.0.0.1", FILES_PORT), PackageFiles) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
