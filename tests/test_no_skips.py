"""CI's rule: what is skipped elsewhere, with its reason, is a failure there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = {
    "by a test": "import pytest\ndef test_it(): pytest.skip('no redis-server here')",
    "by a mark": "import pytest\n@pytest.mark.skip(reason='no redis-server here')\ndef test_it(): pass",
    "by its module": "import pytest\npytest.skip('no redis-server here', allow_module_level=True)",
}
EXPECTED = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): assert False"


def outcome(folder: Path, code: str, no_skips: str) -> str:
    (folder / "test_it.py").write_text(code)
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-ra",
        f"--rootdir={folder}",
    ]
    environment = os.environ | {"EVENHAND_NO_SKIPS": no_skips, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*run, str(folder)], env=environment, capture_output=True, text=True, timeout=240)
    return f"exit {done.returncode}: {done.stdout}"


@pytest.mark.parametrize("code", SKIPPED.values(), ids=SKIPPED)
def test_a_skip_fails_in_ci_and_nowhere_else(tmp_path: Path, code: str) -> None:
    in_ci, elsewhere = outcome(tmp_path, code, "1"), outcome(tmp_path, code, "")
    assert not in_ci.startswith("exit 0"), in_ci
    assert "would be skipped: " in in_ci and "no redis-server here" in in_ci
    assert elsewhere.startswith(("exit 0", "exit 5")), elsewhere
    assert "no redis-server here" in elsewhere


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    assert outcome(tmp_path, EXPECTED, "1").startswith("exit 0")
