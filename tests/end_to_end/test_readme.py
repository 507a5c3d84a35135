"""The README's first screen, executed as it stands but for the port."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVED_AT = "http://127.0.0.1:8000"


def block(language: str, with_word: str) -> str:
    """The first code block of a language that contains a word."""
    return next(code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if with_word in code)


def test_the_curl_example_answers(stack: Stack) -> None:
    command = block("sh", "curl").replace(SERVED_AT, stack.url)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=240)
    assert '"content":"The capital of France is Paris."' in done.stdout, done.stderr
    assert '"model":"smollm2"' in done.stdout


def test_the_python_example_streams(stack: Stack) -> None:
    program = block("python", "OpenAI").replace(SERVED_AT, stack.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert "Paris" in done.stdout, done.stderr


CONVERSATIONS = [
    {
        "id": f"talk{at}",
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "It is a short answer."},
            {"from": "human", "value": "And why is that?"},
            {"from": "gpt", "value": "Because it is."},
        ],
    }
    for at, question in enumerate(("What is the capital of Spain?", "Name a colour, please."))
]


def test_the_replay_example_sends_the_conversations_as_they_are(stack: Stack, tmp_path: Path) -> None:
    """Both turns of each conversation, with their own text, and a page of what came of it."""
    found = re.search(r"`evenhand (replay sharegpt\.json [^`]*)`", README)
    assert found is not None
    (tmp_path / "sharegpt.json").write_text(json.dumps(CONVERSATIONS))
    words = [*found[1].replace(SERVED_AT, stack.url).split(), "--out", "run.jsonl"]
    program = [str(ROOT / ".venv/bin/evenhand"), *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "4 of 4 requests reported" in done.stdout
    assert "made-up" not in done.stdout
    assert "</html>" in (tmp_path / "page.html").read_text()
