"""Two real vLLM engines with two places for adapters each, and six adapters: each answer is its own adapter's."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch
from safetensors.torch import save_file

from deploy.engine.engine_args import EXECUTOR, SCHEDULER
from deploy.model.model import TINY_CONFIG
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.iterations.in_process_engine import chaotic_model
from server.fleet.adapters import RUNTIME_UPDATES
from tests.server.conftest import Running, eventually, serving
from tests.server.test_admin import ADMIN_KEY, admin

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BASE = "tiny"
KEPT = 2  # adapters that an engine keeps
NAMES = [f"adapter{number}" for number in range(6)]
SETTINGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "4",
    "--block-size",
    "32",
]
LORA = ["--enable-lora", "--max-loras", f"{KEPT}", "--max-cpu-loras", f"{KEPT}", "--max-lora-rank", "8"]
PLUGIN = ["--scheduler-cls", SCHEDULER, "--additional-config", '{"evenhand":{"policy":"fcfs"}}']


def write_adapter(folder: Path, seed: int, rank: int = 8) -> Path:
    """An adapter in PEFT's format, large enough to change every answer."""
    seeded = torch.Generator().manual_seed(seed)
    width, heads = int(TINY_CONFIG["hidden_size"]), int(TINY_CONFIG["num_attention_heads"])
    queries = heads * int(TINY_CONFIG["head_dim"])
    weights = {}
    for layer in range(int(TINY_CONFIG["num_hidden_layers"])):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=seeded) / width**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(queries, rank, generator=seeded)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(folder / name, seed)
    write_adapter(folder / "wide", 99, rank=16)
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    model = chaotic_model(tmp_path_factory.mktemp("model"))
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", RUNTIME_UPDATES: "True"}
    with ExitStack() as stack:
        urls = []
        for _ in range(2):
            url = f"http://127.0.0.1:{(port := free_port())}"
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
            command += ["--host", "127.0.0.1", "--model", str(model), "--served-model-name", BASE]
            command += ["--distributed-executor-backend", EXECUTOR, *SETTINGS, *LORA, *PLUGIN]
            own = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}  # for what the plug-in says
            stack.enter_context(running(command, os.environ | env | own, f"{url}/health"))
            urls.append(url)
        yield urls


@asynccontextmanager
async def over(engines: list[str], folder: Path) -> AsyncIterator[Running]:
    adapters = {name: {"model": BASE, "path": str(folder / name)} for name in NAMES}
    async with serving(*engines, adapters=adapters, admin_key=ADMIN_KEY, probe_s=0.1, slots=4) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready(BASE)) == 2)
        yield gateway


def question(model: str, number: int, **more: Any) -> dict[str, Any]:
    ids = [(number * 7919 + index * 104_729) % 40_000 + 100 for index in range(20 + 5 * number)]
    return {"model": model, "prompt": ids, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | more


async def alone(engine: str, folder: Path) -> dict[tuple[str, int], str]:
    """What an engine says with one adapter and one request at a time."""
    said = {}
    async with httpx2.AsyncClient(base_url=engine, timeout=120) as client:
        for name in NAMES:
            loaded = {"lora_name": name, "lora_path": str(folder / name)}
            assert (await client.post("/v1/load_lora_adapter", json=loaded)).status_code == 200
            for number in range(3):
                answer = await client.post("/v1/completions", json=question(name, number))
                said[name, number] = answer.json()["choices"][0]["text"]
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code == 200
    return said


async def test_six_adapters_move_between_two_engines_and_each_answers_as_itself(
    engines: list[str], folder: Path
) -> None:
    expected = await alone(engines[0], folder)
    assert len(set(expected.values())) == len(expected)
    async with over(engines, folder) as gateway:
        members = gateway.server.fleet.members.values()
        await eventually(lambda: {member.site.most for member in members} == {KEPT}, "they say how many they keep")
        work = [(NAMES[(turn * 5 + number) % 6], number) for turn in range(8) for number in range(3)]
        most = 0

        async def ask(name: str, number: int) -> str:
            nonlocal most
            reply = await gateway.ask("/v1/completions", question(name, number))
            assert reply.status == 200, reply.body
            most = max(most, *(len(member.site.loaded) for member in members))
            return str(reply.json()["choices"][0]["text"])

        said = await asyncio.gather(*(ask(*each) for each in work))
        assert {each: text for each, text in zip(work, said, strict=True)} == {each: expected[each] for each in work}
        assert most <= KEPT and gateway.server.adapters.unloads
        listed = (await gateway.ask("/v1/models", method="GET")).json()["data"]
        assert {entry["id"]: entry.get("parent") for entry in listed} == {BASE: None, **dict.fromkeys(NAMES, BASE)}


async def test_an_adapter_that_moves_answers_from_its_new_files_which_are_read_once(
    engines: list[str], folder: Path, tmp_path: Path
) -> None:
    async with over(engines, folder) as gateway:

        async def said(name: str) -> str:
            reply = await gateway.ask("/v1/completions", question(name, 1))
            assert reply.status == 200, reply.body
            return str(reply.json()["choices"][0]["text"])

        before, other = await said(NAMES[0]), await said(NAMES[1])
        assert before != other
        moved = tmp_path / "moved"
        shutil.copytree(folder / NAMES[1], moved)
        put = await admin(gateway, "PUT", f"/adapters/{NAMES[0]}", {"model": BASE, "path": str(moved)})
        assert put.status == 200 and "loaded" in put.json()["asked"].values(), put.body
        assert await said(NAMES[0]) == other
        shutil.rmtree(moved)
        assert [await said(NAMES[0]) for _ in range(2)] == [other, other]


async def test_what_vllm_says_of_one_that_does_not_fit_is_one_sentence(engines: list[str], folder: Path) -> None:
    async with over(engines, folder) as gateway:
        for name, words in (
            ("wide", "LoRA rank 16 is greater than max_lora_rank 8"),
            ("none", "it finds no adapter at"),
        ):
            put = await admin(gateway, "PUT", f"/adapters/{name}", {"model": BASE, "path": str(folder / name)})
            assert put.status == 400 and words in put.error["message"], put.body
            assert "\n" not in put.error["message"] and "stack trace" not in put.error["message"]
        assert (await gateway.ask("/v1/completions", question(NAMES[0], 0))).status == 200
        assert (await gateway.ask("/v1/completions", question(BASE, 0, stream=True))).status == 200
