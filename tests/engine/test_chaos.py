"""Real vLLM engines are told to end, killed and stopped under load, and no client can tell."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.chaos.engines import real_engines
from tests.chaos.workers import Chaos

# On an idle machine it takes a minute and a half, nearly all of it four starts of an engine.
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]


async def test_every_answer_is_greedy_token_for_token_while_engines_end_die_and_freeze() -> None:
    report = await Chaos(1, blows=3, clients=4, setting=real_engines(1, 2)).run()
    assert not report.seen.wrong, report.seen.wrong[:3]
    assert report.kinds == {"term": 1, "kill": 1, "stop": 1}
    assert report.failovers["failed"] == 0 and report.failovers["resumed"] >= 3, report.failovers
