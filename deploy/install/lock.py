"""Makes the pinned lock files of deploy/requirements/ from pyproject.toml: `make lock`, or `make lock UPGRADE=1`.

Without UPGRADE the versions in the present locks are kept wherever they still fit. Needs PyPI; installs nothing here.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

UV = "uv==0.13.8"
PINNED = re.compile(r"^[\w.-]+==", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("deploy/requirements")
HEADER = "# Made by `make lock` from pyproject.toml. Change that and run it again.\n"

# Each lock with what goes into it, in an order in which a later lock takes over the versions of the earlier ones that
# it names. The two engines never share an environment, so neither binds the other.
LOCKS: dict[str, list[str]] = {
    "bootstrap": ["deploy/requirements/bootstrap.in"],
    "gateway": ["pyproject.toml", "deploy/requirements/vllm-bounds.in", "--extra=s3"],
    "engine-cpu": ["pyproject.toml", "deploy/requirements/torch-needs.in", "--extra=cpu", "-c=bootstrap", "-c=gateway"],
    "loadtest": ["pyproject.toml", "--extra=loadtest", "-c=gateway", "-c=engine-cpu"],
    "test": ["pyproject.toml", "--extra=test", "-c=gateway", "-c=engine-cpu", "-c=loadtest"],
    "engine-cuda": ["pyproject.toml", "--extra=cuda", "-c=gateway", "-c=loadtest", "-c=test"],
}
EXCLUDES = {"engine-cpu": "exclude-cpu.txt", "engine-cuda": "exclude-cuda.txt"}


def compile_command(uv: Path, lock: str, upgrade: bool) -> list[str]:
    command = [str(uv), "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    for part in LOCKS[lock]:
        command.append(f"-c={FOLDER}/{part.removeprefix('-c=')}.txt" if part.startswith("-c=") else part)
    if lock in EXCLUDES:
        command.append(f"--excludes={FOLDER}/{EXCLUDES[lock]}")
    return [*command, *(["--upgrade"] if upgrade else []), "-o", f"{FOLDER}/{lock}.txt"]


def main() -> int:
    upgrade = "--upgrade" in sys.argv[1:]
    # Only PyPI decides what a lock says: settings of the machine that makes it must not leak into it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(temporary, with_pip=True)
        tools = Path(temporary) / "bin"
        subprocess.run([tools / "python", "-m", "pip", "install", "--quiet", UV], check=True)
        for lock in LOCKS:
            subprocess.run(compile_command(tools / "uv", lock, upgrade), check=True, cwd=ROOT, env=environment)
            file = ROOT / FOLDER / f"{lock}.txt"
            file.write_text(HEADER + file.read_text(encoding="utf-8"), encoding="utf-8")
            print(f"{file.relative_to(ROOT)}: {len(re.findall(PINNED, file.read_text(encoding='utf-8')))} packages")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
