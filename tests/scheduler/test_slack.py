"""The time of a step is learned from steps, and flex takes what is left of the budget."""

import random
from math import inf

import pytest

from scheduler.slack import Headroom, Slack, StepLoad

TRUE = (0.009, 60e-6, 40e-6, 25e-9)  # seconds of a step as such, per prompt token, sequence and KV token


def seconds(load: StepLoad) -> float:
    constant, prompt, sequence, context = TRUE
    return constant + prompt * load.prompt_tokens + sequence * load.sequences + context * load.context


def drawn(rng: random.Random) -> StepLoad:
    sequences = rng.randint(0, 200)
    return StepLoad(rng.choice((0, 0, rng.randint(1, 2048))), sequences, sequences * rng.randint(100, 900))


def taught(steps: int = 400, noise: float = 0.0) -> Slack:
    rng, slack = random.Random(1), Slack()
    for _ in range(steps):
        load = drawn(rng)
        slack.model.learn(load, seconds(load) * rng.uniform(1 - noise, 1 + noise))
    return slack


def test_linear_steps_are_predicted() -> None:
    model, rng = taught().model, random.Random(2)
    for load in (drawn(rng) for _ in range(50)):
        assert model.predicted_s(load) == pytest.approx(seconds(load), rel=0.02)


def test_noise_and_a_pause_of_the_process_move_the_prediction_little() -> None:
    model = taught(noise=0.2).model
    model.learn(StepLoad(0, 10, 1000), 30.0)
    load = StepLoad(512, 64, 32_000)
    assert model.predicted_s(load) == pytest.approx(seconds(load), rel=0.25)


def test_steps_that_are_all_alike_teach_without_harm() -> None:
    slack, load = Slack(), StepLoad(0, 8, 4000)
    for _ in range(20_000):
        slack.model.learn(load, seconds(load))
    assert slack.model.predicted_s(load) == pytest.approx(seconds(load), rel=0.01)


@pytest.mark.parametrize("sequences", [0, 20, 100])
def test_a_step_with_flex_in_it_keeps_the_budget(sequences: int) -> None:
    slack = taught()
    others = StepLoad(0, 50, 25_000)
    contexts = [500] * sequences
    decoding, tokens = slack.room(others, contexts, 2048, [0.5, 0.05])
    assert decoding == sequences and tokens > 100
    step = StepLoad(tokens, 50 + decoding, 25_000 + 500 * decoding)
    assert 0.9 * 0.05 < seconds(step) <= 1.03 * 0.05


def test_who_has_no_objective_counts_as_four_empty_steps() -> None:
    slack, others = taught(), StepLoad(0, 50, 25_000)
    careless = slack.room(others, [], 2048, [inf])
    assert careless == slack.room(others, [], 2048) == slack.room(others, [], 2048, [inf, 0.5])
    assert careless < slack.room(others, [], 2048, [0.5])


def test_an_objective_that_no_step_keeps_does_not_stop_flex() -> None:
    slack, others = taught(), StepLoad(0, 50, 25_000)
    assert slack.room(others, [], 2048, [0.001, 0.05]) == slack.room(others, [], 2048, [0.05])
    assert slack.room(others, [], 2048, [0.001]) == slack.room(others, [], 2048)


def test_the_end_of_a_long_flex_prompt_takes_more_of_the_budget() -> None:
    slack, pair_s = Slack(), 20e-9
    for at in range(400):
        load = StepLoad(0, at % 50, 500 * (at % 50))
        load.add_prompt(700 * (at % 3), 3000 * (at % 5))
        slack.model.learn(load, seconds(load) + pair_s * load.pairs)
    others = StepLoad(0, 50, 25_000)
    _, begins = slack.room(others, [], 2048, [0.05])
    _, ends = slack.room(others, [], 2048, [0.05], before=10_000)
    step = StepLoad(0, 50, 25_000)
    step.add_prompt(ends, 10_000)
    assert 0 < ends < 0.5 * begins
    assert 0.9 * 0.05 < seconds(step) + pair_s * step.pairs <= 1.03 * 0.05


def test_where_others_fill_the_budget_flex_waits() -> None:
    slack = taught()
    assert slack.room(StepLoad(1500, 50, 25_000), [500] * 100, 2048, [0.05]) == (0, 0)


def test_alone_something_is_always_done() -> None:
    slack = taught()
    decoding, tokens = slack.room(StepLoad(), [500] * 100, 2048, [0.001])
    assert decoding == 100 and tokens > 0


def test_before_anything_is_known_the_step_s_tokens_are_the_only_bound() -> None:
    assert Slack().room(StepLoad(100, 10, 0), [1] * 5, 200) == (5, 85)


def test_memory_that_others_had_lately_is_left_to_them_for_a_while() -> None:
    headroom = Headroom()
    assert headroom.blocks == 0.0
    headroom.note(1000, 0.0)
    assert headroom.blocks == 0.0
    headroom.note(200, 1.0)
    assert 700.0 < headroom.blocks < 800.0
    left = []
    for step in range(2, 2000):
        headroom.note(200, step * 0.1)
        left.append(headroom.blocks)
    assert left == sorted(left, reverse=True) and left[-1] < 10.0


def test_headroom_is_never_negative_whatever_the_clock_does() -> None:
    rng, headroom = random.Random(4), Headroom()
    for _ in range(1000):
        headroom.note(rng.randrange(10_000), rng.uniform(-50.0, 50.0))
        assert headroom.blocks >= 0.0
