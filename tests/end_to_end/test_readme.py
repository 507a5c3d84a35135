"""The README's first screen, executed as it stands but for the port."""

import re
import subprocess
import sys

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
