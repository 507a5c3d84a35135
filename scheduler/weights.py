"""How small a model's weights are: bits per parameter, from the heads of its safetensors files."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "I32": 32, "I64": 64}
EXTRAS = (
    "scales", "scale", "scale_2", "scale_inv", "zeros", "zero_point", "g_idx", "weight_shape",
    "absmax", "quant_map",
)  # fmt: skip
_MOST_HEAD_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """parameters: of the model. bits: that they take together, scales and zero points of quantised ones included."""

    parameters: int
    bits: int

    @property
    def compression(self) -> float:
        """How many times smaller they are than with 16 bits each."""
        return 16 * self.parameters / self.bits


def weights_of(folder: Path, loaded_bits: int, packed_bits: int | None = None) -> Weights | None:
    """The weights in a folder, None where there are no safetensors files that can be read.

    loaded_bits: of one number in the format in which the engine computes; floats are converted to it when they are
    loaded. packed_bits: of one parameter, where a quantised model packs several into one integer.
    """
    parameters = bits = 0
    try:
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in _head(file).items():
                count, size = _tensor(name, tensor, loaded_bits, packed_bits)
                parameters, bits = parameters + count, bits + size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Weights(parameters, bits) if parameters and bits else None


def _head(file: Path) -> Mapping[str, Mapping[str, Any]]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > _MOST_HEAD_BYTES:
            raise ValueError(f"{file} is no safetensors file")
        head = json.loads(opened.read(size))
    if not isinstance(head, dict):
        raise ValueError(f"{file} is no safetensors file")
    return {name: tensor for name, tensor in head.items() if name != "__metadata__"}


def _tensor(name: str, tensor: Mapping[str, Any], loaded_bits: int, packed_bits: int | None) -> tuple[int, int]:
    """Parameters and bits. Scales and zero points take room and are no parameters."""
    kind, numbers = tensor["dtype"], prod(tensor["shape"])
    stored = BITS[kind] * numbers
    if name.endswith(EXTRAS) or "inv_freq" in name or ".quant_state." in name:
        return 0, stored
    if kind in ("I32", "U8") and not packed_bits:
        raise ValueError(f"{name} packs several parameters into each integer, and nothing says how many")
    if packed_bits and kind in ("I32", "U8"):
        return stored // packed_bits, stored
    return numbers, numbers * loaded_bits if kind in FLOATS else stored


def packed_bits_of(config: Any) -> int | None:
    """Bits of a packed parameter as a Hugging Face configuration says, None if it does not."""
    told = getattr(config, "quantization_config", None)
    if not isinstance(told, Mapping):
        return None
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        if told.get("quant_method") == "mxfp4":
            return 4
        groups = [group["weights"]["num_bits"] for group in told.get("config_groups", {}).values()]
        bits = int(told.get("bits") or max(groups, default=0) or (4 if told.get("load_in_4bit") else 0))
        return bits if bits > 0 else None
    return None
