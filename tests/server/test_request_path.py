"""A request's way through the gateway stays short: see docs/architecture.md."""

import pytest

from tests.request_path import Trace, measured


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return measured()


@pytest.mark.parametrize(("name", "calls"), [("request", 70), ("request with a head seen before", 52)])
def test_a_request_reaches_its_engine_in_a_few_calls(traces: dict[str, Trace], name: str, calls: int) -> None:
    trace = traces[name]
    assert trace.files[0] == "server/connection/protocol.py" and trace.files[-1] == "server/engine/client.py"
    assert len(trace.calls) <= calls and len(set(trace.files)) <= 15 and trace.changes <= 30, trace.page()


def test_a_token_reaches_its_client_in_five_calls(traces: dict[str, Trace]) -> None:
    assert len(traces["token"].calls) <= 5, traces["token"].page()
