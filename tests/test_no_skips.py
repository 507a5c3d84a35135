"""CI's rule: what is skipped elsewhere, with its reason, is a failure there."""

import os
import re
import subprocess
import sys

import pytest

SKIPPED = {
    "by a test": "import pytest\ndef test_it(): pytest.skip('no redis-server here')",
    "by a mark": "import pytest\n@pytest.mark.skip(reason='no redis-server here')\ndef test_it(): pass",
    "by its module": "import pytest\npytest.skip('no redis-server here', allow_module_level=True)",
}
MISSING = "import pytest\ndef test_it(): pytest.skip('no Docker Engine here: there is no program `docker`')"
EXPECTED = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): assert False"


@pytest.fixture(scope="module", params=["1", "all", ""], ids=["in CI", "with all", "elsewhere"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """How far CI's rule is in force, and what pytest prints about a file of each kind."""
    folder = tmp_path_factory.mktemp("skips")
    for name, code in {**SKIPPED, "expected": EXPECTED, "missing": MISSING}.items():
        (folder / f"test_{name.replace(' ', '_')}.py").write_text(code)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-rA", f"--rootdir={folder}", str(folder)]
    environment = os.environ | {"EVENHAND_NO_SKIPS": request.param, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return request.param, done.stdout


@pytest.mark.parametrize("kind", SKIPPED)
def test_a_skip_fails_in_ci_and_nowhere_else(run: tuple[str, str], kind: str) -> None:
    in_ci, said = bool(run[0]), run[1]
    (line,) = re.findall(rf"^(?:SKIPPED|FAILED|ERROR) .*test_{kind.replace(' ', '_')}\.py.*$", said, re.MULTILINE)
    assert line.startswith(("FAILED", "ERROR") if in_ci else "SKIPPED"), said
    assert said.count("no redis-server here") >= len(SKIPPED)
    assert ("would be skipped: " in said) == in_ci


def test_what_no_installation_brings_may_be_missing_unless_it_must_be_there(run: tuple[str, str]) -> None:
    (line,) = re.findall(r"^(?:SKIPPED|FAILED) .*test_missing\.py.*$", run[1], re.MULTILINE)
    assert line.startswith("FAILED" if run[0] == "all" else "SKIPPED")


def test_an_expected_failure_is_no_skip(run: tuple[str, str]) -> None:
    assert re.search(r"^XFAIL .*test_expected\.py", run[1], re.MULTILINE), run[1]
