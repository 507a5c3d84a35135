"""The Helm chart, rendered by Helm's own engine: valid for Kubernetes, in step with our commands, strict on values."""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from deploy.observability.dashboards import BOARDS
from deploy.serve.join import JoinSettings
from deploy.serve.join import add_arguments as worker_arguments
from deploy.serve.preflight import SHARED_BYTES
from scheduler.catalog import POLICIES
from server.__main__ import add_arguments as gateway_arguments
from server.request.tenant_files import read_file
from server.settings import Settings, read_settings
from tests.deploy.queries import ROOT, RULES, known, selectors

CHART = ROOT / "deploy" / "chart"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
FOREIGN = ("monitoring.coreos.com/", "leaderworkerset.x-k8s.io/", "keda.sh/")
POD = {"apiVersion": "v1", "kind": "Pod"}
OLDEST, NEWEST = "1.27", "1.33"
KEY = {"admin": {"key": "an-admin-key-for-the-tests"}}
EVERYTHING = KEY | {
    "gateway": {
        "autoscaling": {"enabled": True, "waitingPerReplica": 500},
        "policyOptions": {"within": "gittins", "min_samples": 100},
        "tls": {"existingSecret": "certificate"},
        "settings": {"shutdown_s": 120, "admission": {"max_waiting": 500}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"operator": "Exists"}],
    },
    "tenants": {"list": [{"name": "acme", "keys": ["sha256:" + "0" * 64], "weight": 2}]},
    "workers": {
        "main": None,
        "read": {"role": "prefill", "replicas": 2, "engineArgs": ["--max-num-seqs=64"], "huggingFaceSecret": "hub"},
        "write": {
            "role": "decode",
            "storage": {"size": "100Gi", "className": "fast"},
            "autoscaling": {"enabled": True, "maxReplicas": 8},
            "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
        },
        "small": {
            "image": {"repository": "evenhand-worker-cpu"},
            "model": "smollm2",
            "resources": {"limits": {"cpu": "4", "memory": "8Gi"}},
            "sharedMemory": "256Mi",
            "storage": {"existingClaim": "models"},
        },
        "wide": {
            "replicas": 2,
            "multiNode": {"nodes": 4},
            "resources": {"limits": {"nvidia.com/gpu": 8}},
            "engineArgs": ["--max-num-seqs=64"],
        },
        "rays": {"multiNode": {"nodes": 2, "backend": "ray"}, "autoscaling": {"enabled": True}},
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "imagePullSecrets": [{"name": "registry"}],
}
OWN_SECRETS = {
    "admin": {"existingSecret": "admin"},
    "tenants": {"existingSecret": "tenants"},
    "redis": {"enabled": False, "existingSecret": "redis"},
    "networkPolicy": {"enabled": False},
}
BUCKET = KEY | {
    "gateway": {
        "settings": {"batch": {"files_url": "s3://bucket/evenhand", "shared": True}},
        "envFrom": [{"secretRef": {"name": "s3"}}],
        "serviceAccountName": "batches",
        "temporaryStorage": "8Gi",
    }
}
VARIANTS = {"least": KEY, "everything": EVERYTHING, "own secrets": OWN_SECRETS, "bucket": BUCKET}
Doc = dict[str, Any]


def rendered(values: Mapping[str, Any]) -> list[Doc]:
    """Every resource. ValueError is what Helm says of wrong values."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(dict(values), name="prod", namespace="llm")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


DOCS = {name: rendered(values) for name, values in VARIANTS.items()}


def of(variant: str, kind: str, name: str = "") -> Doc:
    (found,) = [
        doc for doc in DOCS[variant] if doc["kind"] == kind and doc["metadata"]["name"].endswith(name or "gateway")
    ]
    return found


def templates(doc: Doc) -> list[Doc]:
    """The pods that a resource makes; the leader of a group comes before those that compute for it."""
    spec = doc.get("spec", {})
    group = spec.get("leaderWorkerTemplate", {})
    parts = [spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")]
    return [part for part in parts if part]


def container(doc: Doc, at: int = 0) -> Doc:
    (only,) = templates(doc)[at]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_chart_renders_is_valid_for_kubernetes(variant: str, version: str) -> None:
    """What other projects define is not in Kubernetes' schemas; the pods of a group are checked as pods."""
    for document in DOCS[variant]:
        if not document["apiVersion"].startswith(FOREIGN):
            kubernetes_validate.validate(document, version, strict=True)
        elif document["kind"] == "LeaderWorkerSet":
            for pod in templates(document):
                metadata = {**pod["metadata"], "name": "pod"}
                kubernetes_validate.validate({**POD, "metadata": metadata, "spec": pod["spec"]}, version, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_resources_have_one_name_and_all_carry_the_labels(variant: str) -> None:
    names = [(doc["kind"], doc["metadata"]["name"]) for doc in DOCS[variant]]
    assert len(names) == len(set(names))
    for doc in DOCS[variant]:
        assert doc["metadata"]["labels"]["app.kubernetes.io/instance"] == "prod"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_selector_selects_pods_of_the_chart(variant: str) -> None:
    pods = [pod["metadata"]["labels"] for doc in DOCS[variant] for pod in templates(doc)]
    for doc in DOCS[variant]:
        spec = doc.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector and doc["kind"] != "ServiceMonitor":
            wanted = selector.get("matchLabels", selector).items()
            assert any(wanted <= labels.items() for labels in pods), doc["metadata"]["name"]
    for one in pods:
        assert sum(other["app.kubernetes.io/component"] == one["app.kubernetes.io/component"] for other in pods) >= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_runs_as_root_or_with_a_token_of_the_cluster(variant: str) -> None:
    for pod in [template["spec"] for doc in DOCS[variant] for template in templates(doc)]:
        assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
        (only,) = pod["containers"]
        security = only["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}


def test_the_gateway_is_probed_where_it_answers_and_has_time_to_finish() -> None:
    deployment = of("everything", "Deployment")
    probes = container(deployment)
    assert probes["livenessProbe"]["httpGet"]["path"] == "/health"
    assert probes["readinessProbe"]["httpGet"]["path"] == "/ready"
    (pause,) = probes["lifecycle"]["preStop"]["exec"]["command"][1:]
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(pause) + EVERYTHING["gateway"]["settings"]["shutdown_s"]  # type: ignore[index]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_a_gateway_with_a_certificate_is_asked_over_https_by_probes_and_prometheus() -> None:
    gateway = container(of("everything", "Deployment"))
    (place,) = (mount["mountPath"] for mount in gateway["volumeMounts"] if mount["name"] == "tls")
    env = environment(of("everything", "Deployment"))
    assert (env["EVENHAND_TLS_CERT"], env["EVENHAND_TLS_KEY"]) == (f"{place}/tls.crt", f"{place}/tls.key")
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    assert {gateway[probe]["httpGet"]["scheme"] for probe in probes} == {"HTTPS"}
    assert of("everything", "ServiceMonitor")["spec"]["endpoints"][0]["scheme"] == "https"
    plain = container(of("least", "Deployment"))
    assert all("scheme" not in plain[probe]["httpGet"] for probe in probes)
    assert "EVENHAND_TLS_CERT" not in environment(of("least", "Deployment"))


def test_gateways_scale_by_cpu_and_where_it_is_asked_for_by_the_line() -> None:
    by_cpu, by_line = of("everything", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert by_cpu["resource"]["name"] == "cpu"
    assert by_line["external"]["metric"]["name"] == "evenhand_queue_depth" in known()
    assert by_line["external"]["target"]["averageValue"] == "500"


def test_a_gateway_that_cannot_write_to_its_disk_has_a_place_for_its_sockets() -> None:
    gateway = container(of("everything", "Deployment"))
    assert gateway["securityContext"]["readOnlyRootFilesystem"] is True
    assert "/tmp" in {mount["mountPath"] for mount in gateway["volumeMounts"] if not mount.get("readOnly")}


def test_a_gateway_with_a_bucket_has_its_keys_and_a_disk_for_what_passes() -> None:
    pod = of("bucket", "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "batches"
    assert container(of("bucket", "Deployment"))["envFrom"] == [{"secretRef": {"name": "s3"}}]
    (tmp,) = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
    assert tmp["emptyDir"] == {"sizeLimit": "8Gi"}
    settings = yaml.safe_load(of("bucket", "ConfigMap")["data"]["gateway.yaml"])
    assert Settings(batch=settings["batch"]).batch.files_url == "s3://bucket/evenhand"


def environment(doc: Doc) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in container(doc)["env"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variables_are_settings_and_arguments_are_understood(variant: str) -> None:
    for doc in DOCS[variant]:
        if doc["metadata"]["name"].endswith("redis") or not templates(doc):
            continue
        gateway = doc["kind"] == "Deployment"
        kind = Settings if gateway else JoinSettings
        for name in environment(doc):
            assert not name.startswith("EVENHAND_") or name.removeprefix("EVENHAND_").lower() in kind.model_fields
        parser = argparse.ArgumentParser(exit_on_error=False)
        (gateway_arguments if gateway else worker_arguments)(parser)
        words = container(doc)["args"]
        parser.parse_args(words[words.index("--role") :] if not gateway else words[1:])


def test_the_gateway_takes_its_settings_as_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gateway.yaml").write_text(of("everything", "ConfigMap")["data"]["gateway.yaml"])
    for name, value in environment(of("everything", "Deployment")).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = read_settings({}, tmp_path / "gateway.yaml", Settings)
    assert settings.policy == "vtc" and settings.policy_options == {"within": "gittins", "min_samples": "100"}
    assert settings.admission.max_waiting == 500 and settings.shutdown_s == 120
    assert [url.get_secret_value() for url in settings.redis_url] == ["redis://prod-evenhand-redis:6379/0"]


def test_several_redis_servers_reach_gateways_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["redis://one:6379/0", "redis://two:6379/0"]
    docs = rendered(KEY | {"redis": {"enabled": False, "url": urls}})
    given = [environment(doc)["EVENHAND_REDIS_URL"] for doc in docs if templates(doc)]
    assert len(given) == 2  # the gateway, and the one kind of workers
    for text in given:
        assert text is not None
        monkeypatch.setenv("EVENHAND_REDIS_URL", text)
        for kind in (Settings, JoinSettings):
            assert [url.get_secret_value() for url in read_settings({}, None, kind).redis_url] == urls


def test_tenants_are_a_file_that_the_gateway_reads(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(of("everything", "Secret", "tenants")["stringData"]["tenants.yaml"])
    (tenant,) = read_file(tmp_path / "tenants.yaml")
    assert (tenant.name, tenant.weight) == ("acme", 2.0)


def test_a_worker_gets_its_role_its_model_and_its_disk_and_an_unwanted_one_is_gone() -> None:
    workers = {
        doc["metadata"]["name"].rpartition("-")[2]: doc
        for doc in DOCS["everything"]
        if doc["kind"] == "StatefulSet" and "worker" in doc["metadata"]["name"]
    }
    assert set(workers) == {"read", "write", "small"}
    assert container(workers["read"])["args"][:2] == ["--role", "prefill"]
    assert "--engine-arg=--max-num-seqs=64" in container(workers["read"])["args"]
    assert workers["read"]["spec"]["replicas"] == 2 and "replicas" not in workers["write"]["spec"]
    (claim,) = workers["write"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert "smollm2" in container(workers["small"])["args"]
    for doc in workers.values():
        pod = doc["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > VALUES["workerDefaults"]["shutdownSeconds"]
        mounted = {mount["name"] for mount in container(doc)["volumeMounts"]}
        given = {volume["name"] for volume in pod["volumes"]}
        assert mounted == given | {claim["metadata"]["name"] for claim in doc["spec"].get("volumeClaimTemplates", [])}


def test_the_values_that_the_documentation_shows_are_rendered() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    values = [block for block in shown if "workers" in block]
    assert len(values) >= 3
    for block in values:
        for document in rendered(block):
            if not document["apiVersion"].startswith(FOREIGN):
                kubernetes_validate.validate(document, NEWEST, strict=True)


def test_keda_starts_the_first_worker_for_requests_that_wait_for_its_model() -> None:
    worker = {"replicas": 0, "model": "Qwen/Qwen3-8B", "keda": {"enabled": True, "prometheus": "http://p:9090"}}
    docs = rendered(KEY | {"workers": {"main": worker}})
    assert not any(doc["kind"] == "HorizontalPodAutoscaler" for doc in docs)
    (scaled,) = (doc for doc in docs if doc["kind"] == "ScaledObject")
    aimed = scaled["spec"]["scaleTargetRef"]
    (target,) = (doc for doc in docs if (doc["kind"], doc["metadata"]["name"]) == (aimed["kind"], aimed["name"]))
    assert "replicas" not in target["spec"]  # else each upgrade would stop what KEDA has started
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (0, 4)
    (trigger,) = scaled["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    names = {name for name, _ in selectors(query)}
    assert names == {"evenhand_requests_awaiting_wake", "evenhand_queue_depth", "evenhand_worker_in_flight"} <= known()
    assert 'model="Qwen/Qwen3-8B"' in query and trigger["metadata"]["activationThreshold"] == "0"


def test_a_cpu_worker_asks_for_cores_and_no_gpu() -> None:
    """Limits alone are requests, too: whole cores then come as a cpuset where the node's CPU manager is static."""
    small = container(of("everything", "StatefulSet", "small"))
    assert small["resources"] == {"limits": {"cpu": "4", "memory": "8Gi"}}
    assert small["image"].startswith("evenhand-worker-cpu:")
    assert container(of("everything", "StatefulSet", "read"))["resources"] == VALUES["workerDefaults"]["resources"]
    wide = of("everything", "LeaderWorkerSet", "wide")
    assert container(wide, 1)["resources"] == {"limits": {"nvidia.com/gpu": 8}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_has_the_shared_memory_that_its_processes_need(variant: str) -> None:
    """A container has 64 MiB of its own, with which an engine of several processes does not start."""
    units = {"Mi": 1024**2, "Gi": 1024**3}
    engines = [pod["spec"] for doc in DOCS[variant] for pod in templates(doc) if "worker" in doc["metadata"]["name"]]
    assert engines
    for pod in engines:
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert int(shm["sizeLimit"][:-2]) * units[shm["sizeLimit"][-2:]] >= SHARED_BYTES
        (only,) = pod["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in only["volumeMounts"]


def test_an_engine_over_several_nodes_is_a_group_whose_leader_is_the_worker() -> None:
    wide = of("everything", "LeaderWorkerSet", "wide")
    assert wide["spec"]["replicas"] == 2 and wide["spec"]["leaderWorkerTemplate"]["size"] == 4
    assert set(wide["spec"]["leaderWorkerTemplate"]) <= {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    leader, follower = container(wide, 0), container(wide, 1)
    shared = [
        *("--tensor-parallel-size=8", "--pipeline-parallel-size=4", "--distributed-executor-backend=mp", "--nnodes=4"),
        *("--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)", "--max-num-seqs=64"),
    ]
    assert leader["args"][4:] == [f"--engine-arg={arg}" for arg in shared]
    assert follower["args"] == [VALUES["workerDefaults"]["model"], "--headless", *shared]
    assert "readinessProbe" in leader and "ports" in leader
    # Nobody asks a follower, and Redis is none of its business.
    assert not {"readinessProbe", "startupProbe", "ports"} & set(follower)
    assert not [item for item in follower["env"] if item["name"].startswith("EVENHAND")]
    scaled = of("everything", "HorizontalPodAutoscaler", "rays")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == (
        "LeaderWorkerSet",
        of("everything", "LeaderWorkerSet", "rays")["metadata"]["name"],
    )


@pytest.mark.parametrize("at", [0, 1], ids=["leader", "follower"])
def test_under_ray_the_leader_is_the_head_and_the_others_join_it_when_it_is_there(at: int, tmp_path: Path) -> None:
    """The shell lines are run, with programs that say how they were called and a head that comes up late."""
    late = f'[ "$1" != health-check ] || [ -e {tmp_path}/up ] || {{ touch {tmp_path}/up; exit 1; }}'
    for name, says in (("ray", f'echo ray "$@"; {late}'), ("evenhand", 'echo evenhand "$@"'), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    only = container(of("everything", "LeaderWorkerSet", "rays"), at)
    given = {"VLLM_HOST_IP": "10.0.0.2", "EVENHAND_ADDRESS": "10.0.0.2", "LWS_LEADER_ADDRESS": "leader"}
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given}
    run = subprocess.run(only["command"] + only["args"], env=environ, capture_output=True, text=True, check=True)
    checked = "ray health-check --address leader:6379"
    where = "--node-ip-address=10.0.0.2 --disable-usage-stats"
    if at == 0:
        worker = f"evenhand worker --address 10.0.0.2 {' '.join(only['args'][2:])}"
        assert run.stdout.splitlines() == [f"ray start --head --port=6379 {where}", worker]
    else:
        assert run.stdout.splitlines() == [checked, checked, f"ray start --block --address=leader:6379 {where}"]


def test_only_gateways_prometheus_and_workers_reach_an_engine() -> None:
    policy = of("everything", "NetworkPolicy", "worker")
    engine, among = policy["spec"]["ingress"]
    assert [port["port"] for port in engine["ports"]] == ["engine"]
    components = [
        peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for peer in engine["from"]
        if "podSelector" in peer
    ]
    assert components == ["gateway"] and {"namespaceSelector": {}} in engine["from"]
    assert among["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "worker"
    assert {"namespaceSelector": {}} not in of("least", "NetworkPolicy", "worker")["spec"]["ingress"][0]["from"]


def test_prometheus_gets_the_rules_of_the_repository_with_the_widest_gap_of_the_values() -> None:
    assert of("everything", "PrometheusRule", "evenhand")["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))
    monitoring = {"enabled": True, "objectives": {"fairnessGap": 1000000}}
    (rule,) = [doc for doc in rendered(KEY | {"monitoring": monitoring}) if doc["kind"] == "PrometheusRule"]
    text = yaml.safe_dump(rule)
    assert "> 1000000" in text and "> 65536" not in text


def test_grafana_gets_every_dashboard() -> None:
    given = of("everything", "ConfigMap", "dashboards")["data"]
    assert set(given) == {f"{name}.json" for name in BOARDS}
    assert all(json.loads(text)["uid"].startswith("evenhand-") for text in given.values())


def test_the_schema_allows_what_the_code_has() -> None:
    assert set(SCHEMA["definitions"]["policy"]["enum"]) == set(POLICIES)


WRONG = [
    ({}, "admin.key"),
    ({"admin": {"key": "short"}}, "key"),
    (KEY | {"gateway": {"policy": "lifo"}}, "policy"),
    (KEY | {"gateway": {"replicas": 0}}, "replicas"),
    (KEY | {"gateway": {"replica": 2}}, "replica"),
    (KEY | {"gateway": {"settings": {"redis_url": "redis://x"}}}, "redis_url"),
    (KEY | {"gateway": {"settings": {"batch": {"files_url": "s3://bucket"}}}}, "gateway.settings.batch.shared"),
    (KEY | {"gateway": {"temporaryStorage": "lots"}}, "temporaryStorage"),
    (KEY | {"redis": {"url": "redis://:secret@host"}}, "url"),
    (KEY | {"redis": {"url": "redis://host"}}, "redis.enabled"),
    (KEY | {"redis": {"enabled": False, "url": ["redis://host", "redis://:secret@host"]}}, "url"),
    (KEY | {"redis": {"enabled": False}}, "redis"),
    (KEY | {"tenants": {"list": [{"name": "a"}], "existingSecret": "b"}}, "tenants"),
    (KEY | {"workers": {"main": {"role": "cook"}}}, "role"),
    (KEY | {"workers": {"main": {"role": "prefill"}}}, "workers.main.role"),
    (KEY | {"workers": {"Main_1": {}}}, "Main_1"),
    (KEY | {"workers": {"main": {"engineArgs": ["max-num-seqs"]}}}, "engineArgs"),
    (KEY | {"workers": {"main": {"storage": {"size": "1Gi", "existingClaim": "x"}}}}, "workers.main.storage"),
    (KEY | {"workers": {"main": {"multiNode": {"nodes": 2, "backend": "mpi"}}}}, "backend"),
    (KEY | {"workers": {"main": {"multiNode": {"nodes": 0}}}}, "nodes"),
    (KEY | {"workers": {"main": {"sharedMemory": "64Mi"}}}, "sharedMemory"),
    (KEY | {"workers": {"main": {"sharedMemory": "255Mi"}}}, "sharedMemory"),
    (KEY | {"workers": {"main": {"sharedMemory": "0Gi"}}}, "sharedMemory"),
    (KEY | {"workers": {"main": {"multiNode": {"nodes": 2}, "role": "decode"}}}, "workers.main.multiNode"),
    (KEY | {"workers": {"main": {"multiNode": {"nodes": 2}, "storage": {"size": "1Gi"}}}}, "workers.main.storage.size"),
    (KEY | {"monitoring": {"objectives": {"ttftSeconds": "1.7"}}}, "ttftSeconds"),
    (KEY | {"workers": {"main": {"keda": {"prometheus": "prometheus:9090"}}}}, "prometheus"),
    (KEY | {"monitorring": {}}, "monitorring"),
]


@pytest.mark.parametrize(("values", "named"), WRONG, ids=lambda item: item if isinstance(item, str) else "")
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        rendered(values)
    assert named in str(refused.value)


def worker_pod(**values: Any) -> Doc:
    """The pod of a worker with these values."""
    documents = rendered(KEY | {"workers": {"main": values}})
    (pod,) = [
        doc["spec"]["template"]["spec"]
        for doc in documents
        if doc["kind"] in ("Deployment", "StatefulSet") and doc["metadata"]["name"].endswith("main")
    ]
    return dict(pod)


@pytest.mark.parametrize(
    ("limits", "engine_args", "said"),
    [
        ({"nvidia.com/gpu": 8}, [], ["--engine-arg=--tensor-parallel-size=8"]),
        ({"nvidia.com/gpu": 1}, [], []),
        ({"nvidia.com/mig-3g.20gb": 1}, [], []),
        (
            {"nvidia.com/gpu": 8},
            ["--pipeline-parallel-size=8"],
            ["--engine-arg=--pipeline-parallel-size=8"],
        ),
        (
            {"nvidia.com/gpu": 2},
            ["--max-num-seqs=64"],
            ["--engine-arg=--tensor-parallel-size=2", "--engine-arg=--max-num-seqs=64"],
        ),
    ],
)
def test_an_engine_uses_all_gpus_of_its_pod(limits: Mapping[str, int], engine_args: list[str], said: list[str]) -> None:
    pod = worker_pod(resources={"limits": limits}, engineArgs=engine_args)
    assert pod["containers"][0]["args"][4:] == said


def test_a_pod_for_rdma_may_lock_memory_and_choose_runtime_and_place() -> None:
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
    pod = worker_pod(capabilities=["IPC_LOCK"], runtimeClassName="nvidia", affinity=affinity)
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert (pod["runtimeClassName"], pod["affinity"]) == ("nvidia", affinity)
    plain = worker_pod()
    assert plain["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"runtimeClassName", "affinity"} & set(plain)


def test_what_a_start_compiles_is_kept_beside_the_models() -> None:
    env = {item["name"]: item.get("value") for item in worker_pod()["containers"][0]["env"]}
    assert env["VLLM_CACHE_ROOT"].startswith(env["HF_HOME"] + "/")
