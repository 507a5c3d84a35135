"""The same blows over real vLLM engines, on a tiny model with large seeded weights.

Stock vLLM is three processes: the API server, the EngineCore and the Worker, which computes; as `evenhand serve` starts
it on CPUs, EngineCore computes. Each process is struck on its own. While another one lives on, a failure comes in other
ways than a connection that breaks: an error event in a stream, an answer with status 500, or silence.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deploy.engine.engine_args import EXECUTOR, SHUTDOWN_S
from deploy.model.model import TINY_CONFIG, cache_folder, prepare_tiny
from loadtest.bench.bench_target import free_port
from loadtest.bench.random_model import write
from tests.chaos.greedy import Judge
from tests.chaos.load import CHAT, COMPLETIONS, Question, Told, questions, told_by_a_model
from tests.chaos.nursery import Forked, Nursery
from tests.chaos.plan import Blow, Part
from tests.chaos.site import HEALTH, Program
from tests.chaos.workers import Setting
from tests.server.conftest import Reply

Json = dict[str, Any]

START_S = 400.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all of them share one core
}
# A busy machine may take seconds to answer a probe of an engine that is well.
PATIENT = HEALTH | {"probe_timeout_s": 3.0, "stall_s": 10.0}


def vllm(folder: Path, number: int, model: Path, nursery: Nursery) -> Program:
    """vLLM's API server: every second one stock, with a Worker process of its own, the others as `evenhand serve` has
    them. All finish what runs when they are told to end, as those of `evenhand serve` do."""
    port = free_port()
    command = ["--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", str(SHUTDOWN_S)]
    command += ["--model", str(model), "--served-model-name", "fake", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32"]
    if number % 2:
        command += ["--distributed-executor-backend", EXECUTOR]
    return Forked(
        f"vllm-{number}", command, folder / f"vllm-{number}.log", port, "/health", start_s=START_S, nursery=nursery
    )


_WORD = re.compile(" [a-z]{2,}")


def words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are whole words: a text of them has no other token ids, so that it can be continued exactly from its
    text alone, as the text of a trained model can."""
    found = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        if _WORD.fullmatch(text) and tokenizer.encode(text, add_special_tokens=False).ids == [token]:
            found.append(token)
    return found


def real_engines(seed: int, count: int) -> Setting:
    """So many vLLM engines; killed, stopped and told to end in turn. Answers are greedy and have a fixed length."""
    tiny = prepare_tiny(cache_folder(), lambda _: None)
    nursery = Nursery(ENVIRONMENT, Path(os.devnull))

    def workers(folder: Path) -> list[Program]:
        weights = folder / "model"
        weights.mkdir()
        tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
        model = write(weights, TINY_CONFIG, says=words(tokenizer))
        nursery.log = folder / "nursery.log"
        return [vllm(folder, number, model, nursery) for number in range(count)]

    asked = [greedy(question) for question in questions(seed, count=12, least=60, most=300)]
    return Setting(
        workers,
        [*asked, *in_other_dialects()],
        (Blow.KILL, Blow.STOP, Blow.TERM),
        probe_s=0.5,
        health=PATIENT,
        prefill_s=None,
        told=told_in_any_dialect,
        judge=Judge(tiny),
        rests=True,
        parts=(Part.COMPUTES, Part.CORE, Part.SERVER, Part.COMPUTES),
        process_of=process_of,
        close=nursery.close,
    )


def greedy(question: Question) -> Question:
    """Of a fixed length. The gateway asks for a stream's token ids; of an answer in one piece the client must."""
    body = question.body | {"temperature": 0, "ignore_eos": True}
    return replace(question, body=body if question.stream else body | {"return_token_ids": True})


def in_other_dialects() -> list[Question]:
    """Answers of /v1/messages and /v1/responses, streams and whole ones."""
    asked = []
    for number, stream in enumerate((True, True, False)):
        text = f"Tell me all that you know of {number} seas, please."
        both = {"model": "fake", "temperature": 0, "stream": stream}
        turns = [{"role": "user", "content": text}]
        length = 100 + 60 * number
        asked += [
            Question("/v1/messages", both | {"max_tokens": length, "messages": turns}),
            Question("/v1/responses", both | {"max_output_tokens": length, "input": text, "ignore_eos": True}),
        ]
    return asked


def told_in_any_dialect(question: Question, reply: Reply) -> Told:
    """Text, token ids where they are told, end; and usage. AssertionError if it is ill-formed."""
    if question.path in (CHAT, COMPLETIONS):
        return told_by_a_model(question, reply)
    assert reply.status == 200, reply.body[:300]
    if question.path == "/v1/messages":
        answer = _message(reply) if question.stream else reply.json()
        parts, end = answer["content"], answer["stop_reason"]
    else:
        answer = _response(reply) if question.stream else reply.json()
        parts, end = answer["output"][0]["content"], answer["status"]
    prompt, output = answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return [["".join(part["text"] for part in parts), [], end], usage]


def _message(reply: Reply) -> Json:
    """A stream of one text as the message that it makes."""
    start, block, *deltas, stop, end, last = reply.events
    assert [one["type"] for one in (start, block, stop, end, last)] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert {(one["type"], one["index"]) for one in deltas} == {("content_block_delta", 0)}
    text = "".join(one["delta"]["text"] for one in deltas)
    content = [{"type": "text", "text": text}]
    return start["message"] | end["delta"] | {"content": content, "usage": start["message"]["usage"] | end["usage"]}


def _response(reply: Reply) -> Json:
    """A stream of one text as the response that it makes."""
    events = reply.events
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    created, going, item, part, *deltas, text_done, part_done, item_done, last = events
    assert [one["type"].removeprefix("response.") for one in (created, going, item, part)] == [
        "created", "in_progress", "output_item.added", "content_part.added",
    ]  # fmt: skip
    assert [one["type"].removeprefix("response.") for one in (text_done, part_done, item_done, last)] == [
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert {one["type"] for one in deltas} == {"response.output_text.delta"}
    assert len({one["response"]["id"] for one in (created, going, last)}) == 1
    assert len({one["item_id"] for one in (part, *deltas, text_done, part_done)} | {item["item"]["id"]}) == 1
    text = "".join(one["delta"] for one in deltas)
    assert text == text_done["text"] == part_done["part"]["text"]
    assert [item_done["item"]] == last["response"]["output"]
    response: Json = last["response"]
    return response


_COMPUTES = (b"VLLM::Worker", b"VLLM::EngineCore")  # the first of these that an engine has


def process_of(program: Program, part: Part) -> int:
    """The process of a vLLM that is this part, by the title that vLLM gives it. LookupError if there is none."""
    if part is Part.SERVER:
        return program.pid
    titles = _COMPUTES if part is Part.COMPUTES else _COMPUTES[1:]
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(name)) == program.pid:
                found[Path(f"/proc/{name}/cmdline").read_bytes()] = int(name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    for title in titles:
        for line, pid in found.items():
            if line.startswith(title):
                return pid
    raise LookupError(f"{program.name} has no process {titles}")
