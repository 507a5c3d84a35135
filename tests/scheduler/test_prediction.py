"""Placement by prediction: pure choices from what is known of a few engines."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.forecast import EngineForecast, Fleet, Reading, late
from scheduler.objectives import Objectives
from scheduler.prediction import Asked, HandOver, Prospect, choose
from scheduler.step_cost import StepCost, pairs_of

COST = StepCost(0.01, 60e-6, 40e-6, 25e-9, 0.0, 0.0)
HANDOVER = HandOver((0.01, 1e-6), (0.005, 0.0))
TIGHT, LOOSE = Objectives(2.0, 0.0135), Objectives(2.0, 0.1)


def engine(**how: float) -> EngineForecast:
    return EngineForecast(assumed=COST, **how)  # type: ignore[arg-type]


def answering(
    forecast: EngineForecast, answers: int, context_tokens: float = 1000.0, now: float = 0.0, limit_s: float = inf
) -> EngineForecast:
    for _ in range(answers):
        forecast.begins(forecast.expects(context_tokens, tpot_limit_s=limit_s), now)
    return forecast


def asked(prompt_tokens: int, objectives: Objectives, *, splittable: bool = True) -> Asked:
    return Asked(prompt_tokens, 200.0, objectives, 6000.0, splittable)


def test_idle_engines_take_a_request_whole() -> None:
    choice = choose(asked(6000, TIGHT), [Prospect(engine()), Prospect(engine(), rank=1)], HANDOVER, 0.0)
    assert choice is not None and choice.reader == choice.writer == 0
    assert choice.ttft_s == pytest.approx(6000 * 60e-6 + 3 * 0.01, rel=0.1) and choice.risk < 0.01


@pytest.mark.parametrize("objectives", [TIGHT, LOOSE], ids=["tight", "loose"])
def test_a_long_prompt_is_read_where_it_holds_up_nobody_and_written_there_if_prompts_are_read_elsewhere(
    objectives: Objectives,
) -> None:
    busy = answering(engine(), 20)
    busy.sends_prompt("before", 12_000, 0.0, life_s=2.0)
    busy.has_read("before", 0.7)
    choice = choose(asked(12_000, objectives), [Prospect(busy), Prospect(engine(), rank=1)], HANDOVER, 0.8)
    assert choice is not None and (choice.reader, choice.writer) == (1, 1)
    assert choice.risk < 0.2 and choice.ttft_s < 2.0


@pytest.mark.parametrize(
    ("objectives", "writer"), [(TIGHT, 0), (LOOSE, 1)], ids=["tight", "loose: a hand-over gains nothing"]
)
def test_a_long_prompt_is_read_where_prompts_are_read_and_written_where_answers_are(
    objectives: Objectives, writer: int
) -> None:
    writes, reads = answering(engine(), 3, now=0.7, limit_s=objectives.tpot_s), engine()
    reads.sends_prompt("before", 12_000, 0.0, life_s=2.0)
    reads.has_read("before", 0.75)
    choice = choose(asked(12_000, objectives), [Prospect(writes), Prospect(reads, rank=1)], HANDOVER, 0.8)
    assert choice is not None and (choice.reader, choice.writer) == (1, writer)
    assert choice.risk < 0.2 and choice.ttft_s < 2.0


def test_nothing_is_handed_over_for_the_sake_of_answers_that_may_take_as_long_as_they_like() -> None:
    writes, reads = answering(engine(), 3), engine()
    prospects = [Prospect(writes), Prospect(reads, rank=1)]
    choice = choose(asked(12_000, LOOSE), prospects, HandOver((0.0, 0.0), (0.0, 0.0)), 0.8)
    assert choice is not None and choice.reader == choice.writer


def test_sides_that_had_better_be_taken_are_taken_though_one_request_gains_nothing_by_it() -> None:
    writes, reads = engine(), engine()
    writes.sends_prompt("before", 6000, 0.0, life_s=2.0)  # else it would do all of it

    def choice(worth: float, *, had_better_read: bool = True) -> tuple[int, int]:
        prospects = [Prospect(writes), Prospect(reads, rank=0.5, had_better_read=had_better_read)]
        chosen = choose(asked(6000, TIGHT), prospects, HANDOVER, 0.0, worth)
        assert chosen is not None
        return chosen.reader, chosen.writer

    assert choice(0.0) == (1, 1) and choice(0.5) == (1, 0)
    assert choice(0.5, had_better_read=False) == (1, 1), "where both of them are to write, neither is kept free"


def test_a_prompt_goes_past_a_reader_whose_queue_would_make_it_late() -> None:
    reader = engine()
    for number in range(6):
        reader.sends_prompt(number, 8000, 0.0, life_s=2.0)
    choice = choose(asked(8000, LOOSE), [Prospect(answering(engine(), 5)), Prospect(reader, rank=1)], HANDOVER, 0.0)
    assert choice is not None and choice.reader == 0


def test_what_is_cached_is_not_read_elsewhere() -> None:
    prospects = [Prospect(answering(engine(), 5), cached_tokens=11_900), Prospect(engine(), rank=1)]
    choice = choose(asked(12_000, TIGHT), prospects, HANDOVER, 0.0)
    assert choice is not None and (choice.reader, choice.writer) == (0, 0)


def test_fixed_roles_and_unfit_requests_are_kept_to() -> None:
    reads = Prospect(engine(), whole=False, fetches=False)
    writes = Prospect(engine(), rank=1, reads=False)
    choice = choose(asked(6000, TIGHT), [reads, writes], HANDOVER, 0.0)
    assert choice is not None and choice.writer == 1
    choice = choose(asked(6000, TIGHT, splittable=False), [reads, writes], HANDOVER, 0.0)
    assert choice is not None and (choice.reader, choice.writer) == (1, 1)
    assert choose(asked(6000, TIGHT, splittable=False), [reads], HANDOVER, 0.0) is None


def test_without_objectives_nothing_is_at_risk_and_short_times_decide() -> None:
    late = engine()
    late.sends_prompt("long", 50_000, 0.0, life_s=2.0)
    choice = choose(asked(1000, Objectives(30.0, inf)), [Prospect(late), Prospect(engine(), rank=1)], HANDOVER, 0.0)
    assert choice is not None and (choice.reader, choice.writer) == (1, 1)


def test_full_memory_counts_as_waiting() -> None:
    full = answering(engine(kv_tokens=20_000), 4, context_tokens=4900.0)
    choice = choose(asked(6000, LOOSE), [Prospect(full), Prospect(engine(kv_tokens=20_000), rank=1)], HANDOVER, 0.0)
    assert choice is not None and choice.writer == 1


@pytest.mark.parametrize("attended_s", [0.0, 5e-7], ids=["linear", "attention_counts"])
def test_a_forecast_learns_how_fast_its_engine_reads_and_writes(attended_s: float) -> None:
    true = StepCost(0.05, 4e-3, 9e-3, 0.0, 0.0, attended_s)  # a small model on a CPU, assumed to be a GPU
    forecast, now = EngineForecast(chunk_tokens=256), 0.0

    def seconds(tokens: int) -> float:
        return true.prompt_s(tokens, pairs_of(tokens)) + max(1.0, -(-tokens // 256)) * true.fixed_s

    for number in range(60):
        tokens = 200 + 137 * (number % 11)
        forecast.sends_prompt(number, tokens, now, life_s=5.0)
        now += seconds(tokens)
        forecast.has_read(number, now)
        stay = forecast.expects(tokens + 10)
        forecast.begins(stay, now)
        last = now + 20 * true.decode_s(1, 0.0)
        forecast.ended(stay, last, last, 21)
        now = last + 0.5
    for tokens in (512, 4096):
        assert forecast.first_token_s(Reading.of(tokens), now) == pytest.approx(seconds(tokens), rel=0.05)
    rest = Reading(256, pairs_of(256, 3840))  # a prompt of which the beginning is cached
    expected = true.prompt_s(*rest) + true.fixed_s
    assert forecast.first_token_s(rest, now) == pytest.approx(expected, rel=0.1)
    now += 1000.0  # the habit of reading prompts is forgotten
    assert forecast.pace(100.0, 0.0, now, more=1).tpot_s == pytest.approx(true.decode_s(1, 0.0), rel=0.1)


def test_an_engine_that_wrote_answers_only_knows_from_another_what_prompts_cost() -> None:
    true = StepCost(0.02, 3e-4, 1e-3, 0.0, 0.0, 1e-7)
    fleet = Fleet()
    reads, writes = (EngineForecast(chunk_tokens=512, fleet=fleet) for _ in range(2))
    for number in range(100):
        now, tokens = 10.0 * number, 100 + 50 * (number % 40)
        reads.sends_prompt(number, tokens, now, life_s=5.0)
        reads.has_read(number, now + true.prompt_s(tokens, pairs_of(tokens)) + -(-tokens // 512) * true.fixed_s)
        stay = writes.expects(tokens)
        writes.begins(stay, now)
        last = now + 50 * true.decode_s(1, 0.0)
        writes.ended(stay, last, last, 51)
    prompt = Reading.of(3000)
    expected = true.prompt_s(*prompt) + 6 * true.decode_s(0, 0.0)
    assert writes.first_token_s(prompt, 1e6) == pytest.approx(expected, rel=0.1)


def test_an_answer_more_makes_others_late_only_where_a_step_with_it_takes_longer_than_they_may() -> None:
    """However many tokens they have left: a step that is longer by less than their room is in time each time. A step
    that is not is too long until one of the answers has ended."""

    def writing(context_tokens: float, answers: int = 2) -> float:
        one = answering(engine(), answers, 0.0, limit_s=0.0135)
        return one.misses(Reading(), context_tokens, 200.0, 0.0).writing

    assert writing(60_000.0) == 0.0
    for answers in (2, 5):
        room_s, slower_s = 0.0135 - COST.decode_s(answers, 0.0), COST.decode_s(1, 160_000.0) - COST.fixed_s
        least_s = 0.05 * 0.0135
        too_long_s = (slower_s - room_s + least_s) * 200.0 / (answers + 1)
        chunk_s = COST.prompt_s(2048 - answers, 0.0)
        assert writing(160_000.0, answers) == pytest.approx(answers * late(0.0, too_long_s, least_s, chunk_s, 200.0))


def test_answers_that_are_still_to_begin_are_held_up_by_what_is_not_read_by_then() -> None:
    def held_up(due_at: float) -> float:
        one = engine()
        one.expects(0.0, tpot_limit_s=0.02, due_at=due_at)
        return one.misses(Reading.of(10_000.0), 0.0, 20.0, 0.0).reading  # of 0.6 s

    assert held_up(0.0) > 0.8 > 0.3 > held_up(0.55) and held_up(0.7) == 0.0


def test_answers_whose_prompts_are_read_here_are_held_up_by_those_behind_and_not_by_those_before() -> None:
    def more(before: int, behind: int) -> float:
        """What one more prompt does to an answer between two others."""
        one = engine()
        one.sends_prompt("before", before, 0.0, life_s=2.0)
        stay = one.expects(0.0, tpot_limit_s=0.02, due_at=-1.0)  # it should have begun
        one.sends_prompt("own", 10, 0.0, life_s=2.0)
        one.reads_itself(stay)
        one.sends_prompt("behind", behind, 0.0, life_s=2.0)
        return one.misses(Reading.of(10_000.0), 0.0, 20.0, 0.0).reading

    assert more(40_000, 0) > 0.8 and more(0, 40_000) < 0.1


def test_a_first_token_says_nothing_of_prompts_that_were_sent_after_its_own() -> None:
    forecast = engine()
    for name, silent in (("unseen before", True), ("seen", False), ("unseen behind", True)):
        forecast.sends_prompt(name, 1000, 0.0, life_s=2.0, silent=silent)
    forecast.has_read("seen", 0.2)
    assert forecast.unread(0.2).tokens == 1000


def test_an_engine_of_which_nothing_was_seen_is_taken_to_be_as_the_others() -> None:
    fleet = Fleet()
    for _ in range(20):
        fleet.costs.learn(5.0, (1.0, 1000.0, 0.0, 0.0, 0.0, 5e5))
    fresh = EngineForecast(fleet=fleet)
    fresh.look_around()
    assert fresh.first_token_s(Reading.of(1000), 0.0) == pytest.approx(5.0, rel=0.1)


def test_long_prompts_have_dear_chunks() -> None:
    forecast = answering(EngineForecast(chunk_tokens=512), 5, 0.0, limit_s=0.05)
    risk = forecast.misses(Reading.of(200_000.0), 0.0, 100.0, 0.1).reading
    assert risk > 1.0  # the chunks of the first 50,000 tokens alone would be within the objective


SECONDS = st.floats(0.0, 10.0)


@given(st.floats(-10.0, 10.0), SECONDS, SECONDS, st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), st.floats(1.0, 1000.0))
def test_a_longer_stall_never_makes_it_likelier_that_an_answer_is_on_time(
    behind_s: float, stall_s: float, more_s: float, room_s: float, chunk_s: float, left: float
) -> None:
    risk, higher = (late(behind_s, stall, room_s, chunk_s, left) for stall in (stall_s, stall_s + more_s))
    assert 0.0 <= risk <= higher <= 1.0


def test_an_answer_that_has_got_far_can_wait_and_one_that_is_late_has_nothing_to_lose() -> None:
    now, prompt = 2.0, 4000.0  # of 0.24 s
    far, fresh, stalled = (answering(engine(), 5, 0.0, at, 0.0135) for at in (0.0, 1.9, 1.9))
    for number in range(20):
        stalled.sends_prompt(number, 5000, 1.9, life_s=2.0)
    costs = [one.misses(Reading.of(prompt), 0.0, 100.0, now).reading for one in (far, fresh, stalled)]
    assert costs[0] < 0.1 * costs[1] and costs[2] < 0.1 * costs[1] and 1.0 < costs[1] < 5.0


def test_steps_within_the_objective_make_no_answer_late() -> None:
    small = answering(engine(chunk_tokens=256), 5, 0.0, limit_s=0.05)
    assert small.misses(Reading.of(50_000.0), 0.0, 100.0, 0.1).reading == 0.0
    assert answering(engine(), 5, 0.0, limit_s=0.05).misses(Reading.of(50_000.0), 0.0, 100.0, 0.1).reading > 2.0


def test_each_answer_is_judged_by_its_own_objective_and_many_by_some_of_them() -> None:
    mixed = answering(answering(engine(), 5, 0.0, limit_s=0.0135), 5, 0.0)
    alike = answering(engine(), 5, 0.0, limit_s=0.0135)
    assert mixed.misses(Reading.of(4000.0), 0.0, 100.0, 0.1).reading == pytest.approx(
        alike.misses(Reading.of(4000.0), 0.0, 100.0, 0.1).reading, rel=0.15
    )
    many = answering(engine(), 64, 0.0, limit_s=0.03)
    assert many.misses(Reading.of(20_000.0), 0.0, 100.0, 0.1).reading == pytest.approx(
        64 * late(-0.1 * (0.03 / 0.01256 - 1), 1.2, 0.03 - 0.01256, (2048 - 64) * 60e-6, 100.0), rel=0.05
    )


def test_what_comes_from_another_engine_waits_for_the_prompts_that_are_read_where_it_goes() -> None:
    writes = answering(engine(), 1)
    writes.sends_prompt("long", 30_000, 0.0, life_s=2.0)
    roles = [Prospect(engine(), whole=False, fetches=False), Prospect(writes, reads=False, whole=False)]
    choice = choose(asked(1000, LOOSE), roles, HANDOVER, 0.0)
    assert choice is not None and (choice.reader, choice.writer) == (0, 1) and choice.ttft_s > 1.8


def test_a_first_token_is_passed_on_unless_its_answer_would_then_be_late() -> None:
    """What follows waits for the KV, and counts as time per token."""
    roles = [
        Prospect(engine(), whole=False, fetches=False, passes_on=True),
        Prospect(engine(), reads=False, whole=False, passes_on=True),
    ]
    slow = HandOver((1.8, 0.0), (0.005, 0.0))
    passed_on, held, in_a_hurry, at_ease = (
        choose(asked(1000, objectives), roles, handover, 0.0)
        for objectives, handover in (
            (LOOSE, slow),
            (Objectives(10.0, 0.0135), slow),
            (Objectives(0.5, 0.0135), slow),
            (Objectives(inf, 1.0), HANDOVER),
        )
    )
    assert passed_on is not None and passed_on.passes_on and passed_on.ttft_s < 0.2
    assert held is not None and not held.passes_on and held.ttft_s > 1.8
    assert passed_on.tpot_s == pytest.approx(held.tpot_s + 1.795 / 200.0)
    assert in_a_hurry is not None and in_a_hurry.passes_on, "held back it would be late for certain"
    assert at_ease is not None and at_ease.passes_on, "nothing is late either way, and one token is earlier"


def test_the_wait_behind_a_first_token_that_was_passed_on_counts_against_the_answer() -> None:
    def held_up(waited_s: float) -> float:
        one = engine()
        stay = one.expects(0.0, tpot_limit_s=0.02)
        stay.waited_s = waited_s
        one.begins(stay, 0.0)
        return one.misses(Reading.of(1000.0), 0.0, 50.0, 0.5).reading

    assert held_up(0.45) > 2 * held_up(0.0)


def test_a_first_token_is_passed_on_only_between_engines_that_both_know_how_and_if_another_follows() -> None:
    def choice(reader: bool, writer: bool, answer: float = 200.0) -> bool:
        roles = [
            Prospect(engine(), whole=False, fetches=False, passes_on=reader),
            Prospect(engine(), reads=False, whole=False, passes_on=writer),
        ]
        chosen = choose(Asked(1000, answer, LOOSE, 6000.0), roles, HANDOVER, 0.0)
        assert chosen is not None
        return chosen.passes_on

    assert choice(True, True)
    assert not choice(True, False) and not choice(False, True) and not choice(True, True, 1.0)


def limited(answers: int, limit_s: float, *, limits_steps: bool = True) -> EngineForecast:
    """An engine that writes such answers, and takes longer over a prompt for their sake."""
    one = answering(engine(), answers, 0.0, limit_s=limit_s)
    one.limits_steps = limits_steps
    return one


def test_beside_answers_with_a_limit_a_prompt_is_read_in_as_many_steps_as_that_takes() -> None:
    prompt, step_s = Reading.of(4000.0), COST.decode_s(4, 0.0)  # of 0.24 s
    freely = limited(4, 0.02, limits_steps=False).first_token_s(prompt, 0.0)
    assert freely == pytest.approx(0.24 + (0.5 + 4000 / 2044) * step_s)
    within = limited(4, 0.02).first_token_s(prompt, 0.0)
    assert within == pytest.approx(0.24 + (0.5 + 0.24 / (1.2 * 0.02 - step_s)) * step_s)
    assert limited(4, 10.0).first_token_s(prompt, 0.0) == pytest.approx(freely), "a limit above what a chunk takes"
    assert limited(4, 1.5 * step_s).first_token_s(prompt, 0.0) == pytest.approx(freely), "prompts would stand still"


def test_how_long_limited_steps_are_is_learned_and_nothing_of_what_prompts_cost() -> None:
    """How many steps there were is not known. Late answers let them be twice as long as others, or nearly."""
    one, now = limited(4, 0.02), 0.0
    step_s, cost = COST.decode_s(4, 0.0), one.cost
    for number in range(100):
        one.sends_prompt(number, 4000, now, life_s=2.0)
        now += 0.24 + 0.24 / (0.04 - step_s) * step_s
        one.has_read(number, now)
        now += 1.0
    for number in range(1000, 1100):  # a prompt that takes one step says nothing of how long it might have been
        one.sends_prompt(number, 10, now, life_s=2.0)
        now += step_s + 10 * COST.prompt_token_s
        one.has_read(number, now)
    told = one.first_token_s(Reading.of(4000.0), now)
    assert told == pytest.approx(0.24 + (0.5 + 0.24 / (0.04 - step_s)) * step_s, rel=0.01)
    assert one.cost.prompt_token_s == pytest.approx(cost.prompt_token_s, rel=0.01)


def test_memory_is_waited_for_behind_those_that_come_to_the_engine_before() -> None:
    full = engine(kv_tokens=10_000)
    elsewhere = full.expects(8000.0, comes_at=1.0)
    assert full.memory_wait_s(4000.0, 2.0) == 0.0
    assert full.memory_wait_s(4000.0, 2.0, comes_at=0.9) == 0.0
    assert full.memory_wait_s(4000.0, 2.0, comes_at=1.1) == pytest.approx(0.5)
    for _ in range(2):
        full.stands_in_line(elsewhere)  # its prompt has been read, earlier than was expected
        assert full.memory_wait_s(4000.0, 2.0) == pytest.approx(0.5)
        assert full.memory_wait_s(4000.0, 2.0, comes_at=1.1) == pytest.approx(0.5)
    full.begins(elsewhere, 0.9)
    full.stands_in_line(elsewhere)
    assert full.memory_wait_s(4000.0, 2.0, comes_at=1.1) == pytest.approx(0.5), "it holds it as long as it runs"
    full.ended(elsewhere, 1.5)
    assert full.memory_wait_s(4000.0, 2.0, comes_at=2.0) == 0.0
    stay = full.expects(8000.0)
    full.reads_itself(stay)
    assert full.memory_wait_s(4000.0, 2.0) == pytest.approx(0.5)
    full.ended(stay, 0.1)
    unseen = full.expects(8000.0)
    full.begins(unseen, 0.2)  # nobody will see its first token, so it is taken to run at once
    full.reads_itself(unseen)
    full.ended(unseen, 0.3)
    assert full.memory_wait_s(4000.0, 2.0) == 0.0


def test_a_prompt_that_is_read_elsewhere_gets_memory_behind_those_that_are_there_sooner() -> None:
    asked = Asked(5000, 100.0, Objectives(10.0, 0.05), 1000.0)
    full = engine(kv_tokens=10_000)
    prospects = [Prospect(engine(), whole=False, fetches=False), Prospect(full, whole=False, reads=False)]
    alone = choose(asked, prospects, HANDOVER, 0.0)
    full.expects(8000.0, comes_at=1e3)
    before_another = choose(asked, prospects, HANDOVER, 0.0)
    full.expects(8000.0, comes_at=0.01)
    behind_another = choose(asked, prospects, HANDOVER, 0.0)
    assert alone is not None and before_another is not None and behind_another is not None
    assert before_another.ttft_s == alone.ttft_s < behind_another.ttft_s


def test_memory_comes_free_as_typical_answers_end_however_short_ones_own_is() -> None:
    full = engine(kv_tokens=10_000)
    full.reads_itself(full.expects(9000.0))
    waits = [
        choose(Asked(2000, output, Objectives(10.0, 0.05), 1000.0, 100.0), [Prospect(full)], HANDOVER, 0.0)
        for output in (2.0, 100.0)
    ]
    short, typical = waits
    assert short is not None and typical is not None
    assert short.ttft_s == pytest.approx(typical.ttft_s, rel=0.1)


def test_no_more_memory_comes_free_in_an_answers_life_than_there_is() -> None:
    full = engine(kv_tokens=10_000)
    for _ in range(3):
        full.reads_itself(full.expects(10_000.0))
    assert full.memory_wait_s(5000.0, 2.0) == pytest.approx(2.5 * 2.0)


def test_how_long_memory_is_waited_for_is_learned() -> None:
    """An answer that has been there for long is likely to have much, and to stay."""
    full = engine(kv_tokens=10_000)
    full.reads_itself(full.expects(8000.0))
    typical_s = full.memory_wait_s(4000.0, 2.0)
    for _ in range(200):
        full.learn_memory_wait(3.0 * typical_s, typical_s)
    assert full.memory_wait_s(4000.0, 2.0) == pytest.approx(3.0 * typical_s, rel=0.1)
    for _ in range(200):
        full.learn_memory_wait(60.0, 1e-6)
    assert full.memory_wait_s(4000.0, 2.0) < 3.0 * typical_s, "something else held it up"


def test_a_prompt_that_will_not_be_read_leaves_no_trace_in_the_queue() -> None:
    forecast = engine()
    forecast.sends_prompt("a", 5000, 0.0, life_s=1.0)
    forecast.has_read("a", 0.1, learn=False)
    stay = forecast.expects(100.0)
    forecast.ended(stay, 0.2)
    assert forecast.unread(0.2) == Reading() and forecast.answers == 0
