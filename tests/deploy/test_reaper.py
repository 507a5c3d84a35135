"""reaper.py with real processes: what it started never outlives its holder."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.engine.child import LEASH
from tests.deploy.processes import MARK, eventually, marked, new_mark

# A parent with a grandchild of its own, which would live for ever: the shape of vLLM's server and its EngineCore.
FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); {}"
STUBBORN = FAMILY.format(
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
OBEDIENT = FAMILY.format("print('up', flush=True); time.sleep(600)")
DYING = FAMILY.format("print('up', flush=True); sys.exit(3)")


@pytest.fixture
def mark() -> Iterator[str]:
    value = new_mark()
    yield value
    for pid in marked(value):
        os.kill(pid, signal.SIGKILL)


def leashed(code: str, mark: str, grace_s: float = 60.0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", LEASH, str(grace_s), "-", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, MARK: mark},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def finish(process: subprocess.Popen[bytes]) -> int:
    code = process.wait(timeout=120)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    return code


def test_a_command_that_ends_takes_its_grandchildren_along_and_its_exit_code_is_passed_on(mark: str) -> None:
    assert finish(leashed(DYING, mark)) == 3
    assert marked(mark) == {}


def test_sigterm_stops_command_and_grandchildren(mark: str) -> None:
    process = leashed(OBEDIENT, mark)
    assert eventually(lambda: len(marked(mark)) == 3)
    process.terminate()
    assert finish(process) == 128 + signal.SIGTERM
    assert marked(mark) == {}


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(mark: str) -> None:
    process = leashed(STUBBORN, mark, grace_s=0.3)
    process.terminate()
    assert finish(process) == 128 + signal.SIGKILL
    assert marked(mark) == {}


@pytest.mark.parametrize("code", [OBEDIENT, STUBBORN], ids=["obedient", "stubborn"])
def test_nothing_is_left_when_the_holder_of_the_leash_is_gone(code: str, mark: str) -> None:
    process = leashed(code, mark, grace_s=0.3)
    assert process.stdin is not None
    process.stdin.close()
    assert eventually(lambda: not marked(mark))
    finish(process)


def test_the_command_dies_with_a_leash_that_is_killed(mark: str) -> None:
    process = leashed("import time; print('up', flush=True); time.sleep(600)", mark)
    process.kill()
    assert eventually(lambda: not marked(mark))
    assert finish(process) == -signal.SIGKILL


def test_a_command_that_does_not_exist_is_named(mark: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", LEASH, "1", "-", "/nowhere/vllm"],
        stdin=subprocess.PIPE,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 127
    assert done.stderr == b"reaper.py: error: cannot run /nowhere/vllm: No such file or directory\n"


def test_a_command_keeps_to_its_cores_with_all_that_it_starts() -> None:
    core = max(os.sched_getaffinity(0))
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'])"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", LEASH, "1", str(core), sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{{{core}}}\n".encode()
