"""An engine that answers and does not compute is told from one that is idle, slow or busy."""

from deploy.engine.pulse import Pulse

PATIENCE_S = 60.0


def page(requests: int, steps: int | None = None, tokens: int = 0) -> str:
    lines = [f'vllm:num_requests_running{{engine="0"}} {requests}.0', f"vllm:generation_tokens_total {tokens}.0"]
    return "\n".join(lines + ([] if steps is None else [f"evenhand_engine_steps_total {steps}.0"]))


def test_requests_and_no_step_for_too_long_is_a_hang() -> None:
    pulse = Pulse(0.0)
    pulse.read(page(2, steps=10), 5.0)
    pulse.read(page(2, steps=10), 60.0)
    assert not pulse.hangs(64.0, PATIENCE_S)
    assert pulse.hangs(66.0, PATIENCE_S)


def test_without_requests_nothing_hangs_and_the_time_counts_from_their_arrival() -> None:
    pulse = Pulse(0.0)
    pulse.read(page(0, steps=10), 5.0)
    pulse.read(page(0, steps=10), 500.0)
    assert not pulse.hangs(501.0, PATIENCE_S)
    pulse.read(page(1, steps=10), 510.0)
    assert not pulse.hangs(560.0, PATIENCE_S)
    assert pulse.hangs(571.0, PATIENCE_S)


def test_an_engine_whose_steps_take_long_is_given_ten_of_its_longest() -> None:
    pulse = Pulse(0.0)
    pulse.read(page(1, steps=1), 0.0)
    pulse.read(page(1, steps=2), 20.0)
    assert pulse.longest_s == 20.0
    assert not pulse.hangs(200.0, PATIENCE_S)
    assert pulse.hangs(221.0, PATIENCE_S)


def test_an_engine_that_counts_no_steps_is_not_judged_while_it_has_requests() -> None:
    pulse = Pulse(0.0)
    pulse.read(page(1, tokens=7), 0.0)  # perhaps it reads a prompt of a million tokens
    pulse.read(page(1, tokens=7), 1000.0)
    assert not pulse.hangs(1000.0, PATIENCE_S)
    assert pulse.read(page(1, tokens=8), 1001.0)
