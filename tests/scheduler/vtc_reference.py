"""VTC as published, written down a second time without regard to speed, and the bounds it must keep.

`Auditor` watches an `engine_model.Engine`: it keeps its own counters by Algorithm 2 and checks every choice, the
spread of the counters (Lemma 4.3) and the service gap of tenants that wait (Theorem 4.4).
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

from scheduler.policies.vtc import Vtc
from tests.scheduler.engine_model import Engine, Life


@dataclass
class Auditor:
    engine: Engine
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    burst: float = 0.0
    most_credit: float = 0.0
    wrong_means: int = 0
    ended: list[float] = field(default_factory=list)
    counter: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    service: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waiting: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    weight: dict[str, float] = field(default_factory=dict)
    last_left: str | None = None
    charged: set[str] = field(default_factory=set)
    longest_prompt: int = 0
    most_tokens: int = 0
    least_weight: float = 1.0
    spread: float = 0.0
    gap: float = 0.0
    wrong_choices: int = 0
    wrong_counters: int = 0
    idle_slots: int = 0
    _lead: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine.watch = self.saw

    @property
    def bound(self) -> float:
        """U*: the published U with the most tokens that the batch ever held at its jobs' final length."""
        most = max(self.prompt_weight, self.output_weight) * self.most_tokens
        return (max(self.prompt_weight * self.longest_prompt, most) + self.most_credit) / self.least_weight

    def _credit(self) -> float:
        """What a tenant that comes back may be below the others, in weighted tokens."""
        credit = self.burst * sum(self.ended[-50:]) / len(self.ended[-50:]) if self.ended else 0.0
        shares = self.engine.lanes.policy.shares
        if self.burst and isinstance(shares, Vtc):  # how the mean forgets is its own affair; that it is one is checked
            known = len(self.ended) >= 20
            self.wrong_means += known and not 0.3 * credit <= self.burst * shares.mean_service <= 3 * credit
            credit = self.burst * shares.mean_service
        self.most_credit = max(self.most_credit, credit)
        return credit

    def saw(self, event: str, life: Life | None) -> None:
        if event == "admitted":
            self._check_slots()
        elif life is not None and event in ("push", "preempt"):
            self._arrives(life)
        elif life is not None and event == "pop":
            self._taken(life)
        elif life is not None and event == "token":
            self._charge(life, self.output_weight)
        elif life is not None and event == "finish":
            self.ended.append(
                self.prompt_weight * life.request.prompt_tokens + self.output_weight * life.request.output_tokens
            )
        if event != "token":
            self._measure()

    def violations(self) -> list[str]:
        found = []
        if self.spread > self.bound + 1e-6:
            found.append("spread")
        if self.gap > 2 * self.bound + 1e-6:
            found.append("gap")
        if self.wrong_choices:
            found.append("choice")
        if self.wrong_counters:
            found.append("counter")
        if self.idle_slots:
            found.append("idle")
        return found

    def _arrives(self, life: Life) -> None:
        tenant = life.request.tenant
        self.weight[tenant] = life.request.weight
        self.least_weight = min(self.least_weight, life.request.weight)
        if not self.waiting[tenant]:
            others = [self.counter[other] for other, count in self.waiting.items() if count]
            if others:
                self.counter[tenant] = max(self.counter[tenant], min(others) - self._credit() / life.request.weight)
            elif self.last_left is not None:
                self.counter[tenant] = max(self.counter[tenant], self.counter[self.last_left])
        self.waiting[tenant] += 1

    def _taken(self, life: Life) -> None:
        tenant = life.request.tenant
        least = min(self.counter[other] for other, count in self.waiting.items() if count)
        self.wrong_choices += self.counter[tenant] > least + 1e-6
        self.waiting[tenant] -= 1
        if not self.waiting[tenant]:
            self.last_left = tenant
        if life.job.id not in self.charged:
            self.charged.add(life.job.id)
            self._charge(life, self.prompt_weight * life.request.prompt_tokens)
        self.longest_prompt = max(self.longest_prompt, life.request.prompt_tokens)
        self.most_tokens = max(self.most_tokens, sum(other.final_tokens for other in self.engine.batch.values()))

    def _charge(self, life: Life, service: float) -> None:
        self.counter[life.request.tenant] += service / life.request.weight
        self.service[life.request.tenant] += service / life.request.weight

    def _check_slots(self) -> None:
        engine = self.engine
        head = engine.lanes.peek(engine.now)
        free = len(engine.batch) < engine.slots
        self.idle_slots += free and head is not None and engine.fits(engine.lives[head.id])

    def _measure(self) -> None:
        backlogged = [tenant for tenant, count in self.waiting.items() if count]
        own = {tenant: self._own_counter(tenant) for tenant in backlogged}
        self.wrong_counters += any(abs(own[tenant] - self.counter[tenant]) > 1e-6 for tenant in backlogged)
        if backlogged:
            self.spread = max(self.spread, max(own.values()) - min(own.values()))
        together = set(combinations(sorted(backlogged), 2))
        for pair in list(self._lead):
            if pair not in together:
                del self._lead[pair]
        for pair in together:
            lead = self.service[pair[0]] - self.service[pair[1]]
            low, high = self._lead.get(pair, (lead, lead))
            self._lead[pair] = (min(low, lead), max(high, lead))
            self.gap = max(self.gap, self._lead[pair][1] - self._lead[pair][0])

    def _own_counter(self, tenant: str) -> float:
        return self.engine.lanes.service(tenant) / self.weight[tenant]
