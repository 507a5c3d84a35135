"""Displaced jobs' blocks are freed anew while they wait, the first displaced first, as many as fit into the share."""

from collections.abc import Sequence

from scheduler.jobs import Job
from scheduler.kept_blocks import Kept


class Memory:
    """Twenty blocks of ten tokens, in the order in which they will be overwritten."""

    def __init__(self) -> None:
        self.free = [f"old{number}" for number in range(20)]
        self.line: set[Job] = set()
        self.kept: Kept[str] = Kept(20, 10, self.free.__contains__, self._free_anew, share=0.5)

    def _free_anew(self, blocks: Sequence[str]) -> None:
        for block in reversed(blocks):
            self.free.remove(block)
            self.free.append(block)

    def displace(self, name: str, blocks: int) -> Job:
        """A job leaves the batch; its blocks are overwritten after all that are free, its last one first."""
        job = Job(name, "t", 1, 0.0)
        own = [f"{name}.{number}" for number in range(blocks)]
        self.kept.displaced(job, own)
        self.line.add(job)
        self.free[:blocks] = []
        self.free += reversed(own)
        return job

    def compute(self, blocks: int) -> None:
        """So many blocks are filled by requests that end at once."""
        for _ in range(blocks):
            self.free.pop(0)
            self.free.append("new")
            self.kept.after(10, self.line.__contains__)


def test_blocks_of_a_displaced_job_outlive_those_freed_later_until_it_resumes() -> None:
    memory = Memory()
    job = memory.displace("a", 4)
    memory.compute(200)
    assert [f"a.{number}" in memory.free for number in range(4)] == [True] * 4
    memory.line.remove(job)
    memory.compute(30)
    assert set(memory.free) == {"new"}


def test_more_than_the_share_is_not_kept_and_who_was_displaced_first_is() -> None:
    memory = Memory()
    for name in ("a", "b", "c"):
        memory.displace(name, 4)
    memory.compute(100)
    assert sorted({block.partition(".")[0] for block in memory.free}) == ["a", "b", "new"]


def test_what_is_overwritten_already_is_not_freed_anew() -> None:
    memory = Memory()
    memory.displace("a", 4)
    memory.free.remove("a.3")
    memory.free.append("new")
    memory.compute(40)
    assert set(memory.free) == {"new"}
