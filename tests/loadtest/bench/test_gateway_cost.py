"""`evenhand bench gateway-cost`: it works end to end in seconds, or says what it needs."""

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from loadtest.bench.gateway.gateway import OURS
from loadtest.bench.gateway.gateway_cost import FIGURES, checkouts, table
from loadtest.bench.gateway.relay_load import BenchmarkError, RelayBench

ROOT = Path(__file__).resolve().parents[3]


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "bench", "gateway-cost", "--rounds", "1", "--seconds", "0.2"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_compares_with_another_checkout_or_says_what_it_needs() -> None:
    ran = bench("--checkout", f"other={ROOT}")
    if ran.returncode != 0:  # a machine without nginx or a compiler has this to check, and nothing to skip
        assert "is not installed here" in ran.stderr and "Traceback" not in ran.stderr
        return
    lines = [line.split("|")[1].strip() for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert lines == ["gateway", "---", "nginx", OURS, "other", f"{OURS} ÷ nginx", f"{OURS} ÷ other"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    unused = cast(RelayBench, None)  # asked for its address only once a gateway starts
    with pytest.raises(BenchmarkError, match="a checkout of this repository"):
        checkouts(unused, [f"other={tmp_path}"])
    assert list(checkouts(unused, [f"other={ROOT}"])) == ["other"]


def test_ratios_are_those_of_one_round() -> None:
    def rounds(*values: float) -> list[dict[str, float]]:
        return [dict.fromkeys(FIGURES, value) for value in values]

    row = table({OURS: rounds(1.0, 10.0, 100.0), "other": rounds(2.0, 20.0, 200.0)}).splitlines()[-1]
    assert row.startswith(f"| {OURS} ÷ other | 0.50 (0.50–0.50) |")
