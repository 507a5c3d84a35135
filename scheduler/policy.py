"""What a policy is: an order inside one line of jobs and, where tenants share, the rules by which each is charged.

A policy is pure: it reads no clock and does no I/O. `Lanes` owns the jobs and asks it. Two parts, so that they compose:
an `Order` says who goes first inside one line, and `Shares`, if present, gives every tenant a line and an account of
its own and chooses the line whose account is lowest.
"""

import sys
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from scheduler.jobs import Job, Outcome

NEVER = sys.maxsize
FOR_GOOD = NEVER // 2  # a boost "at" so many output tokens never ends

Lane = tuple[int, ...]


class Spot(NamedTuple):
    """The lane a job belongs in, and for how long.

    lane: jobs of one lane are served first come, first served.
    until: the lane holds while `output_tokens` is below this; `NEVER` if for good.
    """

    lane: Lane
    until: int


class Order(Protocol):
    """Who goes first inside one line. A job's lane is piecewise constant in its output tokens."""

    @property
    def name(self) -> str:
        """The policy's name."""

    @property
    def patience_s(self) -> float:
        """A job unserved for so long is boosted to the front; infinity if never."""

    @property
    def stall_s(self) -> float:
        """A job that has begun to answer and is unserved for so long is boosted too; infinity if never."""

    @property
    def preemptions_per_s(self) -> int:
        """Most running jobs displaced in any one second; 0 if the order never displaces."""

    @property
    def tail(self) -> float:
        """How many times the waits of first come, first served a job may wait; infinity if nothing is promised."""

    @property
    def admission(self) -> Literal["now", "peak"]:
        """Whether an engine starts a job as soon as its memory fits, or only if what it expects to hold will, too."""

    @property
    def tokens_per_step(self) -> float:
        """Tokens whose computing takes an engine as long as a step does as such."""

    def fit(self, slots: int) -> None:
        """The jobs run in an engine with so many slots; 0 if that is not known."""

    def rest_tokens(self, job: Job, share: float | None = None) -> float:
        """How many more output tokens the job is expected to make; 0 if nothing is known.

        share: of jobs like it, how many make no more than that; None for the mean.
        """

    @property
    def epoch(self) -> int:
        """Grows whenever `rank` has changed for lanes that exist."""

    def spot(self, job: Job, *, running: bool, boosted_at: int | None) -> Spot:
        """The job's lane. `boosted_at`: its output tokens when its patience ended, None if it has not."""

    def rank(self, lane: Lane) -> float:
        """The smallest goes first; lanes of equal rank are merged by arrival."""

    def label(self, lane: Lane) -> str:
        """The lane's name in metrics: one of a few."""

    def displaces(self, head: Job, victim: Job, head_lane: Lane, victim_lane: Lane) -> bool:
        """Whether the waiting `head` should take the slot of the running `victim`.

        If so, `head` must also rank before `victim` once that waits, or the two would trade places for ever.
        """

    def learn(self, job: Job, outcome: Outcome) -> None:
        """The job left."""


class Account:
    """What one tenant has been charged.

    tenant: its name.
    counter: service received in weighted tokens, divided by the tenant's weight.
    lifted, heard: parts of the counter that were not charged here: lifts, and what other queues charged.
    elsewhere: the tenant waits in another queue, so it is not back when it begins to wait in this one.
    weight: as last seen on a job.
    recent: output tokens of its latest finished jobs.
    """

    __slots__ = ("counter", "elsewhere", "heard", "lifted", "recent", "tenant", "weight")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.counter = 0.0
        self.lifted = 0.0
        self.heard = 0.0
        self.elsewhere = False
        self.weight = 1.0
        self.recent: deque[int] = deque(maxlen=5)


class Bill:
    """What one job was charged when it was taken, in units of its tenant's counter.

    floor: the counter just before.
    prompt: charged for the prompt.
    predicted_tokens: output tokens charged in advance.
    price: of one output token.
    fresh: the job has not been preempted since it was taken for the first time.
    """

    __slots__ = ("floor", "fresh", "predicted_tokens", "price", "prompt")

    def __init__(self, floor: float, prompt: float, predicted_tokens: int, price: float) -> None:
        self.floor = floor
        self.prompt = prompt
        self.predicted_tokens = predicted_tokens
        self.price = price
        self.fresh = True


class Shares(Protocol):
    """How tenants are charged; the tenant with the lowest counter goes first."""

    @property
    def taken_per_s(self) -> int:
        """Most slots that tenants take from others that hold more, in any one second; 0 if they never do."""

    def lift(self, account: Account, level: float, *, contended: bool) -> None:
        """A tenant that had nothing waiting is back. `level`: lowest counter of those that wait, in counter units;
        if nobody does (not `contended`), that of the last tenant that did."""

    def take(self, account: Account, job: Job) -> Bill:
        """The job starts for the first time: charges what is charged in advance."""

    def undo(self, account: Account, bill: Bill) -> None:
        """The job could not start after all: as if `take` had not been."""

    def adopt(self, job: Job) -> Bill:
        """A bill for a job that was started under another policy: only what it makes from here on is charged."""

    def correct(self, account: Account, job: Job, bill: Bill) -> None:
        """The job's prompt turned out to be longer, shorter, or better cached than `take` was told."""

    def settle(self, account: Account, job: Job, bill: Bill, outcome: Outcome) -> None:
        """The job left after it had been taken: refunds what was charged in advance and not used."""


@dataclass(frozen=True, slots=True)
class Policy:
    """An order within a line, and what shares between the tenants' lines (None: all tenants stand in one line)."""

    name: str
    order: Order
    shares: Shares | None = None

    @property
    def preemptions_per_s(self) -> int:
        """Most running jobs displaced in any one second; 0 if none ever is."""
        return max(self.order.preemptions_per_s, 0 if self.shares is None else self.shares.taken_per_s)

    @property
    def weighs_prompts(self) -> bool:
        """Whether who goes next, or what is charged, depends on a prompt's length."""
        return self.shares is not None or self.order.name != "fcfs"


FAR_AHEAD = 4096  # a preempting policy wants newcomers inside the engine, where they can displace a running job


def window_for(policy: Policy, ahead: int | None) -> int:
    """Sequences given to a worker beyond its batch: few for policies that never preempt, so that what waits in a
    gateway can still be re-ordered, re-routed or shed; many for those that do. `ahead`, if given, is taken as it is."""
    if ahead is not None:
        return ahead
    return FAR_AHEAD if policy.preemptions_per_s else 4
