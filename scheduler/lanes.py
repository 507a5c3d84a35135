"""Everything that waits or runs under one policy: each job is in exactly one place, waiting or running."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import inf, isfinite

from scheduler.jobs import Job, Outcome
from scheduler.line import JobPlace, JobState, Line
from scheduler.overdue import Overdue
from scheduler.policy import FOR_GOOD, Account, Lane, Policy
from scheduler.ranking import Ranking
from scheduler.shadow import Recent, Shadow

_BOOSTS_AT_ONCE = 64  # bounds the pause when thousands lose patience in the same moment
_TENANTS_KEPT = 4096  # below this many, idle tenants are not looked at
_PROMISED = 0.99  # of the jobs of first come, first served are no worse off than what is promised
_LATER = 1.2  # times the latest end that is promised: the longest jobs pay for what all others gain
_GROWING = 1.25  # a line that is longer than it ever was grows on while a job waits in it
_UNPROMISED = 0.005  # of the jobs: of those that ask for most work, whoever's promise is due first
_MOST_UNPROMISED = 5.0  # at once, which is that share of the jobs whose ends are remembered
_LONG = 0.9  # of the arrivals rank before a job that may be one of them
_OPEN = 0.95  # of the promised wait: from here on fewer and fewer may overtake
_RANKS = 500  # of the latest arrivals, to know which rank so many of them are below
_COMPARE_S = 1.0
_COMPARED = 50  # jobs that have ended in both worlds
_BEHIND = 1.02


def _anyone(job: Job) -> bool:
    return True


class Lanes:
    """The jobs of one queue and the batch it feeds; one owner, one thread.

    The caller takes jobs with `peek`, and `pop` if the job fits. At the first head that does not fit it must stop, and
    not try the next one: passing over a head would void the bounds of VTC and starve large jobs under any policy.

    waiting: how many wait; as `len`, for those who look at every request.

    Times are seconds on one clock of the caller's that never goes back. With n jobs waiting, `push`, `pop`, `put_back`,
    `preempt` and `finish` are O(log n); `serve` is O(1) except where a job changes its lane.
    """

    def __init__(self, policy: Policy) -> None:
        self.waiting = 0
        self._places: dict[str, JobPlace] = {}
        self._seq = 0
        self._slots = 0
        self._promises = True
        self._start(policy)

    def feed(self, slots: int, *, promises: bool = True) -> None:
        """What is popped runs in an engine with so many slots, whose steps `stepped` tells of.

        Only then can a policy keep the promise that its `tail` makes, and weigh a prompt, which takes the engine as a
        whole, against a decode step, which all slots share. promises: False for jobs that are promised nothing, since
        others go first. RuntimeError if there are jobs already.
        """
        if self._places:
            raise RuntimeError("say what the queue feeds before its first job")
        self._slots = slots
        self._promises = promises
        self._start(self.policy)

    def _start(self, policy: Policy) -> None:
        self.policy = policy
        self._order = policy.order
        self._order.fit(self._slots)
        self._shares = policy.shares
        self.waiting = 0
        self._depths: dict[Lane, int] = {}
        self._lines: dict[str, Line] = {}
        self._ranking: Ranking[Line] = Ranking()
        self._last_left: Account | None = None
        self._sweep_at = _TENANTS_KEPT
        self._unserved = Overdue()  # by their latest stall
        self._fresh = Overdue()  # before their first token, by all that they have waited
        self._stalled = Overdue()  # from their first token on, by when they would have to start for the same end
        self._interrupted = Overdue()  # from their first token on, by their latest stall
        self._unpromised = 0.0
        self._fresh_s = self._end_s = inf
        self._gate = inf  # rank from which on a job may not overtake
        self._ranks = Recent(_RANKS)
        self._behind = False
        self._compare_at = 0.0
        self.shadow = self._shadow()
        self._busy: dict[Line, None] = {}
        self._displaced_at: deque[float] = deque(maxlen=policy.preemptions_per_s)
        self._offered: JobPlace | None = None
        self._next: JobPlace | None = None

    def _shadow(self) -> Shadow | None:
        """Where tenants share, nobody is promised what first come, first served would have given."""
        if not (self._slots and self._promises) or self._shares is not None or not isfinite(self._order.tail):
            return None
        return Shadow(self._slots, self._order.tokens_per_step, self._order.rest_tokens)

    def push(self, job: Job, now: float) -> None:
        """The job arrives and waits. ValueError if its id is known, or its weight is not positive."""
        place = self._enter(job, now)
        self._arrive(place, front=False)
        if self.shadow is not None:
            self._ranks.add(self._order.rank(place.lane))
            self._unpromised = min(_MOST_UNPROMISED, self._unpromised + _UNPROMISED)

    def admit(self, job: Job, now: float) -> None:
        """`push`, and the `pop` that would take this very job, in one: for a job that finds nobody waiting.

        ValueError as `push`, and if somebody waits.
        """
        if self.waiting:
            raise ValueError(f"job {job.id!r} cannot pass those that wait")
        place = self._enter(job, now)
        if self._shares is not None:
            self._lift(place.account)
            self._last_left = place.account
            place.bill = self._shares.take(place.account, job)
        self._next = None
        self._go(place)

    def _enter(self, job: Job, now: float) -> JobPlace:
        if job.id in self._places:
            raise ValueError(f"job {job.id!r} is already in: give every job an id of its own")
        if job.weight <= 0:
            raise ValueError(f"job {job.id!r} has weight {job.weight}: a weight must be above zero")
        line = self._lines.get("" if self._shares is None else job.tenant) or self._line(job.tenant)
        line.account.weight = job.weight
        self._seq += 1
        place = self._places[job.id] = JobPlace(job, line, self._seq, now)
        if self.shadow is not None:
            self.shadow.arrived(job, now)
        return place

    def peek(self, now: float) -> Job | None:
        """The job that goes next, or None. Charges nothing; a `pop` that follows takes this very job."""
        place = self._peek(now)
        return None if place is None else place.job

    def pop(self, now: float) -> Job:
        """Takes the job that goes next: it runs, and its prompt is charged. IndexError if nothing waits."""
        place = self._next or self._peek(now)
        if place is None:
            raise IndexError("nothing waits")
        line = place.line
        self._quit(place)
        if self._shares is not None:
            if place.bill is None:
                place.bill = self._shares.take(line.account, place.job)
            self._rank(line)
        place.began_at = now
        self._go(place)
        return place.job

    def put_back(self, job: Job, now: float) -> None:
        """The job just popped could not start: what its pop charged is refunded, and it waits, first in its lane."""
        place = self._running_place(job)
        self._stop(place)
        if self._shares is not None and place.bill is not None and place.bill.fresh:
            self._shares.undo(place.account, place.bill)
            place.bill = None
        self._wait(place, front=True)

    def computed(self, job: Job, cached_tokens: int, now: float, *, prompt_tokens: int | None = None) -> None:
        """Of the job's prompt `cached_tokens` were found in the prefix cache. KeyError if the job is unknown.

        prompt_tokens: the prompt's true length where the job came with an estimate; what was charged is corrected.
        """
        place = self._places[job.id]
        self._tell(place, job.prompt_tokens if prompt_tokens is None else prompt_tokens, cached_tokens)
        self._reconsider(place)

    def _tell(self, place: JobPlace, prompt_tokens: int, cached_tokens: int) -> None:
        job = place.job
        job.prompt_tokens = prompt_tokens
        job.cached_tokens = min(cached_tokens, prompt_tokens)
        if self._shares is not None and place.bill is not None:
            self._shares.correct(place.account, job, place.bill)

    def read(self, job: Job, read_tokens: int) -> None:
        """So much of a running job's prompt is in KV by now. KeyError if the job is unknown."""
        place = self._places[job.id]
        job.read_tokens = read_tokens
        if not job.output_tokens:
            self._reconsider(place)

    def _reconsider(self, place: JobPlace) -> None:
        """What is known of a job has changed, and with it, perhaps, its lane."""
        place.line.move(place)
        self._price(place)
        self._rank(place.line)

    def serve(self, job: Job, tokens: int, now: float) -> None:
        """The job made `tokens` output tokens. KeyError if the job is unknown."""
        place = self._places[job.id]
        job.output_tokens = made = job.output_tokens + tokens
        place.account.counter += tokens * place.price
        self._next = None
        if made >= place.until:
            self._cross(place)

    def _charge(self, place: JobPlace, tokens: int) -> None:
        """As `serve`, for a job whose next lane does not matter."""
        job, bill, account = place.job, place.bill, place.account
        job.output_tokens += tokens
        if place.price:
            account.counter += tokens * place.price
        elif bill is not None:
            account.counter += max(0, job.output_tokens - bill.predicted_tokens) * bill.price

    def displacement(self, now: float, can_yield: Callable[[Job], bool] = _anyone) -> tuple[Job, Job] | None:
        """The waiting head and the running job it should replace while the batch is full, or None.

        To do it, `preempt` the second and `pop`, which takes the first. Between tenants nobody is displaced unless they
        share the slots: else the victim always belongs to the line that goes next.
        can_yield: False for a job that holds a slot and cannot give it up at present.
        """
        times = self._displaced_at
        if not times.maxlen or (len(times) == times.maxlen and now - times[0] < 1.0):
            return None
        head = self._peek(now)
        if head is None or (self._behind and head.boosted_at is None):
            return None
        victim = self._victim_of_another(head.line, can_yield) or self._victim_of_its_own(head, can_yield)
        if victim is None:
            return None
        self._offered = victim
        return head.job, victim.job

    def outranks(self, now: float, running: Sequence[Job]) -> Job | None:
        """The waiting head if it goes before all of these running jobs, or None.

        Whoever it goes before may be slowed down for it without losing anything, so no gain is asked for.
        """
        head = self._peek(now)
        if head is None or not running:
            return None
        places = [self._places[job.id] for job in running]
        return head.job if all(self._goes_before(head, place) for place in places) else None

    def _goes_before(self, head: JobPlace, place: JobPlace) -> bool:
        if head.line is not place.line:
            return head.account.counter < place.account.counter
        return self._order.rank(head.lane) < self._order.rank(place.lane)

    def _victim_of_its_own(self, head: JobPlace, can_yield: Callable[[Job], bool]) -> JobPlace | None:
        victim = head.line.worst(can_yield)
        lane = head.lane
        if head.is_due:  # a promise is a place in the line, and nobody's slot
            lane = self._order.spot(head.job, running=False, boosted_at=None).lane
        if victim is None or not self._order.displaces(head.job, victim.job, lane, victim.lane):
            return None
        return victim

    def _victim_of_another(self, line: Line, can_yield: Callable[[Job], bool]) -> JobPlace | None:
        """Of the tenant with the most slots for its weight, if after the change it still has no fewer than `line`.

        And if it has had more service, or it would be next again as soon as its job waits. A tenant none of whose jobs
        can yield is passed over.
        """
        if self._shares is None or not self._shares.taken_per_s:
            return None
        ahead = [other for other in self._busy if other.account.counter > line.account.counter]
        while ahead:
            most = max(ahead, key=lambda other: other.running / other.account.weight)
            if (most.running - 1) / most.account.weight < (line.running + 1) / line.account.weight:
                return None
            victim = most.worst(can_yield)
            if victim is not None:
                return victim
            ahead.remove(most)
        return None

    def preempt(self, job: Job, now: float) -> None:
        """The running job yields and waits, first in its lane; nothing is refunded, its prompt is not charged again."""
        place = self._running_place(job)
        if place is self._offered:
            self._displaced_at.append(now)
        self._stop(place)
        if place.bill is not None:
            place.bill.fresh = False
        place.waited_s += place.began_at - place.since
        place.since = now
        self._arrive(place, front=True)

    def victim(self, now: float, can_yield: Callable[[Job], bool] = _anyone) -> Job | None:
        """The running job that yields first when KV memory is short: O(tenants that run) under VTC, O(jobs that run)
        where promises are made, else O(1).

        can_yield: as for `displacement`; those that cannot are passed over. A promise is a place in the line, so it
        protects no job here: who started by it would else make others yield that have much more to compute again.
        """
        lines = list(self._busy)
        while lines:
            line = max(lines, key=lambda line: line.account.counter)
            place = line.worst(can_yield)
            if place is not None:
                return (place if self.shadow is None else self._first_to_yield(line, place, can_yield)).job
            lines.remove(line)
        return None

    def _first_to_yield(self, line: Line, worst: JobPlace, can_yield: Callable[[Job], bool]) -> JobPlace:
        """Of the worst and those that run by a promise, whoever ranks last without it; of equals the newest."""
        spot, rank = self._order.spot, self._order.rank
        due = [place for place in line.running_places() if place.is_due and can_yield(place.job)]
        return max(
            (worst, *due), key=lambda place: (rank(spot(place.job, running=True, boosted_at=None).lane), place.seq)
        )

    def finish(
        self,
        job: Job,
        outcome: Outcome,
        now: float,
        *,
        tokens: int = 0,
        prompt_tokens: int | None = None,
        cached_tokens: int = 0,
    ) -> None:
        """The job leaves from wherever it is. KeyError if it is unknown.

        What is known only at its end is charged as by `computed` and `serve`, but no lane is looked for any more.
        tokens: output tokens beyond those served. prompt_tokens: the prompt's true length, of which `cached_tokens`
        were found in the prefix cache.
        """
        place = self._places.pop(job.id)
        if prompt_tokens is not None:
            self._tell(place, prompt_tokens, cached_tokens)
        if tokens:
            self._charge(place, tokens)
        if place.state is JobState.WAITING:
            self._quit(place)
        else:
            self._stop(place)
        if self._shares is not None and place.bill is not None:
            self._shares.settle(place.account, job, place.bill, outcome)
        self._order.learn(job, outcome)
        if self.shadow is not None:
            self.shadow.left(job, now)
        self._rank(place.line)

    def stepped(self, now: float, tokens: int) -> None:
        """A step of the engine that computes so many tokens begins now. Renews what is promised, if anything is.

        Who has waited, before its first token, for as long as 99 of 100 would have under first come, first served
        (times `tail`) is served next, and as that time draws near, fewer and fewer may overtake whoever has waited
        longest: only those of the best ranks. Who was displaced is served to its own end when it would else end later
        than 99 of 100 would have, times 1.2 (or `tail`, if that is more). One job in 200, of those that ask for most
        work, waits on when it would be its turn by either: under overload that keeps the gain of all others. While
        jobs end later, in the mean, than they would have, nobody is displaced for a newcomer.
        """
        shadow = self.shadow
        if shadow is None:
            return
        shadow.stepped(now, tokens, running=self.running(), waiting=self.waiting)
        waited_s = max(shadow.waits.quantile(_PROMISED), _GROWING * shadow.first_wait_s(now))
        self._fresh_s = self._order.tail * waited_s
        self._end_s = max(_LATER, self._order.tail) * shadow.ends.quantile(_PROMISED)
        self._set_gate(now)
        if now >= self._compare_at:
            self._compare_at = now + _COMPARE_S
            known = len(shadow.completions) >= _COMPARED
            self._behind = known and shadow.real_completions.mean > _BEHIND * shadow.completions.mean

    def _set_gate(self, now: float) -> None:
        """Opens the gate for as many of the arrivals as the longest wait leaves of the promise."""
        oldest = self._fresh.first()
        gate = inf
        if oldest is not None and self._fresh_s > 0.0:
            left = 1.0 - (now - oldest.since + oldest.waited_s) / self._fresh_s
            if left < 1.0 - _OPEN:
                gate = self._ranks.quantile(max(0.0, left / (1.0 - _OPEN)))
        if gate != self._gate:
            self._gate = gate
            self._next = None

    @property
    def keeps_order(self) -> bool:
        """Whether who goes next stays the same while running jobs are served: first come, first served."""
        patience_s = min(self._order.patience_s, self._order.stall_s)
        return self._shares is None and not self._displaced_at.maxlen and not isfinite(patience_s)

    @property
    def promised_wait_s(self) -> float:
        """Longest wait for a first token that is promised at present; infinity if none is."""
        return self._fresh_s

    def told(self, tenant: str, service: float, weight: float, now: float) -> None:
        """Others have seen this much service of the tenant (weighted tokens): the larger of theirs and ours counts."""
        if self._shares is None:
            return
        account = self._line(tenant).account
        account.weight = weight
        self._raise(account, service / weight)
        self._next = None

    def merge(self, tenant: str, more: float, floor: float, *, elsewhere: bool) -> None:
        """What the other queues of a replicated gateway did for a tenant since the last time, in counter units.

        more: they charged it so much (less than zero for a refund). floor: where the highest of their counters stands,
        which takes over their lifts. elsewhere: it waits in one of them, so its next job here is no return.

        A sum for charges and a maximum for lifts: so the counters of all queues meet, wherever a tenant was served.
        Counters that differed for good would not do: one queue would serve only this tenant, the other only that.
        """
        if self._shares is None:
            return
        line = self._line(tenant)
        account = line.account
        account.counter += more
        account.heard += more
        self._raise(account, floor)
        account.elsewhere = elsewhere
        self._rank(line)

    def standings(self) -> Iterator[tuple[Account, bool]]:
        """Each tenant's account, and whether it waits; nothing where tenants do not share."""
        if self._shares is not None:
            yield from ((line.account, line.waiting > 0) for line in self._lines.values())

    def service(self, tenant: str) -> float:
        """The tenant's service as `told` takes it: its counter times its weight; 0 if no account is kept."""
        line = self._lines.get(tenant)
        return 0.0 if self._shares is None or line is None else line.account.counter * line.account.weight

    def service_without(self, job: Job) -> float:
        """Its tenant's service as `service`, less what this very job was charged.

        For the queue that the job goes to next, which charges it too: with the job's own charge in it, that queue
        would be ahead by it for good.
        """
        place = self._places.get(job.id)
        if place is None or place.bill is None:
            return self.service(job.tenant)
        tokens = max(place.bill.predicted_tokens, job.output_tokens)
        charged = place.bill.prompt + tokens * place.bill.price
        return max(0.0, (place.account.counter - charged) * place.account.weight)

    def switch(self, policy: Policy, now: float) -> None:
        """Another policy from here on: who waits keeps waiting, in order of arrival, and who runs keeps running."""
        places = sorted(self._places.values(), key=lambda place: place.seq)
        states = [place.state for place in places]
        self._settle_all(places)
        accounts = [] if self._shares is None else [line.account for line in self._lines.values()]
        last_left = self._last_left
        self._start(policy)
        for old in accounts:
            self.told(old.tenant, old.counter * old.weight, old.weight, now)
        if self._shares is not None and last_left is not None:
            self._last_left = self._line(last_left.tenant).account
        for place, state in zip(places, states, strict=True):
            self._move_in(place, running=state is JobState.RUNNING)

    def depth(self) -> dict[str, int]:
        """How many wait, by the label of their lane."""
        labels: dict[str, int] = {}
        for lane, count in self._depths.items():
            label = self._order.label(lane)
            labels[label] = labels.get(label, 0) + count
        return labels

    def running(self) -> int:
        """How many run."""
        return len(self._places) - self.waiting

    def waiting_jobs(self) -> Iterator[Job]:
        """All that wait, in order of arrival."""
        return (place.job for place in self._places.values() if place.state is JobState.WAITING)

    def running_jobs(self) -> Iterator[Job]:
        """All that run."""
        return (place.job for place in self._places.values() if place.state is JobState.RUNNING)

    def __len__(self) -> int:
        return self.waiting

    def __contains__(self, job: Job) -> bool:
        place = self._places.get(job.id)
        return place is not None and place.job is job and place.state is JobState.WAITING

    def _peek(self, now: float) -> JobPlace | None:
        self._boost(now)
        if self._next is None:
            line = self._front()
            self._next = None if line is None else self._let_through(line.first())
        return self._next

    def _let_through(self, first: JobPlace | None) -> JobPlace | None:
        """The first in line, or whoever has waited longest if the first may not overtake that one."""
        if first is None or first.boosted_at is not None or self._order.rank(first.lane) < self._gate:
            return first
        return self._fresh.first() or first

    def _front(self) -> Line | None:
        """The line that goes next. Counters rise without a word to the ranking, so its first entry may be outdated."""
        if self._shares is None:
            return self._lines.get("")
        while (entry := self._ranking.first()) is not None:
            if entry.item.account.counter <= entry.rank:
                return entry.item
            self._rank(entry.item)
        return None

    def _rank(self, line: Line) -> None:
        """Ranks the line anew; a line in which nothing waits is not ranked."""
        self._next = None
        if self._shares is None or not line.waiting:
            return
        head = line.first()
        if head is not None:
            self._ranking.post(line, line.account.counter, head.seq)

    def _line(self, tenant: str) -> Line:
        name = "" if self._shares is None else tenant
        line = self._lines.get(name)
        if line is None:
            if len(self._lines) >= self._sweep_at:
                self._sweep()
            line = self._lines[name] = Line(self._order, Account(name), self._depths)
        return line

    def _sweep(self) -> None:
        """Forgets idle tenants whom the lift would put, on their return, at least as high as they are now."""
        level = self._level(self._front())
        self._lines = {
            name: line for name, line in self._lines.items() if not line.idle or line.account.counter > level
        }
        self._sweep_at = max(_TENANTS_KEPT, 2 * len(self._lines))

    def _level(self, front: Line | None) -> float:
        """The counter of `front`, the lowest of those that wait; if none does, that of the last tenant that did."""
        if front is not None:
            return front.account.counter
        return 0.0 if self._last_left is None else self._last_left.counter

    @staticmethod
    def _raise(account: Account, floor: float) -> None:
        if floor > account.counter:
            account.lifted += floor - account.counter
            account.counter = floor

    def _arrive(self, place: JobPlace, *, front: bool) -> None:
        if self._shares is not None and not place.line.waiting:
            self._lift(place.account)
        self._wait(place, front=front)

    def _lift(self, account: Account) -> None:
        """A tenant is back that has nothing in line."""
        if self._shares is not None and not account.elsewhere:
            before, front = account.counter, self._front() if self.waiting else None
            self._shares.lift(account, self._level(front), contended=front is not None)
            account.lifted += account.counter - before

    def _wait(self, place: JobPlace, *, front: bool) -> None:
        place.line.wait(place, front=front)
        self.waiting += 1
        self._price(place)
        self._note_wait(place)
        self._rank(place.line)

    def _quit(self, place: JobPlace) -> None:
        """The job waits no longer."""
        line = place.line
        line.leave(place)
        self.waiting -= 1
        self._next = None
        if self._shares is not None and not line.waiting:
            self._ranking.drop(line)
            self._last_left = line.account

    def _stop(self, place: JobPlace) -> None:
        """The job runs no longer."""
        place.line.leave(place)
        if not place.line.running:
            self._busy.pop(place.line, None)
        if place is self._offered:
            self._offered = None

    def _go(self, place: JobPlace) -> None:
        """The job runs."""
        place.line.run(place)
        self._busy[place.line] = None
        if place.bill is not None:
            self._price(place)

    def _running_place(self, job: Job) -> JobPlace:
        place = self._places[job.id]
        if place.state is not JobState.RUNNING:
            raise ValueError(f"job {job.id!r} waits: only a running job can stop running")
        return place

    def _cross(self, place: JobPlace) -> None:
        """The job reached a boundary: of its lane, or of the tokens charged in advance."""
        bill = place.bill
        if bill is not None and place.price == 0.0:
            place.account.counter += max(0, place.job.output_tokens - bill.predicted_tokens) * bill.price
        place.line.move(place)
        self._price(place)
        self._rank(place.line)

    def _price(self, place: JobPlace) -> None:
        """Sets what the job's next token costs, and until when."""
        bill = place.bill
        if bill is None:
            place.price = 0.0
        elif place.job.output_tokens >= bill.predicted_tokens:
            place.price = bill.price
        else:
            place.price = 0.0
            place.until = min(place.until, bill.predicted_tokens)

    def _boost(self, now: float) -> None:
        """Moves forward those that have been unserved for too long, a bounded number of them at a time."""
        left = self._boost_from(self._interrupted, now - self._order.stall_s, _BOOSTS_AT_ONCE)
        left = self._boost_from(self._unserved, now - self._order.patience_s, left)
        if self._fresh_s > 0.0:  # else first come, first served would let nobody wait, and neither does this
            left = self._boost_from(self._fresh, now - self._fresh_s, left)
            self._boost_from(self._stalled, now - self._end_s, left)

    def _boost_from(self, overdue: Overdue, before: float, most: int) -> int:
        """Returns how many more may be."""
        promised = overdue is self._fresh or overdue is self._stalled
        while most and (place := overdue.pop(before)) is not None:
            most -= 1
            self._next = None
            if promised and self._lets_wait(place):
                continue
            if overdue is self._interrupted:
                place.is_due = False  # it may displace, even if a promise has brought it forward before
            if place.boosted_at != FOR_GOOD:
                displaces = place.boosted_at == place.job.output_tokens and not place.is_due
                place.boosted_at = FOR_GOOD if overdue is self._stalled else place.job.output_tokens
                place.is_due = promised and not (displaces and isfinite(self._order.stall_s))
                place.line.move(place)
                self._price(place)
        return most

    def _lets_wait(self, place: JobPlace) -> bool:
        """Whether the job is one of the few to whom nothing is promised, now that its promise is due."""
        if self._unpromised < 1.0 or self._order.rank(place.lane) < self._ranks.quantile(_LONG):
            return False
        self._unpromised -= 1.0
        place.is_promised = False
        return True

    def _note_wait(self, place: JobPlace) -> None:
        if isfinite(self._order.patience_s):
            self._unserved.note(place, place.since, self.waiting)
        if isfinite(self._order.stall_s) and place.job.output_tokens:
            self._interrupted.note(place, place.since, self.waiting)
        if self.shadow is not None and place.is_promised:
            if place.job.output_tokens:
                self._stalled.note(place, place.job.arrived_at - self.shadow.rest_s(place.job), self.waiting)
            else:
                self._fresh.note(place, place.since - place.waited_s, self.waiting)

    def _settle_all(self, places: list[JobPlace]) -> None:
        """Ends the accounts of all that were taken, for the policy that kept them goes."""
        if self._shares is None:
            return
        for place in places:
            if place.bill is not None:
                self._shares.settle(place.account, place.job, place.bill, Outcome.ABORTED)

    def _move_in(self, place: JobPlace, *, running: bool) -> None:
        """A job that was here under another policy: no arrival, so nothing is lifted."""
        job = place.job
        taken = running or place.bill is not None or job.output_tokens > 0
        place.line = self._line(job.tenant)
        place.account = place.line.account
        place.account.weight = job.weight
        place.boosted_at, place.is_due, place.is_promised = None, False, True
        if self.shadow is not None:
            self.shadow.arrived(job, job.arrived_at)
        place.bill = self._shares.adopt(job) if self._shares is not None and taken else None
        place.price = 0.0
        if running:
            self._go(place)
        else:
            self._wait(place, front=False)
