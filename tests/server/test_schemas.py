"""What is read of a body, and what the engine gets of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.catalog import build
from scheduler.lanes import Lanes
from scheduler.workers import Worker
from server.admission.dispatch import Lines
from server.fleet.fleet import Fleet
from server.relay.engine_body import Steering
from server.request.call import Route
from server.request.errors import BadRequest
from server.request.schemas import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, splice, with_usage
from server.request.tenants import Tenant
from tests.server.calls import call_of, ticket_of


@pytest.mark.parametrize(
    "route, body, sequences",
    [
        (CHAT, {"n": 3}, 3),
        (COMPLETIONS, {"prompt": "one", "n": 2}, 2),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2}, 6),
        (COMPLETIONS, {"prompt": [[1, 2], [3]]}, 2),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        (COMPLETIONS, {"prompt": []}, 1),
        (EMBEDDINGS, {"input": ["a"] * 100}, 100),
        (RESPONSES, {"input": [{"role": "user"}, {"role": "user"}]}, 1),
    ],
)
def test_a_call_knows_how_many_sequences_it_makes(route: Route, body: dict[str, object], sequences: int) -> None:
    assert call_of(json.dumps({"model": "m"} | body).encode(), route).sequences == sequences


@pytest.mark.parametrize(
    "route, body, limit",
    [
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (CHAT, {}, 0),
        (RESPONSES, {"max_output_tokens": 9, "max_tokens": 1}, 9),
        (MESSAGES, {"max_tokens": 4}, 4),
    ],
)
def test_the_output_limit_is_the_routes_own(route: Route, body: dict[str, object], limit: int) -> None:
    assert call_of(json.dumps({"model": "m"} | body).encode(), route).max_tokens == limit


def test_a_prompt_is_estimated_exactly_from_ids_and_roughly_from_text() -> None:
    def estimate(prompt: object) -> int:
        return call_of(json.dumps({"model": "m", "prompt": prompt}).encode(), COMPLETIONS).prompt_tokens

    assert estimate([1, 2, 3]) == estimate([[1, 2], [3]]) == 3
    assert 90 <= estimate("abcd" * 100) <= 110
    picture = "data:image/png;base64," + "A" * 1_000_000
    assert estimate(picture) < 2000
    assert estimate("no picture;base64," + "A" * 1_000_000) > 200_000, "text cannot hide as a picture"


def test_the_last_of_two_members_counts_as_it_does_in_engines() -> None:
    assert call_of(b'{"model":"a","model":"b"}').model == "b"


def test_a_granted_field_passes() -> None:
    tenant = Tenant(name="t", grants=frozenset({"priority"}))
    assert call_of(b'{"model":"m","priority":1}', CHAT, tenant).model == "m"
    with pytest.raises(BadRequest):
        call_of(b'{"model":"m","cache_salt":"x"}', CHAT, tenant)


def test_what_is_spliced_in_wins_over_what_the_client_wrote() -> None:
    for body in (b'{"a":1}', b' {"a":{"b":"}"}} \n', b'{"a":1,"x":null}', b'{"a":1,"\\u0078":null}'):
        assert json.loads(splice(body, b'"x":[7]'))["x"] == [7]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=8) | st.just("stream_options"), json_values, max_size=5),
    st.sampled_from([None, {}, {"include_usage": False}, {"continuous_usage_stats": True}]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_asking_for_usage_changes_nothing_else(others: dict[str, object], options: object, spaced: bool) -> None:
    members = {**others, "model": "m"}
    members.pop("stream_options", None)
    if options is not None:
        members["stream_options"] = options
    body = json.dumps(members, indent=2 if spaced else None).encode()
    got = json.loads(with_usage(body))
    asked = got.pop("stream_options")
    before = members.pop("stream_options", {})
    assert asked == {**before, "include_usage": True}  # type: ignore[dict-item]
    assert got == members


def test_the_scheduler_s_words_cannot_be_overwritten_by_a_client() -> None:
    class OneLine:
        lanes = Lanes(build("vtc", {}))

    class TheLines:
        by_model = {"m": OneLine()}

    worker = Worker("w", "http://127.0.0.1:1", plugin=True)
    steering = Steering(TheLines())  # type: ignore[arg-type]
    for body in (b'{"model":"m"}', b'{"model":"m","vllm_xargs":null}', b'{"model":"m","vllm_xarg\\u0073":null}'):
        sent = json.loads(steering.body_for(ticket_of(lambda: 0.0, call_of(body)), worker))
        assert sent["vllm_xargs"]["evenhand_tenant"] == "anybody"
    granted = Tenant(name="t", grants=frozenset({"vllm_xargs"}))
    body = b'{"model":"m","big":123456789012345678901234567890,"vllm_xargs":{"mine":1,"evenhand_tenant":"other"}}'
    sent_bytes = steering.body_for(ticket_of(lambda: 0.0, call_of(body, CHAT, granted)), worker)
    assert b"123456789012345678901234567890" in sent_bytes
    sent = json.loads(sent_bytes)
    assert sent["vllm_xargs"]["mine"] == 1 and sent["vllm_xargs"]["evenhand_tenant"] == "t"


def test_an_engine_is_told_what_kind_of_answer_is_asked_for() -> None:
    class OneLine:
        lanes = Lanes(build("gittins", {}))

    class TheLines:
        by_model = {"m": OneLine()}

    worker = Worker("w", "http://127.0.0.1:1", plugin=True)
    steering = Steering(TheLines())  # type: ignore[arg-type]
    kinds = {
        b'{"model":"m","messages":[]}': None,
        b'{"model":"m","messages":[],"tools":[{"type":"function","function":{"name":"f"}}]}': "tools",
        b'{"model":"m","messages":[],"response_format":{"type":"json_object"}}': "json",
    }
    for body, kind in kinds.items():
        sent = json.loads(steering.body_for(ticket_of(lambda: 0.0, call_of(body)), worker))
        assert sent["vllm_xargs"].get("evenhand_kind") == kind


@pytest.mark.parametrize(("granted", "salted"), [(frozenset(), True), (frozenset({"cache_salt"}), False)])
def test_tenants_share_no_prefix_cache_where_that_is_asked_for(granted: frozenset[str], salted: bool) -> None:
    body = b'{"model":"m","messages":[]}'
    for tenant in ("acme", "beta"):
        ticket = ticket_of(lambda: 0.0, call_of(body, tenant=Tenant(tenant, grants=granted)))
        steering = Steering(Lines(None, Fleet()), salt_cache=True)  # type: ignore[arg-type]  # no line is made here
        sent = json.loads(steering.body_for(ticket, Worker("w", "http://127.0.0.1:9")))
        assert sent.get("cache_salt") == (f"evenhand-{tenant}" if salted else None)
        plain = Steering(Lines(None, Fleet()))  # type: ignore[arg-type]
        assert plain.body_for(ticket, Worker("w", "http://127.0.0.1:9")) == body
