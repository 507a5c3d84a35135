"""Skip-join MLFQ as published, written down a second time: levels are tracked per job, iteration by iteration.

`Auditor` watches an `engine_model.Engine` and counts what must not happen (the invariants I1 to I6 of the property
tests): a job in two places, a lower level running while a higher one waits, a level overstayed, patience overrun.
"""

from dataclasses import dataclass, field

from tests.scheduler.engine_model import Engine, Life


@dataclass
class Level:
    """A job's level and what it has used of it, in decode steps."""

    level: int
    used_steps: float = 0.0
    most_used_steps: float = 0.0
    waiting_since: float | None = None


@dataclass
class Auditor:
    engine: Engine
    quanta_steps: list[int]
    prefill_tokens_per_step: int
    patience_s: float
    levels: dict[str, Level] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    demotions: int = 0
    promotions: int = 0

    def __post_init__(self) -> None:
        self.engine.watch = self.saw

    def saw(self, event: str, life: Life | None) -> None:
        if life is None:
            if event == "displaced":
                self._check()
            elif event == "admitted":
                self._promote()
        elif event == "push":
            self.levels[life.job.id] = Level(self._join(life), waiting_since=self.engine.now)
        elif event == "preempt":
            self.levels[life.job.id].waiting_since = self.engine.now
        elif event == "pop":
            self._promote()
            self.levels[life.job.id].waiting_since = None
        elif event == "token":
            self._use(life)

    def prefill_steps(self, life: Life) -> float:
        return max(1.0, life.request.prompt_tokens / self.prefill_tokens_per_step)

    def _join(self, life: Life) -> int:
        steps = self.prefill_steps(life)
        last = len(self.quanta_steps) - 1
        return next((level for level, quantum in enumerate(self.quanta_steps) if quantum >= steps), last)

    def _use(self, life: Life) -> None:
        state = self.levels[life.job.id]
        first = life.job.output_tokens == 1 and state.used_steps == 0 and not state.most_used_steps
        state.used_steps += self.prefill_steps(life) if first and state.level == self._join(life) else 1
        state.most_used_steps = max(state.most_used_steps, state.used_steps)
        if state.level < len(self.quanta_steps) - 1:
            if state.used_steps > self.quanta_steps[state.level] + 1:
                self.found.add("I5 overstayed its level")
            if state.used_steps > self.quanta_steps[state.level]:
                state.level += 1
                state.used_steps = 0
                self.demotions += 1

    def _promote(self) -> None:
        for state in self.levels.values():
            if state.waiting_since is not None and state.waiting_since + self.patience_s <= self.engine.now:
                self.promotions += state.level > 0
                state.level, state.used_steps, state.most_used_steps = 0, 0, 1

    def _check(self) -> None:
        engine = self.engine
        waiting = {job.id for job in engine.lanes.waiting_jobs()}
        if waiting & engine.batch.keys() or len(waiting) + len(engine.batch) != engine.lives_left:
            self.found.add("I2 not in exactly one place")
        best = min((self.levels[name].level for name in waiting), default=None)
        worst = max((self.levels[name].level for name in engine.batch), default=None)
        if best is not None and worst is not None and best < worst:
            self.found.add("I3 a lower level runs while a higher one waits")
        if best is not None and len(engine.batch) < engine.slots:
            self.found.add("idle slot")
        for name in waiting:
            since = self.levels[name].waiting_since
            if since is not None and since + self.patience_s <= engine.now and self.levels[name].level > 0:
                self.found.add("I6 patience overrun")
