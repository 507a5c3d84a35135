"""A long-lived task that fails is seen, and goes on."""

import asyncio

import pytest

from loadtest.virtual_loop import VirtualLoop
from server.background import LONGEST_PAUSE_S, STEADY_S, Background
from tests.server.conftest import eventually, over_fake


def test_a_task_that_fails_is_told_and_started_again_with_growing_pauses(
    virtual_loop: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    loop = virtual_loop.get_loop()
    assert isinstance(loop, VirtualLoop)
    background, starts = Background(loop.time, first_pause_s=1.0), list[float]()

    async def work() -> None:
        starts.append(loop.time())
        if len(starts) == 2:
            return
        if len(starts) < 9:
            raise KeyError("lost")
        await asyncio.sleep(1e6)

    async def main() -> None:
        task = background.start("work", work)
        await asyncio.sleep(200.0)
        assert len(starts) == 9
        assert background.problems() == {}, "it has run for long enough"
        await Background.stop(task)

    virtual_loop.run(main())
    pauses = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0] and LONGEST_PAUSE_S == 30.0
    assert "KeyError" in caplog.text and "it returned" in caplog.text


def test_a_failure_is_shown_for_a_while(virtual_loop: asyncio.Runner) -> None:
    loop = virtual_loop.get_loop()
    background = Background(loop.time)

    async def main() -> None:
        background.failed("disk", "full")
        assert background.problems() == {"disk": "full"}
        await asyncio.sleep(STEADY_S + 1)
        assert background.problems() == {}

    virtual_loop.run(main())


async def test_a_task_that_was_stopped_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()
    task = background.start("work", lambda: asyncio.sleep(1e6))
    await asyncio.sleep(0)
    await Background.stop(task)
    assert task.cancelled() and not background.problems() and not caplog.records


async def test_a_probe_that_meets_a_bug_goes_on_and_ready_says_so() -> None:
    async with over_fake() as (gateway, _):
        fleet = gateway.server.fleet
        member = fleet.members["worker-0"]
        sound, member.breaker = member.breaker, None  # type: ignore[assignment]  # a bug
        gateway.server.fleet.put(member, type(member.state).DOWN)
        await eventually(gateway.server.background.problems, "the probe has failed")
        told = (await gateway.ask("/ready", method="GET")).json()
        assert "AttributeError" in told["failing"]["probe worker-0"]
        member.breaker = sound
        await eventually(fleet.ready, "the probe goes on")
