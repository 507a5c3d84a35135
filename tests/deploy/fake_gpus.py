"""Machines with GPUs that are not there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from deploy.machine.gpus import Gpu
from deploy.machine.machine import GIB, Engine, Machine

L4 = Gpu("GPU-a", 0, "NVIDIA L4", 22 * GIB, 22 * GIB, (8, 9))
H100 = Gpu("GPU-h0", 0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0))


def h100s(count: int) -> tuple[Gpu, ...]:
    return tuple(replace(H100, id=f"GPU-h{index}", index=index) for index in range(count))


def cuda_machine(gpus: tuple[Gpu, ...], driver: str = "580.65.06") -> Machine:
    cores = tuple(range(32))
    return Machine(cores, True, 900 * GIB, gpus, Engine("vllm", "0.32.0", "cuda"), nixl=True, driver=driver)


def answering(gpus: int | None = 1, data_parallel: int = 1, nodes: int = 1, utilization: float | None = None) -> Any:
    """What vLLM's parser would say of the engine arguments."""
    told = {"gpus": gpus, "data_parallel": data_parallel, "nodes": nodes, "utilization": utilization}
    return lambda args: json.dumps(told)


class NvmlFailed(Exception):
    """NVMLError of the fake."""


@dataclass
class FakeNvml:
    """What NVML tells of some GPUs. slices: UUIDs of MIG slices by GPU, None where a place is empty."""

    gpus: Sequence[Gpu]
    driver: str | bytes = "580.65.06"
    slices: dict[int, list[str | None]] = field(default_factory=dict)
    works: bool = True
    knows_memory: bool = True
    open: int = 0
    NVMLError: type[Exception] = NvmlFailed

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.works:
            raise NvmlFailed("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802
        return self.driver

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return str(handle.id)

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return str(handle.name)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        if not self.knows_memory:
            raise NvmlFailed("Not Supported")
        return SimpleNamespace(total=handle.total_bytes, free=handle.free_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:  # noqa: N802
        return (handle.capability[0], handle.capability[1])

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:  # noqa: N802
        if handle.index not in self.slices:
            raise NvmlFailed("Not Supported")
        return len(self.slices[handle.index])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:  # noqa: N802
        uuid = self.slices[handle.index][index]
        if uuid is None:
            raise NvmlFailed("Not Found")
        return replace(handle, id=uuid, total_bytes=20 * GIB, free_bytes=19 * GIB)
