"""Hardware meters: energy of CPU packages (RAPL) and GPUs (NVML), and GPU utilisation.

RAPL's counters are files of the kernel that only root may read since Linux 5.10, and that most virtual machines lack;
NVML counts energy from the Volta generation on. What a machine does not tell is left out.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of a machine, in all of its containers


class Nvml(Protocol):
    """What we use of the module `pynvml` (distribution nvidia-ml-py)."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: N802


@dataclass(slots=True)
class RaplZone:
    """One CPU package. Its counter, in microjoules, begins anew at `span`."""

    file: Path
    span: int
    last: int
    joules: float = 0.0

    def read(self) -> float:
        """Joules since the zone was found; OSError if the kernel does not tell any more."""
        now = int(self.file.read_text())
        self.joules += ((now - self.last) % self.span) / 1e6
        self.last = now
        return self.joules


def rapl_zones(root: Path = POWERCAP, boot_id: Path = BOOT_ID) -> dict[str, RaplZone]:
    """The CPU packages by name and machine; none where this process may not read them. Their parts (cores, memory) are
    in them."""
    zones = {}
    machine = boot_id.read_text()[:8] if boot_id.is_file() else ""  # packages have the same names everywhere
    for folder in sorted(root.glob("intel-rapl:[0-9]*")) if root.is_dir() else ():
        with suppress(OSError, ValueError):
            name = (folder / "name").read_text().strip()
            span = int((folder / "max_energy_range_uj").read_text()) + 1
            if name.startswith("package"):
                counter = folder / "energy_uj"
                zones[f"{name}-{machine}"] = RaplZone(counter, span, int(counter.read_text()))
    return zones


@dataclass(slots=True)
class Meters:
    """The devices that an engine computes on. gpus: handles by UUID."""

    zones: dict[str, RaplZone] = field(default_factory=dict)
    gpus: dict[str, Any] = field(default_factory=dict)
    nvml: Nvml | None = None

    def joules(self) -> dict[str, float]:
        """By device, each since a moment of its own. GPUs by UUID, as every engine on them names them."""
        read: dict[str, float] = {}
        for name, zone in self.zones.items():
            with suppress(OSError, ValueError):
                read[name] = zone.read()
        if self.nvml is not None:
            for uuid, handle in self.gpus.items():
                with suppress(self.nvml.NVMLError):
                    read[uuid] = self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        return read

    def use(self) -> dict[str, float]:
        """The share of the last moments in which a GPU computed anything, 0 to 1, by UUID."""
        read: dict[str, float] = {}
        if self.nvml is not None:
            for uuid, handle in self.gpus.items():
                with suppress(self.nvml.NVMLError):
                    read[uuid] = self.nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return read


def meters(*, gpus: int, environ: Mapping[str, str], root: Path = POWERCAP, nvml: Nvml | None = None) -> Meters:
    """The meters of an engine: of the first so many GPUs that it sees, or, if it has none, of the CPU packages.

    nvml: None for this machine's own.
    """
    if not gpus:
        return Meters(zones=rapl_zones(root))
    nvml = nvml or installed_nvml()
    if nvml is None:
        return Meters()
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        seen = environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(gpus)) if seen is None else seen.split(",")[:gpus]
        return Meters(gpus=_visible(nvml, names), nvml=nvml)
    return Meters()


def _visible(nvml: Nvml, names: Iterable[str]) -> dict[str, Any]:
    gpus = {}
    for name in filter(None, map(str.strip, names)):
        with suppress(nvml.NVMLError):
            found = (
                nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
            )
            gpus[str(nvml.nvmlDeviceGetUUID(found))] = found
    return gpus


def installed_nvml() -> Any | None:
    """NVML's Python binding, None where it is not installed."""
    with suppress(ImportError):
        return import_module("pynvml")
    return None
