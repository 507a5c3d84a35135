"""stray_threads, on /proc files as the kernel writes them, and on a real process."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.machine.cores import cpu_list, stray_threads

SESSION = 40


def thread(proc: Path, pid: int, title: str, tid: int, name: str, where: str, session: int = SESSION) -> None:
    task = proc / str(pid) / "task" / str(tid)
    task.mkdir(parents=True)
    (task / "status").write_text(f"Name:\t{name}\nCpus_allowed:\tff\nCpus_allowed_list:\t{where}\n")
    (proc / str(pid) / "cmdline").write_text(title + "\0")
    (proc / str(pid) / "stat").write_text(f"{pid} ({name} 1) S 1 {session} {session} 0 -1\n")


@pytest.mark.parametrize(
    ("compute", "nixl", "server", "strays"),
    [
        ("2-3", "2-3", "0,2-3", []),
        ("7", "2-3", "0,2-3", ["VLLM::EngineCore/VLLM::EngineCor on 7"]),
        ("0,2-3", "2-3", "0,2-3", ["VLLM::EngineCore/VLLM::EngineCor on 0,2-3"]),
        ("2", "4", "0", ["VLLM::EngineCore/nixl on 4"]),
        ("2", "2", "0-7", ["python -P -m vllm/python on 0-7"]),
    ],
)
def test_computing_keeps_to_the_engines_cores_and_the_rest_off_those_of_others(
    compute: str, nixl: str, server: str, strays: list[str], tmp_path: Path
) -> None:
    thread(tmp_path, 41, "python -P -m vllm", 41, "python", server)
    thread(tmp_path, 42, "VLLM::EngineCore", 42, "VLLM::EngineCor", compute)
    thread(tmp_path, 42, "VLLM::EngineCore", 43, "nixl", nixl)
    thread(tmp_path, 50, "VLLM::EngineCore", 50, "another", "5", session=49)
    assert stray_threads(SESSION, (2, 3), (0, 2, 3), tmp_path) == strays


def test_where_an_engine_may_run_anywhere_nothing_strays(tmp_path: Path) -> None:
    thread(tmp_path, 42, "VLLM::EngineCore", 42, "VLLM::EngineCor", "0-7")
    assert stray_threads(SESSION, (2, 3), (), tmp_path) == []


def test_a_real_process_is_read_as_the_kernel_tells_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert stray_threads(process.pid, (0,), range(4096)) == []
        (stray,) = stray_threads(process.pid, (0,), (100_000,))
        assert " on 0" in stray
        process.communicate(b"\n")


def test_the_kernels_lists_of_cpus() -> None:
    assert cpu_list("0-3,8") == {0, 1, 2, 3, 8}
    assert cpu_list("") == set()
