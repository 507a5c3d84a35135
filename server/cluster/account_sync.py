"""Fairness across replicas: service that tenants got at other gateways counts in this one's queues too."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.policy import Account
from scheduler.tiers import TieredLanes
from server.store.store import SLICE

REPEAT_S = 1.0
_UNCHANGED = 10 * SLICE  # accounts that are looked at between two turns, where few of them have changed


class Queue(Protocol):
    """A model's line."""

    @property
    def lanes(self) -> TieredLanes: ...

    def settle(self, now: float) -> None: ...


@dataclass(slots=True)
class _Sent:
    """What was last told of a tenant, and how it follows from its account.

    offset: charged on accounts before this one; `Lanes` forgets an account that is idle, and a change of policy
    begins new ones, but what others were told may not fall back.
    """

    account: Account
    offset: float = 0.0
    charged: float = 0.0
    lifted: float = 0.0
    counter: float = 0.0
    waits: bool = False
    at: float = 0.0


@dataclass(slots=True)
class _Reported:
    """Another replica's word on a tenant: charged there in all, its whole counter, whether the tenant waits there."""

    charged: float
    counter: float
    waits: bool


@dataclass(slots=True)
class AccountSync:
    """Shares the accounts of every model's lanes between replicas, under keys `account model`.

    How far shares may be off: two replicas know of each other's charges one exchange late or two, so a tenant may be
    ahead by what was served in that time, once; the counters themselves meet exactly.
    """

    queues: Callable[[], Mapping[str, Queue]]
    clock: Callable[[], float]
    prefix: str = "service:"
    _told: dict[str, _Sent] = field(default_factory=dict)
    _heard: dict[str, dict[str, _Reported]] = field(default_factory=dict)  # by key, then replica
    _known: dict[str, TieredLanes] = field(default_factory=dict)

    def changed(self, *, everything: bool) -> Iterator[tuple[str, str] | None]:
        now = self.clock()
        for model, queue in list(self.queues().items()):
            queue.settle(now)
            if self._known.get(model) is not queue.lanes:
                self._catch_up(model, queue.lanes)
            for number, (name, account, waits) in enumerate(list(queue.lanes.standings()), 1):
                if number % _UNCHANGED == 0:
                    yield None
                key = f"{name} {model}"
                if self._note(key, account, waits, now) or everything:
                    yield key, f"{self._told[key].charged!r} {account.counter!r} {int(waits)}"

    def _note(self, key: str, account: Account, waits: bool, now: float) -> bool:
        """Whether to report an account to the others: local changes at once, received ones now and then.

        The second is for whoever joined between two words, or missed one: its counter must not stay behind for good.
        """
        told = self._told.get(key)
        if told is None:
            told = self._told[key] = _Sent(account)
        elif told.account is not account:
            told.account, told.offset = account, told.charged
        charged = told.offset + account.counter - account.lifted - account.heard
        same = charged == told.charged and account.lifted == told.lifted and waits == told.waits
        if same and (account.counter == told.counter or now - told.at < REPEAT_S):
            return False
        told.charged, told.lifted, told.waits = charged, account.lifted, waits
        told.counter, told.at = account.counter, now
        return True

    def _catch_up(self, model: str, lanes: TieredLanes) -> None:
        """A line that is new here begins where the tenants stand elsewhere."""
        self._known[model] = lanes
        queues = self.queues()
        for key, by_replica in self._heard.items():
            if key.partition(" ")[2] == model:
                self._merge(queues, key, 0.0, max(word.counter for word in by_replica.values()))

    def heard(self, rows: Mapping[str, Mapping[str, str]], from_zero: Collection[str]) -> Iterator[None]:
        more: dict[str, float] = {}
        floors: dict[str, float] = {}
        number = 0
        for replica, told in rows.items():
            for key, row in told.items():
                number += 1
                if number % SLICE == 0:
                    yield
                charged, counter, waits = row.split()
                word = _Reported(float(charged), float(counter), waits == "1")
                by_replica = self._heard.setdefault(key, {})
                before = by_replica.get(replica)
                begin = before.charged if before is not None else 0.0 if replica in from_zero else word.charged
                by_replica[replica] = word
                more[key] = more.get(key, 0.0) + word.charged - begin
                floors[key] = max(floors.get(key, 0.0), word.counter)
        # All charges before any counter: one replica's counter may hold what another one charged.
        queues = self.queues()
        for number, (key, amount) in enumerate(more.items(), 1):
            self._merge(queues, key, amount, floors[key])
            if number % SLICE == 0:
                yield

    def gone(self, replica: str) -> None:
        queues = self.queues()
        for key, by_replica in self._heard.items():
            word = by_replica.get(replica)
            if word is not None and word.waits:
                word.waits = False
                self._merge(queues, key, 0.0, 0.0)

    def silence(self) -> None:
        """The store has been unavailable for longer than reports of replicas stay valid: no tenant counts as waiting
        elsewhere.

        Otherwise a tenant that did wait elsewhere would keep missing its lift here for as long as the outage lasts.
        Replicas tell everything anew when the store is back.
        """
        for replica in {replica for by_replica in self._heard.values() for replica in by_replica}:
            self.gone(replica)

    def forget(self, replica: str) -> None:
        for key in list(self._heard):
            self._heard[key].pop(replica, None)
            if not self._heard[key]:
                del self._heard[key]

    def _merge(self, queues: Mapping[str, Queue], key: str, more: float, floor: float) -> None:
        name, _, model = key.partition(" ")
        queue = queues.get(model)
        if queue is not None:
            elsewhere = any(word.waits for word in self._heard[key].values())
            queue.lanes.merge(name, more, floor, elsewhere=elsewhere)
