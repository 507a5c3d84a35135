"""`evenhand bench gateway`: it works end to end in seconds, or says what it needs."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.bench.gateway import gateway
from loadtest.bench.gateway.gateway import OURS, PHASES, add_arguments, phases
from loadtest.bench.gateway.gateway_table import STREAMS, YARDSTICK
from loadtest.bench.gateway.relay_load import BenchmarkError, LoadPhase, program

RELAY = "import sys; sys.exit('this one never relays')"


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "bench", "gateway", "--quick", "--streams", "50", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=560)


@pytest.mark.slow
def test_it_prints_a_line_for_each_gateway_or_says_what_it_needs() -> None:
    ran = bench("--add", f"broken={shlex.quote(sys.executable)} -c {shlex.quote(RELAY)}")
    folders = "/usr/sbin:/usr/local/sbin"
    missing = [name for name in ("cc", "nginx") if not (shutil.which(name) or shutil.which(name, path=folders))]
    if missing:  # a machine without them has this to check, and nothing to skip
        assert ran.returncode == 1
        assert "is not installed here" in ran.stderr and "Traceback" not in ran.stderr
        return
    assert ran.returncode == 0, ran.stderr
    assert "broken is left out: broken does not relay" in ran.stderr and "this one never relays" in ran.stderr
    lines = {line.split("|")[1].strip(): line for line in ran.stdout.splitlines() if line.startswith("| ")}
    assert set(lines) == {"gateway", "---", YARDSTICK, OURS}
    for name in (YARDSTICK, OURS):
        assert re.search(r"\d+ with \d+ streams", lines[name]), lines[name]
    assert "errors" not in ran.stdout


def test_a_program_that_is_missing_is_named_with_what_to_do() -> None:
    with pytest.raises(BenchmarkError, match="no-such-program is not installed here: install it so"):
        program("no-such-program", hint="install it so")


def test_the_crowded_phase_offers_what_the_table_says() -> None:
    crowded = PHASES["many"]
    assert crowded.connections == STREAMS
    assert crowded.connections * 1_000_000 / crowded.interval_us == 25_600


def test_memory_is_read_in_one_repetition_and_only_there() -> None:
    first, later = phases(False, 10_000, weigh=True), phases(False, 10_000, weigh=False)
    assert [name for name, phase in first.items() if phase.weighs] == ["open"]
    assert "open" not in later
    assert first["open"].connections == 10_000
    assert first["open"].warm_up_s > 10_000 / 5_000, "the connections are not open by then"


def test_a_phase_becomes_the_load_generator_s_arguments() -> None:
    assert LoadPhase(2, 1.0, 0.5).arguments() == ["-c", "2", "-d", "1.0", "-w", "0.5"]
    assert LoadPhase(2, 1.0, 0.5, chunks=3, interval_us=7, rate=4.0).arguments()[6:] == [
        "-s",
        "3",
        "-i",
        "7",
        "-r",
        "4.0",
    ]


def test_all_repetitions_of_nginx_and_ours_fit_into_six_minutes() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    repetitions = parser.parse_args([]).repetitions
    one_s = sum(phase.warm_up_s + phase.seconds for phase in PHASES.values())
    warm_up_s = sum(phase.warm_up_s + phase.seconds for phase in gateway.WARM_UP)
    start_and_stop_s = 4.0
    idle_s = PHASES["idle"].warm_up_s + PHASES["idle"].seconds
    assert repetitions * (2 * (one_s + warm_up_s + start_and_stop_s) + idle_s) < 330


@pytest.mark.parametrize("text", ["nothing", "=command", "name=", f"{YARDSTICK}=x", f"{OURS}=x", "twice=x"])
def test_what_is_added_needs_a_name_of_its_own_and_a_command(text: str) -> None:
    with pytest.raises(BenchmarkError, match="NAME=COMMAND"):
        gateway.named(["twice=a=b", text])
    assert gateway.named(["twice=a=b"]) == {"twice": "a=b"}


def test_names_in_braces_that_are_not_filled_in_are_refused(tmp_path: Path) -> None:
    class Somewhere:
        url, key = "http://127.0.0.1:1", "secret"

    made = gateway.added_command(Somewhere(), "g --listen {port} --to {backend} --key {key}", 9)  # type: ignore[arg-type]
    assert made == ["g", "--listen", "9", "--to", "http://127.0.0.1:1", "--key", "secret"]
    with pytest.raises(BenchmarkError, match="port, backend and key"):
        gateway.added_command(Somewhere(), "g {listen}", 9)  # type: ignore[arg-type]
