"""How many GPUs an engine takes, by vLLM's own parser."""

import json
import warnings

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM imports uses deprecated parts of Python and torch
    from vllm.entrypoints.launchers import cli_args  # noqa: F401

from deploy.engine.engine_args import EngineArgsError
from deploy.engine.engine_needs import EngineNeeds, needs_of
from scheduler.vllm.arguments import needs, parsed

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], {"gpus": 1, "data_parallel": 1, "nodes": 1}),
        (["-tp", "2", "-pcp=2"], {"gpus": 4}),
        (["--tensor_parallel_size=4", "-n", "2", "-pp", "2"], {"gpus": 4, "nodes": 2}),
        (["-dp", "8", "-dpl", "4", "-tp", "2"], {"gpus": 8, "data_parallel": 8}),
        (["-dp", "4"], {"gpus": 4, "data_parallel": 4}),
        (["--distributed-executor-backend=ray", "-tp", "16"], {"gpus": None}),
        (["--gpu-memory-utilization", "0.5", "--enable-auto-tool-choice"], {"gpus": 1, "utilization": 0.5}),
    ],
)
def test_every_spelling_of_a_size_counts(args: list[str], told: dict[str, object]) -> None:
    found = needs(parsed(args))
    assert told.items() <= found.items()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_the_program_is_asked_in_a_process_of_its_own() -> None:
    assert needs_of(["-tp", "2"]) == EngineNeeds(gpus=2)
    with pytest.raises(EngineArgsError, match="unrecognized arguments: --tensor-paralel-size=2"):
        needs_of(["--tensor-paralel-size=2"])
