"""vLLM's real scheduler with our plug-in: beside an objective, a long prompt does not make answers late."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.request import Request

from loadtest.bench.plugin.driven import DrivenEngine, StepClock, build_scheduler, expected, request
from scheduler.objectives import Objectives
from scheduler.slack import StepModel
from scheduler.step_limit import Batch, Limit, Prompt, StepLimit
from tests.engine.test_first_token import handed
from tests.engine.test_vllm_plugin import ArrivingBlocks

pytestmark = pytest.mark.engine

TPOT_S, STEP_TOKENS, LONG = 0.02, 2048, 7000
FIXED_S, PROMPT_S, SEQUENCE_S = 0.004, 20e-6, 0.1e-3


class Timed:
    """An engine whose steps take their time by what they compute. lags_s: by how much each answer's tokens, from its
    second on, came after they were due by `tpot_s`, or the engine's objective."""

    def __init__(
        self,
        folder: Path,
        objectives: dict[str, float],
        *,
        is_async: bool = False,
        policy: str = "fcfs",
        slots: int = 4,
        tpot_s: float | None = None,
    ) -> None:
        self.clock = StepClock()
        self.scheduler = build_scheduler(
            folder,
            policy,
            slots=slots,
            step_tokens=STEP_TOKENS,
            blocks=2000,
            is_async=is_async,
            clock=self.clock,
            objectives=objectives,
        )
        self.engine = DrivenEngine(self.scheduler, is_async=is_async, clock=self.clock, step_s=0.0)
        self.lags_s: dict[str, list[float]] = {}
        self._tpot_s = tpot_s or objectives.get("tpot_s", TPOT_S)
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
        self.lags_s.setdefault(name, []).append(self.clock.now - first_at - self._tpot_s * (tokens - 1))

    def warm_up(self) -> None:
        """Until the engine knows what its steps take."""
        for at in range(12):
            self.engine.add(request(f"w{at}", 40 + 37 * at, 12))
            for _ in range(4):
                self.step()
        while self.scheduler.has_unfinished_requests():
            self.step()

    def answer(self, name: str, tokens: int = 300) -> None:
        """One that has just had its first token."""
        self.engine.add(request(name, 20, tokens))
        self.until_first_token(name)

    def scheduled(self) -> dict[str, int]:
        """Tokens of the next step."""
        return dict(self.step().num_scheduled_tokens)

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


@pytest.mark.parametrize("of_engine", [{}, {"tpot_s": 10 * TPOT_S}], ids=["none", "a loose one"])
def test_a_request_s_own_objective_goes_before_the_engine_s(hollow_model: Path, of_engine: dict[str, float]) -> None:
    timed = Timed(hollow_model, of_engine, tpot_s=TPOT_S)
    timed.engine.add(request("first", 20, 2, tpot_s=TPOT_S))
    timed.warm_up()
    timed.engine.add(request("own", 20, 300, tpot_s=TPOT_S))
    timed.until_first_token("own")
    timed.engine.add(request("long", LONG, 5))
    timed.until_first_token("long")
    assert max(timed.lags_s["own"]) < 0.1 * TPOT_S


@pytest.mark.parametrize(("tpot_s", "longest_s"), [(0.01, 0.0105), (None, 0.0185)], ids=["own", "four empty steps"])
def test_flex_leaves_an_answer_its_own_objective(hollow_model: Path, tpot_s: float | None, longest_s: float) -> None:
    timed = Timed(hollow_model, {})
    timed.engine.add(request("first", 20, 2, tpot_s=0.01))
    timed.warm_up()
    timed.engine.add(request("answer", 20, 300, **({} if tpot_s is None else {"tpot_s": tpot_s})))
    timed.until_first_token("answer")
    timed.engine.add(request("flex", LONG, 5, tier="flex"))
    steps_s: list[float] = []
    while not timed.engine.answers.get("flex"):
        began = timed.clock.now
        timed.step()
        steps_s.append(timed.clock.now - began)
    assert 0.8 * longest_s < max(steps_s) < longest_s


def test_nonsense_for_an_objective_is_as_none(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S})
    for at, nonsense in enumerate(("soon", -1.0, 0, float("nan"), float("inf"), [1.0])):
        timed.engine.add(request(f"r{at}", 20, 3, tpot_s=nonsense))
        assert timed.scheduler.waiting.entries[f"r{at}"].job.objectives == Objectives(tpot_s=TPOT_S)


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


def test_a_short_prompt_that_goes_first_starts_beside_a_long_one(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, policy="srpt")
    timed.warm_up()
    timed.answer("answer")
    timed.engine.add(request("long", LONG, 5))
    assert 64 <= timed.scheduled()["long"] < STEP_TOKENS / 2
    timed.engine.add(request("short", 50, 5))
    step = timed.scheduled()
    assert step["short"] > 0
    assert step["long"] > 0


def test_one_whose_kv_has_come_starts_beside_prompts_that_are_read(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, policy="srpt", slots=8)
    timed.warm_up()
    timed.answer("answer")
    timed.scheduler.connector = ArrivingBlocks({"far": 32})
    timed.engine.add(request("far", 33, 5))
    timed.step()
    timed.engine.add(request("long", LONG, 5))
    timed.step()
    timed.engine.add(request("shorter", LONG // 2, 5))  # both are read at once
    assert timed.scheduled().keys() == {"answer", "long", "shorter"}
    assert timed.scheduled().keys() == {"answer", "long"}
    timed.scheduler.finished_recving_kv_req_ids.add("far")
    assert timed.scheduled().keys() == {"answer", "long", "shorter", "far"}
    assert timed.engine.answers["far"] == expected("far", 33, 1)


def test_the_clock_of_an_answer_starts_with_a_first_token_from_elsewhere(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": 2 * TPOT_S})
    timed.warm_up()
    timed.scheduler.connector = ArrivingBlocks({"far": 33})
    timed.scheduler._prepare_for_first_tokens()
    timed.engine.add(request("long", LONG, 5))
    timed.step()
    timed.engine.add(handed("far", 32, 20, expected("far", 32, 1)[0]))
    timed.until_first_token("far")
    timed.scheduled()  # and its KV is asked for
    timed.scheduler.finished_recving_kv_req_ids.add("far")
    while len(timed.engine.answers["far"]) < 2:
        timed.step()
    assert timed.lags_s["far"][1] < 0.1 * TPOT_S
    assert not timed.engine.answers.get("long")


class Recorded(StepLimit):
    """Keeps what it was asked."""

    batch: Batch

    def of(self, batch: Batch, *args: Any, **kwargs: Any) -> Limit | None:
        self.batch = batch
        return super().of(batch, *args, **kwargs)


def test_a_step_under_way_counts_as_one_token_however_many_are_drafted(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, is_async=True)
    scheduler = timed.scheduler
    scheduler.num_spec_tokens = 3
    scheduler._limit = recorded = Recorded(StepModel())
    timed.engine.add(request("answer", 20, 300), request("long", 4 * STEP_TOKENS, 5))
    for _ in range(3):
        timed.step()
    answer = scheduler.requests["answer"]
    assert answer.num_output_placeholders == 4
    timed.step()
    [(job, made)] = recorded.batch.answers
    assert job.id == "answer"
    assert made == len(timed.engine.answers["answer"])  # one of which came after it was asked


def test_prompts_of_flex_that_run_by_the_reserve_are_limited(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S / 2, "flex_reserve": 0.5}, slots=3)
    timed.warm_up()
    timed.answer("answer")
    timed.answer("second", tokens=5)
    timed.answer("first", tokens=3)
    timed.engine.add(request("flex", LONG, 5, tier="flex"), request("fresh", 20, 300))
    timed.until_first_token("fresh")
    assert any("flex" in timed.scheduled() for _ in range(200)), "flex never started by the reserve"
    assert timed.scheduler._lanes.is_reserved(timed.scheduler.waiting.entries["flex"].job)
    timed.until_first_token("flex")
    assert max(timed.lags_s["answer"]) < 0.1 * TPOT_S
    assert max(timed.lags_s["fresh"]) < 0.1 * TPOT_S


def test_what_a_displaced_answer_reads_again_counts_as_a_prompt(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S})
    scheduler = timed.scheduler
    scheduler._limit = recorded = Recorded(StepModel())
    timed.answer("answer")
    timed.engine.add(request("displaced", 1000, 300))
    timed.until_first_token("displaced")
    job = scheduler.waiting.entries["displaced"].job
    scheduler._send_back(job, timed.clock.now)
    timed.step()
    assert recorded.batch.waiting == [Prompt(1001)]


def turn(name: str, prompt: int, max_tokens: int) -> Request:
    """Of a streaming session, not its last."""
    one = request(name, prompt, max_tokens)
    one.resumable = True
    return one


def test_prompts_go_on_beside_the_later_turns_of_many_sessions(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S}, slots=100)
    timed.warm_up()
    sessions = [f"s{at}" for at in range(70)]
    for max_tokens, said in ((2, 2), (300, 100)):
        timed.engine.add(*(turn(name, 10, max_tokens) for name in sessions))
        while any(len(timed.engine.answers.get(name, ())) < said for name in sessions):
            timed.step()
    assert len(timed.scheduler.running) == len(sessions)
    assert not timed.scheduler.waiting.entries  # vLLM goes on with these: they are no jobs
    timed.answer("answer")
    timed.engine.add(request("long", LONG, 5))
    for _ in range(5):
        step = timed.scheduled()
        assert len(step) == len(sessions) + 2
        assert step["long"] >= 64
    assert max(timed.lags_s["answer"]) < 0.1 * TPOT_S


def test_the_prompt_of_a_later_turn_is_limited_too(hollow_model: Path) -> None:
    timed = Timed(hollow_model, {"tpot_s": TPOT_S})
    timed.warm_up()
    timed.engine.add(turn("session", 10, 2))
    while len(timed.engine.answers.get("session", ())) < 2:
        timed.step()
    timed.answer("answer")
    timed.engine.add(turn("session", LONG, 5))
    while len(timed.engine.answers["session"]) < 3:
        timed.step()
    assert max(timed.lags_s["answer"]) < 0.1 * TPOT_S


def test_a_prompt_that_is_read_in_whole_blocks_goes_on(hollow_model: Path) -> None:
    block = 512

    def whole_blocks(one: Request, tokens: int, *_: int) -> int:
        ends = one.num_computed_tokens + tokens >= one.num_prompt_tokens
        return tokens if ends else tokens // block * block

    timed = Timed(hollow_model, {"tpot_s": 0.5 * TPOT_S})
    timed.scheduler.vllm_config.cache_config.block_size = block
    timed.scheduler.need_mamba_block_aligned_split = True
    timed.scheduler._mamba_block_aligned_split = whole_blocks
    timed.scheduler._prepare_for_flex()
    timed.warm_up()
    timed.answer("answer")
    timed.engine.add(request("long", LONG, 5))
    assert timed.scheduled()["long"] == block
