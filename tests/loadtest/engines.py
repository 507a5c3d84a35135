"""A fake engine for commands that have an event loop of their own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.fake.faults import HEALTHY, Faults
from loadtest.simulator.costmodel import PRESETS


@contextmanager
def engine_in_a_thread(faults: Faults = HEALTHY, setup: EngineSetup | None = None) -> Iterator[FakeEngine]:
    """Runs while the block does, on a loop in another thread."""
    loop = asyncio.new_event_loop()
    engine = FakeEngine(setup or EngineSetup(cost=PRESETS["instant"]), faults=faults)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(engine.__aenter__(), loop).result(60)
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(engine.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
