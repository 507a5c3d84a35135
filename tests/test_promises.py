"""Every promise of the README is in docs/reliability.md beside the tests that hold it, and those tests exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
OF_README = RELIABILITY.partition("| promise of the README |")[2]
ROW = re.compile(r"^\| (.+?) \| (`tests/.+`) \|$", re.MULTILINE)
TESTS = sorted(set(re.findall(r"`(tests/[^`]+)`", RELIABILITY)))


def test_every_promise_of_the_readme_names_its_tests() -> None:
    section = README.partition("## What only Evenhand does")[2].partition("\n## ")[0]
    promised = re.findall(r"^- \*\*(.+?)\*\*", section, re.MULTILINE)
    assert len(promised) == 5
    held = [promise for promise, _ in ROW.findall(OF_README)]
    assert set(promised) <= set(held), "in README.md, but not in docs/reliability.md"
    words = " ".join(README.split())
    assert all(promise in words for promise in held), "in docs/reliability.md, but not in README.md"
    assert len(held) == OF_README.count("\n| ") - 1, "every row has its tests"


@pytest.mark.parametrize("test", TESTS)
def test_it_exists(test: str) -> None:
    path, _, name = test.partition("::")
    file = ROOT / path
    assert file.is_file() and file.name.startswith("test_"), path
    code = file.read_text(encoding="utf-8")
    assert re.search(rf"^(?:async )?def {name or 'test_'}", code, re.MULTILINE), f"{path} has no {name or 'test'}"
