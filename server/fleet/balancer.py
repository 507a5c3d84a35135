"""Roles that follow load: workers of role `both` lean to the side that is short (scheduler/balance.py), one at a time.

Nothing is restarted. A worker that leans finishes what it has; what comes next it gets from its side only.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.balance import Swing, lean
from scheduler.workers import Role
from server.fleet.fleet import Fleet, Member

log = logging.getLogger("evenhand.balancer")

LOOK_S = 1.0


def loads(ready: Sequence[Member], busy_tokens: int) -> tuple[float, float]:
    """(prefill, decode): the share of what a prefill worker may have pending, and of the decode workers' slots."""
    readers = [member for member in ready if member.role is Role.PREFILL]
    writers = [member for member in ready if member.role is Role.DECODE]
    pending_tokens = sum(member.load.pending_tokens for member in readers)
    in_flight = sum(member.load.in_flight for member in writers)
    return (
        pending_tokens / (busy_tokens * len(readers)) if readers else 0.0,
        in_flight / sum(member.worker.slots for member in writers) if writers else 0.0,
    )


class Balancer(Collector):
    """Looks at a fleet. busy_tokens: pending at a prefill worker, from there on prompts are sent elsewhere."""

    def __init__(
        self,
        fleet: Fleet,
        busy_tokens: int,
        *,
        clock: Callable[[], float],
        swing: Swing = Swing(),  # noqa: B008 - frozen
    ) -> None:
        self._fleet = fleet
        self._busy_tokens = busy_tokens
        self._clock = clock
        self._swing = swing
        self.changes: Counter[Role] = Counter()

    async def run(self) -> None:
        """Looks once a second until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Has at most one worker change its side: what that does must show before the next one follows."""
        ready, now = self._fleet.ready(), self._clock()
        prefill_load, decode_load = loads(ready, self._busy_tokens)
        for member in ready:
            worker = member.worker
            if worker.role is not Role.BOTH or not worker.hands_over or now - member.leaned_at < self._swing.hold_s:
                continue
            side = lean(member.load.leans, prefill_load, decode_load, self._swing)
            if side is not member.load.leans:
                log.info("worker %s: %s (load %.2f, %.2f)", worker.id, side.value, prefill_load, decode_load)
                member.leaned_at = now
                self.changes[side] += 1
                self._fleet.lean(member, side)
                return

    def collect(self) -> Iterator[Metric]:
        changes = CounterMetricFamily(
            "evenhand_role_changes", "Changes of the side that workers of role `both` prefer.", labels=("to",)
        )
        for role in Role:
            changes.add_metric((role.value,), self.changes[role])
        yield changes
