"""One line of jobs under one order: the lanes that wait and the lanes that run (a tenant's own, or the only one)."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum

from scheduler.jobs import Job
from scheduler.policy import NEVER, Account, Bill, Lane, Order
from scheduler.ranking import Ranking


class JobState(IntEnum):
    """Where a job is."""

    WAITING = 0
    RUNNING = 1
    GONE = 2


class JobPlace:
    """One job's place in its line.

    seq: order of arrival.
    since: unserved since then, in seconds. began_at: when it was popped last. waited_s: unserved before `since`.
    boosted_at: output tokens when its patience ended, or what it was promised.
    is_due: it was boosted because of a promise. is_promised: False for one of the few that are promised nothing.
    until: output tokens at which lane or price must be looked at again.
    price: counter units per output token at present.
    """

    __slots__ = (
        "account", "began_at", "bill", "boosted_at", "is_due", "is_promised", "job", "lane", "line", "price", "seq",
        "since", "state", "until", "waited_s",
    )  # fmt: skip

    def __init__(self, job: Job, line: "Line", seq: int, since: float) -> None:
        self.job = job
        self.line = line
        self.account = line.account
        self.seq = seq
        self.since = since
        self.began_at = since
        self.waited_s = 0.0
        self.state = JobState.GONE
        self.lane: Lane = ()
        self.until = NEVER
        self.boosted_at: int | None = None
        self.is_due = False
        self.is_promised = True
        self.bill: Bill | None = None
        self.price = 0.0


class Line:
    """Waiting lanes ranked by (rank, arrival of the head), and running lanes with the worst at hand.

    Every step is O(log lanes), except that finding the worst running lane looks at all running lanes after one of
    them opened or closed. `depths` counts waiting jobs by lane over all lines.
    """

    __slots__ = (
        "_epoch", "_order", "_ranking", "_running", "_waiting", "_worst", "account", "depths", "running", "waiting",
    )  # fmt: skip

    def __init__(self, order: Order, account: Account, depths: dict[Lane, int]) -> None:
        self._order = order
        self.account = account
        self.depths = depths
        self.waiting = 0
        self.running = 0
        self._epoch = order.epoch
        self._waiting: dict[Lane, OrderedDict[int, JobPlace]] = {}
        self._running: dict[Lane, OrderedDict[int, JobPlace]] = {}
        self._ranking: Ranking[Lane] = Ranking()
        self._worst: Lane | None = None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running

    def wait(self, place: JobPlace, *, front: bool) -> None:
        """The job waits, first or last in its lane."""
        place.lane, place.until = self._order.spot(place.job, running=False, boosted_at=place.boosted_at)
        lane = self._waiting.get(place.lane)
        if lane is None:
            lane = self._waiting[place.lane] = OrderedDict()
        lane[place.seq] = place
        if front:
            lane.move_to_end(place.seq, last=False)
        if front or len(lane) == 1:
            self._ranking.post(place.lane, self._order.rank(place.lane), place.seq)
        self.waiting += 1
        self.depths[place.lane] = self.depths.get(place.lane, 0) + 1
        place.state = JobState.WAITING

    def run(self, place: JobPlace) -> None:
        """The job runs, as the latest of its lane."""
        place.lane, place.until = self._order.spot(place.job, running=True, boosted_at=place.boosted_at)
        lane = self._running.get(place.lane)
        if lane is None:
            lane = self._running[place.lane] = OrderedDict()
            self._worst = None
        lane[place.seq] = place
        self.running += 1
        place.state = JobState.RUNNING

    def leave(self, place: JobPlace) -> None:
        """The job neither waits nor runs."""
        if place.state is JobState.WAITING:
            self._leave_waiting(place)
        else:
            lane = self._running[place.lane]
            del lane[place.seq]
            self.running -= 1
            if not lane:
                del self._running[place.lane]
                self._worst = None
        place.state = JobState.GONE

    def _leave_waiting(self, place: JobPlace) -> None:
        lane = self._waiting[place.lane]
        was_head = next(iter(lane)) == place.seq
        del lane[place.seq]
        if not lane:
            del self._waiting[place.lane]
            self._ranking.drop(place.lane)
        elif was_head:
            self._ranking.post(place.lane, self._order.rank(place.lane), next(iter(lane)))
        self.waiting -= 1
        self.depths[place.lane] -= 1
        if not self.depths[place.lane]:
            del self.depths[place.lane]

    def move(self, place: JobPlace) -> None:
        """The job may belong in another lane by now: last there if it waits."""
        spot = self._order.spot(place.job, running=place.state is JobState.RUNNING, boosted_at=place.boosted_at)
        if spot.lane == place.lane:
            place.until = spot.until
        elif place.state is JobState.RUNNING:
            self.leave(place)
            self.run(place)
        else:
            self.leave(place)
            self.wait(place, front=False)

    def first(self) -> JobPlace | None:
        """The waiting job that goes next."""
        self._refresh()
        entry = self._ranking.first()
        return None if entry is None else next(iter(self._waiting[entry.item].values()))

    def running_places(self) -> Iterator[JobPlace]:
        """All that run."""
        return (place for places in self._running.values() for place in places.values())

    def worst(self, can_yield: Callable[[Job], bool]) -> JobPlace | None:
        """The running job that yields first: the newest of the worst lane, passing over those that cannot."""
        self._refresh()
        if not self._running:
            return None
        if self._worst is None:
            self._worst = max(self._running, key=self._order.rank)
        place = next(reversed(self._running[self._worst].values()))
        if can_yield(place.job):
            return place
        lanes = sorted(self._running, key=self._order.rank, reverse=True)
        places = (place for lane in lanes for place in reversed(self._running[lane].values()))
        return next((place for place in places if can_yield(place.job)), None)

    def _refresh(self) -> None:
        if self._epoch == self._order.epoch:
            return
        self._epoch = self._order.epoch
        self._worst = None
        for lane, places in self._waiting.items():
            self._ranking.post(lane, self._order.rank(lane), next(iter(places)))
