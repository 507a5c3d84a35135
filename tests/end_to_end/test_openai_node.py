"""The official openai client for Node against the whole system with a real engine."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import LIMIT_S, Stack, in_ci, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

FOLDER = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def node() -> str:
    """The node program, with the client's package installed beside the script."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        assert not in_ci(), "CI must have node and npm"
        pytest.skip("node and npm are not installed: the openai client for Node is not tried")
    if not (FOLDER / "node_modules" / "openai" / "package.json").exists():
        done = subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return node


def test_the_node_client_chats_streams_aborts_and_sees_errors(stack: Stack, node: str) -> None:
    made = stack.engine_made()
    done = subprocess.run(
        [node, "client.mjs", f"{stack.url}/v1", stack.model], cwd=FOLDER, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    answer = "The capital of France is Paris."
    assert (seen["whole"], seen["stream"], seen["helper"], seen["response"]) == (answer,) * 4
    assert seen["usage"]["completion_tokens"] == seen["streamUsage"]["completion_tokens"] == 8
    assert seen["error"] == {"status": 404, "code": "model_not_found", "name": "NotFoundError"}
    assert seen["models"] == [stack.model]
    until(lambda: stack.engine_running() == 0, LIMIT_S, "the aborted stream is gone from the engine")
    assert stack.engine_made() - made < 1000, "the aborted stream was not made to its end, which is 2,000 tokens"


def test_the_node_client_runs_a_batch_from_upload_to_download(stack: Stack, node: str) -> None:
    done = subprocess.run(
        [node, "batch.mjs", f"{stack.url}/v1", stack.model], cwd=FOLDER, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["states"][0] == "validating" and seen["status"] == "completed"
    assert (seen["counts"], seen["metadata"]) == ({"total": 2, "completed": 1, "failed": 1}, {"job": "node"})
    (answer,), (error,) = seen["output"], seen["errors"]
    body = answer["response"]["body"]
    assert answer["custom_id"] == "paris" and answer["response"]["status_code"] == 200 and answer["error"] is None
    assert (body["choices"][0]["message"]["content"], body["service_tier"]) == (
        "The capital of France is Paris.",
        "flex",
    )
    assert error["custom_id"] == "wrong" and error["response"]["status_code"] == 400
    assert seen["listed"] == 1 and seen["files"] == ["batch", "batch_output", "batch_output"] and seen["deleted"]
    assert (seen["cancelling"], seen["cancelled"]) == ("cancelling", "cancelled")
    assert seen["failed"] == ["failed", [[1, "invalid_json_line"]]]
    assert seen["error"] == {"status": 404, "code": "batch_not_found", "name": "NotFoundError"}
    until(lambda: stack.engine_running() == 0, LIMIT_S, "the lines of the cancelled batch are gone from the engine")
