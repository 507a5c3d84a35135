"""Whatever the policy, a real engine gives token for token the greedy answers of stock vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest.bench.iterations.environment import ENVIRONMENT
from loadtest.bench.iterations.in_process_engine import chaotic_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POLICIES = ("fcfs", "mlfq", "vtc", "gittins")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chaotic_model(tmp_path_factory.mktemp("chaotic"))


def answers(model: Path, combination: str, *policies: str) -> Any:
    """What an engine answered, by policy; in a process of its own, for vLLM does not bear two starts in one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.answers", str(model), combination, *policies],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("combination", ["memory_scarce", "drafted_by_ngram", "two_adapters"])
def test_answers_are_those_of_stock_vllm_token_for_token(model: Path, combination: str) -> None:
    wanted = answers(model, combination, "stock")["stock"]["answers"]
    seen = answers(model, combination, *POLICIES)
    assert len({str(answer) for answer in wanted.values()}) == len(wanted) >= 17
    assert {policy: ours["answers"] for policy, ours in seen.items()} == dict.fromkeys(POLICIES, wanted)
    assert seen["mlfq"]["preemptions"]["policy"] > 0
    if combination == "memory_scarce":
        assert all(ours["preemptions"]["memory"] > 0 for ours in seen.values())
