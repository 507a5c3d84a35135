"""The NVIDIA GPUs of this machine: from NVML where its Python binding is installed, else from `nvidia-smi`."""

import csv
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scheduler.energy import installed_nvml

# CUDA 13, which vLLM's wheels are built for, needs the driver 580 or newer, and Turing or newer (NVIDIA, CUDA Toolkit
# 13.0 release notes). NVIDIA's package cuda-compat-13-0 lets some older data center drivers run it, too.
OLDEST_DRIVER = 580
OLDEST_CAPABILITY = (7, 5)
QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "driver_version", "mig.mode.current")
SMI_TIMEOUT_S = 20.0
WSL_SMI = "usr/lib/wsl/lib/nvidia-smi"  # often not on the PATH of WSL2


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or one MIG slice of a GPU.

    id: names it in CUDA_VISIBLE_DEVICES: its UUID, or its index where the UUID is not known.
    index: its number, or that of the GPU which it is a slice of, as nvidia-smi counts.
    total_bytes, free_bytes: its memory; 0 where it is not known.
    capability: CUDA compute capability, (0, 0) where it is not known.
    """

    id: str
    index: int = 0
    name: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    capability: tuple[int, int] = (0, 0)

    @property
    def is_slice(self) -> bool:
        return self.id.startswith("MIG-")

    def __str__(self) -> str:
        """For a person: "GPU 0 (NVIDIA L4)"; a MIG slice by as much of its UUID as `--gpus` needs."""
        own = f"{self.id if '/' in self.id else self.id[:12]} of " if self.is_slice else ""
        return f"{own}GPU {self.index}" + (f" ({self.name})" if self.name else "")

    @property
    def is_too_old(self) -> bool:
        """Whether vLLM's CUDA build is known not to run on it."""
        return (0, 0) < self.capability < OLDEST_CAPABILITY


@dataclass(frozen=True, slots=True)
class Accelerators:
    """The GPUs that a process started here would see, in order, and the version of their driver ("" if unknown)."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""


def driver_is_too_old(driver: str) -> bool:
    """Whether a driver of this version, "580.65.06" for example, cannot run CUDA 13. An unknown one is trusted."""
    major = driver.partition(".")[0]
    return major.isdigit() and int(major) < OLDEST_DRIVER


class Nvml(Protocol):
    """What we use of the module `pynvml` (distribution nvidia-ml-py)."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlSystemGetDriverVersion(self) -> str: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]: ...  # noqa: N802
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any: ...  # noqa: N802


Smi = Callable[[Sequence[str]], str]


def find_gpus(
    environ: Mapping[str, str], root: Path = Path("/"), nvml: Nvml | None = None, smi: Smi | None = None
) -> Accelerators:
    """What a process with this environment would see. Device files under `root` count where nothing tells more.

    nvml, smi: None for this machine's own.
    """
    nvml = nvml or installed_nvml()
    found = (from_nvml(nvml) if nvml is not None else None) or from_smi(smi or smi_of(root)) or from_devices(root)
    return Accelerators(visible(found.gpus, environ.get("CUDA_VISIBLE_DEVICES")), found.driver)


def from_nvml(nvml: Nvml) -> Accelerators | None:
    """None where the driver does not answer."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [(index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = [gpu for index, handle in handles for gpu in _of_handle(nvml, index, handle)]
        return Accelerators(tuple(gpus), _text(nvml.nvmlSystemGetDriverVersion()))
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _of_handle(nvml: Nvml, index: int, handle: Any) -> list[Gpu]:
    """The GPU, or its MIG slices: CUDA sees the slices alone where there are any."""
    capability = _or_zero(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), (0, 0))
    whole = _gpu(nvml, index, handle, _text(nvml.nvmlDeviceGetName(handle)), capability)
    slices = []
    for number in range(_or_zero(nvml, lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)):
        try:
            slice_handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # not every place for a slice is taken
            continue
        slices.append(_gpu(nvml, index, slice_handle, whole.name, capability))
    return slices or [whole]


def _gpu(nvml: Nvml, index: int, handle: Any, name: str, capability: tuple[int, int]) -> Gpu:
    # Memory is not supported where it is the machine's own (DGX Spark, Jetson).
    memory = _or_zero(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
    total, free = (int(memory.total), int(memory.free)) if memory is not None else (0, 0)
    return Gpu(_text(nvml.nvmlDeviceGetUUID(handle)), index, name, total, free, (capability[0], capability[1]))


def _or_zero(nvml: Nvml, ask: Callable[[], Any], otherwise: Any) -> Any:
    """What an optional question gives, `otherwise` on a GPU that cannot answer it."""
    try:
        return ask()
    except nvml.NVMLError:
        return otherwise


def _text(value: str | bytes) -> str:
    """Old bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def smi_of(root: Path) -> Smi:
    """Runs this machine's nvidia-smi; "" where there is none or it fails."""

    def run(arguments: Sequence[str]) -> str:
        for program in ("nvidia-smi", str(root / WSL_SMI)):
            try:
                done = subprocess.run(
                    [program, *arguments], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return done.stdout
        return ""

    return run


def from_smi(smi: Smi) -> Accelerators | None:
    """None where nvidia-smi lists nothing."""
    rows = list(csv.reader(smi([f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]).splitlines()))
    told = [dict(zip(QUERY, (part.strip() for part in row), strict=True)) for row in rows if len(row) == len(QUERY)]
    slices = _slices(smi(["-L"])) if any(row["mig.mode.current"] == "Enabled" for row in told) else {}
    gpus: list[Gpu] = []
    for row in told:
        index, name, capability = int(row["index"]), row["name"], _capability(row["compute_cap"])
        if cut := slices.get(index):
            # nvidia-smi does not list a slice's memory in a form made for programs.
            gpus += [Gpu(uuid, index, name, capability=capability) for uuid in cut]
        else:
            total, free = _mib(row["memory.total"]), _mib(row["memory.free"])
            gpus.append(Gpu(row["uuid"], index, name, total, free, capability))
    return Accelerators(tuple(gpus), told[0]["driver_version"]) if told else None


def _slices(listing: str) -> dict[int, list[str]]:
    """UUIDs of the MIG slices in the output of `nvidia-smi -L`, by the index of their GPU."""
    found: dict[int, list[str]] = {}
    index = 0
    for line in listing.splitlines():
        if (gpu := re.match(r"GPU (\d+):", line)) is not None:
            index = int(gpu[1])
        elif (uuid := re.search(r"\bMIG\b.*UUID: (MIG-[^)\s]+)", line)) is not None:
            found.setdefault(index, []).append(uuid[1])
    return found


def _mib(text: str) -> int:
    return int(text) * 1024**2 if text.isdigit() else 0


def _capability(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def from_devices(root: Path) -> Accelerators:
    """As many as there are device files: all that a container without nvidia-smi shows."""
    nodes = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return Accelerators(tuple(Gpu(f"{index}", index) for index in range(len(nodes))))


def visible(gpus: Sequence[Gpu], chosen: str | None) -> tuple[Gpu, ...]:
    """Those that a list of indices and UUIDs (or beginnings of them) names, all if there is no list.

    As in CUDA, an entry that names nothing hides itself and all that follow it; where no GPU is known, what is asked
    for is believed.
    """
    if chosen is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for part in (part.strip() for part in chosen.split(",")):
        match = named(gpus, part) if gpus else [Gpu(part, int(part) if part.isdigit() else 0)]
        if part in {"", "-1"} or not match:
            break
        found += match
    return tuple(found)


def named(gpus: Sequence[Gpu], part: str) -> list[Gpu]:
    """The one that an index or (the beginning of) a UUID means; the slices of a GPU for its index; [] if none."""
    if part.isdigit():
        return [gpu for gpu in gpus if gpu.index == int(part)]
    return [gpu for gpu in gpus if part and gpu.id.startswith(part)][:1]
