"""Limits on what all clients together may use of this process: memory for request bodies, and connections."""

import logging
import resource
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("evenhand.intake")

TIMES_LEFT = 4  # one tenant may hold so many times the memory that is left
MOST_CONNECTIONS = 16_384  # without a setting
RESERVED_FILES = 128  # descriptors for workers' probes, stores, logs and operators
WARN_EVERY_S = 60.0


class BodyBudget:
    """Bytes of request bodies that are held: those that are still arriving, wait, or may be sent to a worker again.

    One tenant may hold at most `TIMES_LEFT` times what is left, so that it cannot use up what others need (Choudhury
    and Hahne's dynamic threshold); a tenant that is alone has four fifths.
    """

    __slots__ = ("limit", "held", "_by_tenant")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._by_tenant: dict[str, int] = {}

    def take(self, tenant: str, size: int) -> bool:
        """Books `size` more bytes for a tenant; False, and nothing booked, if it may not hold so many."""
        own = self._by_tenant.get(tenant, 0) + size
        held = self.held + size
        if own > TIMES_LEFT * (self.limit - held):
            return False
        self._by_tenant[tenant] = own
        self.held = held
        return True

    def give_back(self, tenant: str, size: int) -> None:
        """The inverse of `take`."""
        self.held -= size
        left = self._by_tenant[tenant] - size
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]


class Spare(Protocol):
    """A connection that can be closed for another's sake."""

    def give_way(self) -> None: ...


class Connections:
    """Client connections of this process: at most `most`.

    When there are more, the one that has been without an accepted request for longest is closed. Connections whose
    request was accepted (its head is complete, its key valid) are never closed for others.

    spare: those that wait for a request, in the order in which they became so. A connection takes itself out when its
    request is accepted, and comes back when its answer is complete.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.most = most
        self.count = 0
        self.spare: dict[Spare, None] = {}
        self._clock = clock
        self._warned_at: float | None = None

    def opened(self, connection: Spare) -> bool:
        """Counts a new connection. False if it cannot stay: all others are at work."""
        self.count += 1
        if self.count > self.most:
            self._warn()
            longest = next(iter(self.spare), None)
            if longest is None:
                return False
            del self.spare[longest]
            longest.give_way()
        self.spare[connection] = None
        return True

    def closed(self, connection: Spare) -> None:
        self.count -= 1
        self.spare.pop(connection, None)

    def _warn(self) -> None:
        now = self._clock()
        if self._warned_at is None or now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning(
                "the limit of %d client connections is reached: idle ones are closed for new ones "
                "(setting edge.max_connections)",
                self.most,
            )


def connections_allowed(wanted: int | None) -> int:
    """How many client connections this process can have: `wanted`, or as many as its limit of open files allows.

    Each may need a second descriptor, for its worker. Raises the soft limit of open files as far as that takes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted or MOST_CONNECTIONS
    needed = 2 * most + RESERVED_FILES
    files = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    allowed = min(most, max(1, (files - RESERVED_FILES) // 2))
    if wanted is not None and allowed < wanted:
        log.warning(
            "the limit of open files is %d: this process accepts %d client connections, not %d. Raise it: `ulimit -n`",
            hard, allowed, wanted,
        )  # fmt: skip
    return allowed
