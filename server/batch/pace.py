"""Whether a batch ends within its window."""

from collections import deque

MEMORY_S = 600.0  # over which the pace is measured
EVERY_S = 5.0  # between two samples
LEAST_S = 60.0  # of samples, to tell a pace from them


class Pace:
    """How fast the requests of one batch get results, wherever they run, over the last `MEMORY_S` seconds.

    late: whether at that pace the window ends first. left: requests without a result.
    """

    def __init__(self) -> None:
        self.late = False
        self.left = 0
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now: float, done: int, total: int, window_s: float) -> None:
        """So many requests are done; the window ends in `window_s` seconds."""
        self.left = total - done
        samples = self._samples
        if not samples or now - samples[-1][0] >= EVERY_S:
            samples.append((now, done))
        while now - samples[0][0] > MEMORY_S:
            samples.popleft()
        since, before = samples[0]
        seconds = now - since
        if seconds >= LEAST_S:
            self.late = self.left * seconds > (done - before) * window_s
