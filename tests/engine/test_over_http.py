"""The plug-in behind vLLM's own HTTP server: a live change of policy, and its metrics beside vLLM's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from deploy.engine.model import cache_folder, prepare_tiny
from loadtest.bench.bench_target import free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_LIMIT_S = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """vLLM's API server on the tiny model, with the plug-in under MLFQ."""
    model = prepare_tiny(cache_folder(), lambda _: None)
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    config = json.dumps({"evenhand": {"policy": "mlfq", "options": {"quantum_steps": "8"}}})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", "tiny", "--load-format", "dummy", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "2", "--block-size", "32"]
    command += ["--scheduler-cls", "scheduler.vllm.plugin.PolicyScheduler", "--additional-config", config]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    metrics = folder / "metrics"
    metrics.mkdir()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | env | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}, stdout=log, stderr=log
        )
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
                wait_until_ready(client, process, folder / "log")
                yield client
        finally:
            process.terminate()
            process.wait(120)


def wait_until_ready(client: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx2.TransportError:
            pass  # it does not listen yet
        time.sleep(0.5)
    raise AssertionError(f"not ready after {START_LIMIT_S} s: {log.read_text()[-3000:]}")


def complete(client: httpx2.Client, max_tokens: int, **xargs: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body | {"vllm_xargs": xargs})
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def metric(client: httpx2.Client, line: str) -> float:
    """The value on the line that starts like this, 0 if there is none."""
    found = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line)]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def test_the_policy_given_at_the_start_is_in_force_and_shown(server: httpx2.Client) -> None:
    complete(server, 3)
    assert metric(server, 'evenhand_engine_policy_info{policy="mlfq"}') == 1


def test_the_service_of_each_tenant_is_counted_and_shown(server: httpx2.Client) -> None:
    used = complete(server, 30, evenhand_tenant="acme")["usage"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        complete(server, 1, evenhand_tenant="other")  # metrics follow work, at most once a second
        if shown := metric(server, 'evenhand_engine_tenant_service_total{tenant="acme"}'):
            break
    assert shown == used["prompt_tokens"] + 2 * 30


def test_an_order_is_answered_whether_it_is_obeyed_or_not(server: httpx2.Client) -> None:
    done = complete(server, 1, evenhand_policy="vtc", evenhand_policy_options=["output_weight=3"])
    assert done["kv_transfer_params"] == {"evenhand": {"policy": "vtc"}}
    assert metric(server, 'evenhand_engine_policy_info{policy="vtc"}') == 1
    assert metric(server, 'evenhand_engine_policy_info{policy="mlfq"}') == 0
    refused = complete(server, 1, evenhand_policy="lottery")
    assert "lottery" in refused["kv_transfer_params"]["evenhand"]["error"]
    assert metric(server, 'evenhand_engine_policy_info{policy="vtc"}') == 1
    assert metric(server, 'evenhand_engine_policy_switches_total{outcome="refused"}') == 1
    assert complete(server, 5)["usage"]["completion_tokens"] == 5
