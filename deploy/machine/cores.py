"""Checks with the kernel whether a CPU engine's threads stay on its cores."""

from collections.abc import Collection, Iterator
from pathlib import Path

from deploy.machine.machine import text_of

# The processes that compute, by the titles that vLLM gives them; the first kind that there is.
COMPUTING = ("VLLM::Worker", "VLLM::EngineCore")


def stray_threads(
    session: int, cores: Collection[int], allowed: Collection[int], proc: Path = Path("/proc")
) -> list[str]:
    """The threads of the engine in `session` that may run where they must not, each as "process/thread on 0-3".

    cores: where it computes. allowed: where anything of it may run; empty for anywhere, and then nothing strays.
    """
    if not allowed:
        return []
    processes = {pid: _title(proc / str(pid)) for pid in _members(session, proc)}
    computing = next((kind for kind in COMPUTING if any(title.startswith(kind) for title in processes.values())), "-")
    found: list[str] = []
    for pid, title in processes.items():
        for task in (proc / str(pid) / "task").glob("[0-9]*"):
            status = dict(line.split(":\t", 1) for line in text_of(task / "status").splitlines() if ":\t" in line)
            where = status.get("Cpus_allowed_list", "")
            computes = title.startswith(computing) and task.name == str(pid)
            if not cpu_list(where) <= set(cores if computes else allowed):
                found.append(f"{title}/{status.get('Name', task.name)} on {where}")
    return sorted(set(found))


def cpu_list(text: str) -> set[int]:
    """`0-3,8` → {0, 1, 2, 3, 8}, as the kernel writes it."""
    parts = [part.partition("-") for part in text.split(",") if part]
    return {cpu for first, dash, last in parts for cpu in range(int(first), int(last if dash else first) + 1)}


def _members(session: int, proc: Path) -> Iterator[int]:
    for stat in proc.glob("[0-9]*/stat"):
        fields = text_of(stat).rpartition(")")[2].split()
        if len(fields) > 3 and fields[0] != "Z" and fields[3] == str(session):
            yield int(stat.parent.name)


def _title(process: Path) -> str:
    return text_of(process / "cmdline").replace("\0", " ").strip()[:40] or text_of(process / "comm").strip()
