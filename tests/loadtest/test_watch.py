"""How late an event loop is."""

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import pytest
import uvloop

from loadtest.client.watch import Watch
from tests.server.conftest import eventually


async def watched(busy_s: float) -> list[float]:
    """What is noted around one standstill of the loop."""
    late: list[float] = []
    async with Watch(late):
        await eventually(lambda: len(late) >= 3)
        until = perf_counter() + busy_s
        while perf_counter() < until:
            pass
        count = len(late)
        await eventually(lambda: len(late) > count)
    return late


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_loop_that_stands_still_is_late_at_every_tick(
    run: Callable[[Coroutine[Any, Any, list[float]]], list[float]],
) -> None:
    late = run(watched(0.2))
    assert max(late) >= 0.18
    assert len([one for one in late if one > 0.01]) >= 9  # of ten ticks
