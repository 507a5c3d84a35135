"""Places reserved for refused requests, so that a client that honours its Retry-After finds room.

Who is told a time has a place kept from then on for a while. Times are as far apart as places come free, so those who
keep to them come no faster than they can be let in (the generic cell rate algorithm, ITU-T I.371).
"""

from collections import Counter, deque

KEPT_S = 5.0  # a place waits so long for whom it was promised


class Reservations:
    """Promises to tenants, up to `most` at a time. Seconds are the gateway's own."""

    __slots__ = ("_coming", "_due", "_held", "_kept", "_last", "_total", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._last = 0.0  # when the latest promise is due
        self._coming: deque[tuple[float, str]] = deque()
        self._kept: deque[tuple[float, str]] = deque()  # due, in that order; kept ones and redeemed ones
        self._due: dict[str, deque[float]] = {}  # by tenant: due and not redeemed
        self._held: Counter[str] = Counter()
        self._total = 0

    def make(self, tenant: str, pace_per_s: float, now: float) -> float:
        """Seconds after which this tenant may retry. A place is reserved for that time, unless the tenant holds more
        reservations than places are left (Choudhury and Hahne's dynamic threshold); a tenant may always hold one."""
        self._settle(now)
        held = self._held[tenant]
        at = max(self._last, now) + 1.0 / pace_per_s
        if self.most and (not held or held < self.most - self._total):
            self._last = at
            self._coming.append((at, tenant))
            self._held[tenant] += 1
            self._total += 1
        return at - now

    def redeem(self, tenant: str, now: float) -> bool:
        """Whether a place is kept for this tenant; it is taken."""
        self._settle(now)
        mine = self._due.get(tenant)
        if not mine:
            return False
        mine.popleft()
        self._drop(tenant)
        return True

    def due(self, now: float) -> int:
        """Places that are kept at this moment."""
        self._settle(now)
        return self._total - len(self._coming)

    def _drop(self, tenant: str) -> None:
        self._total -= 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        if not self._due[tenant]:
            del self._due[tenant]

    def _settle(self, now: float) -> None:
        """Activates reservations that are due and drops those that nobody used."""
        while self._coming and self._coming[0][0] <= now:
            at, tenant = self._coming.popleft()
            self._due.setdefault(tenant, deque()).append(at)
            self._kept.append((at, tenant))
        while self._kept and self._kept[0][0] + KEPT_S <= now:
            at, tenant = self._kept.popleft()
            mine = self._due.get(tenant)
            if mine and mine[0] == at:  # else it was redeemed
                mine.popleft()
                self._drop(tenant)
