"""What each tenant got and how long started jobs stood still: kept by what happens once a job, not once a token."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nlargest

from scheduler.jobs import Job, Tier

# Weights of the VTC paper's experiments (Sheng et al., OSDI 2024): an output token costs twice a prompt token.
PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
OTHER = "other"


@dataclass(frozen=True, slots=True)
class FairnessSample:
    """What was seen since the sample before.

    service: weighted tokens by label (a tenant's name, or `OTHER`).
    gap: weighted tokens between the most and the least served of the tenants that wait, each divided by its weight, in
        the default tier; what other tiers get is no part of it.
    longest_stall_s: the longest that a started job went without a slot, among those stalled now or resumed since.
    """

    service: dict[str, float]
    gap: float
    longest_stall_s: float


@dataclass(slots=True)
class FairnessTally:
    """Books service per tenant lazily: a job's tokens are read when a sample is taken or the job leaves.

    The gap is the spread of VTC's own counters: a tenant that comes back to wait is lifted to the least served of those
    that waited all along, so that time spent idle is no claim. Under VTC the spread is bounded; under others it shows
    what the policy costs.
    labels: how many tenants are named beside `OTHER`; at most four times as many names are ever given out.
    """

    labels: int = 20
    _waiting: Counter[str] = field(default_factory=Counter)  # jobs in line, by tenant
    _booked: dict[Job, float] = field(default_factory=dict)  # service already counted, by running or stalled job
    _fresh: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # since the last sample, by tenant
    _total: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _level: dict[str, float] = field(default_factory=dict)  # lifted service per weight, by tenant
    _waited_before: set[str] = field(default_factory=set)
    _named: set[str] = field(default_factory=set)
    _stalled: dict[Job, float] = field(default_factory=dict)  # since when
    _resumed: dict[Job, float] = field(default_factory=dict)  # stalled until the present pass, and since when
    _resumed_at: float = 0.0
    _longest_ended_s: float = 0.0

    def queued(self, job: Job) -> None:
        """The job has arrived and is in line."""
        if job.tier is Tier.DEFAULT:
            self._waiting[job.tenant] += 1

    def put_back(self, job: Job) -> None:
        """The job was taken in this scheduling pass but could not start: its stall continues."""
        if job.tier is Tier.DEFAULT:
            self._waiting[job.tenant] += 1
        if job in self._resumed:
            self._stalled[job] = self._resumed.pop(job)

    def started(self, job: Job, now: float) -> None:
        """The job left the line and holds a slot."""
        self._out_of_line(job)
        self._booked.setdefault(job, 0.0)
        if now != self._resumed_at:
            self._resumed.clear()
            self._resumed_at = now
        if job in self._stalled:
            self._resumed[job] = self._stalled[job]
        self._end_stall(job, now)

    def preempted(self, job: Job, now: float) -> None:
        """The job lost its slot and is in line again."""
        if job.tier is Tier.DEFAULT:
            self._waiting[job.tenant] += 1
        if job.tier is not Tier.FLEX:  # which is promised nothing
            self._stalled[job] = now

    def left(self, job: Job, was_waiting: bool, now: float) -> None:
        """The job is gone, from the line or from its slot."""
        if was_waiting:
            self._out_of_line(job)
        self._end_stall(job, now)
        if job in self._booked:
            self._book(job)
            del self._booked[job]

    def finished(self, job: Job) -> None:
        """The job, which was running, is gone. For a queue without preemption, which tells no more than this and
        `present`."""
        self._booked.setdefault(job, 0.0)
        self._book(job)
        del self._booked[job]

    def __contains__(self, job: Job) -> bool:
        """Whether the job runs, as far as this was told."""
        return job in self._booked

    def present(self, running: Iterable[Job], waiting: Mapping[str, int]) -> None:
        """All that run, and how many of the default tier wait by tenant: what a queue that tells no single start says
        before a sample."""
        for job in running:
            self._booked.setdefault(job, 0.0)
        self._waiting = Counter(waiting)

    def sample(self, now: float) -> FairnessSample:
        """Book what running jobs made, and start a new period."""
        for job in self._booked:
            self._book(job)
        self._name_the_largest()
        service: dict[str, float] = defaultdict(float)
        for tenant, amount in self._fresh.items():
            service[tenant if tenant in self._named else OTHER] += amount
        self._fresh.clear()
        oldest = min(self._stalled.values(), default=now)
        longest_s, self._longest_ended_s = max(self._longest_ended_s, now - oldest), 0.0
        return FairnessSample(dict(service), self._gap(), longest_s)

    def _book(self, job: Job) -> None:
        service = PROMPT_WEIGHT * job.charged_tokens(cached_free=True) + OUTPUT_WEIGHT * job.output_tokens
        made = service - self._booked[job]
        if made:
            self._booked[job] = service
            self._fresh[job.tenant] += made
            self._total[job.tenant] += made
            if job.tier is Tier.DEFAULT:
                self._level[job.tenant] = self._level.get(job.tenant, 0.0) + made / job.weight

    def _gap(self) -> float:
        stayed = self._waited_before & self._waiting.keys()
        floor = min((self._level.get(tenant, 0.0) for tenant in stayed), default=0.0)
        for tenant in self._waiting.keys() - stayed:
            self._level[tenant] = max(self._level.get(tenant, 0.0), floor)
        self._waited_before = set(self._waiting)
        levels = [self._level.get(tenant, 0.0) for tenant in self._waiting]
        self._forget_absent()
        return max(levels) - min(levels) if levels else 0.0

    def _forget_absent(self) -> None:
        """Bounds the memory: among many tenants, one without a job is forgotten, and lifted if it returns."""
        if len(self._level) <= 10_000:
            return
        present = self._waiting.keys() | {job.tenant for job in self._booked}
        self._level = {tenant: level for tenant, level in self._level.items() if tenant in present}
        for tenant in self._total.keys() - present:
            del self._total[tenant]

    def _name_the_largest(self) -> None:
        # A counter that was exported cannot be taken back, so a name once given stays; hence the second bound.
        for tenant in nlargest(self.labels, self._fresh, key=self._total.__getitem__):
            if len(self._named) < (self.labels if self._total[tenant] <= self._named_least() else 4 * self.labels):
                self._named.add(tenant)

    def _named_least(self) -> float:
        return min((self._total[tenant] for tenant in self._named), default=0.0)

    def _end_stall(self, job: Job, now: float) -> None:
        since = self._stalled.pop(job, None)
        if since is not None:
            self._longest_ended_s = max(self._longest_ended_s, now - since)

    def _out_of_line(self, job: Job) -> None:
        if job.tier is not Tier.DEFAULT:
            return
        self._waiting[job.tenant] -= 1
        if not self._waiting[job.tenant]:
            del self._waiting[job.tenant]
