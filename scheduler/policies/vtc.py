"""Virtual token counter: the tenant with the least service goes first (Sheng et al., OSDI'24, arXiv 2401.00588).

Algorithm 2, and Algorithm 3 with `predict="last5"`. What the paper leaves open is decided here: a preempted job is
not charged its prompt again, an aborted one gets back only what was predicted and not made, prefix-cache hits may be
free (`charge="computed"`), and counters are stored already divided by the tenant's weight.
"""

from dataclasses import dataclass, field
from typing import Literal

from scheduler.jobs import Job, Outcome
from scheduler.policy import Account, Bill

_FRESH = 0.02  # of what is known of the mean request after one more


@dataclass(slots=True)
class Vtc:
    """The rules of the counters; the counters themselves are the `Account`s that `Lanes` keeps.

    prompt_weight, output_weight: service per prompt token and per output token (w_p and w_q; the paper's 1 and 2).
    predict: "last5" charges in advance the mean output of the tenant's last five finished jobs.
    charge: "computed" leaves out prompt tokens that the prefix cache held.
    slots: "shared" lets the tenant that goes next take a slot from one that holds more of them for its weight, also
        after the change; "free", as published, lets it wait for the next free slot.
    preemptions_per_s: cap on the slots so taken.
    burst: how many mean requests a tenant may be below those that wait when it comes back, as far as it really has had
        less; 0, as published, lifts it to their level. Counters of waiting tenants then differ by U + burst at most.
    """

    prompt_weight: float = 1.0
    output_weight: float = 2.0
    predict: Literal["none", "last5"] = "none"
    charge: Literal["all", "computed"] = "all"
    slots: Literal["free", "shared"] = "free"
    preemptions_per_s: int = 100
    burst: float = 0.0
    mean_service: float = field(default=0.0, init=False)  # of a finished request, in weighted tokens

    @property
    def taken_per_s(self) -> int:
        """The cap, 0 where slots are not shared."""
        return self.preemptions_per_s if self.slots == "shared" else 0

    def lift(self, account: Account, level: float, *, contended: bool) -> None:
        """Time away saves up no more than `burst`: the counter rises to that far below the level of those that wait.

        Where nobody waits there is nobody to catch up with, and nothing is saved up.
        """
        credit = self.burst * self.mean_service / account.weight if contended else 0.0
        account.counter = max(account.counter, level - credit)

    def take(self, account: Account, job: Job) -> Bill:
        """Charges the whole prompt at once, or the tenant would stay lowest and fill the batch."""
        prompt = self._prompt_price(job)
        price = self.output_weight / job.weight
        bill = Bill(account.counter, prompt, self._predicted_tokens(account, job), price)
        account.counter += prompt + bill.predicted_tokens * price
        return bill

    def undo(self, account: Account, bill: Bill) -> None:
        """Gives back what `take` charged."""
        account.counter -= bill.prompt + bill.predicted_tokens * bill.price

    def adopt(self, job: Job) -> Bill:
        """Nothing in advance, output tokens from here on."""
        bill = Bill(0.0, 0.0, 0, self.output_weight / job.weight)
        bill.fresh = False
        return bill

    def correct(self, account: Account, job: Job, bill: Bill) -> None:
        """Settles the prompt at what it was; not for a resumed job, whose cached tokens are its own."""
        if not bill.fresh:
            return
        prompt = self._prompt_price(job)
        account.counter = max(min(bill.floor, account.counter), account.counter + prompt - bill.prompt)
        bill.prompt = prompt

    def settle(self, account: Account, job: Job, bill: Bill, outcome: Outcome) -> None:
        """Gives back the output that was predicted and not made; tokens that were made stay charged."""
        unused_tokens = bill.predicted_tokens - job.output_tokens
        if unused_tokens > 0:
            account.counter = max(min(bill.floor, account.counter), account.counter - unused_tokens * bill.price)
        if outcome in (Outcome.DONE, Outcome.LENGTH):
            account.recent.append(job.output_tokens)
            service = self._prompt_price(job) * job.weight + self.output_weight * job.output_tokens
            share = _FRESH if self.mean_service else 1.0
            self.mean_service += share * (service - self.mean_service)

    def _prompt_price(self, job: Job) -> float:
        return self.prompt_weight * job.charged_tokens(cached_free=self.charge == "computed") / job.weight

    def _predicted_tokens(self, account: Account, job: Job) -> int:
        if self.predict == "none" or not account.recent:
            return 0
        mean = round(sum(account.recent) / len(account.recent))
        return min(mean, job.max_tokens) if job.max_tokens else mean
