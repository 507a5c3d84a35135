import re
from pathlib import Path

import pytest

from deploy.engine.engine_log import STAGES, LogFile, cause, parse, shown, stage

# As vLLM 0.32 wrote them, from the start of the process to its first request, shortened at the right.
A_START = """\
/venv/vllm/entrypoints/openai/api_server.py:24: DeprecationWarning: `vllm.entrypoints.openai.api_server` is deprecated
(APIServer pid=6341) INFO 11-21 04:51:26 [api_utils.py:286] non-default args: {'host': '127.0.0.1', 'port': 48123}
(APIServer pid=6341) WARNING 11-21 04:51:26 [system_utils.py:255] Found ulimit of 20000 and failed to increase
(APIServer pid=6341) INFO 11-21 04:51:36 [model.py:733] Resolved architecture: LlamaForCausalLM
(APIServer pid=6341) WARNING 11-21 04:51:36 [vllm.py:1703] Enforce eager set, disabling JIT kernel warmup.
(EngineCore pid=6511) INFO 11-21 04:51:48 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'
(Worker pid=6539) INFO 11-21 04:52:00 [cpu_model_runner.py:68] Starting to load model /m...
(Worker pid=6539) INFO 11-21 04:52:02 [cpu_worker.py:260] Explicitly set (1.0/7.09) GiB for KV cache on node 0.
(EngineCore pid=6511) INFO 11-21 04:52:02 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens
(EngineCore pid=6511) INFO 11-21 04:52:05 [core.py:402] init engine (profile, create kv cache, warmup model) took 3 s
(EngineCore pid=6511) WARNING 11-21 04:52:07 [vllm.py:1703] Enforce eager set, disabling JIT kernel warmup.
(APIServer pid=6341) INFO 11-21 04:52:07 [entry.py:140] Starting vLLM server on http://127.0.0.1:48123
INFO:     Application startup complete.""".splitlines()


def test_a_start_is_told_stage_by_stage_each_once_and_in_order() -> None:
    reached, told = 0, [STAGES[0][1]]
    for text in A_START:
        now = stage(parse(text), reached)
        assert now >= reached
        if now != reached:
            told.append(STAGES[now][1])
        reached = now
    assert told == [
        "importing the engine",
        "reading the model's configuration",
        "starting the engine's processes",
        "setting up the engine",
        "loading the model",
        "reserving the KV cache",
        "starting its HTTP server",
        "answering",
    ]


def test_a_line_is_taken_apart_into_process_level_and_text() -> None:
    line = parse("(EngineCore pid=6511) ERROR 11-21 04:52:33 [core.py:1512] RuntimeError: Executor failed.\n")
    assert (line.process, line.level, line.text) == ("EngineCore", "ERROR", "RuntimeError: Executor failed.")
    assert parse("INFO:     Shutting down").text == "INFO:     Shutting down"
    assert parse("").text == ""


def test_of_a_healthy_start_nothing_shown() -> None:
    assert [text for text in A_START if shown(parse(text))] == []


def test_a_warning_shown_and_the_stack_behind_it_does_not() -> None:
    stem = "(APIServer pid=1) ERROR 11-21 04:52:33 [async_llm.py:906] "
    assert shown(parse(stem + "AsyncLLM output_handler failed."))
    assert not shown(parse(stem + "Traceback (most recent call last):"))
    assert not shown(parse(stem + '  File "/venv/vllm/v1/engine/async_llm.py", line 849'))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "api_server.py: error: unrecognized arguments: --nonsense",
            "unrecognized arguments: --nonsense.*--engine-arg",
        ),
        (
            "(Worker pid=9) ERROR 11-21 04:52:33 [x.py:1] ValueError: Available memory on node 0 (1.2/7.0 GiB) on kv"
            " cache allocation is less than requested memory for kv (4.0 GiB). Decrease it.",
            "KV cache of 4.0 GiB.*--kv-cache-gib",
        ),
        ("OSError: [Errno 98] Address already in use", "another program took its port"),
        (
            "  Value error, The checkpoint you are trying to load has model type `foo` but Transformers does not "
            "recognize this architecture.",
            "does not know models of type 'foo'",
        ),
        (
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now.",
            "does not support the model's architecture",
        ),
        (
            "  Value error, Invalid repository ID or local directory specified: '/no/model'.",
            "/no/model is neither a model folder",
        ),
        ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate snapshot", "not on this machine"),
        (
            "  Value error, max_num_batched_tokens (8) must be greater than or equal to max_num_seqs (64). "
            "[type=value_error, input_value=ArgsKwargs((), {})]",
            r"refuses the configuration: max_num_batched_tokens \(8\) must be .* max_num_seqs \(64\)$",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
            "on GPUs by .*--tensor-parallel-size=2",
        ),
        (
            "ValueError: Free memory on device cuda:0 (60.1/79.2 GiB) on startup is less than desired GPU memory",
            "GPU has too little free memory.*nvidia-smi",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "GPU has too little free memory"),
        ("ModuleNotFoundError: No module named 'triton'", "installation is incomplete.*make install"),
        ("OSError: [Errno 28] No space left on device", "disk.*is full"),
        ("my.package.StrangeError: a thing happened", "failed with StrangeError: a thing happened"),
    ],
)
def test_a_known_cause_becomes_one_sentence(line: str, sentence: str) -> None:
    said = cause(["Traceback (most recent call last):", line, "RuntimeError: Engine core initialization failed."], 1)
    assert re.search(sentence, said), said
    assert "\n" not in said


def test_who_raised_first_is_believed_and_not_who_noticed() -> None:
    lines = [
        "(EngineCore pid=2) ERROR 11-21 04:52:33 [core.py:1] KeyError: 'layers.7'",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert cause(lines, 1) == "it failed with KeyError: 'layers.7'"


@pytest.mark.parametrize(
    ("lines", "exit_code", "sentence"),
    [
        ([], 137, "one of its processes was killed"),
        (["WARNING 11-21 04:52:33 [x.py:1] [shutdown] MPClient: engine core exited unexpectedly"], None, "was killed"),
        ([], 3, "it ended with exit code 3"),
        ([], None, "it stopped answering"),
    ],
)
def test_without_a_word_the_exit_code_speaks(lines: list[str], exit_code: int | None, sentence: str) -> None:
    assert sentence in cause(lines, exit_code)


def test_a_cause_stays_one_line_of_bearable_length() -> None:
    assert len(cause(["ValueError: " + "x" * 10_000], 1)) < 300


def test_lines_are_on_disk_as_soon_as_they_are_written_and_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "worker-0.log"
    for text in ("first", "second"):
        log = LogFile(path)
        log.write(text)
        log.write("é 100%s")
        assert path.read_text().endswith(f"{text}\né 100%s\n")
        log.close()
    assert path.read_text() == "first\né 100%s\nsecond\né 100%s\n"


def test_at_its_size_it_starts_anew_and_keeps_one_older_file(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "worker-0.log", most_bytes=11)
    for text in ("aaaa", "bbbb", "cccc", "dddd", "eeee"):
        log.write(text)
    log.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["worker-0.log", "worker-0.log.1"]
    assert (tmp_path / "worker-0.log.1").read_text() + log.path.read_text() == "cccc\ndddd\neeee\n"


def test_a_log_that_cannot_be_written_is_reported_once_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    log = LogFile(tmp_path / "file" / "worker-0.log")
    log.write("lost")
    log.write("lost too")
    (said,) = caplog.messages
    assert "cannot write" in said and "worker-0.log" in said


def test_a_number_format_without_a_kernel_is_told_once_with_its_cost_and_a_way_out() -> None:
    stem = "(Worker pid=9) WARNING 11-21 04:52:33 [utils.py:597] Failed to create oneDNN linear, fallback to torch "
    told = shown(parse(stem + "linear. Exception: could not create a primitive descriptor"))
    assert "ten times as long" in told and "--dtype=float32" in told


def test_a_weight_that_is_narrowed_is_not_worth_a_line_for_each_of_hundreds() -> None:
    stem = "(Worker pid=9) WARNING 11-21 04:52:33 [utils.py:333] Attempted to load weight "
    assert not shown(parse(stem + "lm_head.weight with dtype torch.float16 into parameter with dtype torch.bfloat16"))
