"""GPUs as NVML, nvidia-smi and device files show them, and as CUDA_VISIBLE_DEVICES hides them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.machine.gpus import Accelerators, Gpu, driver_is_too_old, find_gpus, smi_of
from deploy.machine.machine import GIB
from tests.deploy.fake_gpus import FakeNvml, h100s

UUIDS = ["GPU-c0ffee00-1111", "GPU-c0ffee01-2222"]
MIGS = ["MIG-aaaa-1", "MIG-bbbb-2"]
QUERIED = """\
0, GPU-c0ffee00-1111, NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, 570.86.15, {mig}
1, GPU-c0ffee01-2222, NVIDIA A100-SXM4-40GB, 40960, 512, 8.0, 570.86.15, Disabled
"""
LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-c0ffee00-1111)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa-1)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbb-2)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-c0ffee01-2222)
"""
DEAD = FakeNvml([], works=False)


def smi(mig: bool = False, works: bool = True) -> object:
    def run(arguments: Sequence[str]) -> str:
        if not works:
            return ""
        return LISTED if arguments == ["-L"] else QUERIED.format(mig="Enabled" if mig else "Disabled")

    return run


def ids(found: Accelerators) -> list[str]:
    return [gpu.id for gpu in found.gpus]


def test_nvml_tells_uuid_memory_capability_and_driver(tmp_path: Path) -> None:
    nvml = FakeNvml(h100s(4))
    found = find_gpus({}, tmp_path, nvml)
    assert found == Accelerators(h100s(4), "580.65.06")
    assert nvml.open == 0


def test_an_old_binding_and_a_gpu_without_memory_of_its_own_are_understood(tmp_path: Path) -> None:
    found = find_gpus({}, tmp_path, FakeNvml(h100s(1), driver=b"580.1", knows_memory=False))
    assert found.driver == "580.1"
    assert (found.gpus[0].total_bytes, found.gpus[0].free_bytes) == (0, 0)


def test_a_gpu_that_is_cut_is_seen_as_its_slices(tmp_path: Path) -> None:
    found = find_gpus({}, tmp_path, FakeNvml(h100s(2), slices={0: ["MIG-a", None, "MIG-b"]}))
    assert ids(found) == ["MIG-a", "MIG-b", "GPU-h1"]
    assert [gpu.total_bytes // GIB for gpu in found.gpus] == [20, 20, 80]
    assert [str(gpu) for gpu in found.gpus][0] == "MIG-a of GPU 0 (NVIDIA H100 80GB HBM3)"


def test_without_nvml_nvidia_smi_is_asked(tmp_path: Path) -> None:
    found = find_gpus({}, tmp_path, DEAD, smi())  # type: ignore[arg-type]
    first = Gpu(UUIDS[0], 0, "NVIDIA A100-SXM4-40GB", 40 * GIB, 40000 * 1024**2, (8, 0))
    assert (found.gpus[0], found.driver) == (first, "570.86.15")
    assert ids(find_gpus({}, tmp_path, DEAD, smi(mig=True))) == [*MIGS, UUIDS[1]]  # type: ignore[arg-type]


def test_a_container_that_shows_device_files_only_has_that_many(tmp_path: Path) -> None:
    assert find_gpus({}, tmp_path, DEAD, smi(works=False)) == Accelerators()  # type: ignore[arg-type]
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert ids(find_gpus({}, tmp_path, DEAD, smi(works=False))) == ["0", "1"]  # type: ignore[arg-type]


def test_under_wsl_nvidia_smi_is_found_where_windows_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "usr/lib/wsl/lib/nvidia-smi"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{QUERIED.format(mig='Disabled')}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert ids(find_gpus({}, tmp_path, DEAD, smi_of(tmp_path))) == UUIDS


@pytest.mark.parametrize(
    ("chosen", "seen"),
    [
        ("1", UUIDS[1:]),
        ("1, 0", [UUIDS[1], UUIDS[0]]),
        ("GPU-c0ffee01", UUIDS[1:]),
        ("0,7,1", UUIDS[:1]),
        ("0,-1,1", UUIDS[:1]),
        ("", []),
        ("-1", []),
        ("none", []),
    ],
)
def test_cuda_visible_devices_hides_as_in_cuda(chosen: str, seen: list[str], tmp_path: Path) -> None:
    assert ids(find_gpus({"CUDA_VISIBLE_DEVICES": chosen}, tmp_path, DEAD, smi())) == seen  # type: ignore[arg-type]


def test_what_is_asked_for_is_believed_where_no_gpu_can_be_seen(tmp_path: Path) -> None:
    silent = smi(works=False)
    found = find_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-x"}, tmp_path, DEAD, silent)  # type: ignore[arg-type]
    assert ids(found) == ["3", "GPU-x"]


@pytest.mark.parametrize(("driver", "old"), [("550.54.15", True), ("579.9", True), ("580.65.06", False), ("", False)])
def test_cuda_13_needs_a_new_driver(driver: str, old: bool) -> None:
    assert driver_is_too_old(driver) is old
