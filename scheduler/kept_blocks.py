"""Chooses the KV blocks that an engine should overwrite last: those of displaced requests, which need them again."""

from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from scheduler.jobs import Job

SHARE: Final = 0.75  # of all blocks, the most that are kept: the rest is for those that run and for finished prefixes
_TIMES: Final = 8  # how often they are seen to while as many tokens are computed as the blocks hold

Block = TypeVar("Block")


class Kept(Generic[Block]):
    """The blocks of displaced requests.

    An engine overwrites free blocks in the order in which they were freed, a displaced request's before those of
    requests that finished since. So they are freed anew now and then, of as many requests as fit into the share. Who
    was displaced first is seen to first: it will be promoted first, and the latest go last anyway.

    blocks: how many there are, of `block_tokens` each. intact: whether a block still holds what it did when it was
    noted. free_anew: puts a request's blocks behind all that are free; those that somebody holds are left alone.
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        intact: Callable[[Block], bool],
        free_anew: Callable[[Sequence[Block]], None],
        share: float = SHARE,
    ) -> None:
        self._most_blocks = int(blocks * share)
        self._tokens_between = blocks * block_tokens // _TIMES
        self._tokens_left = self._tokens_between
        self._intact = intact
        self._free_anew = free_anew
        self._noted: dict[Job, Sequence[Block]] = {}

    def displaced(self, job: Job, blocks: Sequence[Block]) -> None:
        """The job is about to lose these blocks, all that it could find again."""
        self._noted.pop(job, None)
        self._noted[job] = blocks

    def after(self, tokens: int, waits: Callable[[Job], bool]) -> None:
        """A step computes so many tokens. `waits`: whether a job is still in line.

        Amortised O(1) per token: as many blocks are freed anew as fit into the share, each time an eighth is filled.
        """
        if not self._noted:
            return
        self._tokens_left -= tokens
        if self._tokens_left > 0:
            return
        self._tokens_left = self._tokens_between
        room = self._most_blocks
        for job, blocks in list(self._noted.items()):
            if not waits(job) or not all(map(self._intact, blocks)):
                del self._noted[job]
            elif len(blocks) <= room:
                room -= len(blocks)
                self._free_anew(blocks)
