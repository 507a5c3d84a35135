"""Service tiers: a queue in which `priority` goes before `default`, and `default` before `flex`.

Between tiers the order is strict, for slots and, inside an engine, for tokens; within a tier the policy decides, and
each tier has accounts of its own. `flex` runs in what the others leave and may be displaced at any iteration; once it
has had nothing for minutes, a reserve keeps it from starving.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final

from scheduler.jobs import Job, Outcome, Tier
from scheduler.lanes import Lanes
from scheduler.policy import Account, Policy
from scheduler.shadow import Shadow

DEFAULT_RESERVE: Final = 0.05
PATIENCE_S: Final = 120.0  # after flex ran in what others left, before anything is owed to it
BY_NAME: Final = {tier.label: tier for tier in Tier}
_MARK: Final = ":"  # between a tenant and its tier in the names of accounts; no tenant's name has one


def _anyone(job: Job) -> bool:
    return True


class TieredLanes:
    """`Lanes` for each tier, used as one: the same methods, the same rule to stop at the first head that does not fit.

    reserve: of the starts that happen while flex jobs wait and none of them runs in what others leave, the share that
    is theirs; 0 if others always go first. Only starts count from `PATIENCE_S` after flex last ran in what others
    left: a burst is not slowed down for those who had the calm before it. A job that starts by the reserve cannot be
    displaced by another tier.
    """

    def __init__(self, policy: Policy, reserve: float = DEFAULT_RESERVE) -> None:
        """ValueError for a reserve that is no share."""
        if not 0.0 <= reserve < 1.0:
            raise ValueError(f"the reserve of flex is a share below 1, not {reserve}")
        self._tiers = tuple(Lanes(policy) for _ in Tier)
        self._flex = self._tiers[Tier.FLEX]
        self._per_start = reserve / (1.0 - reserve)
        self._owed = 0.0  # starts
        self._ran_at = -math.inf  # when flex last ran in what others left
        self._reserved: set[Job] = set()
        self._paid: dict[Job, float] = {}  # what running flex jobs took of what is owed when they started

    @property
    def policy(self) -> Policy:
        """The policy of every tier."""
        return self._flex.policy

    @property
    def keeps_order(self) -> bool:
        """As `Lanes.keeps_order`."""
        return all(lanes.keeps_order for lanes in self._tiers)

    def feed(self, slots: int) -> None:
        """As `Lanes.feed`. A policy's promise holds for the default tier, and leaves out what the others do to it."""
        for tier in Tier:
            self._tiers[tier].feed(slots, promises=tier is Tier.DEFAULT)

    def switch(self, policy: Policy, now: float) -> None:
        """As `Lanes.switch`."""
        for lanes in self._tiers:
            lanes.switch(policy, now)

    # who goes next
    def push(self, job: Job, now: float) -> None:
        """As `Lanes.push`."""
        self._tiers[job.tier].push(job, now)

    def ahead(self, tier: Tier) -> int:
        """How many wait that go before the next newcomer of this tier."""
        priority, default, flex = self._tiers  # asked for every request: their counts are read without a call
        waiting = priority.waiting
        if tier is not Tier.PRIORITY:
            waiting += default.waiting
        if tier is Tier.FLEX:
            return waiting + flex.waiting
        return waiting + 1 if self._owed >= 1.0 and self._is_due() else waiting

    def admit(self, job: Job, now: float) -> None:
        """`push` and the `pop` that takes this very job, in one: for a job that has nobody `ahead`. ValueError as
        `push`, and if somebody of its tier waits."""
        self._tiers[job.tier].admit(job, now)
        if job.tier is Tier.FLEX or self._flex.waiting:
            self._count(job, now)
        else:
            self._owed = 0.0

    def peek(self, now: float) -> Job | None:
        """As `Lanes.peek`."""
        lanes = self._next()
        return None if lanes is None else lanes.peek(now)

    def pop(self, now: float) -> Job:
        """As `Lanes.pop`."""
        lanes = self._next()
        if lanes is None:
            raise IndexError("nothing waits")
        due = lanes is self._flex and self._is_due()
        job = lanes.pop(now)
        if due:
            self._reserved.add(job)
        self._count(job, now)
        return job

    def put_back(self, job: Job, now: float) -> None:
        """As `Lanes.put_back`."""
        if job.tier is Tier.FLEX:
            self._reserved.discard(job)
            self._owed += self._paid.pop(job, 0.0)
        elif self._counts(now):
            self._owed = max(0.0, self._owed - self._per_start)
        self._tiers[job.tier].put_back(job, now)

    def _counts(self, now: float) -> bool:
        """Whether starts of others count for flex: it waits, and has had nothing of what they leave for a while."""
        return self._is_kept_waiting and now - self._ran_at >= PATIENCE_S

    @property
    def _is_kept_waiting(self) -> bool:
        return self._flex.waiting > 0 and self._flex.running() == len(self._reserved)

    def _next(self) -> Lanes | None:
        if self._is_due():
            return self._flex
        for lanes in self._tiers:
            if lanes.waiting:
                return lanes
        return None

    def _is_due(self) -> bool:
        """Whether a flex job goes before all others: so many of them have started while none of flex ran in what
        others leave."""
        return self._owed >= 1.0 and self._is_kept_waiting

    def is_reserved(self, job: Job) -> bool:
        """Whether the job runs by the reserve."""
        return job in self._reserved

    def is_due(self, job: Job) -> bool:
        """Whether the job is of flex, and goes first for once."""
        return job.tier is Tier.FLEX and self._is_due()

    def _count(self, job: Job, now: float) -> None:
        """The job starts."""
        if job.tier is Tier.FLEX:
            self._paid[job] = paid = min(1.0, self._owed)
            self._owed -= paid
        elif self._counts(now):
            self._owed = min(self._owed + self._per_start, 1.0 + self._per_start)
        elif not self._flex.waiting:
            self._owed = 0.0  # nobody is kept waiting

    # who yields
    def displacement(self, now: float, can_yield: Callable[[Job], bool] = _anyone) -> tuple[Job, Job] | None:
        """As `Lanes.displacement`: of a lower tier whoever yields first, else whom the policy names in the same."""
        lanes = self._next()
        head = None if lanes is None else lanes.peek(now)
        if lanes is None or head is None:
            return None
        if lanes is not self._flex:
            victim = self._yields(Tier(head.tier + 1), now, lambda job: job not in self._reserved and can_yield(job))
            if victim is not None:
                return head, victim
        return lanes.displacement(now, can_yield)

    def victim(self, now: float, can_yield: Callable[[Job], bool] = _anyone) -> Job | None:
        """As `Lanes.victim`: of the lowest tier that has one; those that run by the reserve are the last."""
        first = self._yields(Tier.PRIORITY, now, lambda job: job not in self._reserved and can_yield(job))
        return first if first is not None else self._yields(Tier.PRIORITY, now, can_yield)

    def _yields(self, from_tier: Tier, now: float, can_yield: Callable[[Job], bool]) -> Job | None:
        """Who yields first among the jobs of this tier and those below it."""
        for lanes in reversed(self._tiers[from_tier:]):
            if lanes.running() and (victim := lanes.victim(now, can_yield)) is not None:
                return victim
        return None

    def outranks(self, now: float, running: Sequence[Job]) -> Job | None:
        """As `Lanes.outranks`."""
        lanes = self._next()
        head = None if lanes is None else lanes.peek(now)
        if lanes is None or head is None or not running or any(job.tier < head.tier for job in running):
            return None
        same = [job for job in running if job.tier is head.tier]
        return lanes.outranks(now, same) if same else head

    def preempt(self, job: Job, now: float) -> None:
        """As `Lanes.preempt`."""
        self._leaves(job, now)
        self._tiers[job.tier].preempt(job, now)

    def _leaves(self, job: Job, now: float) -> None:
        """The job runs no longer, if it ran."""
        if self._paid.pop(job, None) is not None and job not in self._reserved:
            self._ran_at = now
        self._reserved.discard(job)

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
        """As `Lanes.finish`."""
        self._leaves(job, now)
        self._tiers[job.tier].finish(
            job, outcome, now, tokens=tokens, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens
        )

    # what was done
    def serve(self, job: Job, tokens: int, now: float) -> None:
        """As `Lanes.serve`."""
        self._tiers[job.tier].serve(job, tokens, now)

    def computed(self, job: Job, cached_tokens: int, now: float, *, prompt_tokens: int | None = None) -> None:
        """As `Lanes.computed`."""
        self._tiers[job.tier].computed(job, cached_tokens, now, prompt_tokens=prompt_tokens)

    def read(self, job: Job, read_tokens: int) -> None:
        """As `Lanes.read`."""
        self._tiers[job.tier].read(job, read_tokens)

    def stepped(self, now: float, tokens: int) -> None:
        """As `Lanes.stepped`. tokens: those of the default tier and of priority."""
        self._tiers[Tier.DEFAULT].stepped(now, tokens)

    @property
    def shadow(self) -> Shadow | None:
        """Of the default tier."""
        return self._tiers[Tier.DEFAULT].shadow

    @property
    def promised_wait_s(self) -> float:
        """As `Lanes.promised_wait_s`, for the default tier."""
        return self._tiers[Tier.DEFAULT].promised_wait_s

    # accounts, each under its tenant's name in the default tier, and `tenant:tier` in another
    def told(self, job: Job, service: float, now: float) -> None:
        """As `Lanes.told`, of the job's tenant in its tier."""
        self._tiers[job.tier].told(job.tenant, service, job.weight, now)

    def merge(self, name: str, more: float, floor: float, *, elsewhere: bool) -> None:
        """As `Lanes.merge`, for an account as `standings` names it; nothing is kept of an unknown tier."""
        tenant, _, label = name.partition(_MARK)
        tier = BY_NAME.get(label or Tier.DEFAULT.label)
        if tier is not None:
            self._tiers[tier].merge(tenant, more, floor, elsewhere=elsewhere)

    def standings(self) -> Iterator[tuple[str, Account, bool]]:
        """Each account's name, the account, and whether its tenant waits in that tier."""
        for tier in Tier:
            mark = "" if tier is Tier.DEFAULT else _MARK + tier.label
            for account, waits in self._tiers[tier].standings():
                yield account.tenant + mark, account, waits

    def service(self, tenant: str, tier: Tier = Tier.DEFAULT) -> float:
        """As `Lanes.service`, in one tier."""
        return self._tiers[tier].service(tenant)

    def service_without(self, job: Job) -> float:
        """As `Lanes.service_without`."""
        return self._tiers[job.tier].service_without(job)

    # how many
    def depth(self) -> dict[str, int]:
        """How many wait, by the label of their lane, behind that of a tier that is not the default one."""
        depth = dict(self._tiers[Tier.DEFAULT].depth())
        for tier in (Tier.PRIORITY, Tier.FLEX):
            depth |= {f"{tier.label} {label}": count for label, count in self._tiers[tier].depth().items()}
        return depth

    def wanted_tokens(self, most: int) -> int:
        """Tokens that those who wait in higher tiers than flex want to compute in the next step, up to `most`."""
        tokens = 0
        for lanes in self._tiers[: Tier.FLEX]:
            if len(lanes):
                for job in lanes.waiting_jobs():
                    tokens += max(1, job.restart_tokens)
                    if tokens >= most:
                        return most
        return tokens

    def by_tier(self) -> dict[Tier, int]:
        """How many wait."""
        return {tier: self._tiers[tier].waiting for tier in Tier}

    def waiting(self, tier: Tier) -> int:
        """How many of the tier wait."""
        return self._tiers[tier].waiting

    def has(self, tier: Tier) -> bool:
        """Whether any job of the tier waits or runs."""
        lanes = self._tiers[tier]
        return lanes.waiting > 0 or lanes.running() > 0

    def running(self, tier: Tier | None = None) -> int:
        """How many run, of a tier or of all."""
        return sum(lanes.running() for lanes in self._tiers) if tier is None else self._tiers[tier].running()

    def waiting_jobs(self) -> Iterator[Job]:
        """All that wait, tier by tier, each in order of arrival."""
        return chain.from_iterable(lanes.waiting_jobs() for lanes in self._tiers)

    def running_jobs(self) -> Iterator[Job]:
        """All that run."""
        return chain.from_iterable(lanes.running_jobs() for lanes in self._tiers)

    def __len__(self) -> int:
        priority, default, flex = self._tiers
        return priority.waiting + default.waiting + flex.waiting

    def __contains__(self, job: Job) -> bool:
        return job in self._tiers[job.tier]
