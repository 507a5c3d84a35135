"""A batch engine in virtual time: slots, iterations, an optional KV budget. One iteration is one decode step."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from scheduler.jobs import Job, Outcome
from scheduler.lanes import Lanes
from scheduler.policy import Policy


@dataclass
class Request:
    """A job as it will be: `output_tokens` is what only the model knows."""

    at: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "t"
    weight: float = 1.0
    max_tokens: int = 0
    kind: str = ""


@dataclass
class Life:
    """What happened to one job, in seconds of virtual time."""

    request: Request
    job: Job
    prefill_steps_left: int = 0
    first_token_at: float = -1.0
    finished_at: float = -1.0
    started: list[float] = field(default_factory=list)
    unserved_since: float = 0.0
    longest_gap: float = 0.0

    @property
    def kv_tokens(self) -> int:
        return self.request.prompt_tokens + self.job.output_tokens

    @property
    def final_tokens(self) -> int:
        return self.request.prompt_tokens + self.request.output_tokens


class Engine:
    """Runs requests to the end.

    `watch(event, life)` is told of push, pop, admitted, displaced, preempt, token, finish and step.
    """

    def __init__(
        self,
        policy: Policy,
        slots: int,
        *,
        step_s: float = 0.03,
        kv_tokens: int | None = None,
        admission: Literal["reserve", "optimistic"] = "reserve",
        prefill_tokens_per_step: int | None = None,
        lanes: Callable[[Policy], Lanes] = Lanes,
    ) -> None:
        self.lanes = lanes(policy)
        self.slots = slots
        self.step_s = step_s
        self.kv_tokens = kv_tokens
        self.admission = admission
        self.prefill_tokens_per_step = prefill_tokens_per_step
        self.now = 0.0
        self.batch: dict[str, Life] = {}
        self.lives: dict[str, Life] = {}
        self.preemptions = 0
        self.watch: Callable[[str, Life | None], None] = lambda event, life: None

    def run(self, requests: Sequence[Request]) -> list[Life]:
        coming = deque(sorted(requests, key=lambda request: request.at))
        while coming or self.lives_left:
            if not self.lives_left:
                self.now = max(self.now, coming[0].at)
            while coming and coming[0].at <= self.now:
                self._push(coming.popleft())
            self._admit()
            self.watch("admitted", None)
            self._displace()
            self.watch("displaced", None)
            self._make_room()
            self._step()
        return list(self.lives.values())

    @property
    def lives_left(self) -> int:
        return len(self.lanes) + len(self.batch)

    def fits(self, life: Life) -> bool:
        if self.kv_tokens is None or not self.batch:
            return True
        if self.admission == "reserve":
            return sum(other.final_tokens for other in self.batch.values()) + life.final_tokens <= self.kv_tokens
        return sum(other.kv_tokens for other in self.batch.values()) + life.kv_tokens < self.kv_tokens

    def _push(self, request: Request) -> None:
        job = Job(
            id=str(len(self.lives)),
            tenant=request.tenant,
            prompt_tokens=request.prompt_tokens,
            arrived_at=request.at,
            max_tokens=request.max_tokens,
            weight=request.weight,
            kind=request.kind,
        )
        life = self.lives[job.id] = Life(request, job, unserved_since=self.now)
        self.lanes.push(job, self.now)
        self.watch("push", life)

    def _admit(self) -> None:
        while len(self.batch) < self.slots:
            head = self.lanes.peek(self.now)
            if head is None or not self.fits(self.lives[head.id]):
                break
            assert self._pop() is head

    def _pop(self) -> Job:
        job = self.lanes.pop(self.now)
        life = self.batch[job.id] = self.lives[job.id]
        life.started.append(self.now)
        if self.prefill_tokens_per_step is not None:
            life.prefill_steps_left = -(-life.kv_tokens // self.prefill_tokens_per_step) - 1
        self.watch("pop", life)
        return job

    def _displace(self) -> None:
        while len(self.batch) >= self.slots and (pair := self.lanes.displacement(self.now)) is not None:
            head, victim = pair
            self._preempt(victim)
            assert self._pop() is head

    def _make_room(self) -> None:
        if self.kv_tokens is None or self.admission == "reserve":
            return
        while len(self.batch) > 1 and sum(life.kv_tokens + 1 for life in self.batch.values()) > self.kv_tokens:
            victim = self.lanes.victim(self.now)
            assert victim is not None
            self._preempt(victim)

    def _preempt(self, job: Job) -> None:
        life = self.batch.pop(job.id)
        life.unserved_since = self.now
        self.preemptions += 1
        self.lanes.preempt(job, self.now)
        self.watch("preempt", life)

    def _step(self) -> None:
        self.now += self.step_s
        for life in list(self.batch.values()):
            if life.prefill_steps_left > 0:
                life.prefill_steps_left -= 1
                continue
            self._token(life)
        self.watch("step", None)

    def _token(self, life: Life) -> None:
        job = life.job
        self.lanes.serve(job, 1, self.now)
        if life.first_token_at < 0:
            life.first_token_at = self.now
        else:
            life.longest_gap = max(life.longest_gap, self.now - life.unserved_since)
        life.unserved_since = self.now
        self.watch("token", life)
        if job.output_tokens >= life.request.output_tokens:
            life.finished_at = self.now
            del self.batch[job.id]
            self.lanes.finish(job, Outcome.DONE, self.now)
            self.watch("finish", life)
