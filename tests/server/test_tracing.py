"""Traces: one per request, within the client's own, across to the engine, and sent to a collector."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.conftest import SLOW, chat, eventually, over_fake

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector:
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        kept = self.requests

        class Taking(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                kept.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                return

        with HTTPServer(("127.0.0.1", 0), Taking) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/v1/traces"
            finally:
                server.shutdown()
                thread.join()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def attributes(self, name: str) -> dict[str, Any]:
        (span,) = [span for span in self.spans if span.name == name]
        return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


async def test_a_request_is_one_trace_within_the_client_s_own_and_the_engine_is_told() -> None:
    collector = Collector()
    with collector.listening() as endpoint:
        async with over_fake(SLOW, tracing={"endpoint": endpoint}) as (gateway, engine):
            body = chat(stream=True, max_tokens=5, ignore_eos=True)
            answer = await gateway.ask(CHAT, body, headers=SAMPLED)
            assert answer.status == 200
            told = engine.seen[-1].headers["traceparent"].split("-")
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"chat fake", "wait in line", "prefill", "decode"}
    root = spans["chat fake"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE} and root.parent_span_id.hex() == PARENT
    assert told == ["00", TRACE, root.span_id.hex(), "01"]
    phases = [spans[name] for name in ("wait in line", "prefill", "decode")]
    assert all(span.parent_span_id == root.span_id for span in phases)
    times = [time for span in phases for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert [root.start_time_unix_nano, *times, root.end_time_unix_nano] == sorted(
        [root.start_time_unix_nano, *times, root.end_time_unix_nano]
    )
    attributes = collector.attributes("chat fake")
    assert attributes["gen_ai.operation.name"] == "chat" and attributes["gen_ai.request.model"] == "fake"
    assert attributes["gen_ai.usage.output_tokens"] == 5 and attributes["evenhand.outcome"] == "ok"
    assert attributes["evenhand.request_id"] == answer.headers["x-request-id"]
    assert attributes["evenhand.tenant"] != "open" and "error.type" not in attributes
    assert collector.attributes("decode") == {"evenhand.worker": "worker-0"}


async def test_what_the_caller_does_not_want_traced_is_not_sent_and_still_told_to_the_engine() -> None:
    collector = Collector()
    with collector.listening() as endpoint:
        async with over_fake(tracing={"endpoint": endpoint}) as (gateway, engine):
            unwanted = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            assert (await gateway.ask(CHAT, chat(), headers=unwanted)).status == 200
            assert engine.seen[-1].headers["traceparent"].startswith(f"00-{TRACE}-")
            assert engine.seen[-1].headers["traceparent"].endswith("-00")
    assert collector.spans == []


async def test_nonsense_in_place_of_a_trace_begins_a_new_one_and_a_failure_is_told_as_such() -> None:
    collector = Collector()
    with collector.listening() as endpoint:
        async with over_fake(tracing={"endpoint": endpoint}) as (gateway, _):
            refused = await gateway.ask(CHAT, chat(max_tokens=10**6), headers={"traceparent": "nonsense"})
            assert refused.status == 400
            await eventually(gateway.at_rest)
    (root,) = [span for span in collector.spans if not span.parent_span_id]
    assert root.status.code == 2 and root.trace_id.hex() != TRACE
    assert collector.attributes(root.name)["error.type"] == "engine_400"


async def test_without_an_endpoint_an_engine_is_told_of_no_trace() -> None:
    async with over_fake() as (gateway, engine):
        await gateway.ask(CHAT, chat(), headers=SAMPLED)
        assert "traceparent" not in engine.seen[-1].headers


async def test_a_collector_that_is_not_there_costs_nobody_an_answer() -> None:
    async with over_fake(tracing={"endpoint": "http://127.0.0.1:9/v1/traces", "share": 0.0}) as (gateway, _):
        assert (await gateway.ask(CHAT, chat())).status == 200
