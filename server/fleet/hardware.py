"""What an engine with our scheduler reports about its hardware and its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.fleet.health import NUMBER

_JOULES = re.compile(
    r'^evenhand_engine_energy_joules\{[^}]*device="([^"]{1,100})"[^}]*\}\s+(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)$',
    re.MULTILINE,
)
_GPU_USE = re.compile(r"^evenhand_engine_gpu_use" + NUMBER, re.MULTILINE)
_COMPRESSION = re.compile(r"^evenhand_engine_weight_compression" + NUMBER, re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Hardware:
    """joules: that each device has drawn since a moment of its own. gpu_use: share of time in which its GPUs computed,
    None if it does not say. compression: of its weights against 16 bits a parameter, 0 if it does not know."""

    joules: Mapping[str, float] = field(default_factory=dict)
    gpu_use: float | None = None
    compression: float = 0.0


def hardware_in(metrics: str) -> Hardware:
    """What an engine's metrics say of its hardware."""
    joules = {device: float(value) for device, value in _JOULES.findall(metrics)}
    use = [float(value) for value in _GPU_USE.findall(metrics)]
    compression = max(map(float, _COMPRESSION.findall(metrics)), default=0.0)
    return Hardware(joules, sum(use) / len(use) if use else None, compression)
