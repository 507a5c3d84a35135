"""The reference for choosing a worker: looks at every one."""

from collections.abc import Callable, Collection

from scheduler.pools import WorkerLoad
from scheduler.routing import ANY_ROLE, Choice
from scheduler.workers import Role


class FullScan(Choice):
    """`Choice` without an index."""

    def cheapest(
        self, roles: Collection[Role] = ANY_ROLE, fits: Callable[[WorkerLoad], bool] | None = None
    ) -> WorkerLoad | None:
        up = [load for pool in self._pools for load in pool.workers.values() if load.worker.id != self._avoided]
        suits = [load for load in up if load.role in roles and load.free > 0 and (fits is None or fits(load))]
        needed = min(self._sequences, max((load.free for load in suits), default=1))
        roomy = [load for load in suits if load.free >= needed]
        return min(roomy, key=lambda load: (self.cost(load), load.number), default=None)
