"""The same blows over real vLLM engines, on a tiny model with large seeded weights that says anything.

An engine is three processes: the API server, the EngineCore and the Worker, which computes. Each is struck on its own.
While another of them lives on, a failure comes in other ways than a connection that breaks: an error event in a stream,
an answer with status 500, or silence.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from deploy.engine.model import cache_folder, prepare_tiny
from loadtest.bench.bench_target import free_port
from loadtest.bench.in_process_engine import chaotic_model
from tests.chaos.greedy import Judge
from tests.chaos.load import CHAT, COMPLETIONS, Question, Told, questions, told_by_a_model
from tests.chaos.plan import Blow, Part
from tests.chaos.site import HEALTH, Program
from tests.chaos.workers import Setting
from tests.server.conftest import Reply

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
    """vLLM's API server, stock: with a Worker process of its own, as on GPUs."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "fake", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32"]
    return Program(f"vllm-{number}", command, folder / f"vllm-{number}.log", port, "/health", ENVIRONMENT, START_S)


def real_engines(seed: int, count: int) -> Setting:
    """So many vLLM engines; killed, stopped and told to end in turn. Answers are greedy and have a fixed length."""

    def workers(folder: Path) -> list[Program]:
        weights = folder / "model"
        weights.mkdir()
        model = chaotic_model(weights)
        return [vllm(folder, number, model) for number in range(count)]

    asked = [greedy(question) for question in questions(seed, least=60, most=300)]
    judge = Judge(prepare_tiny(cache_folder(), lambda _: None))
    return Setting(
        workers,
        [*asked, *in_other_dialects()],
        (Blow.KILL, Blow.STOP, Blow.TERM),
        probe_s=0.5,
        health=PATIENT,
        prefill_s=None,
        told=told_in_any_dialect,
        judge=judge,
        rests=True,
        parts=(Part.WORKER, Part.CORE, Part.SERVER, Part.WORKER),
        process_of=process_of,
    )


def greedy(question: Question) -> Question:
    """Of a fixed length. The gateway asks for a stream's token ids; of an answer in one piece the client must."""
    body = question.body | {"temperature": 0, "ignore_eos": True}
    return replace(question, body=body if question.stream else body | {"return_token_ids": True})


def in_other_dialects() -> list[Question]:
    """Whole answers of /v1/messages and /v1/responses."""
    text = "Tell me all that you know of the sea, please."
    both = {"model": "fake", "temperature": 0}
    return [
        Question("/v1/messages", both | {"max_tokens": 80, "messages": [{"role": "user", "content": text}]}),
        Question("/v1/responses", both | {"max_output_tokens": 80, "input": text, "ignore_eos": True}),
    ]


def told_in_any_dialect(question: Question, reply: Reply) -> Told:
    """Text, token ids where they are told, end; and usage. AssertionError if it is ill-formed."""
    if question.path in (CHAT, COMPLETIONS):
        return told_by_a_model(question, reply)
    assert reply.status == 200, reply.body[:300]
    answer = reply.json()
    parts = answer["content"] if question.path == "/v1/messages" else answer["output"][0]["content"]
    end = answer["stop_reason"] if question.path == "/v1/messages" else answer["status"]
    prompt, output = answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return [["".join(part["text"] for part in parts), [], end], usage]


_TITLES = {Part.CORE: "VLLM::EngineCore", Part.WORKER: "VLLM::Worker"}


def process_of(program: Program, part: Part) -> int:
    """The process of a vLLM that is this part, by the title that vLLM gives it. LookupError if there is none."""
    if part not in _TITLES:
        return program.pid
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            title = Path(f"/proc/{name}/cmdline").read_bytes()
            if title.startswith(_TITLES[part].encode()) and os.getpgid(int(name)) == program.pid:
                return int(name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise LookupError(f"{program.name} has no process {_TITLES[part]}")
