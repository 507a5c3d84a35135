"""How late an event loop is: told to the part of a millisecond, whatever its own timers are good for."""

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import pytest
import uvloop

from loadtest.client.watch import Watch
from tests.server.conftest import eventually


async def watched(busy_s: float, kernel: bool) -> list[float]:
    """What is noted around one standstill of the loop."""
    late: list[float] = []
    async with Watch(late, kernel=kernel):
        await eventually(lambda: len(late) >= 3)
        until = perf_counter() + busy_s
        while perf_counter() < until:
            pass
        count = len(late)
        await eventually(lambda: len(late) > count)
    return late


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("kernel", [True, False], ids=["the kernel's timer", "the loop's timer"])
def test_a_loop_that_stands_still_is_late_by_as_much_at_every_tick_of_it(
    run: Callable[[Coroutine[Any, Any, list[float]]], list[float]], kernel: bool
) -> None:
    late = run(watched(0.2, kernel))
    assert max(late) >= 0.18
    assert len([one for one in late if one > 0.01]) >= 9  # of ten ticks


def test_an_idle_loop_is_not_late_by_its_timers_millisecond() -> None:
    """The best of many looks, since a machine that does something else makes any one late."""

    async def idle() -> float:
        late: list[float] = []
        async with Watch(late):
            await eventually(lambda: len(late) >= 40)
        return min(late)

    assert uvloop.run(idle()) < 0.0005
