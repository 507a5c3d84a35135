"""Who has waited for too long: places by the time since which that is counted, oldest first."""

from heapq import heapify, heappop, heappush

from scheduler.line import JobPlace, JobState

_SLACK = 64  # outdated entries that are not worth a clean-up


class Overdue:
    """Waiting places. An entry is outdated once its place has left the line, or come back to it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, float, JobPlace]] = []
        self._noted = 0

    def note(self, place: JobPlace, since: float, waiting: int) -> None:
        """The place waits; `since` is what it is judged by. waiting: how many places wait in all."""
        self._noted += 1
        heappush(self._heap, (since, self._noted, place.since, place))
        if len(self._heap) > 2 * waiting + _SLACK:
            self._heap = list({entry[3]: entry for entry in self._heap if self._holds(entry)}.values())
            heapify(self._heap)

    def first(self) -> JobPlace | None:
        """The oldest; None if there is none."""
        while self._heap:
            if self._holds(self._heap[0]):
                return self._heap[0][3]
            heappop(self._heap)
        return None

    def pop(self, before: float) -> JobPlace | None:
        """The oldest of those that wait since before then, which is forgotten; None if there is none."""
        place = self.first()
        if place is None or self._heap[0][0] > before:
            return None
        heappop(self._heap)
        return place

    @staticmethod
    def _holds(entry: tuple[float, int, float, JobPlace]) -> bool:
        place = entry[3]
        return place.state is JobState.WAITING and place.since == entry[2]
