"""What is not relayed: health, readiness, models, the OpenAPI page."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from loadtest.fake.engine import FakeEngine
from tests.server.conftest import INSTANT, chat, over_fake, over_script, plain, request, says, serving
from tests.server.test_tenants import KEY


async def test_health_says_that_the_process_lives_and_ready_that_a_worker_does() -> None:
    async with serving() as gateway:
        assert (await gateway.ask("/health", method="GET")).status == 200
        reply = await gateway.ask("/ready", method="GET")
        assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
    async with over_fake() as (gateway, _):
        reply = await gateway.ask("/ready", method="GET")
        assert reply.status == 200 and reply.json()["workers"][0]["state"] == "ready"


async def test_ready_names_the_half_that_nobody_takes_and_requests_that_go_unsplit_for_it_are_counted() -> None:
    async with FakeEngine(INSTANT) as prefill, FakeEngine(INSTANT) as decode:
        async with serving(f"{decode.url},role=decode,id=d0") as gateway:
            ready = await gateway.ask("/ready", method="GET")
            assert (ready.status, ready.json()["missing_roles"]) == (200, ["prefill"])
            assert (
                await gateway.ask(
                    "/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
                )
            ).status == 200
            counted = (await gateway.ask("/metrics", method="GET")).body.decode()
            assert 'evenhand_placements_total{placement="no_pool"} 1.0' in counted
        async with serving(f"{prefill.url},role=prefill", f"{decode.url},role=decode") as gateway:
            assert "missing_roles" not in (await gateway.ask("/ready", method="GET")).json()
        async with serving(decode.url) as gateway:
            assert "missing_roles" not in (await gateway.ask("/ready", method="GET")).json()


async def test_models_are_listed_and_found_by_name() -> None:
    async with over_fake() as (gateway, _):
        listed = (await gateway.ask("/v1/models", method="GET")).json()
        assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == ["fake"]
        assert "root" not in listed["data"][0]
        assert (await gateway.ask("/v1/models/fake", method="GET")).json() == listed["data"][0]
        missing = await gateway.ask("/v1/models/other", method="GET")
        assert missing.status == 404 and missing.error["code"] == "model_not_found"


async def test_the_openapi_page_knows_the_relayed_routes() -> None:
    async with over_fake() as (gateway, _):
        paths = (await gateway.ask("/openapi.json", method="GET")).json()["paths"]
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"):
            assert "post" in paths[path]


async def test_what_is_not_there_is_an_error_object() -> None:
    async with over_fake() as (gateway, _):
        assert (await gateway.ask("/nothing", method="GET")).error["code"] == "unknown_url"
        wrong = await gateway.ask("/health", {}, method="POST")
        assert wrong.status == 405 and wrong.error["code"] == "method_not_allowed"


async def test_a_wrong_method_is_told_the_right_one() -> None:
    async with over_fake() as (gateway, _):
        wants = {"/v1/models": "GET", "/v1/models/fake": "GET", "/v1/chat/completions": "POST", "/v1/messages": "POST"}
        for path, right in wants.items():
            wrong = await gateway.ask(path, {}, method="PUT")
            assert wrong.status == 405 and wrong.headers["allow"] == right


async def test_below_the_messages_route_errors_are_anthropic_s() -> None:
    expected = {
        ("GET", "/v1/messages"): (405, "invalid_request_error"),
        ("GET", "/v1/messages/batches"): (404, "not_found_error"),
        ("POST", "/v1/messages/nothing"): (404, "not_found_error"),
    }
    async with over_fake() as (gateway, _):
        for (method, path), (status, kind) in expected.items():
            reply = await gateway.ask(path, {}, method=method)
            told = reply.json()
            assert reply.status == status and told["type"] == "error" and told["error"]["type"] == kind
        too_large = request("/v1/messages", headers={"content-length": str(10**9)})
        told = (await (await gateway.send(too_large)).answer()).json()
        assert told["error"]["type"] == "request_too_large"
        assert (await gateway.ask("/v1/messagesx", {})).error["code"] == "unknown_url"


ANTHROPIC = {"anthropic-version": "2023-06-01"}


async def test_clients_of_anthropic_see_models_as_anthropic_lists_them() -> None:
    async with over_fake() as (gateway, _):
        listed = (await gateway.ask("/v1/models", method="GET", headers=ANTHROPIC)).json()
        assert set(listed) == {"data", "has_more", "first_id", "last_id"} and listed["first_id"] == "fake"
        (model,) = listed["data"]
        assert model["type"] == "model" and model["id"] == model["display_name"] == "fake"
        assert datetime.fromisoformat(model["created_at"]).tzinfo is not None
        assert (await gateway.ask("/v1/models/fake", method="GET", headers=ANTHROPIC)).json() == model
        missing = await gateway.ask("/v1/models/other", method="GET", headers=ANTHROPIC)
        assert missing.status == 404 and missing.json()["error"]["type"] == "not_found_error"
        assert (await gateway.ask("/v1/models/", method="GET")).json()["object"] == "list"


async def test_below_the_messages_route_the_id_is_in_anthropic_s_header_too() -> None:
    good = chat(max_tokens=3)
    async with over_fake() as (gateway, _):
        for method, path, body in (
            ("POST", "/v1/messages", good),
            ("POST", "/v1/messages", b"{"),
            ("GET", "/v1/messages", b""),
        ):
            reply = await gateway.ask(path, body, method=method, headers={"x-request-id": "trace-7"})
            assert reply.headers["request-id"] == reply.headers["x-request-id"] == "trace-7"
        assert "request-id" not in (await gateway.ask("/v1/chat/completions", good)).headers


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/detokenize", "/tokenize"])
async def test_what_only_counts_tokens_is_relayed_and_does_not_wait(path: str) -> None:
    asked = {"model": "fake"} | ({"tokens": [1, 2]} if path == "/detokenize" else {"messages": []})
    async with over_script(says(plain(b'{"input_tokens":3}')), slots=1, admission={"max_waiting": 0}) as (
        gateway,
        engine,
    ):
        next(iter(gateway.server.fleet.members.values())).load.reserve(1, 0)  # it is full
        reply = await gateway.ask(path, asked)
        assert reply.status == 200 and reply.json() == {"input_tokens": 3}
        assert engine.asked[-1].path == path and json.loads(engine.asked[-1].body) == asked
        next(iter(gateway.server.fleet.members.values())).load.release(1, 0)


async def test_a_byte_order_mark_before_a_body_is_passed_over() -> None:
    body = json.dumps(chat()).encode()
    async with over_script(says(plain(b'{"choices":[]}'))) as (gateway, engine):
        assert (await gateway.ask("/v1/chat/completions", b"\xef\xbb\xbf" + body)).status == 200
        assert engine.asked[-1].body == body


async def test_the_field_that_an_engine_refuses_is_named_as_openai_names_it() -> None:
    refused = b'{"error":{"message":"no","type":"BadRequestError","param":"body.input","code":400}}'
    async with over_script(says(plain(refused, status="400 Bad Request"))) as (gateway, _):
        assert (await gateway.ask("/v1/chat/completions", chat())).error["param"] == "input"


async def test_what_keeps_responses_says_that_none_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    routes = [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")]
    async with over_fake(tenants=tmp_path / "tenants.yaml") as (gateway, _):
        paths = (await gateway.ask("/openapi.json", method="GET")).json()["paths"]
        for method, path in routes:
            assert method.lower() in paths["/v1/responses/{response_id}" + path]
            unknown = await gateway.ask("/v1/responses/resp_1" + path, method=method)
            assert unknown.status == 401
            headers = {"authorization": f"Bearer {KEY}"}
            refused = await gateway.ask("/v1/responses/resp_1" + path, method=method, headers=headers)
            assert (refused.status, refused.error["code"]) == (404, "response_not_found")


RESPONSES = "/v1/responses"


async def test_a_response_that_was_cut_at_its_length_is_incomplete() -> None:
    async with over_fake() as (gateway, _):
        body = {"model": "fake", "input": "Once", "stream": True, "max_output_tokens": 3}
        for name in ("fake", "alias"):
            gateway.server.lines.names.set_stored({"alias": '"fake"'})
            cut = await gateway.ask(RESPONSES, body | {"model": name})
            last = cut.body.rstrip().rpartition(b"\n\n")[2]
            assert last.startswith(b"event: response.incomplete\ndata: ")
            event = cut.events[-1]
            assert (event["type"], event["response"]["status"]) == ("response.incomplete", "incomplete")
            assert event["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
            assert event["response"]["model"] == name
        whole = await gateway.ask(RESPONSES, body | {"max_output_tokens": 4000})
        assert whole.events[-1]["type"] == "response.completed"


async def test_on_responses_null_is_as_if_it_were_not_there_and_what_is_not_kept_is_refused() -> None:
    async with over_fake() as (gateway, engine):
        nothing = {"truncation": None, "background": None, "conversation": None, "metadata": None}
        asked = {"model": "fake", "input": "null", "max_output_tokens": 3}
        assert (await gateway.ask(RESPONSES, asked | nothing)).status == 200
        assert engine.seen[-1].body == asked
        for field in ("conversation", "prompt", "previous_response_id"):
            refused = await gateway.ask(RESPONSES, asked | {field: "conv_1"})
            assert (refused.status, refused.error["param"], refused.error["code"]) == (400, field, "field_not_allowed")
