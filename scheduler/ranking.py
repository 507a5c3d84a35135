"""A priority queue whose items change their key: a heap in which outdated entries are skipped when they surface."""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

_SLACK = 64

Item = TypeVar("Item", bound=Hashable)


class RankedEntry(NamedTuple, Generic[Item]):
    """One posting. `serial` is unique, so that items are never compared."""

    rank: float
    tie: int
    serial: int
    item: Item


class Ranking(Generic[Item]):
    """Items by (rank, tie), smallest first. `post` and `drop` cost O(log n) amortised."""

    __slots__ = ("_heap", "_posted", "_serial")

    def __init__(self) -> None:
        self._heap: list[RankedEntry[Item]] = []
        self._posted: dict[Item, RankedEntry[Item]] = {}
        self._serial = 0

    def post(self, item: Item, rank: float, tie: int) -> None:
        """Adds the item, or gives it another key."""
        self._serial += 1
        entry = RankedEntry(rank, tie, self._serial, item)
        self._posted[item] = entry
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._posted) + _SLACK:
            self._heap = list(self._posted.values())
            heapify(self._heap)

    def drop(self, item: Item) -> None:
        """Removes the item; KeyError if it is not in."""
        del self._posted[item]

    def first(self) -> RankedEntry[Item] | None:
        """The smallest entry, or None."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if self._posted.get(entry.item) is entry:
                return entry
            heappop(heap)
        return None
