"""The lengths seen lately, and the Gittins index they give (Kaplan-Meier where jobs were cut before their end)."""

import math
from bisect import bisect_left, bisect_right
from collections import deque

_POINTS = 60  # quantile points at which the index looks for the best quantum
_LEAST_SHARE = 0.1  # of the jobs alive, how many must end in a quantum for its rate to count
_LEAST_JOBS = 24  # and how many samples that must be: a rate from fewer is noise, the largest of many such even more
_DOUBT = 2.0  # standard errors by which a shorter quantum's rate must be the higher
_SURE = 1.63  # Kolmogorov and Smirnov's bound that samples alike exceed once in a hundred times


class Lengths:
    """The latest `window` lengths of one class of jobs; `ready` from `min_samples` completed ones on."""

    def __init__(self, window: int, min_samples: int) -> None:
        self._samples: deque[tuple[int, bool]] = deque(maxlen=window)
        self._min_samples = min_samples
        self._unfitted = 0
        self._ended = 0
        self.ready = False
        self._lengths: list[int] = []  # distinct completed lengths, ascending
        self._shares: list[float] = []  # P(S <= length), one more at the front for length 0
        self._means: list[float] = []  # E[min(S, length)], likewise
        self._points: list[int] = []  # positions in the lists above
        self._supported = 0

    def add(self, tokens: int, *, ended: bool) -> bool:
        """Notes one length; `ended` if the job reached its end. True if the index has changed."""
        if len(self._samples) == self._samples.maxlen:
            self._ended -= self._samples[0][1]
        self._samples.append((tokens, ended))
        self._ended += ended
        self._unfitted += 1
        if self._ended < self._min_samples or (self.ready and 10 * self._unfitted < len(self._samples)):
            return False
        self._fit()
        return True

    def index(self, age: int, prefill_steps: float) -> float:
        """The index of a job that has made `age` tokens and must do `prefill_steps` before its next; needs `ready`."""
        age = min(age, self._supported)
        at = bisect_right(self._lengths, age)
        share = self._shares[at]
        alive = 1.0 - share
        before = self._lengths[at - 1] if at else 0
        mean = self._means[at] + alive * (age - before)
        least = max(_LEAST_SHARE * alive, _LEAST_JOBS / len(self._samples))
        best = surest = 0.0
        for point in reversed(self._points):
            gain = self._shares[point] - share
            if best and gain < least:
                break
            rate = gain / (alive * prefill_steps + self._means[point] - mean)
            sure = rate * max(0.0, 1.0 - _DOUBT / math.sqrt(gain * len(self._samples)))
            if sure > surest or not best:
                best, surest = rate, sure
        return best

    def rest(self, age: int, share: float | None = None) -> float:
        """How many more tokens a job that has made `age` is expected to make; needs `ready`.

        share: of such jobs, how many make no more than that; None for the mean.
        """
        age = min(age, self._supported)
        at = bisect_right(self._lengths, age)
        if share is not None:
            below = self._shares[at] + share * (self._shares[-1] - self._shares[at])
            point = min(max(at + 1, bisect_left(self._shares, below)), len(self._lengths))
            return max(1.0, float(self._lengths[point - 1] - age))
        alive = 1.0 - self._shares[at]
        before = self._lengths[at - 1] if at else 0
        mean = self._means[at] + alive * (age - before)
        return max(1.0, (self._means[-1] - mean) / alive) if alive > 0.0 else 1.0

    def differs(self, other: "Lengths") -> bool:
        """Whether the two are more unlike than chance makes samples of one kind (Kolmogorov and Smirnov, at 1 %).

        Needs `ready` of both. Of the steps of the two only this one's quantile points are looked at.
        """
        bound = _SURE * math.sqrt(1.0 / len(self._samples) + 1.0 / len(other._samples))
        for point in self._points:
            for length, share in (
                (self._lengths[point - 1], self._shares[point]),
                (self._lengths[point - 1] - 1, self._shares[point - 1]),
            ):
                if abs(share - other._share(length)) > bound:
                    return True
        return False

    def _share(self, length: int) -> float:
        return self._shares[bisect_right(self._lengths, length)]

    def _fit(self) -> None:
        self._unfitted = 0
        self.ready = True
        samples = sorted(self._samples, key=lambda sample: (sample[0], not sample[1]))
        self._lengths, self._shares, self._means = [], [0.0], [0.0]
        alive, mean, before = 1.0, 0.0, 0
        for position, (tokens, ended) in enumerate(samples):
            if not ended:
                continue
            mean += alive * (tokens - before)
            alive *= 1.0 - 1.0 / (len(samples) - position)
            if tokens == before and self._lengths:
                self._shares[-1] = 1.0 - alive
            else:
                self._lengths.append(tokens)
                self._shares.append(1.0 - alive)
                self._means.append(mean)
            before = tokens
        self._supported = max(0, samples[max(0, len(samples) - _LEAST_JOBS)][0] - 1)
        self._thin()

    def _thin(self) -> None:
        """Keeps about `_POINTS` quantiles, and the largest length."""
        total, kept = self._shares[-1], 0.0
        self._points = []
        for point in range(1, len(self._shares)):
            if self._shares[point] - kept >= total / _POINTS or point == len(self._shares) - 1:
                self._points.append(point)
                kept = self._shares[point]
