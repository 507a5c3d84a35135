"""How many GPUs an engine takes, by vLLM's own parser."""

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM imports uses deprecated parts of Python and torch
    from vllm.engine import arg_utils
    from vllm.entrypoints.launchers import cli_args  # noqa: F401
    from vllm.usage.usage_lib import UsageContext

from deploy.engine.engine_args import GPU_SLOTS, EngineArgsError, EnginePlan, Ports, engine_command
from deploy.engine.engine_needs import EngineNeeds, needs_of
from deploy.machine.gpu_plan import UTILIZATION, GpuPlanError, Share
from deploy.machine.gpus import Gpu, find_gpus
from deploy.serve.preflight import check, gpu_plan, worker_roles
from deploy.settings import ServeSettings
from scheduler.vllm.arguments import needs, parsed
from scheduler.workers import Role
from tests.deploy.fake_gpus import H100, FakeNvml, cuda_machine, h100s

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


def seen(gpus: Sequence[Gpu], chosen: str | None = None, **nvml: Any) -> tuple[Gpu, ...]:
    """What a process sees of these GPUs with this CUDA_VISIBLE_DEVICES."""
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    return find_gpus(environ, Path("/nowhere"), FakeNvml(gpus, **nvml)).gpus


MACHINES = {
    "1 GPU": seen(h100s(1)),
    "4 GPUs": seen(h100s(4)),
    "8 GPUs": seen(h100s(8)),
    "3 MIG slices": seen(h100s(1), slices={0: ["MIG-a", "MIG-b", "MIG-c"]}),
    # By NVML alone: it has no /dev/nvidia0.
    "WSL2": seen([replace(H100, name="NVIDIA RTX PRO 6000")]),
    "4 UUIDs of 8": seen(h100s(8), "GPU-h6,GPU-h1,GPU-h3,GPU-h0"),
}
WORKERS: list[dict[str, int]] = [
    {},
    {"worker_count": 2},
    {"worker_count": 4},
    {"worker_count": 8},
    {"prefill_workers": 1, "decode_workers": 1},
    {"prefill_workers": 1, "decode_workers": 2, "worker_count": 1},
]


@pytest.mark.parametrize(
    ("args", "each"),
    [
        ([], 1),
        (["-tp", "2"], 2),
        (["-pp=2"], 2),
        (["--tensor_parallel_size=2", "-pcp", "2"], 4),
        (["-tp=4", "-n", "2"], 2),
        (["-tp", "8"], 8),
        (["-dp", "2"], None),
    ],
    ids=str,
)
def test_on_every_machine_each_engine_gets_its_world_size_or_a_reason(
    args: list[str], each: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = json.dumps(needs(parsed(args)) | {"utilization": None})
    for gpus, workers in itertools.product(MACHINES.values(), WORKERS):
        machine = cuda_machine(gpus)
        settings = ServeSettings(model=str(tmp_path), engine_args=args, **workers)  # type: ignore[arg-type]
        engines = list(worker_roles(settings))
        cut = any(gpu.is_slice for gpu in gpus)
        if each is None or (each > 1 and (cut or each * len(engines) > len(gpus))):
            with pytest.raises(EngineArgsError if each is None else GpuPlanError):
                check(settings, machine, tmp_path, lambda asked: told)
            continue
        plan = gpu_plan(settings, machine, [check(settings, machine, tmp_path, lambda asked: told)])
        assert list(plan.shares) == engines
        assert {len(share.gpus) for share in plan.shares.values()} == {each}
        given = Counter(gpu.id for share in plan.shares.values() for gpu in share.gpus)
        assert given.keys() <= {gpu.id for gpu in gpus}
        assert max(given.values()) == (1 if each * len(engines) <= len(gpus) else math.ceil(len(engines) / len(gpus)))
        assert all(share.sharers == given[share.gpus[0].id] for share in plan.shares.values())
        assert any("idle" in remark for remark in plan.remarks) == (len(given) < len(gpus))


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
