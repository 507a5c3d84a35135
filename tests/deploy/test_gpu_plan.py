"""GPUs x engines: each gets what it needs, nothing is given twice unless it is shared, and what is short is told."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.engine.engine_args import EngineArgsError
from deploy.engine.engine_needs import EngineNeeds, needs_of
from deploy.machine.gpu_lock import GpuLocks
from deploy.machine.gpu_plan import GpuPlanError, Need, plan_gpus, tensor_parallel
from deploy.machine.machine import GIB
from deploy.model.hub import HubWeights
from deploy.serve.preflight import Checked, PreflightError, check, gpu_plan
from deploy.serve.serving import claimed
from deploy.settings import ServeSettings
from tests.deploy.fake_gpus import H100, L4, answering, cuda_machine, h100s


def names(count: int) -> list[str]:
    return [f"worker-{index}" for index in range(count)]


@given(gpus=st.integers(1, 16), engines=st.integers(1, 16), each=st.integers(1, 8))
def test_every_engine_gets_what_it_needs_and_no_gpu_is_given_twice_unless_shared(
    gpus: int, engines: int, each: int
) -> None:
    try:
        plan = plan_gpus(h100s(gpus), names(engines), Need(each))
    except GpuPlanError:
        assert each > 1 and each * engines > gpus
        return
    assert list(plan.shares) == names(engines)
    given_out = [gpu.id for share in plan.shares.values() for gpu in share.gpus]
    assert all(len(share.gpus) == each for share in plan.shares.values())
    for gpu in h100s(gpus):
        users = [share for share in plan.shares.values() if gpu in share.gpus]
        assert all(share.sharers == len(users) for share in users)
        assert sum(share.utilization or 0.92 for share in users) <= (0.95 if users else 0)
    assert len(set(given_out)) == len(given_out) or each == 1
    idle = gpus - len(set(given_out))
    assert any("idle" in remark for remark in plan.remarks) == (idle > 0)


def test_gpus_of_one_engine_are_neighbours() -> None:
    plan = plan_gpus(h100s(4), names(2), Need(2))
    assert [share.ids for share in plan.shares.values()] == ["GPU-h0,GPU-h1", "GPU-h2,GPU-h3"]
    assert str(plan.shares["worker-1"]) == "GPUs 2, 3 (2 x NVIDIA H100 80GB HBM3)"
    assert plan.remarks == ()


def test_too_few_gpus_are_refused_with_a_way_out() -> None:
    with pytest.raises(GpuPlanError, match="4 engines of 2 GPUs need 8, and 4 are free here: use --workers 2"):
        plan_gpus(h100s(4), names(4), Need(2))
    with pytest.raises(GpuPlanError, match="an engine needs 2 GPUs, and 1 is free here: use a machine with more"):
        plan_gpus(h100s(1), names(1), Need(2))


def test_idle_gpus_are_told_with_what_would_use_them() -> None:
    (remark,) = plan_gpus(h100s(8), names(1), Need()).remarks
    assert "GPUs 1-7 are idle: --workers 8 runs 8 copies" in remark and "splits one copy across 8 GPUs" in remark
    (remark,) = plan_gpus(h100s(8), names(2), Need(2)).remarks
    assert remark == "GPUs 4-7 are idle: --workers 4 runs 4 copies of the model"
    (remark,) = plan_gpus([h100s(4)[number] for number in (0, 1, 3)], names(1), Need()).remarks
    assert remark.startswith("GPUs 1, 3 are idle: --workers 3")


def test_engines_that_share_a_gpu_share_its_memory_and_say_so() -> None:
    plan = plan_gpus([H100], names(2), Need())
    assert [share.utilization for share in plan.shares.values()] == [0.45, 0.45]
    assert "worker-0 and worker-1 share GPU 0" in plan.remarks[0]
    with pytest.raises(GpuPlanError, match=r"GPU 0 .*, 45% of its memory has room for 33.0: use fewer --workers"):
        plan_gpus([H100], names(2), Need(weights_bytes=40 * GIB))
    with pytest.raises(GpuPlanError, match=r"3% of its memory is too little .*3.0 GiB besides .*: use fewer --workers"):
        plan_gpus([H100], names(30), Need())
    own = plan_gpus([H100], names(2), Need(utilization=0.3))
    assert [share.utilization for share in own.shares.values()] == [0.3, 0.3]
    with pytest.raises(GpuPlanError, match="2 engines share .* 90% .*utilization=0.45"):
        plan_gpus([H100], names(2), Need(utilization=0.9))


def test_under_ray_an_engine_gets_all_that_there_is_for_it() -> None:
    assert plan_gpus(h100s(8), names(2), Need(None)).shares["worker-1"].ids == "GPU-h4,GPU-h5,GPU-h6,GPU-h7"


def test_a_gpu_in_use_is_left_alone_and_told_when_it_is_needed() -> None:
    busy = replace(H100, free_bytes=20 * GIB)
    free = replace(H100, id="GPU-h1", index=1)
    plan = plan_gpus([busy, free], names(1), Need())
    assert plan.shares["worker-0"].ids == "GPU-h1"
    assert "GPU 0 (NVIDIA H100 80GB HBM3) is left out: other programs use 60.0 GiB of its memory" in plan.remarks
    with pytest.raises(GpuPlanError, match=r"has 20.0 of 80.0 GiB free.*--gpu-memory-utilization=0.23"):
        plan_gpus([busy], names(1), Need())
    assert plan_gpus([busy], names(1), Need(utilization=0.2)).shares["worker-0"].ids == "GPU-h0"


def test_weights_that_do_not_fit_are_told_the_parallelism_that_holds_them() -> None:
    seventy = Need(weights_bytes=141 * 10**9)
    with pytest.raises(GpuPlanError, match=r"weights \(131.3 GiB\).*room for 70.6: .*--tensor-parallel-size=4"):
        plan_gpus(h100s(8), names(1), seventy)
    with pytest.raises(GpuPlanError, match=r"use a quantized or a smaller model \(4 such GPUs would hold this one\)"):
        plan_gpus(h100s(2), names(1), seventy)
    with pytest.raises(GpuPlanError, match="use a larger slice or a whole GPU"):
        plan_gpus([replace(H100, id="MIG-0")], names(1), seventy)
    assert plan_gpus(h100s(8), names(2), replace(seventy, gpus=4)).shares
    assert tensor_parallel(16 * 10**9, H100) == 1
    assert tensor_parallel(16 * 10**9, L4) == 1
    assert tensor_parallel(28 * 10**9, L4) == 2


def test_an_engine_cannot_span_mig_slices() -> None:
    slices = [replace(H100, id=f"MIG-{index}") for index in range(2)]
    assert plan_gpus(slices, names(2), Need()).shares["worker-1"].ids == "MIG-1"
    (remark,) = plan_gpus(slices, names(1), Need()).remarks
    assert "MIG-1 of GPU 0" in remark and "tensor-parallel" not in remark
    with pytest.raises(GpuPlanError, match="MIG"):
        plan_gpus(slices, names(1), Need(2))


def test_a_gpu_on_which_vllm_does_not_run_is_left_out() -> None:
    old = replace(H100, id="GPU-v", name="Tesla V100", capability=(7, 0))
    new = replace(H100, index=1)
    plan = plan_gpus([old, new], names(1), Need())
    assert plan.shares["worker-0"].ids == new.id
    (remark,) = plan.remarks
    assert "GPU 0 (Tesla V100) is left out: its compute capability is 7.0" in remark
    with pytest.raises(GpuPlanError, match="no GPU can be used: GPU 0"):
        plan_gpus([old], names(1), Need())


def model(folder: Path) -> str:
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    return str(folder)


@pytest.mark.parametrize(
    ("gpus", "workers", "needs", "expected"),
    [
        (1, {}, {}, ["GPU-h0"]),
        (8, {"worker_count": 8}, {}, [f"GPU-h{index}" for index in range(8)]),
        (4, {"worker_count": 2}, {"gpus": 2}, ["GPU-h0,GPU-h1", "GPU-h2,GPU-h3"]),
        (4, {"prefill_workers": 1, "decode_workers": 1}, {"gpus": 2}, ["GPU-h0,GPU-h1", "GPU-h2,GPU-h3"]),
        (8, {}, {"gpus": 8}, [",".join(f"GPU-h{index}" for index in range(8))]),
        (8, {}, {"gpus": 8, "nodes": 2}, [",".join(f"GPU-h{index}" for index in range(8))]),
        (2, {"gpus": "1"}, {}, ["GPU-h1"]),
        (4, {"gpus": "GPU-h3,0", "worker_count": 2}, {}, ["GPU-h3", "GPU-h0"]),
    ],
)
def test_the_plan_of_a_whole_machine(
    gpus: int, workers: dict[str, int], needs: dict[str, int], expected: list[str], tmp_path: Path
) -> None:
    settings = ServeSettings(model=model(tmp_path), engine_args=["--some-arg"], **workers)  # type: ignore[arg-type]
    machine = cuda_machine(h100s(gpus))
    checked = check(settings, machine, tmp_path, answering(**needs))
    assert [share.ids for share in gpu_plan(settings, machine, [checked]).shares.values()] == expected


def test_what_cannot_be_planned_is_refused_before_anything_starts(tmp_path: Path) -> None:
    machine = cuda_machine(h100s(2))
    settings = ServeSettings(model=model(tmp_path), engine_args=["-dp", "2"])
    with pytest.raises(EngineArgsError, match="use --workers 2"):
        check(settings, machine, tmp_path, answering(gpus=2, data_parallel=2))
    with pytest.raises(PreflightError, match="'7' is named twice or is not one of the GPUs here, which are 0, 1"):
        check(ServeSettings(model=model(tmp_path), gpus="0,7"), machine, tmp_path)
    with pytest.raises(PreflightError, match="named twice"):
        check(ServeSettings(model=model(tmp_path), gpus="0,0"), machine, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "args", "fits"),
    [
        ("bfloat16", [], False),
        ("float32", [], True),  # vLLM computes in half of it
        ("bfloat16", ["--quantization=fp8"], True),  # nobody knows how large
        ("bfloat16", ["--revision=v2"], True),  # vLLM fetches it by itself
    ],
)
def test_a_hubs_model_that_does_not_fit_is_refused_before_it_is_fetched(
    dtype: str, args: list[str], fits: bool, tmp_path: Path
) -> None:
    settings = ServeSettings(model="owner/large", engine_args=args)

    def weighing(name: str) -> HubWeights:
        assert name == "owner/large"
        return HubWeights(100 * GIB, dtype)

    def checked() -> Checked:
        return check(settings, cuda_machine(h100s(4)), tmp_path, answering(), weighing)

    if fits:
        assert checked().build == "cuda"
    else:
        with pytest.raises(GpuPlanError, match=r"weights \(100.0 GiB\).*--tensor-parallel-size=2"):
            checked()


def test_without_arguments_vllm_is_not_asked() -> None:
    def never(args: object) -> str:
        raise AssertionError("asked")

    assert needs_of([], never) == EngineNeeds()


HOLD = """
import sys
from pathlib import Path
from deploy.machine.gpu_lock import GpuLocks
from tests.deploy.fake_gpus import h100s
locks = GpuLocks(Path(sys.argv[1]))
print(len(locks.free(h100s(int(sys.argv[2])), shared=sys.argv[3] == "shared")), flush=True)
sys.stdin.read()
"""


def test_another_process_cannot_take_the_same_gpu_unless_both_share_it(tmp_path: Path) -> None:
    def holder(count: int, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(count), how]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    locks = GpuLocks(tmp_path)
    for how, left, left_to_sharers in (("alone", 1, 1), ("shared", 1, 2)):
        with holder(1, how) as other:
            assert other.stdout is not None and other.stdout.readline() == "1\n"
            assert len(locks.free(h100s(2), shared=True)) == left_to_sharers
            locks.close()
            assert len(locks.free(h100s(2))) == left
            locks.close()
            other.kill()  # however a holder ends, its GPUs are free again
        assert len(locks.free(h100s(2))) == 2
        locks.close()


def test_a_process_takes_gpus_that_others_have_left_and_no_more_than_it_needs(tmp_path: Path) -> None:
    machine = cuda_machine(h100s(2))
    settings = ServeSettings(model="m")
    first, second, third = (GpuLocks(tmp_path) for _ in range(3))
    checked = Checked("cuda", 1)
    assert [gpu.id for gpu in claimed(settings, machine, [checked], first).gpus][0] == "GPU-h0"
    assert [gpu.id for gpu in claimed(settings, machine, [checked], second).gpus] == ["GPU-h1"]
    with pytest.raises(GpuPlanError, match=r"Another evenhand process has GPU 0 \(.*, GPU 1 \("):
        claimed(settings, machine, [checked], third)
    first.close()
    assert claimed(settings, machine, [checked], third).gpus
    for locks in (first, second, third):
        locks.close()
