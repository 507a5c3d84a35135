"""vLLM's real scheduler with our plug-in: beside an objective, a long prompt does not make answers late."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest.bench.plugin.driven import DrivenEngine, StepClock, build_scheduler, expected, request

pytestmark = pytest.mark.engine

TPOT_S, STEP_TOKENS, LONG = 0.02, 2048, 7000
FIXED_S, PROMPT_S, SEQUENCE_S = 0.004, 20e-6, 0.1e-3


class Timed:
    """An engine whose steps take their time by what they compute. lags_s: by how much each answer's tokens, from its
    second on, came after they were due; largest: the most tokens of a step beside a prompt."""

    def __init__(self, folder: Path, objectives: dict[str, float], *, is_async: bool) -> None:
        self.clock = StepClock()
        self.scheduler = build_scheduler(
            folder, "fcfs", step_tokens=STEP_TOKENS, is_async=is_async, clock=self.clock, objectives=objectives
        )
        self.engine = DrivenEngine(self.scheduler, is_async=is_async, clock=self.clock, step_s=0.0)
        self.lags_s: dict[str, list[float]] = {}
        self._first_at: dict[str, float] = {}
        self._computing: deque[float] = deque([0.0] if is_async else [])

    def step(self) -> Any:
        before = {name: len(tokens) for name, tokens in self.engine.answers.items()}
        output = self.engine.step(self._next_s)
        for name, tokens in self.engine.answers.items():
            if len(tokens) > before.get(name, 0):
                self._made(name, len(tokens))
        return output

    def _next_s(self, output: Any) -> float:
        """How long the engine takes until the next output: this one's, or that of the one before it."""
        sequences = len(output.num_scheduled_tokens)
        prompt_tokens = output.total_num_scheduled_tokens - sequences
        self._computing.append(FIXED_S + PROMPT_S * prompt_tokens + SEQUENCE_S * sequences)
        return self._computing.popleft()

    def _made(self, name: str, tokens: int) -> None:
        first_at = self._first_at.setdefault(name, self.clock.now)
        self.lags_s.setdefault(name, []).append(self.clock.now - first_at - TPOT_S * (tokens - 1))

    def warm_up(self) -> None:
        """Until the engine knows what its steps take."""
        for at in range(12):
            self.engine.add(request(f"w{at}", 40 + 37 * at, 12))
            for _ in range(4):
                self.step()
        while self.scheduler.has_unfinished_requests():
            self.step()

    def until_first_token(self, name: str) -> None:
        while not self.engine.answers.get(name):
            self.step()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_long_prompt_makes_no_answer_late(hollow_model: Path, *, is_async: bool) -> None:
    late: list[float] = []
    for objectives in ({"tpot_s": TPOT_S}, {}):
        timed = Timed(hollow_model, objectives, is_async=is_async)
        timed.warm_up()
        timed.engine.add(request("ahead", 20, 300))
        timed.until_first_token("ahead")
        timed.engine.add(request("fresh", 20, 300))
        timed.until_first_token("fresh")
        timed.engine.add(request("long", LONG, 5))
        timed.until_first_token("long")
        late.append(max(*timed.lags_s["ahead"], *timed.lags_s["fresh"]))
        while timed.scheduler.has_unfinished_requests():
            timed.step()
        assert timed.engine.answers["long"] == expected("long", LONG, 5)
        assert timed.engine.answers["fresh"] == expected("fresh", 20, 300)
        assert timed.scheduler.max_num_scheduled_tokens == STEP_TOKENS
    with_objective, without = late
    assert with_objective < 0.1 * TPOT_S
    assert without > TPOT_S


def test_alone_a_prompt_has_all_of_every_step(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, is_async=False)
    timed.warm_up()
    timed.engine.add(request("long", 3 * STEP_TOKENS, 1))
    steps = [timed.step().total_num_scheduled_tokens for _ in range(3)]
    assert steps == [STEP_TOKENS] * 3


def test_what_has_ended_is_forgotten(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, is_async=False)
    timed.warm_up()
    timed.engine.add(request("left", 20, 300))
    timed.until_first_token("left")
    timed.engine.abort("left")
    timed.step()
    assert not timed.scheduler._limit._first_at
