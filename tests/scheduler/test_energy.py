"""Energy and GPU use: a folder as the kernel's, and a library as NVML's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.energy import Meters, meters, rapl_zones


def zone(root: Path, folder: str, name: str, microjoules: int, most: int = 999_999_999) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


def test_packages_count_from_when_they_were_found_and_over_the_end_of_their_counter(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    (boot_id := tmp_path / "boot_id").write_text("0123456789abcdef\n")
    found = Meters(zones=rapl_zones(tmp_path, boot_id))
    one, other = "package-0-01234567", "package-1-01234567"
    assert found.joules() == {one: 0.0, other: 0.0} and found.use() == {}
    assert len(meters(gpus=0, environ={}, root=tmp_path).zones) == 2
    counter.write_text("1000000\n")
    assert found.joules()[one] == pytest.approx(2.0)
    counter.unlink()
    assert found.joules() == {other: 0.0}


def test_what_a_machine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert rapl_zones(tmp_path / "none") == {} and meters(gpus=0, environ={}, root=tmp_path) == Meters()
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert rapl_zones(tmp_path) == {}


class FakeNvml:
    """Two GPUs, of which the second tells nothing."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.millijoules = 5000

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise self.NVMLError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        if index > 1:
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        if handle:
            raise self.NVMLError
        return self.millijoules

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=40 + handle)


def test_gpus_go_by_their_uuid_however_they_were_named() -> None:
    for visible, use in (("0,1", {"GPU-0": 0.4, "GPU-1": 0.41}), ("GPU-1", {"GPU-1": 0.41}), ("7", {})):
        found = meters(gpus=2, environ={"CUDA_VISIBLE_DEVICES": visible}, nvml=FakeNvml())
        assert found.use() == use
        assert found.joules() == ({"GPU-0": 5.0} if "GPU-0" in use else {})
    assert meters(gpus=1, environ={}, nvml=FakeNvml(broken=True)) == Meters()


def test_an_engine_on_some_of_the_visible_gpus_counts_those() -> None:
    assert set(meters(gpus=2, environ={}, nvml=FakeNvml()).gpus) == {"GPU-0", "GPU-1"}
    assert set(meters(gpus=1, environ={"CUDA_VISIBLE_DEVICES": "1,0"}, nvml=FakeNvml()).gpus) == {"GPU-1"}
