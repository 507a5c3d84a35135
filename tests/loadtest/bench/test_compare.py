"""The comparison on the bundled model: what it needs is looked for before minutes are spent."""

import argparse
from pathlib import Path

import pytest

from loadtest.bench.policies import compare


def test_without_the_browser_there_is_a_sentence_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_args(["--pages", f"{tmp_path}/pages", "--out", f"{tmp_path}/out", "--chromium", "no-such-one"])
    assert compare.run(args) == 2
    assert "no-such-one is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
