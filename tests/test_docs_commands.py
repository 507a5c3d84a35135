"""The commands of the documents, executed page by page as a reader would, but without a model: engines are fake, and
addresses are free ones. What is not run is named here with the reason. The README's: tests/end_to_end/test_readme.py.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from deploy.cli import COMMANDS
from loadtest.bench.engines import running
from tests.deploy.test_chart import rendered

ROOT = Path(__file__).resolve().parent.parent
ADMIN_KEY = "admin-key-for-trying-out"
ADMIN_ABOVE = 1000  # /admin's port is so far above the clients'
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```sh" in path.read_text(encoding="utf-8"))
SERVER = re.compile(r"^(?:\w+=(?:'[^']*'|\S+) )*(?:taskset \S+ \S+ )?evenhand (?:gateway|serve|worker)\b")
PREPARED = ("TRACE", "key.txt")  # what a reader has: a trace of their own, a key

# Beginnings of commands that are not run, and why. Those of ours must still be understood by our own command line.
REAL = "starts real engines: tests/end_to_end and tests/engine do"
CLUSTER = "needs a cluster; the chart is rendered with these values below"
ENGINE_OF_CONTAINERS = "needs a container engine; tests/deploy/test_containers.py reads the file as Docker Compose does"
IN_CONTAINERS = (
    "docker compose up --build",
    "docker run --publish 127.0.0.1:8000:8000 --stop-timeout 45 --env EVENHAND_ALLOW_OPEN=true evenhand-gateway",
    "docker run --stop-timeout 75 --env EVENHAND_REDIS_URL=redis://redis:6379/0 evenhand-worker-cpu --role both",
)
NOT_RUN = {
    **dict.fromkeys(IN_CONTAINERS, ENGINE_OF_CONTAINERS),
    "kubectl ": CLUSTER,
    "helm ": CLUSTER,
    "promtool ": "tests/deploy/test_prometheus.py runs it",
    "evenhand serve": REAL,
    "make ": "installs, builds images, or needs a GPU",
    "evenhand doctor --model": "tests/deploy/test_doctor.py asks it of fake machines",
    "export HF_TOKEN=...": "the reader has a token",
    "export AWS_ACCESS_KEY_ID=...": "the reader has a bucket",
    "evenhand gateway --batch-files-url": "needs a bucket: tests/server/batch/test_shared.py has one",
    "evenhand gateway --worker https://": "needs certificates: tests/server/test_credentials.py makes some",
    "EVENHAND_ENGINE_KEY=": REAL,
    "evenhand why": "needs a log: tests/server/test_traced.py writes one",
    "taskset ": REAL,
    "PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) python -m vllm": REAL,
    "evenhand compare TRACE": REAL,
    "evenhand compare  ": "takes two minutes; tests/deploy/test_compare.py runs a shorter one",
    "loadtest/bench/gateway/peers/run.sh": "installs other people's gateways",
    "evenhand bench gateway --add": "adds a program of the reader's",
    "evenhand bench gateway --quick": "tests/loadtest/bench/test_gateway.py runs it",
}
# What a reader would wait for, or a busy machine may lack.
CHANGED = {
    "--rate 0.5": "--rate 20",
    "--rate 2 --limit 100": "--rate 40 --limit 100",
    "--sweep 5,40 --limit 60": "--sweep 50,400 --limit 20",
    "evenhand doctor": "{ evenhand doctor || [ $? = 1 ]; }",
}
# What a reader has done by then.
BEFORE = {
    "evenhand report fcfs=a.jsonl": "for name in a b c d; do cp run.jsonl $name.jsonl; done",
    "evenhand replay traffic/": (
        "answers $GATEWAY/ready; curl $GATEWAY/v1/completions -H 'content-type: application/json' "
        """-d '{"model": "smollm2", "prompt": "Hello"}'"""
    ),
}
PRELUDE = """
set -euo pipefail
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
curl() { command curl --silent --show-error --fail-with-body --max-time 180 "$@"; }
answers() {
  for _ in $(seq 1800); do
    command curl -sf "$1" > answer && return
    kill -0 $! || return 1
    sleep 0.1
  done
  return 1
}
"""
UNTIL_SERVES = "answers $GATEWAY/health"
STOPPED = "for job in $(jobs -p); do kill -TERM $job; wait $job || { code=$?; [ $code = 143 ] || exit $code; }; done"


def free_port() -> int:
    """One that nobody listens on, nor on that of its /admin, below those that the kernel gives to who connects."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + ADMIN_ABOVE))
            return port


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[str]:
    """Its commands, each with its continuation lines, quoted lines and here-document."""
    held = ""
    until = ""
    for line in block.splitlines(keepends=True):
        held += line
        if until and line.strip() != until:
            continue
        if not until and (document := re.search(r"<<'(\w+)'", line)):
            until = document.group(1)
            continue
        until = ""
        if whole(held):
            if held.strip() and not held.startswith("#"):
                yield held.strip()
            held = ""
    assert not held.strip(), f"a command without its end: {held}"


def whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:  # an open quotation
        return False
    return not text.endswith("\\\n")


def reason(command: str) -> str:
    return next((why for begins, why in NOT_RUN.items() if command.startswith(begins)), "")


def placed(command: str, ports: dict[str, str]) -> str:
    """The command with this run's ports, and what is changed of it."""
    for old, new in CHANGED.items():
        command = command.replace(old, new)
    there = ports | {"9000": str(int(ports["8000"]) + ADMIN_ABOVE)}
    return re.sub(r"\b(8000|8101|8102|8103|6379|9000)\b", lambda found: there[found.group()], command)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def script(page: Path, ports: dict[str, str]) -> str:
    """All commands of a page in one shell that stops at the first that fails. A server runs to its block's end."""
    parts = [PRELUDE]
    for block in blocks(page, "sh"):
        run = [command for command in commands(block) if not reason(command)]
        serves = any(SERVER.match(command) for command in run)
        here = ports | ({"8000": str(free_port())} if serves else {})
        if "fake.engine" in block:
            here["8101"] = str(free_port())
        parts.append(f"export GATEWAY=http://127.0.0.1:{here['8000']} EVENHAND_PORT={here['8000']}")
        for command in run:
            parts += [line for begins, line in BEFORE.items() if command.startswith(begins)]
            text = placed(command, here)
            parts.append(f"{text.partition('  #')[0]} &\n{UNTIL_SERVES}" if SERVER.match(command) else text)
        parts.append(STOPPED)
    return "\n".join(parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reader's folder: the repository's, in which files can be written, and what a reader has."""
    for name in ("deploy", "loadtest", "scheduler", "server", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [{"at_s": at / 20, "prompt_tokens": 20 + at, "output_tokens": 8, "tenant": f"t{at % 3}"} for at in range(40)]
    (tmp_path / "TRACE").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "key.txt").write_text("a-key-of-mine-for-trying-out\n")
    return tmp_path


@pytest.fixture
def ports(page: Path, redis_url: str) -> Iterator[dict[str, str]]:
    """Who listens where the page takes for granted that somebody does: three engines, a Redis, and a gateway."""
    given = {port: str(free_port()) for port in ("8000", "8101", "8102", "8103")}
    given["6379"] = redis_url.rpartition(":")[2].partition("/")[0]
    environ = os.environ | {"EVENHAND_ADMIN_KEY": ADMIN_KEY, "EVENHAND_PORT": given["8000"]}
    tenants = ["--tenants", str(ROOT / "deploy" / "tenants.example.yaml")] if page.name == "tenants.md" else []
    worker = f"http://127.0.0.1:{given['8101']}"
    with contextlib.ExitStack() as stack:
        for port in ("8101", "8102", "8103"):
            argv = [sys.executable, "-m", "loadtest.fake.engine", "--port", given[port], "--model", "smollm2"]
            stack.enter_context(running(argv, environ, f"http://127.0.0.1:{given[port]}/health"))
        argv = [sys.executable, "-m", "deploy.cli", "gateway", "--worker", worker, *tenants]
        stack.enter_context(running(argv, environ, f"http://127.0.0.1:{given['8000']}/ready"))
        yield given


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_commands_of_a_page_work_one_after_the_other(page: Path, folder: Path, ports: dict[str, str]) -> None:
    environ = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "EVENHAND_ADMIN_KEY": ADMIN_KEY,
    }
    done = subprocess.run(
        ["bash", "-x", "-c", script(page, ports)], cwd=folder, env=environ, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


OURS = [
    (page, command)
    for page in PAGES
    for block in blocks(page, "sh")
    for command in commands(block)
    if reason(command) and "evenhand " in command and not command.startswith(("helm", "kubectl"))
]


@pytest.mark.parametrize(("page", "command"), OURS, ids=lambda value: "" if isinstance(value, Path) else value)
def test_a_command_that_is_not_run_is_understood(page: Path, command: str) -> None:
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    name, *arguments = words[words.index("evenhand") + 1 :]
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    parser.parse_args(arguments)


def test_what_is_not_run_is_still_in_the_documents() -> None:
    there = [command for page in PAGES for block in blocks(page, "sh") for command in commands(block)]
    for begins in (*NOT_RUN, *BEFORE):
        assert any(command.startswith(begins) for command in there), begins
    for part in CHANGED:
        assert any(part in command for command in there), part


KUBERNETES = ROOT / "docs" / "kubernetes.md"


def values_of(words: Sequence[str]) -> dict[str, object]:
    """`--set a.b=c` as Helm reads it."""
    values: dict[str, object] = {}
    for assignment in (word for before, word in zip(words, words[1:], strict=False) if before == "--set"):
        path, _, value = assignment.partition("=")
        inner = values
        for part in path.split(".")[:-1]:
            inner = inner.setdefault(part, {})  # type: ignore[assignment]
        inner[path.rpartition(".")[2]] = value
    return values


def test_the_chart_renders_as_the_page_installs_it() -> None:
    (install,) = [
        command for block in blocks(KUBERNETES, "sh") for command in commands(block) if command.startswith("helm")
    ]
    words = shlex.split(install)
    assert words[:4] == ["helm", "install", "evenhand", "deploy/chart"]
    images = str(rendered(values_of(words)))
    assert "REGISTRY/evenhand-gateway" in images and "REGISTRY/evenhand-worker-cuda" in images


@pytest.mark.parametrize("block", [block for block in blocks(KUBERNETES, "yaml") if "admin:" in block])
def test_the_values_of_the_page_render(block: str) -> None:
    kinds = [document["kind"] for document in rendered(yaml.safe_load(block))]
    assert {"StatefulSet", "LeaderWorkerSet"} & set(kinds)
