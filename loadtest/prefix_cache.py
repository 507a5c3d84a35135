"""Which prompt prefixes an engine still holds: full blocks by a hash of all up to their end; the least used go first.

As vLLM's automatic prefix caching counts it, with one simplification: the blocks do not share memory with running
sequences, so the cache always holds up to its whole capacity.
"""

import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_hashes(ids: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """One hash per full block, each of everything up to that block's end."""
    packed = array("I", ids).tobytes()
    size = array("I").itemsize * block_tokens
    hashes, digest = [], 0
    for start in range(0, len(packed) - size + 1, size):
        digest = zlib.crc32(packed[start : start + size], digest)
        hashes.append(digest << 32 | start // size)
    return tuple(hashes)


class PrefixCache:
    """Blocks that need no computing. capacity_tokens: how much it keeps; block_tokens: of one block."""

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._most = max(1, capacity_tokens // block_tokens)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, hashes: Sequence[int]) -> int:
        """Tokens of the longest prefix that is held."""
        for at, block in enumerate(hashes):
            if block not in self._blocks:
                return at * self.block_tokens
            self._blocks.move_to_end(block)
        return len(hashes) * self.block_tokens

    def keep(self, hashes: Sequence[int]) -> None:
        """A prompt has been computed."""
        for block in hashes:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
