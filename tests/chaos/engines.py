"""The same blows over real vLLM engines, on a tiny model with large seeded weights that says anything."""

import sys
from dataclasses import replace
from pathlib import Path

from deploy.engine.engine_args import EXECUTOR
from deploy.engine.model import cache_folder, prepare_tiny
from loadtest.bench.bench_target import free_port
from loadtest.bench.in_process_engine import chaotic_model
from tests.chaos.greedy import Judge
from tests.chaos.load import Question, questions, told_by_a_model
from tests.chaos.plan import Blow
from tests.chaos.site import HEALTH, Program
from tests.chaos.workers import Setting

START_S = 400.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all of them share one core
}
# A busy machine may take seconds to answer a probe of an engine that is well.
PATIENT = HEALTH | {"probe_timeout_s": 3.0, "stall_s": 20.0}


def vllm(folder: Path, number: int, model: Path) -> Program:
    """vLLM's API server, stock."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "fake", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32"]
    command += ["--distributed-executor-backend", EXECUTOR]  # one process less to start
    return Program(f"vllm-{number}", command, folder / f"vllm-{number}.log", port, "/health", ENVIRONMENT, START_S)


def real_engines(seed: int, count: int) -> Setting:
    """So many vLLM engines; killed, stopped and told to end in turn. Answers are greedy and have a fixed length."""

    def workers(folder: Path) -> list[Program]:
        weights = folder / "model"
        weights.mkdir()
        model = chaotic_model(weights)
        return [vllm(folder, number, model) for number in range(count)]

    asked = [greedy(question) for question in questions(seed, least=60, most=300)]
    kinds = (Blow.TERM, Blow.KILL, Blow.STOP)
    judge = Judge(prepare_tiny(cache_folder(), lambda _: None))
    return Setting(
        workers,
        asked,
        kinds,
        probe_s=0.5,
        health=PATIENT,
        prefill_s=None,
        told=told_by_a_model,
        judge=judge,
        rests=True,
    )


def greedy(question: Question) -> Question:
    """Of a fixed length. The gateway asks for a stream's token ids; of an answer in one piece the client must."""
    body = question.body | {"temperature": 0, "ignore_eos": True}
    return replace(question, body=body if question.stream else body | {"return_token_ids": True})
