"""A real vLLM that gets SIGTERM in the middle of answers: it aborts them, and the other engine goes on."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from dataclasses import replace

from tests.chaos.engines import real_engines
from tests.chaos.plan import Blow
from tests.chaos.workers import Chaos

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


async def test_a_real_engine_that_is_told_to_end_costs_nobody_an_answer() -> None:
    setting = replace(real_engines(1, count=2), kinds=(Blow.TERM,))
    report = await Chaos(1, blows=1, clients=6, setting=setting).run()
    assert not report.seen.wrong, report.seen.wrong[:3]
    assert report.failovers["failed"] == 0 and report.failovers["resumed"] >= 1
