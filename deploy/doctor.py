"""`evenhand doctor`: finds problems on this machine and says how to fix them; it starts nothing."""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.engine.engine_args import EngineArgsError, build_in_use, cpu_dtype
from deploy.engine.engine_needs import Asking, ask_vllm
from deploy.engine.worker import is_free
from deploy.machine.gpu_plan import GpuPlanError
from deploy.machine.gpus import OLDEST_CAPABILITY, OLDEST_DRIVER, Gpu, driver_is_too_old
from deploy.machine.machine import GIB, Machine, cpu_flags, look
from deploy.model.hub import Weighing, weigh
from deploy.model.model import (
    BUNDLED,
    BUNDLED_BYTES,
    MADE_HERE,
    ModelError,
    cache_folder,
    is_complete,
    resolve,
    stored_dtype,
)
from deploy.serve import preflight
from deploy.serve.preflight import (
    MIB,
    SHARED_BYTES,
    PreflightError,
    SharedMemoryError,
    TransferError,
    check_all,
    check_transfer,
    gpu_plan,
    worker_roles,
)
from deploy.settings import ServeSettings
from server.options import CliOption, add_options, given
from server.settings import read_settings

OPTIONS = (
    CliOption("model", "NAME|PATH|HF_ID"),
    CliOption("worker_count", "N", "--workers"),
    CliOption("prefill_workers", "N"),
    CliOption("decode_workers", "N"),
    CliOption("engine_args", "ARG", "--engine-arg"),
    CliOption("gpus", "LIST"),
    CliOption("kv_cache_gib", "GIB"),
    CliOption("host", "HOST"),
    CliOption("port", "PORT"),
    CliOption("redis_url", "URL"),
)

Level = Literal["ok", "warn", "bad"]
MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}

BFLOAT16_FROM = (8, 0)  # compute capability

# A stream holds two sockets, one to the client and one to the engine; the rest is files and libraries.
FILES_PER_STREAM, FILES_BESIDE = 2, 200
FEW_STREAMS = 1000
REDIS_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was found, and what to do unless all is well."""

    level: Level
    subject: str
    found: str
    advice: str = ""


def check_engine(machine: Machine) -> Finding:
    try:
        build_in_use(machine)
    except EngineArgsError as error:
        found, _, advice = str(error).partition(": ")
        return Finding("bad", "engine", found, advice)
    engine = machine.engine
    assert engine is not None  # build_in_use raises otherwise
    return Finding("ok", "engine", f"vLLM {engine.version}, {engine.build.upper()} build ({engine.distribution})")


def check_cpu(machine: Machine, flags: frozenset[str], architecture: str, stored: str = "") -> Finding:
    """Whether the CPU build has the instructions it is compiled for, and what it computes in.

    stored: the format in which the model's weights are stored, "" if that is not known.
    """
    cores = f"{len(machine.cores)} core{'s' if len(machine.cores) != 1 else ''}"
    if machine.engine is not None and machine.engine.build == "cuda":
        return Finding("ok", "CPU", cores)
    if architecture == "x86_64" and "avx2" not in flags:
        return Finding(
            "bad", "CPU", f"{cores} without AVX2", "vLLM's CPU build needs AVX2: use a newer machine or a GPU"
        )
    widest = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else architecture
    half = " and ".join(name for name, there in (("bfloat16", machine.bf16), ("float16", machine.fp16)) if there)
    return Finding(
        "ok",
        "CPU",
        f"{cores}, {widest}, {half or 'no half precision'}: CPU engines compute in {cpu_dtype(machine, stored)}",
    )


def stored_or_unknown(model: str, cache: Path) -> str:
    """The format of the model's weights; "" where another finding says why the model is not there."""
    try:
        return stored_dtype(model, cache)
    except ModelError:
        return ""


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Which there are, and whether driver and GPUs are new enough for what is, or would be, installed."""
    build = machine.engine.build if machine.engine else None
    if not machine.gpus:
        if build != "cuda":  # else the engine's finding says it
            yield Finding("ok", "GPU", "none, and the CPU build needs none")
        return
    kinds = Counter((gpu.name or "NVIDIA", gpu.total_bytes, gpu.is_slice) for gpu in machine.gpus)
    seen = "; ".join(
        f"{count} x {name}{' (MIG slice)' if cut else ''}" + (f", {size / GIB:.1f} GiB" if size else "")
        for (name, size, cut), count in kinds.items()
    )
    seen += f"; driver {machine.driver}" if machine.driver else ""
    if driver_is_too_old(machine.driver):
        advice = f"update the driver to {OLDEST_DRIVER} or newer, which CUDA 13 needs, or install cuda-compat-13-0"
        yield Finding("bad" if build == "cuda" else "warn", "GPU", seen, advice)
    elif build == "cpu":
        advice = "run `make install ENGINE=cuda` to use " + ("it" if len(machine.gpus) == 1 else "them")
        yield Finding("warn", "GPU", f"{seen}; the CPU build does not use {advice.rpartition(' ')[2]}", advice)
    else:
        yield Finding("ok", "GPU", seen)
    if build == "cuda":
        yield from (
            without_bfloat16(gpu) for gpu in machine.gpus if OLDEST_CAPABILITY <= gpu.capability < BFLOAT16_FROM
        )


def without_bfloat16(gpu: Gpu) -> Finding:
    """A finding of an old GPU that can be used. Those that cannot are told with the plan, which leaves them out."""
    found = f"{gpu}: compute capability {'.'.join(map(str, gpu.capability))}, no bfloat16"
    return Finding("warn", "GPU", found, "models trained in bfloat16 run in float16 there, and a few of them overflow")


def check_gpu_plan(
    settings: ServeSettings, machine: Machine, cache: Path, ask: Asking = ask_vllm, weighing: Weighing = weigh
) -> Iterator[Finding]:
    """Which worker would run where; nothing on a CPU, or where another finding explains why this is unknown."""
    if machine.engine is None or machine.engine.build == "cpu" or not machine.gpus:
        return
    try:
        plan = gpu_plan(settings, machine, check_all(settings, machine, cache, ask, weighing))
    except GpuPlanError as error:
        found, _, advice = str(error).partition(": ")
        yield Finding("bad", "GPU plan", found, advice)
    except (EngineArgsError, PreflightError) as error:
        yield Finding("bad", "GPU plan", str(error))
    except (ModelError, ValueError):
        return
    else:
        level: Level = "warn" if plan.remarks else "ok"
        placed = "\n".join(f"{name}: {share}" for name, share in plan.shares.items())
        yield Finding(level, "GPU plan", placed, "\n→ ".join(plan.remarks))


def check_compiler(machine: Machine, compiler: str | None, header: Path) -> Iterator[Finding]:
    """On a GPU, Triton compiles small C programs against Python when an engine starts."""
    if machine.engine is None or machine.engine.build == "cpu":
        return
    if compiler is None or not header.is_file():
        lacks = "a C compiler" if compiler is None else f"Python's header files ({header})"
        yield Finding("bad", "compiler", f"Triton needs {lacks}", "apt-get install gcc python3-dev, or the equivalent")
    else:
        yield Finding("ok", "compiler", compiler)


def check_workers(settings: ServeSettings, machine: Machine) -> Finding:
    try:
        roles = worker_roles(settings)
        check_transfer(roles.values(), machine)
    except (ValueError, TransferError) as error:
        return Finding("bad", "workers", str(error))
    workers = len(roles)
    if machine.engine and machine.engine.build == "cpu" and workers > len(machine.cores):
        found = f"{workers} workers on {len(machine.cores)} cores"
        return Finding("warn", "workers", found, "each needs a core of its own; more only slow each other down")
    return Finding("ok", "workers", f"{workers}")


def check_memory(settings: ServeSettings, machine: Machine, cache: Path, ask: Asking = ask_vllm) -> Finding:
    """Weights, KV cache and engine of every worker against the free memory, unless another finding explains why that is
    unknown."""
    free = f"{machine.available_bytes / GIB:.1f} GiB free"
    if machine.engine is not None and machine.engine.build == "cuda":
        return Finding("ok", "memory", f"{free}; weights and KV cache go into GPU memory")
    try:
        checked = check_all(settings, machine, cache, ask)
    except (TransferError, SharedMemoryError):
        return Finding("warn", "memory", f"{free}; the amount needed is unknown", "fix the other problems first")
    except PreflightError as error:
        found, _, advice = str(error).rpartition(": ")
        return Finding("bad", "memory", found, advice)
    except (EngineArgsError, GpuPlanError, ModelError, ValueError):
        return Finding("warn", "memory", f"{free}; the amount needed is unknown", "fix the other problems first")
    kv_cache = " and ".join(dict.fromkeys(f"{one.kv_cache_gib}" for one in checked))
    return Finding("ok", "memory", f"{free}, enough with {kv_cache} GiB KV cache for each worker")


def check_model(name: str, cache: Path) -> Finding:
    if name in MADE_HERE and not is_complete(cache / name):
        return Finding(
            "warn", "model", f"{name} is not prepared", f"`evenhand model prepare {name}`; serve does it too"
        )
    try:
        source = resolve(name, cache)
    except ModelError as error:
        found, _, advice = str(error).rpartition(": ")
        return Finding("bad", "model", found, advice)
    if Path(source.path).is_dir():
        return Finding("ok", "model", f"{source.served_name} in {source.path}")
    return Finding(
        "warn",
        "model",
        f"{name}, from the model hub",
        f"`evenhand serve` downloads it first; to do so now: `evenhand model download {name}`",
    )


def check_disk(free_bytes: int, place: Path, needed_bytes: int) -> Finding:
    found = f"{free_bytes / 1e9:.1f} GB free in {place}"
    if free_bytes < needed_bytes:
        return Finding(
            "bad", "disk", found, f"{needed_bytes / 1e9:.1f} GB are needed: free some, or set EVENHAND_CACHE"
        )
    return Finding("ok", "disk", found)


def check_port(host: str, port: int, free: Callable[[str, int], bool]) -> Finding:
    if port == 0 or free(host, port):
        return Finding("ok", "port", f"{host}:{port} is free")
    return Finding(
        "bad", "port", f"cannot listen on {host}:{port}", "stop what listens there, or choose another --host or --port"
    )


def check_redis(urls: Sequence[str], ping: Callable[[str], str]) -> Iterator[Finding]:
    """`ping` returns what a server says of itself, or raises OSError or ValueError."""
    if not urls:
        yield Finding("ok", "Redis", "not configured: the gateway shares no state")
    for url in urls:
        try:
            yield Finding("ok", "Redis", f"{without_password(url)}: {ping(url)}")
        except (OSError, ValueError) as error:
            advice = "start it or correct --redis-url; without it each gateway keeps its own state"
            yield Finding("bad", "Redis", f"{without_password(url)}: {error}", advice)
    if len(set(urls)) < len(urls):
        yield Finding("bad", "Redis", "--redis-url names an address twice", "name each server once")


def without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def check_open_files(limit: int) -> Finding:
    """The soft limit on open files bounds how many streams can be open at once."""
    streams = max(0, limit - FILES_BESIDE) // FILES_PER_STREAM
    found = f"{limit} open files: {streams} streams at once"
    if streams < FEW_STREAMS:
        return Finding("warn", "open files", found, f"raise it before starting: `ulimit -n {2**16}`")
    return Finding("ok", "open files", found)


def check_shared_memory(settings: ServeSettings, machine: Machine) -> Finding:
    """A container has 64 MiB unless it is told otherwise, too little for an engine of several processes."""
    found = f"{machine.shared_bytes / MIB:.0f} MiB free in /dev/shm"
    try:
        preflight.check_shared_memory(settings, machine)
    except SharedMemoryError as error:
        return Finding("bad", "shared memory", found, str(error).partition(" MiB: ")[2])
    if machine.shared_bytes < SHARED_BYTES:
        advice = "an engine on several GPUs needs more: start the container with --shm-size=1g"
        return Finding("warn", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def ping_redis(url: str) -> str:
    """The server's version; OSError when it cannot be reached, ValueError for one that cannot be used."""
    import redis

    from server.store.redis_store import IN_CLUSTER

    try:
        with redis.Redis.from_url(
            url, socket_timeout=REDIS_PATIENCE_S, socket_connect_timeout=REDIS_PATIENCE_S
        ) as client:
            said = client.info("server")
    except redis.RedisError as error:
        raise OSError(str(error)) from error
    if said.get("redis_mode") == "cluster":
        raise ValueError(IN_CLUSTER)
    return f"version {said['redis_version']}"


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def examine(settings: ServeSettings) -> Iterator[Finding]:
    """Everything, the most basic first."""
    machine, cache = look(os.environ), cache_folder()
    yield check_engine(machine)
    yield check_cpu(machine, cpu_flags(Path("/")), platform.machine(), stored_or_unknown(settings.source, cache))
    yield from check_gpus(machine)
    yield from check_gpu_plan(settings, machine, cache)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    yield from check_compiler(machine, shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc"), header)
    for one in settings.model:
        yield check_model(one.name, cache)
    yield check_workers(settings, machine)
    yield check_memory(settings, machine, cache)
    made_here = any(one.name in MADE_HERE for one in settings.model)
    needed_bytes = 0 if not made_here or is_complete(cache / BUNDLED) else BUNDLED_BYTES
    yield check_disk(shutil.disk_usage(existing(cache)).free, existing(cache), needed_bytes)
    if math.isfinite(machine.shared_bytes):
        yield check_shared_memory(settings, machine)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_port(settings.host, settings.port, is_free)
    yield from check_redis([url.get_secret_value() for url in settings.redis_url], ping_redis)


def render(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.level]
        said = Text(finding.found)
        if finding.advice:
            said.append(f"\n→ {finding.advice}", style="cyan")
        table.add_row(Text(mark, style), Text(finding.subject, "bold"), said)
    return table


def verdict(findings: list[Finding]) -> str:
    bad = sum(finding.level == "bad" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    if bad:
        return f"Fix {bad} problem{'s' if bad > 1 else ''} (✗) before `evenhand serve` can work."
    return "`evenhand serve` should work here" + (", with the remarks above." if warnings else ".")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evenhand serve`; what is not given comes from EVENHAND_…, the settings file, or the default, as
    there."""
    add_options(parser, ServeSettings, OPTIONS)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """1 if there is a problem to fix, 2 for invalid settings."""
    try:
        settings = read_settings(given(arguments, ServeSettings, OPTIONS), arguments.config, ServeSettings)
    except ValueError as error:
        sys.stderr.write(f"evenhand doctor: {error}\n")
        return 2
    findings = list(examine(settings))
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
    else:
        console = Console(highlight=False)
        console.print(render(findings))
        console.print(f"\n{verdict(findings)}")
    return int(any(finding.level == "bad" for finding in findings))
