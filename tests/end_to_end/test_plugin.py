"""The plug-in inside the engine: a change of policy while it runs, and its metrics beside vLLM's."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.end_to_end.conftest import LIMIT_S, Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]


@pytest.fixture
def engine(stack: Stack) -> Iterator[httpx2.Client]:
    """The engine's own server, not through the gateway."""
    key = {"authorization": f"Bearer {stack.engine_key}"}
    with httpx2.Client(base_url=stack.engine_url, headers=key, timeout=LIMIT_S) as client:
        yield client


def complete(engine: httpx2.Client, max_tokens: int, **xargs: Any) -> dict[str, Any]:
    body = {"prompt": "Once upon", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "vllm_xargs": xargs}
    answer = engine.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def metric(engine: httpx2.Client, line: str) -> float:
    """The value on the line that starts like this, 0 if there is none."""
    found = [row for row in engine.get("/metrics").text.splitlines() if row.startswith(line)]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def policy_is(engine: httpx2.Client, name: str) -> bool:
    return metric(engine, f'evenhand_engine_policy_info{{policy="{name}"}}') == 1


def test_the_service_of_each_tenant_is_counted_by_the_policy_given_at_the_start(engine: httpx2.Client) -> None:
    assert policy_is(engine, "vtc")
    used = complete(engine, 20, evenhand_tenant="acme")["usage"]
    service = used["prompt_tokens"] + 2 * 20

    def is_shown() -> bool:
        complete(engine, 1, evenhand_tenant="other")  # metrics follow work, at most once a second
        return metric(engine, 'evenhand_engine_tenant_service_total{tenant="acme"}') == service

    until(is_shown, LIMIT_S, f"the tenant's service is {service}")


def test_an_order_to_change_the_policy_is_answered_whether_it_is_obeyed_or_not(engine: httpx2.Client) -> None:
    done = complete(engine, 1, evenhand_policy="mlfq", evenhand_policy_options=["quantum_steps=8"])
    assert done["kv_transfer_params"] == {"evenhand": {"policy": "mlfq"}}
    assert policy_is(engine, "mlfq") and not policy_is(engine, "vtc")
    refused = complete(engine, 1, evenhand_policy="lottery")
    assert "lottery" in refused["kv_transfer_params"]["evenhand"]["error"]
    assert policy_is(engine, "mlfq")
    assert metric(engine, 'evenhand_engine_policy_switches_total{outcome="refused"}') == 1
    assert complete(engine, 5)["usage"]["completion_tokens"] == 5
    complete(engine, 1, evenhand_policy="vtc")
    assert policy_is(engine, "vtc")
