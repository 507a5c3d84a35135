"""The command line: quick, and helpful when it is called wrongly."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

import pytest

from deploy.cli import COMMANDS, INTERRUPTED, Command, main

NOWHERE: Mapping[str, Command] = {
    "serve": Command("no.such.module", "serve"),
    "report": Command("no.such.module", "report"),
}


def evenhand(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; from deploy.cli import main; code = main(); {code or 'sys.exit(code)'}"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("typed", "meant"), [("srve", "serve"), ("reports", "report"), ("Serve", "serve")])
def test_a_mistyped_command_is_answered_with_the_right_one(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed], NOWHERE) == 2
    assert f"did you mean `evenhand {meant}`?" in capsys.readouterr().err


def test_an_unknown_command_points_to_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"], NOWHERE) == 2
    assert "`evenhand --help` lists the commands" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_in_eighty_columns_and_imports_none(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, NOWHERE) == 0
    assert main(arguments, COMMANDS) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


def test_the_help_imports_nothing_slow() -> None:
    slow = "{'fastapi', 'pydantic', 'rich', 'uvicorn', 'importlib.metadata', 'asyncio'}"
    assert evenhand("--help", code=f"print(sorted({slow} & set(sys.modules)))").stdout.endswith("[]\n")


def test_the_version_is_the_packages() -> None:
    assert evenhand("--version").stdout == "evenhand 0.1.0\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: evenhand {name}")


def test_a_package_that_is_not_installed_is_named_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"], NOWHERE) == 1
    assert capsys.readouterr().err == (
        "evenhand serve: the package 'no' is not installed; `make install` installs it\n"
    )


def test_no_command_imports_torch_or_an_engine() -> None:
    heavy = "{'torch', 'vllm', 'transformers', 'numba'} & set(sys.modules)"
    program = f"import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]; print(sorted({heavy}))"
    modules = [command.module for command in COMMANDS.values()]
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_output_cut_off_by_its_reader_is_no_error() -> None:
    program = "import sys; from deploy.cli import main; sys.exit(main(['doctor', '--json']))"
    piped = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true; exit "${PIPESTATUS[0]}"', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in piped.stderr


CTRL_C = "import os, signal, time\ndef ctrl_c():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
WRAPPED = "try:\n    ctrl_c()\nexcept KeyboardInterrupt as error:\n    raise ValueError('no validator') from error\n"


def called(folder: Path, module: str, before: str = "") -> tuple[int, str]:
    """Exit code and errors of a command whose module has this text."""
    (folder / "interrupted.py").write_text(CTRL_C + module)
    program = (
        f"import signal, sys\n{before}\nfrom deploy.cli import Command, main\n"
        "sys.exit(main(['it'], {'it': Command('interrupted', 'it is interrupted')}))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.getcwd()))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", [WRAPPED, "def add_arguments(parser):\n" + indent(WRAPPED, "    ")])
def test_ctrl_c_while_a_command_is_imported_is_no_error_of_a_library(tmp_path: Path, module: str) -> None:
    assert called(tmp_path, module) == (-signal.SIGINT, "")


def test_ctrl_c_reaches_a_command_that_runs(tmp_path: Path) -> None:
    module = "def add_arguments(parser): pass\ndef run(args): ctrl_c()\n"
    assert called(tmp_path, module) == (INTERRUPTED, "")


def test_a_command_that_is_to_ignore_ctrl_c_does(tmp_path: Path) -> None:
    module = (
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "def add_arguments(parser): pass\n"
        "def run(args): return 7 * (signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\n"
    )
    assert called(tmp_path, module, "signal.signal(signal.SIGINT, signal.SIG_IGN)") == (7, "")
