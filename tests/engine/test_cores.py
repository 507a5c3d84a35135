"""Real engines keep to their own cores, with every thread, whatever the KV connector does to its own."""

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("nixl", reason="NIXL is not installed")

from deploy.engine.engine_args import divide_cores
from deploy.machine.machine import look
from loadtest.bench.iterations.in_process_engine import chaotic_model
from tests.engine.halves import CHAT, serving

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ENGINES = 2


@pytest.mark.skipif(len(look(os.environ).cores) < ENGINES, reason="two engines need two cores not to share one")
@pytest.mark.parametrize(("prefill", "decode", "both"), [(1, 1, 0), (0, 0, 2)], ids=["apart", "two that do both"])
async def test_every_thread_keeps_to_its_engines_cores(prefill: int, decode: int, both: int, tmp_path: Path) -> None:
    own = [frozenset(cores) for cores in divide_cores(look(os.environ).cores, ENGINES)]
    (model := tmp_path / "chaotic").mkdir()
    with serving(chaotic_model(model), tmp_path, prefill, decode, both) as running:
        for _ in range(ENGINES):  # what a first request starts is there as well
            story = {"messages": [{"role": "user", "content": "Tell me a story. " * 40}], "max_tokens": 4}
            await running.ask(CHAT, story)
        found = running.cores()
        log = (tmp_path / "serve.log").read_text()
    assert sorted(sorted(engine.computing) for engine in found) == sorted(map(sorted, own))
    for engine in found:
        others = frozenset().union(*own) - engine.computing
        assert not any(where & others for where in engine.all)
    assert "may run on another engine's cores" not in log
