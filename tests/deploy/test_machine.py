from pathlib import Path

import pytest

from deploy.machine.machine import (
    are_own,
    available_bytes,
    cpu_flags,
    installed_engine,
    look,
    physical_cores,
    usable_cores,
)


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_a_second_hardware_thread_of_a_core_is_not_another_core(tmp_path: Path) -> None:
    for core, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", f"{siblings}\n")
    assert usable_cores(physical_cores([0, 1, 2, 3], tmp_path), tmp_path) == (0, 1)
    assert usable_cores(physical_cores([2, 3], tmp_path), tmp_path) == (2, 3)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)])
def test_a_containers_cpu_quota_bounds_the_cores(quota: str, cores: int, tmp_path: Path) -> None:
    put(tmp_path, "sys/fs/cgroup/cpu.max", quota)
    assert len(usable_cores(physical_cores([0, 1, 2, 3], tmp_path), tmp_path)) == cores


@pytest.mark.parametrize(
    ("allowed", "quota", "own"),
    [([0, 1, 2, 3], "", False), ([2, 3], "", True), ([2, 3], "200000 100000", True), ([2, 3], "100000 100000", False)],
    ids=["all of the machine", "a cpuset", "a cpuset and its quota", "a share of a cpuset"],
)
def test_cores_are_ones_own_in_a_cpuset_that_no_quota_makes_smaller(
    allowed: list[int], quota: str, own: bool, tmp_path: Path
) -> None:
    put(tmp_path, "sys/fs/cgroup/cpu.max", quota)
    assert are_own(physical_cores(allowed, tmp_path), 4, tmp_path) is own


@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("-1", 4)])
def test_a_cpu_quota_is_read_under_cgroup_v1_too(quota: str, cores: int, tmp_path: Path) -> None:
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert len(usable_cores(physical_cores([0, 1, 2, 3], tmp_path), tmp_path)) == cores


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "inactive"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_a_containers_memory_limit_bounds_the_memory(
    limit: str, usage: str, stat: str, inactive: str, tmp_path: Path
) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    assert available_bytes(tmp_path) == 8 * 1024**3
    put(tmp_path, f"sys/fs/cgroup/{limit}", f"{4 * 1024**3}\n")
    put(tmp_path, f"sys/fs/cgroup/{usage}", f"{2 * 1024**3}\n")
    assert available_bytes(tmp_path) == 2 * 1024**3
    put(tmp_path, f"sys/fs/cgroup/{stat}", f"cache 7\n{inactive} {1024**3}\nunevictable 0\n")
    assert available_bytes(tmp_path) == 3 * 1024**3


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "max", "memory.current": "1"},
        {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"},
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_a_container_without_a_memory_limit_has_what_the_machine_has(files: dict[str, str], tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemAvailable:    8388608 kB\n")
    for name, text in files.items():
        put(tmp_path, f"sys/fs/cgroup/{name}", text)
    assert available_bytes(tmp_path) == 8 * 1024**3


def test_flags_are_read_as_x86_and_as_arm_spell_them(tmp_path: Path) -> None:
    put(tmp_path, "proc/cpuinfo", "processor: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert "avx512_bf16" in cpu_flags(tmp_path)
    put(tmp_path, "proc/cpuinfo", "processor: 0\nFeatures\t: asimd bf16\n")
    assert "bf16" in cpu_flags(tmp_path)
    assert cpu_flags(tmp_path / "nothing") == frozenset()


def test_this_machine_can_be_looked_at_without_importing_an_engine() -> None:
    machine = look({})
    assert machine.cores
    assert machine.available_bytes > 0
    assert machine.engine == installed_engine()
