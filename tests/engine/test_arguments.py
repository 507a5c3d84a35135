"""How many GPUs an engine takes, by vLLM's own parser."""

import json
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM imports uses deprecated parts of Python and torch
    from vllm.engine import arg_utils
    from vllm.entrypoints.launchers import cli_args  # noqa: F401
    from vllm.usage.usage_lib import UsageContext

from deploy.engine.engine_args import GPU_SLOTS, EngineArgsError, EnginePlan, Ports, engine_command
from deploy.engine.engine_needs import EngineNeeds, needs_of
from deploy.engine.gpu_plan import UTILIZATION, Share
from scheduler.vllm.arguments import needs, parsed
from scheduler.workers import Role
from tests.deploy.fake_gpus import h100s

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


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("share", [Share(h100s(2)), Share(h100s(1), 0.45, 2)], ids=["two GPUs", "shared"])
def test_the_command_line_of_a_gpu_engine_is_one_that_vllm_takes(role: Role, share: Share) -> None:
    plan = EnginePlan(
        model="owner/name",
        served_name="name",
        local=False,
        build="cuda",
        role=role,
        policy="mlfq",
        policy_options={"quantum_steps": "8"},
        share=share,
        user_args=("-tp", str(len(share.gpus))),
    )
    argv = engine_command(plan, Ports(8101, 8102), "python").argv
    args = parsed(argv[argv.index("--model") :])
    assert (args.port, args.tensor_parallel_size) == (8101, len(share.gpus))
    assert args.gpu_memory_utilization == pytest.approx(share.utilization or UTILIZATION)
    assert args.additional_config["evenhand"]["policy"] == "mlfq"
    assert (args.kv_transfer_config is None) == (role is Role.BOTH)


@pytest.mark.slow
def test_the_program_is_asked_in_a_process_of_its_own() -> None:
    assert needs_of(["-tp", "2"]) == EngineNeeds(gpus=2)
    with pytest.raises(EngineArgsError, match="unrecognized arguments: --tensor-paralel-size=2"):
        needs_of(["--tensor-paralel-size=2"])


@pytest.mark.parametrize(
    ("name", "gib", "slots"),
    [
        ("NVIDIA H100 80GB HBM3", 80, 1024),
        ("NVIDIA H200", 141, 1024),
        ("NVIDIA B200", 180, 1024),
        ("NVIDIA A100-SXM4-80GB", 80, 256),
        ("NVIDIA L4", 22, 256),
    ],
)
def test_an_engine_has_at_least_the_slots_that_are_assumed_before_it_says(
    monkeypatch: pytest.MonkeyPatch, name: str, gib: int, slots: int
) -> None:
    """And those that docs/gpus.md names. From then on the gateway goes by the running engine."""
    device = SimpleNamespace(
        get_device_total_memory=lambda: gib * 2**30,
        get_device_name=lambda: name,
        is_tpu=lambda: False,
        is_cpu=lambda: False,
        is_xpu=lambda: False,
    )
    monkeypatch.setattr(arg_utils, "current_platform", device)
    _, most = arg_utils.EngineArgs.get_batch_defaults(1)
    assert most[UsageContext.OPENAI_API_SERVER] == slots >= GPU_SLOTS
