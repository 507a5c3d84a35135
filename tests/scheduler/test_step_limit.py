"""Prompts take as much of a step as the answers beside them can wait for."""

from functools import cache
from math import inf

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from scheduler.jobs import Job, Tier
from scheduler.objectives import NO_OBJECTIVES, Objectives
from scheduler.slack import StepLoad, StepModel
from scheduler.step_cost import pairs_of
from scheduler.step_limit import Batch, Limit, Prompt, StepLimit, UnderWay

STEP_TOKENS, TPOT_S = 2048, 0.05
FIXED_S, PROMPT_S, SEQUENCE_S, CONTEXT_S = 0.009, 60e-6, 40e-6, 25e-9  # of a step
CONTEXT = 1000
DUE_S = 0.85 * TPOT_S  # when the second token is to be there, for steps take longer than expected at times


PACE = Objectives(inf, TPOT_S)


def job(name: str, arrived_at: float = 0.0, objectives: Objectives = PACE, tier: Tier = Tier.DEFAULT) -> Job:
    return Job(name, "tenant", 1000, arrived_at, tier=tier, objectives=objectives)


def prompt(tokens: int) -> Prompt:
    return Prompt(tokens)


@cache
def model_of_steps(pair_s: float = 0.0) -> StepModel:
    model = StepModel()
    for at in range(400):
        load = StepLoad(0, at % 50, (at % 50) * 40 * (at % 7))
        load.add_prompt(700 * (at % 3), 1000 * (at % 5))
        seconds = FIXED_S + PROMPT_S * load.prompt_tokens + SEQUENCE_S * load.sequences + CONTEXT_S * load.context
        model.learn(load, seconds + pair_s * load.pairs)
    return model


def taught() -> StepLimit:
    return StepLimit(model_of_steps())


def step_s(limit: Limit, answers: int = 1) -> float:
    return FIXED_S + PROMPT_S * limit.prompt_tokens + SEQUENCE_S * answers + CONTEXT_S * CONTEXT


def asked(
    limit: StepLimit,
    answers: dict[Job, tuple[float, int]],
    prompts: list[tuple[Job, int]],
    now: float,
    under_way: UnderWay | None = None,
) -> Limit | None:
    """answers: when each had its first token, and how many it will have made by the end of what is under way."""
    for one, (first_at, _) in answers.items():
        limit.ended(one)
        limit.made(one, first_at)
    unread = [prompt(tokens) for _, tokens in prompts]
    batch = Batch([(one, made) for one, (_, made) in answers.items()], CONTEXT, unread)
    return limit.of(batch, now, STEP_TOKENS, under_way=under_way)


def test_a_step_ends_shortly_before_the_next_token_is_due() -> None:
    limit = asked(taught(), {job("a"): (10.0, 1)}, [(job("p"), 9000)], 10.0)
    assert limit is not None
    assert step_s(limit) == pytest.approx(DUE_S, rel=0.02)
    assert limit.step_tokens == limit.prompt_tokens + 1


def test_the_end_of_a_long_prompt_is_read_in_smaller_steps_than_its_beginning() -> None:
    pair_s, by, answer = 2 * PROMPT_S / 9000, StepLimit(model_of_steps(2 * PROMPT_S / 9000)), job("a")
    by.made(answer, 10.0)
    read: list[int] = []
    for before in (0, 9000):
        limit = by.of(Batch([(answer, 1)], CONTEXT, [Prompt(9000, before)]), 10.0, STEP_TOKENS)
        assert limit is not None
        assert step_s(limit) + pair_s * pairs_of(limit.prompt_tokens, before) == pytest.approx(DUE_S, rel=0.02)
        read.append(limit.prompt_tokens)
    begins, ends = read
    assert ends < 0.5 * begins
    beside = by.of(Batch([(answer, 1)], CONTEXT, [Prompt(20, 9000), prompt(9000)]), 10.0, STEP_TOKENS)
    assert beside is not None
    assert ends < beside.prompt_tokens < begins


def test_an_answer_that_is_ahead_may_be_held_up_and_the_tightest_one_decides() -> None:
    by, ahead, fresh = taught(), job("a"), job("b")
    # A tenth of a token ahead: the next one may take so much longer.
    alone = asked(by, {ahead: (10.0, 4)}, [(job("p"), 9000)], 10.0 + 2.9 * TPOT_S)
    assert alone is not None
    assert step_s(alone) == pytest.approx(DUE_S + 0.1 * TPOT_S, rel=0.02)
    both = asked(by, {ahead: (10.0, 4), fresh: (10.0 + 2.9 * TPOT_S, 1)}, [(job("p"), 9000)], 10.0 + 2.9 * TPOT_S)
    assert both is not None
    assert step_s(both, 2) == pytest.approx(DUE_S, rel=0.02)


def test_no_answer_waits_much_longer_than_its_objective_however_far_ahead_it_is() -> None:
    limit = asked(taught(), {job("a"): (10.0, 9)}, [(job("p"), 9000)], 10.0)  # a full step would be in time
    assert limit is not None
    assert step_s(limit) == pytest.approx(1.2 * TPOT_S, rel=0.02)


def test_prompts_go_on_even_if_answers_have_no_room_for_them() -> None:
    limit = asked(taught(), {job("a"): (10.0, 1)}, [(job("p"), 9000)], 10.0 + TPOT_S - FIXED_S - 2 * SEQUENCE_S)
    assert limit is not None
    assert limit.prompt_tokens == 16


def test_every_answer_is_held_to_its_own_objective() -> None:
    tight, loose = job("tight"), job("loose", objectives=Objectives(inf, 4 * TPOT_S))
    prompts = [(job("p"), 9000)]
    alone = asked(taught(), {loose: (10.0, 1)}, prompts, 10.0)
    beside = asked(taught(), {loose: (10.0, 1), tight: (10.0, 1)}, prompts, 10.0)
    assert alone is None
    assert beside is not None
    assert step_s(beside, 2) == pytest.approx(DUE_S, rel=0.02)
    careless = asked(taught(), {job("a", objectives=NO_OBJECTIVES): (10.0, 1), tight: (10.0, 1)}, prompts, 10.0)
    assert careless == beside


def test_one_that_no_prompt_could_keep_does_not_loosen_the_others_objective() -> None:
    impossible = job("b", objectives=Objectives(inf, 1.5 * FIXED_S))
    limit = asked(taught(), {impossible: (10.0, 1), job("a"): (10.0, 1)}, [(job("p"), 9000)], 10.0)
    assert limit is not None
    assert step_s(limit, 2) == pytest.approx(DUE_S, rel=0.02)


def test_where_nobody_has_an_objective_there_is_no_limit() -> None:
    answers = {job("a", objectives=NO_OBJECTIVES): (10.0, 1)}
    assert asked(taught(), answers, [(job("p", objectives=NO_OBJECTIVES), 9000)], 10.0) is None


def test_a_late_answer_is_held_up_for_longer_but_not_for_as_long_as_they_like() -> None:
    late = {job("a"): (10.0, 3)}
    limit = asked(taught(), late, [(job("p"), 9000)], 11.0)
    assert limit is not None
    assert step_s(limit) == pytest.approx(2.4 * TPOT_S, rel=0.02)
    beside = asked(taught(), late | {job("b"): (11.0, 1)}, [(job("p"), 9000)], 11.0)
    assert beside is not None
    assert step_s(beside, 2) == pytest.approx(DUE_S, rel=0.02)


@pytest.mark.parametrize(("tokens", "waits"), [(0.1, False), (4.9, False), (5.1, True)])
def test_an_answer_that_can_catch_up_within_five_tokens_does_so(tokens: float, *, waits: bool) -> None:
    step_alone_s = FIXED_S + SEQUENCE_S + CONTEXT_S * CONTEXT
    now = 10.0 + DUE_S - step_alone_s + tokens * (TPOT_S - step_alone_s)
    limit = asked(taught(), {job("a"): (10.0, 1)}, [(job("p"), 9000)], now)
    assert limit is not None
    if waits:
        assert step_s(limit) == pytest.approx(2.4 * TPOT_S, rel=0.02)
    else:
        assert limit.prompt_tokens == 16


def test_where_no_answer_runs_or_no_prompt_is_read_there_is_no_limit() -> None:
    by = taught()
    assert asked(by, {}, [(job("p"), 9000)], 10.0) is None
    assert asked(by, {job("a"): (10.0, 1)}, [], 10.0) is None


def test_nothing_is_limited_before_steps_are_known_or_where_the_objective_leaves_prompts_little() -> None:
    prompts = [(job("p"), 9000)]
    assert asked(StepLimit(StepModel()), {job("a"): (10.0, 1)}, prompts, 10.0) is None
    tight = job("a", objectives=Objectives(inf, 1.5 * FIXED_S))
    assert asked(taught(), {tight: (10.0, 1)}, prompts, 10.0) is None


def test_the_step_under_way_comes_first() -> None:
    by, answers, prompts = taught(), {job("a"): (10.0, 3)}, [(job("p"), 9000)]
    later = asked(by, answers, prompts, 10.1, UnderWay(10.1, StepLoad(200)))
    now = asked(by, answers, prompts, 10.1)
    assert later is not None
    assert now is not None
    # What the step under way computes, and its own time, is missing from the next one.
    missing_s = FIXED_S + 200 * PROMPT_S + SEQUENCE_S + CONTEXT_S * CONTEXT
    assert now.prompt_tokens - later.prompt_tokens == pytest.approx(missing_s / PROMPT_S, rel=0.03)


def test_answers_of_flex_limit_nothing() -> None:
    by = taught()
    assert asked(by, {job("f", tier=Tier.FLEX): (10.0, 1)}, [(job("p"), 9000)], 10.0) is None


@pytest.mark.parametrize("has_come", [True, False])
def test_kv_that_has_come_or_is_to_be_asked_for_has_its_token_beside_prompts_that_are_read(*, has_come: bool) -> None:
    by, answer, far = taught(), job("a"), job("far")
    by.made(answer, 10.0)
    batch = Batch([(answer, 1)], CONTEXT, [prompt(9000), prompt(100), prompt(8000)])
    if has_come:
        batch.answers.append((far, 0))
        batch.arrived = 1
    else:
        batch.expected.append(far)
        batch.asks = 1
    limit = by.of(batch, 10.0, STEP_TOKENS, tokens_each=3)
    assert limit is not None
    assert limit.step_tokens == limit.prompt_tokens + 3 * 2
    assert 100 + 2 * limit.each_tokens <= limit.prompt_tokens  # all prompts together leave it its tokens
    assert 100 + 2 * (limit.each_tokens + 1) > limit.prompt_tokens


def test_the_first_of_several_prompts_may_take_all_where_nobody_comes_with_its_kv() -> None:
    limit = asked(taught(), {job("a"): (10.0, 1)}, [(job("p"), 9000), (job("q"), 9000)], 10.0)
    assert limit is not None
    assert limit.each_tokens == limit.prompt_tokens


def test_the_second_token_is_due_after_a_first_one_that_was_made_elsewhere() -> None:
    by, here, handed = taught(), job("here"), job("handed")
    by.made(here, 10.0)
    by.made_elsewhere(handed, 10.0)
    limits = []
    for answer in ((here, 3), (handed, 2)):  # both clients have three tokens
        limits.append(by.of(Batch([answer], CONTEXT, [prompt(9000)]), 10.0 + 2 * TPOT_S, STEP_TOKENS))
    assert limits[0] == limits[1] is not None
    by.made(handed, 10.1)  # its second token does not move the first one
    assert by.of(Batch([(handed, 2)], CONTEXT, [prompt(9000)]), 10.0 + 2 * TPOT_S, STEP_TOKENS) == limits[0]


def test_a_second_token_is_waited_for_while_its_kv_is_on_the_way() -> None:
    by, handed = taught(), job("handed")
    by.made_elsewhere(handed, 10.0)
    batch = Batch([], 0, [prompt(9000)], expected=[handed])
    limit = by.of(batch, 10.0, STEP_TOKENS)
    assert limit is not None
    # The next step makes it at the earliest, beside a few tokens of the prompt.
    both_s = 2 * FIXED_S + PROMPT_S * (limit.prompt_tokens + 16)
    assert both_s == pytest.approx(DUE_S, rel=0.02)


def test_sequences_without_a_job_have_their_tokens_too() -> None:
    by, answer = taught(), job("a")
    by.made(answer, 10.0)
    limit = by.of(Batch([(answer, 1)], CONTEXT, [prompt(9000)], untracked=40), 10.0, STEP_TOKENS)
    assert limit is not None
    assert limit.step_tokens == limit.prompt_tokens + 41
    assert step_s(limit, 41) == pytest.approx(DUE_S, rel=0.02)


def test_an_engine_that_reads_whole_blocks_is_given_a_block() -> None:
    by, answer = StepLimit(model_of_steps(), 528), job("a")
    by.made(answer, 10.0)
    batch = Batch([(answer, 1)], CONTEXT, [prompt(9000), prompt(9000)], arrived=1)
    limit = by.of(batch, 10.0 + TPOT_S - 0.02, STEP_TOKENS)
    assert limit is not None
    assert (limit.prompt_tokens, limit.each_tokens) == (528, 528)


def test_of_steps_without_a_prompt_some_are_learned_from() -> None:
    by = taught()
    assert [by.learns_from(reads=False) for _ in range(16)].count(True) == 2
    assert all(by.learns_from(reads=True) for _ in range(5))


@given(
    made=st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(1, 200)), min_size=1, max_size=20),
    unread=st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
)
@example(made=[(7.51171875, 50)], unread=[1])
@example(made=[(7.517, 50)], unread=[9000])  # what is left would be 7 tokens
def test_prompts_get_what_the_tightest_answer_leaves_them_and_always_something(
    made: list[tuple[float, int]], unread: list[int]
) -> None:
    without_s = FIXED_S + SEQUENCE_S * len(made) + CONTEXT_S * CONTEXT
    until_s = [first_at + TPOT_S * (tokens - 0.15) - 10.0 - without_s for first_at, tokens in made]
    given_up_s = 5 * (without_s - TPOT_S)
    assume(all(abs(one - given_up_s) > 1e-3 for one in until_s))  # the model that is learned cannot tell there
    in_time_s, late_s = 1.2 * TPOT_S - without_s, 2.4 * TPOT_S - without_s
    room_s = min(min(max(0.0, one), in_time_s) if one > given_up_s else late_s for one in until_s)
    answers = {job(f"a{at}"): one for at, one in enumerate(made)}
    limit = asked(taught(), answers, [(job(f"p{at}"), tokens) for at, tokens in enumerate(unread)], 10.0)
    assert limit is not None
    assert limit.prompt_tokens == pytest.approx(max(16, room_s / PROMPT_S), rel=0.01, abs=2)
    assert limit.prompt_tokens + len(answers) <= limit.step_tokens < STEP_TOKENS
