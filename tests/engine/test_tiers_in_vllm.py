"""Service tiers inside an unpatched vLLM scheduler: who is displaced, what a step holds, and that no token is lost."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest.bench.batch.loads import Size, bursts, short
from loadtest.bench.batch.scheduler_only import ModelFreeEngine
from loadtest.bench.batch.work import ALONE, TIERS, Outcome, Scenario, Way
from loadtest.bench.plugin.driven import DrivenEngine, StepClock, build_scheduler, expected, request
from loadtest.simulator.costmodel import PRESETS

pytestmark = pytest.mark.engine


def driven(folder: Path, *, is_async: bool = False, policy: str = "fcfs", **sizes: int) -> DrivenEngine:
    clock = StepClock()
    scheduler = build_scheduler(folder, policy, is_async=is_async, clock=clock, **sizes)
    return DrivenEngine(scheduler, is_async=is_async, clock=clock)


def told(engine: DrivenEngine) -> tuple[float, float]:
    """Flex tokens that were displaced, and computed again, of all engines of this process."""
    registry = engine.scheduler.registry
    names = ("flex_displaced_tokens_total", "flex_recomputed_tokens_total")
    displaced, recomputed = (registry.get_sample_value(f"evenhand_engine_{name}") or 0.0 for name in names)
    return displaced, recomputed


def scheduled(output: Any) -> set[str]:
    return set(output.num_scheduled_tokens)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "vtc", "gittins"])
def test_every_answer_is_whole_however_often_flex_is_displaced_or_held(
    hollow_model: Path, policy: str, is_async: bool
) -> None:
    rng = random.Random(3)
    engine = driven(hollow_model, is_async=is_async, policy=policy, slots=4, step_tokens=64, blocks=40)
    wanted: dict[str, tuple[int, int]] = {}
    for number in range(40):
        name, sizes = f"r{number}", (rng.randint(1, 120), rng.randint(1, 30))
        wanted[name] = sizes
        tier = rng.choice(("flex", "flex", "default", "priority"))
        engine.add(request(name, *sizes, tenant=rng.choice("ab"), tier=tier))
        for _ in range(rng.randint(0, 12)):
            if engine.scheduler.has_requests():
                engine.step()
    engine.run()
    assert engine.answers == {name: expected(name, *sizes) for name, sizes in wanted.items()}


def test_a_full_batch_of_flex_makes_room_at_the_next_step(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=2)
    engine.add(*(request(f"f{number}", 20, 100, tier="flex") for number in range(3)))
    for _ in range(5):
        engine.step()
    engine.add(request("d", 20, 3))
    before = told(engine)
    output = engine.step()
    assert output is not None and "d" in scheduled(output)
    displaced, recomputed = (after - then for after, then in zip(told(engine), before, strict=True))
    assert displaced > 20 and not recomputed
    engine.run()
    assert engine.finished[0] == "d"
    displaced, recomputed = (after - then for after, then in zip(told(engine), before, strict=True))
    assert 0 < recomputed < displaced  # the last block was not full, so the prefix cache does not have it


def test_a_flex_prompt_stops_when_somebody_comes(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=4, step_tokens=64)
    engine.add(request("f", 1000, 5, tier="flex"))
    first = engine.step()
    assert first is not None and scheduled(first) == {"f"}
    engine.add(request("d", 300, 5))
    output = engine.step()
    assert output is not None and scheduled(output) == {"d"}
    engine.run()
    assert engine.finished == ["d", "f"]


def test_memory_is_taken_from_flex_for_a_head_that_lacks_it(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=8, step_tokens=512, blocks=41)
    engine.add(*(request(f"f{number}", 150, 60, tier="flex") for number in range(4)))
    for _ in range(4):
        engine.step()
    engine.add(request("d", 300, 4))
    output = engine.step()
    assert output is not None and "d" in scheduled(output)
    engine.run()
    assert set(engine.finished) == {"d", "f0", "f1", "f2", "f3"}


def test_one_flex_prompt_at_a_time_is_read_over_several_steps(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=8, step_tokens=128)
    engine.add(request("d", 20, 60), *(request(f"f{number}", 400, 5, tier="flex") for number in range(4)))
    while engine.scheduler.has_requests():
        engine.step()
        unread = [live for live in engine.scheduler.running if live.num_computed_tokens < live.num_prompt_tokens]
        assert len(unread) <= 1
    assert [name for name in engine.finished if name != "d"] == ["f0", "f1", "f2", "f3"]


@pytest.mark.parametrize("policy", ["srpt", "gittins"])
def test_flex_does_not_displace_flex_for_a_prompt_that_may_not_start_yet(hollow_model: Path, policy: str) -> None:
    engine = driven(hollow_model, policy=policy, slots=2, step_tokens=128)
    engine.add(request("d", 20, 3), request("decodes", 20, 400, tier="flex"))
    for _ in range(8):
        engine.step()
    engine.add(request("reads", 2000, 300, tier="flex"))
    engine.step()
    engine.add(request("short", 20, 1, tier="flex"))
    while any(live.request_id == "reads" and live.num_computed_tokens < 2000 for live in engine.scheduler.running):
        engine.step()
        assert {live.request_id for live in engine.scheduler.running} == {"decodes", "reads"}
    engine.run()
    assert set(engine.finished) == {"d", "decodes", "reads", "short"}


def test_several_short_flex_prompts_start_in_one_step(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=8, step_tokens=128)
    engine.add(*(request(f"f{number}", 20, 5, tier="flex") for number in range(4)))
    output = engine.step()
    assert output is not None and scheduled(output) == {"f0", "f1", "f2", "f3"}


def test_flex_does_not_start_in_memory_that_others_had_a_moment_ago(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=8, step_tokens=2048, blocks=101)
    engine.add(request("long", 1000, 3), request("short", 20, 400), request("f", 800, 3, tier="flex"))
    while "long" not in engine.finished:
        engine.step()
    output = engine.step()
    assert output is not None and scheduled(output) == {"short"}
    before, again_before = engine.scheduler.clock.now, told(engine)[1]
    while "f" not in engine.finished:
        engine.step()
    assert 2.0 < engine.scheduler.clock.now - before < 60.0
    engine.run()
    assert told(engine)[1] == again_before


def test_flex_starts_in_an_empty_engine_whatever_others_had_lately(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=8, step_tokens=2048, blocks=101)
    engine.add(request("long", 1200, 3), request("f", 1200, 3, tier="flex"))
    engine.run(60)
    assert engine.finished == ["long", "f"]


def test_the_reserve_keeps_flex_moving_under_saturation(hollow_model: Path) -> None:
    engine = driven(hollow_model, slots=2)
    engine.add(request("f", 10, 4, tier="flex"))
    for number in range(60):
        engine.add(request(f"d{number}", 10, 4))
    engine.run()
    assert 2 < engine.finished.index("f") < 40


@pytest.mark.slow
def test_interactive_requests_keep_their_first_tokens_beside_a_batch(hollow_model: Path) -> None:
    """On the work clock of `evenhand bench batch`, with a short burst."""
    size, rng = Size(6.0, 1), random.Random(5)
    people = [call for call in bursts(rng, size) if call.at_s < 6.0]

    def ran(way: Way) -> Outcome:
        engine = ModelFreeEngine(hollow_model, way, PRESETS["gpu-7b"])
        return Scenario(engine, way, people, short(random.Random(6), size), 16.0).run()

    alone, both = ran(ALONE), ran(TIERS)
    assert both.ttft_p99_s <= 1.4 * alone.ttft_p99_s
    assert len(both.firsts) == len(alone.firsts) and len(both.gaps) == len(alone.gaps)  # all have ended
    assert both.batch_tokens > 0.3 * alone.people_tokens
    assert both.again < 0.05
