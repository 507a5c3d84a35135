"""Bits per parameter, from the heads of safetensors files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.weights import packed_bits_of, weights_of


def write(file: Path, **tensors: tuple[str, list[int]]) -> None:
    head: dict[str, Any] = {name: {"dtype": kind, "shape": shape} for name, (kind, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}} | head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize("bits, times", [(16, 1.0), (32, 0.5)])
def test_floats_count_as_they_are_loaded(tmp_path: Path, bits: int, times: float) -> None:
    write(tmp_path / "a.safetensors", embed=("F32", [10, 4]), layer=("BF16", [4, 4]))
    write(tmp_path / "b.safetensors", head=("BF16", [10, 4]))
    found = weights_of(tmp_path, bits)
    assert found is not None and found.parameters == 96 and found.compression == times


def test_four_bits_in_integers_with_their_scales(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", qweight=("I32", [16, 128]), scales=("F16", [1, 128]), qzeros=("I32", [1, 16]))
    found = weights_of(tmp_path, 16, packed_bits_of(SimpleNamespace(quantization_config={"bits": 4})))
    assert found is not None and found.parameters == 16 * 128 * 8
    assert found.compression == pytest.approx(16 * 16384 / (65536 + 2048 + 512))


def test_eight_bits_keep_their_size(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", weight=("F8_E4M3", [8, 8]))
    found = weights_of(tmp_path, 16)
    assert found is not None and found.compression == 2.0


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", b"\x09" + b"\0" * 7])
def test_what_is_no_such_file_tells_nothing(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.safetensors").write_bytes(content)
    assert weights_of(tmp_path, 16) is None
    assert weights_of(tmp_path / "an-org" / "a-model", 16) is None
    assert (
        packed_bits_of(SimpleNamespace()) is packed_bits_of(SimpleNamespace(quantization_config={"bits": "?"})) is None
    )


PACKED = [
    ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, ("I32", [64, 16]), "weight_scale", "weight_shape"),
    ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, ("U8", [64, 64]), "weight_scale", "weight_scale_2"),
    ({"load_in_4bit": True}, ("U8", [4096, 1]), "weight.absmax", "weight.quant_map"),
]


@pytest.mark.parametrize(("config", "packed", "scales", "extra"), PACKED)
def test_however_four_bits_are_packed(
    tmp_path: Path, config: dict[str, Any], packed: tuple[str, list[int]], scales: str, extra: str
) -> None:
    tensors = {"weight_packed": packed, scales: ("F16", [64, 1]), extra: ("I64", [2])}
    write(tmp_path / "a.safetensors", **tensors)
    found = weights_of(tmp_path, 16, packed_bits_of(SimpleNamespace(quantization_config=config)))
    stored = 4096 * 8 if packed[0] == "U8" else 1024 * 32
    assert found is not None and found.parameters == stored // 4
    assert 3.5 < found.compression < 4.0


def test_integers_that_nobody_explains_tell_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", qweight=("I32", [16, 128]))
    assert weights_of(tmp_path, 16) is None
