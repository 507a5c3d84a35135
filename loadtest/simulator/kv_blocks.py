"""An engine's KV memory in blocks: who holds which, and which prompt prefixes it still has, as vLLM's V1 block pool.

A full block has an id, a hash of all up to its end, and two sequences that begin alike hold the same block. A block
that nobody holds keeps what is in it until its room is needed; those that no prefix can find go first, then the ones
let go of the longest ago.
"""

import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def block_hashes(ids: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """One hash per full block, each of everything up to that block's end."""
    packed = array("I", ids).tobytes()
    size = array("I").itemsize * block_tokens
    hashes, digest = [], 0
    for start in range(0, len(packed) - size + 1, size):
        digest = zlib.crc32(packed[start : start + size], digest)
        hashes.append(digest << 32 | start // size)
    return tuple(hashes)


class KvBlocks:
    """All blocks of one engine. NAMELESS stands for one that no prefix can find: it is not full yet, or a twin.

    More may be taken than there are: `free` is then below zero.
    """

    NAMELESS = 0

    def __init__(self, blocks: int) -> None:
        self._plain = blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, those that still have a prefix in them included."""
        return self._plain + len(self._idle)

    def known(self, ids: Sequence[int]) -> int:
        """How many of these blocks, from the first on, it still has."""
        for at, block in enumerate(ids):
            if not self.has(block):
                return at
        return len(ids)

    def has(self, block: int) -> bool:
        """Whether it still has this one."""
        return block in self._held or block in self._idle

    def idle(self, ids: Iterable[int]) -> int:
        """How many of these nobody holds, so that to hold them takes room."""
        return sum(block in self._idle for block in ids)

    def hold(self, ids: Iterable[int]) -> None:
        """One more holder for blocks that it has."""
        for block in ids:
            self._held[block] = self._held.get(block, 0) + 1
            self._idle.pop(block, None)

    def take(self, blocks: int) -> None:
        """So many, nameless."""
        self._plain -= blocks
        while self._plain < 0 and self._idle:
            self._idle.popitem(last=False)
            self._plain += 1

    def name(self, block: int) -> int:
        """A nameless block that is held has been filled. Returns what to let go of: its id, or NAMELESS for a twin."""
        if self.has(block):
            return self.NAMELESS
        self._held[block] = 1
        return block

    def let_go(self, ids: Sequence[int]) -> None:
        """One holder less; of those that nobody holds any more the sequence's last go first."""
        held = self._held
        for block in reversed(ids):
            if block == self.NAMELESS:
                self._plain += 1
            elif held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
                self._idle[block] = None

    def free_anew(self, ids: Sequence[int]) -> None:
        """As if they were let go of only now, the last of them first; those that are held stay as they are."""
        for block in reversed(ids):
            if block in self._idle:
                self._idle.move_to_end(block)
