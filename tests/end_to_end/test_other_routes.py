"""The remaining routes of the whole system, and what it counted."""

import httpx2
import pytest

from tests.end_to_end.conftest import LIMIT_S, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


def test_anthropic_messages_answer_and_err_in_anthropics_shape(stack: Stack) -> None:
    body = {
        "model": stack.model,
        "max_tokens": 24,
        "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    answer = httpx2.post(f"{stack.url}/v1/messages", json=body, timeout=LIMIT_S).json()
    assert answer["content"][0]["text"] == "The capital of France is Paris."
    wrong = httpx2.post(f"{stack.url}/v1/messages", json={**body, "model": "other"}, timeout=LIMIT_S)
    assert wrong.status_code == 404
    assert wrong.json()["type"] == "error"


def test_tokenize_answers(stack: Stack) -> None:
    answer = httpx2.post(f"{stack.url}/tokenize", json={"model": stack.model, "prompt": "The sky is"}, timeout=LIMIT_S)
    assert answer.json()["count"] == 3


def test_embeddings_of_a_model_that_has_none_are_a_clear_error(stack: Stack) -> None:
    answer = httpx2.post(f"{stack.url}/v1/embeddings", json={"model": stack.model, "input": "x"}, timeout=LIMIT_S)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_health_and_readiness(stack: Stack) -> None:
    assert httpx2.get(f"{stack.url}/health", timeout=LIMIT_S).json() == {"status": "ok"}
    ready = httpx2.get(f"{stack.url}/ready", timeout=LIMIT_S).json()
    assert ready["status"] == "ready"
    assert [worker["state"] for worker in ready["workers"]] == ["ready"]


def test_metrics_count_what_passed(stack: Stack) -> None:
    requests = stack.metric("evenhand_requests_total")
    tokens = stack.metric('evenhand_tokens_total{kind="completion"}')
    gaps = stack.metric("evenhand_request_itl_seconds_count")
    stream = stack.client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
    )
    list(stream)
    assert stack.metric("evenhand_requests_total") >= requests + 1
    assert stack.metric('evenhand_tokens_total{kind="completion"}') == tokens + 8
    assert stack.metric("evenhand_request_itl_seconds_count") > gaps
    assert stack.metric("evenhand_request_ttft_seconds_count") >= 1
    assert stack.metric("evenhand_worker_up") == 1
