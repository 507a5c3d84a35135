"""`evenhand bench batch`: what it asks for, how it counts, and which figures it calls met."""

import argparse
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from loadtest.bench.batch import command
from loadtest.bench.batch.goals import Figure, Goal, Scene, table
from loadtest.bench.batch.loads import CHAT, JOBS, PEOPLE, Size, mooncake
from loadtest.bench.batch.work import ALONE, BATCH_ONLY, Made, Outcome, Scenario, Way, capped
from loadtest.call import TraceCall


def test_bursts_are_fifteen_times_as_dense_as_calms() -> None:
    calls = list(PEOPLE["bursts"](Random(1), Size(90.0, 2)))
    burst = [call for call in calls if int(call.at_s / 90.0) % 2 == 0]
    assert len(burst) == pytest.approx(2 * 90 * 15, rel=0.1) and len(calls) - len(burst) == pytest.approx(180, rel=0.3)
    assert {call.prompt_tokens for call in calls} == {512}
    assert sum(call.output_tokens for call in calls) / len(calls) == pytest.approx(128, rel=0.1)


@pytest.mark.parametrize("name", PEOPLE)
def test_interactive_requests_come_in_order_and_follow_from_the_seed(name: str) -> None:
    size = Size(20.0, 1, rate=2.0, length=0.5)
    calls = list(PEOPLE[name](Random(3), size))
    assert calls == list(PEOPLE[name](Random(3), size)) != list(PEOPLE[name](Random(4), size))
    assert [call.at_s for call in calls] == sorted(call.at_s for call in calls)
    assert len({call.id for call in calls}) == len(calls) > 50


def test_a_trace_of_chats_is_sent_at_its_times_half_as_fast(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 18:15:{second:02}.5000000,{100 + second},{second + 1}\n" for second in range(40))
    (tmp_path / CHAT).write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    calls = list(PEOPLE["azure"](Random(1), Size(10.0, 1, traces=tmp_path)))
    assert [round(b.at_s - a.at_s, 6) for a, b in zip(calls, calls[1:], strict=False)] == [2.0] * (len(calls) - 1)
    assert len(calls) == 10 and calls[1].prompt_tokens == calls[0].prompt_tokens + 1


@pytest.mark.parametrize("name", JOBS)
def test_jobs_never_end_and_fit_the_context(name: str) -> None:
    drawn = list(islice(JOBS[name](Random(1), Size(1.0, 1)), 600))
    assert all(0 < job.prompt_tokens + job.output_tokens <= 8192 for job in drawn)
    assert all(job.prompt_tokens == len(job.prompt) for job in drawn)


def test_long_jobs_that_begin_alike_come_together() -> None:
    beginnings = [tuple(job.prompt[:512]) for job in islice(mooncake(Random(1), Size(1.0, 1)), 512)]
    changes = sum(a != b for a, b in zip(beginnings, beginnings[1:], strict=False))
    assert changes == len(set(beginnings)) - 1


class Toy:
    """An engine that makes one token a second for each of the first few requests, in their order."""

    class Count:
        def __init__(self) -> None:
            self.flex: set[str] = set()
            self.computed, self.again = 200, 3

        def forget(self, name: str) -> None:
            self.flex.discard(name)

    def __init__(self, slots: int) -> None:
        self.count = self.Count()
        self.slots, self.clock, self.most = slots, 0.0, 0
        self.held: deque[list[object]] = deque()

    def now(self) -> float:
        return self.clock

    def skip_to(self, at_s: float) -> None:
        self.clock = max(self.clock, at_s)

    def add(self, call: TraceCall, *, flex: bool) -> None:
        assert flex == (call.id in self.count.flex)
        self.held.append([call.id, call.output_tokens])
        self.most = max(self.most, len(self.count.flex))

    def step(self) -> list[Made]:
        self.clock += 1.0
        made = []
        for each in islice(self.held, self.slots):
            each[1] -= 1  # type: ignore[operator]
            made.append(Made(str(each[0]), 1, not each[1]))
        self.held = deque(each for each in self.held if each[1])
        return made

    def is_busy(self) -> bool:
        return bool(self.held)

    def waiting(self) -> int:
        return max(0, len(self.held) - self.slots)


def asked(name: str, at_s: float, tokens: int) -> TraceCall:
    return TraceCall(name, at_s, "people", [1], 1, tokens)


def jobs() -> Iterator[TraceCall]:
    while True:
        yield asked("job", 0.0, 2)


def ran(way: Way, slots: int = 2) -> Outcome:
    people = [asked("a", 0.0, 3), asked("b", 4.0, 2), asked("late", 9.5, 4)]
    return Scenario(Toy(slots), way, people, jobs(), 10.0).run()  # type: ignore[arg-type]


def test_a_scenario_waits_for_slow_requests_and_counts_tokens_of_its_time_only() -> None:
    alone = ran(ALONE)
    assert (list(alone.firsts), alone.people_tokens, alone.batch_tokens) == ([1.0, 1.0, 1.0], 5, 0)
    assert len(alone.gaps) == 2 + 1 + 3  # the last answer's too
    batch = ran(BATCH_ONLY)
    assert (batch.firsts, batch.people_tokens, batch.batch_tokens) == ([], 0, 20)
    assert batch.again == pytest.approx(0.015)


def test_a_cap_holds_so_many_of_the_batch_at_a_time() -> None:
    toy = Toy(4)
    Scenario(toy, capped(1), [], jobs(), 10.0).run()  # type: ignore[arg-type]
    assert toy.most == 1
    assert ran(capped(1), slots=4).batch_tokens == 10


def outcome(ttft_s: float, gap_s: float, people: int, batch: int) -> Outcome:
    return Outcome([ttft_s], [gap_s], people, batch, 10.0, 0.06)


def test_figures_stand_beside_their_goals() -> None:
    alone, full, endless = outcome(0.2, 0.05, 400, 0), outcome(0, 0, 0, 1000), outcome(0, 0, 0, 1600)
    scene = Scene([alone], [full], [endless])
    ways = {"ours": [outcome(0.22, 0.07, 390, 540)], "other": [outcome(0.8, 0.05, 400, 300)]}
    ttft, gap, total, slack, again = scene.figures("here", "ours", ways)
    assert (ttft.measured, ttft.met, ttft.beside) == ("1.10", True, {"other": "4.00"})
    assert (gap.measured, gap.met) == ("1.40", False)
    assert (total.measured, total.met) == ("2.33", None)
    assert (slack.measured, slack.met, slack.beside) == ("0.72", False, {"other": "0.40"})
    assert (again.measured, again.met) == ("6.00 %", False)
    page = table([ttft, gap, total])
    assert "| ≤ 1.2 | 2.2 (cap), 7.7 (priority) | 1.10 | other: 4.00 | met |" in page
    assert "**missed**" in page and page.count("\n") == 4


def test_of_several_runs_the_median_counts_and_the_spread_is_shown() -> None:
    goal = Goal(most=2.0, unit=" ms")
    assert (goal.told([1.0, 1.5, 3.0]), goal.met([1.0, 1.5, 3.0])) == ("1.50 ms (1.00–3.00)", True)
    assert Goal().met([1.0]) is None and Goal(least=1.0).met([0.5]) is False


def test_what_is_not_known_is_refused_and_a_section_may_stand_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--sections", "scheduler,sofa"])) == 2
    assert "not 'sofa'" in capsys.readouterr().err
    monkeypatch.setitem(command.SECTIONS, "lines", lambda args, progress: [Figure("f", "here", "1", "≤ 2", "", True)])  # type: ignore[arg-type]
    assert command.run(parser.parse_args(["--sections", "lines"])) == 0
    assert "| f | here | ≤ 2 |  | 1 |  | met |" in capsys.readouterr().out
