"""What is read of a body, and what the engine gets of it."""

import contextlib
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.catalog import build
from scheduler.tiers import TieredLanes
from scheduler.workers import Worker
from server.relay.engine_body import EngineBody
from server.request.call import Call, Route, Ticket
from server.request.errors import BadRequest
from server.request.schemas import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MAX_PROMPTS,
    MESSAGES,
    RESPONSES,
    StreamOptions,
    splice,
    with_usage,
)
from server.request.tenants import Slo, Tenant
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
        (COMPLETIONS, {"prompt": ["a"] * 55, "best_of": 2}, 110),
        (MESSAGES, {"messages": [], "max_tokens": 1}, 1),
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
        (RESPONSES, {"max_output_tokens": 9}, 9),
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
    assert estimate([1, "a" * 4000]) > 900, "no list of token ids"
    for text in ("data:image/png;base64,", "data:;base64,", "no picture;base64,"):
        assert estimate(text + "A" * 1_000_000) > 200_000, "text cannot hide as a picture"


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
SOURCE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000}}


@pytest.mark.parametrize(
    ("route", "content", "tokens"),
    [
        (CHAT, [{"type": "text", "text": "What is this?"}, PICTURE], 1024),
        (CHAT, [PICTURE, PICTURE, PICTURE], 3 * 1024),
        (CHAT, [{"type": "text", "text": json.dumps(PICTURE)}], 250_000),
        (CHAT, json.dumps([PICTURE]), 250_000),
        (CHAT, [{"type": "text", "text": "data:image/png;base64," + "A" * 400_000}], 100_000),
        (MESSAGES, [SOURCE], 1024),
        (MESSAGES, [{"type": "tool_result", "tool_use_id": "t", "content": [SOURCE]}], 1024),
        (MESSAGES, [{"type": "document", "source": {"type": "text", "data": "A" * 400_000}}], 100_000),
    ],
)
def test_a_picture_counts_as_much_as_vision_models_make_of_it_and_only_a_picture_does(
    route: Route, content: object, tokens: int
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    assert tokens <= call_of(json.dumps(body).encode(), route).prompt_tokens <= tokens * 1.01 + 100


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "description": "A" * 600_000}}]}),
        (CHAT, {"documents": [{"title": "t", "text": "A" * 600_000}]}),
        (CHAT, {"functions": [{"name": "f", "description": "A" * 600_000}]}),
        (CHAT, {"chat_template_kwargs": {"x": "A" * 600_000}}),
        (COMPLETIONS, {"prompt": "x", "suffix": "A" * 600_000}),
        (RESPONSES, {"input": "x", "instructions": "A" * 600_000}),
        (MESSAGES, {"messages": [], "system": [{"type": "text", "text": "A" * 600_000}]}),
        (MESSAGES, {"messages": [], "tools": [{"name": "A" * 600_000}]}),
    ],
)
def test_all_that_becomes_part_of_the_prompt_counts(route: Route, fields: dict[str, object]) -> None:
    assert call_of(json.dumps({"model": "m"} | fields).encode(), route).prompt_tokens >= 150_000


def test_a_field_that_only_grants_open_counts_as_prompt() -> None:
    tenant = Tenant(name="t", grants=frozenset({"chat_template"}))
    body = json.dumps({"model": "m", "messages": [], "chat_template": "A" * 4000}).encode()
    assert call_of(body, CHAT, tenant).prompt_tokens > 900


@pytest.mark.parametrize("spaces", [0, 63, 64, 5000])
def test_spaces_do_not_hide_how_many_prompts_there_are(spaces: int) -> None:
    body = b'{"model":"m","prompt":[' + b" " * spaces + b",".join([b'"a"'] * 55) + b"]}"
    assert call_of(body, COMPLETIONS).sequences == 55


REFUSED: list[tuple[Route, dict[str, object]]] = [
    (CHAT, {"ec_transfer_params": {"peer_host": "10.0.0.1"}}),
    (CHAT, {"kv_transfer_params": {"do_remote_prefill": True}}),
    (CHAT, {"a_field_of_tomorrow": 1}),
    (CHAT, {"use_beam_search": True}),
    (CHAT, {"chat_template": "{{ messages }}"}),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}),
    (COMPLETIONS, {"messages": ["x"]}),
    (RESPONSES, {"previous_response_id": "resp_1"}),
    (RESPONSES, {"background": True}),
    (RESPONSES, {"previous_input_messages": [{}]}),
    (RESPONSES, {"n": 128}),
    (MESSAGES, {"n": 128}),
    (EMBEDDINGS, {"priority": -1}),
]


@pytest.mark.parametrize(("route", "fields"), REFUSED)
def test_a_field_that_is_not_on_the_list_is_refused_unless_it_is_granted_or_says_nothing(
    route: Route, fields: dict[str, object]
) -> None:
    (name,) = fields
    with pytest.raises(BadRequest) as refused:
        call_of(json.dumps({"model": "m"} | fields).encode(), route)
    assert refused.value.code == "field_not_allowed" and refused.value.param == name
    assert call_of(json.dumps({"model": "m", name: None}).encode(), route)
    assert call_of(json.dumps({"model": "m"} | fields).encode(), route, Tenant("t", grants=frozenset(fields)))


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
    got = json.loads(with_usage(body, None if options is None else StreamOptions()))
    asked = got.pop("stream_options")
    before = dict(members.pop("stream_options", {}))  # type: ignore[call-overload]
    before.pop("continuous_usage_stats", None)
    assert asked == {**before, "include_usage": True}
    assert got == members


def in_line(line: Any, call: Call) -> Ticket:
    """A ticket that has been given a place by this line."""
    ticket = ticket_of(lambda: 0.0, call)
    ticket.line = line
    return ticket


def test_the_scheduler_s_words_cannot_be_overwritten_by_a_client() -> None:
    class OneLine:
        lanes = TieredLanes(build("vtc", {}))

    worker = Worker("w", "http://127.0.0.1:1", plugin=True)
    steering = EngineBody()
    for body in (b'{"model":"m"}', b'{"model":"m","vllm_xargs":null}', b'{"model":"m","vllm_xarg\\u0073":null}'):
        sent = json.loads(steering.body_for(in_line(OneLine(), call_of(body)), worker))
        assert sent["vllm_xargs"]["evenhand_tenant"] == "anybody"
    granted = Tenant(name="t", grants=frozenset({"vllm_xargs"}))
    body = b'{"model":"m","seed":123456789012345678901234567890,"vllm_xargs":{"mine":1,%s}}' % (
        b'"evenhand_tenant":"other","evenhand_tier":"priority","evenhand_policy":"fcfs","evenhand_tpot_s":0.001,"evenhand_kind":"invoices"'
    )
    sent_bytes = steering.body_for(in_line(OneLine(), call_of(body, CHAT, granted)), worker)
    assert b"123456789012345678901234567890" in sent_bytes
    sent = json.loads(sent_bytes)
    assert sent["vllm_xargs"]["mine"] == 1 and sent["vllm_xargs"]["evenhand_tenant"] == "t"
    assert not {"evenhand_tier", "evenhand_policy", "evenhand_tpot_s"} & sent["vllm_xargs"].keys()
    assert sent["vllm_xargs"]["evenhand_kind"] == "invoices"  # docs/policies.md: a class of its own
    for nonsense in (b"[1]", b'"a"', b"7", b"true"):
        with pytest.raises(BadRequest, match="'vllm_xargs' must be an object"):
            call_of(b'{"model":"m","vllm_xargs":%b}' % nonsense, CHAT, granted)


def test_an_engine_is_told_the_objectives_that_are_a_tenants_own() -> None:
    class OneLine:
        lanes = TieredLanes(build("fcfs", {}))

    worker = Worker("w", "http://127.0.0.1:1", plugin=True)
    asked = {
        None: {},
        Slo(): {},
        Slo(tpot_s=0.05): {"tpot_s": 0.05},
        Slo(2.0, 0.05): {"tpot_s": 0.05},
        Slo(ttft_s=2.0): {},
    }
    for slo, told in asked.items():
        ticket = in_line(OneLine(), call_of(b'{"model":"m"}', CHAT, Tenant(name="t", slo=slo)))
        words = json.loads(EngineBody().body_for(ticket, worker))["vllm_xargs"]
        assert {name: value for name, value in words.items() if name.endswith("t_s")} == {
            f"evenhand_{name}": seconds for name, seconds in told.items()
        }


def test_an_engine_is_told_what_kind_of_answer_is_asked_for() -> None:
    class OneLine:
        lanes = TieredLanes(build("gittins", {}))

    worker = Worker("w", "http://127.0.0.1:1", plugin=True)
    steering = EngineBody()
    kinds = {
        b'{"model":"m","messages":[]}': None,
        b'{"model":"m","messages":[],"tools":[{"type":"function","function":{"name":"f"}}]}': "tools",
        b'{"model":"m","messages":[],"response_format":{"type":"json_object"}}': "json",
    }
    for body, kind in kinds.items():
        sent = json.loads(steering.body_for(in_line(OneLine(), call_of(body)), worker))
        assert sent["vllm_xargs"].get("evenhand_kind") == kind


@pytest.mark.parametrize(("granted", "salted"), [(frozenset(), True), (frozenset({"cache_salt"}), False)])
def test_tenants_share_no_prefix_cache_where_that_is_asked_for(granted: frozenset[str], salted: bool) -> None:
    body = b'{"model":"m","messages":[]}'
    for tenant in ("acme", "beta"):
        ticket = ticket_of(lambda: 0.0, call_of(body, tenant=Tenant(tenant, grants=granted)))
        steering = EngineBody(salt_cache=True)
        sent = json.loads(steering.body_for(ticket, Worker("w", "http://127.0.0.1:9")))
        assert sent.get("cache_salt") == (Tenant(tenant).cache_salt if salted else None)
        plain = EngineBody()
        assert plain.body_for(ticket, Worker("w", "http://127.0.0.1:9")) == body


SIZE = 2 << 20


def much(piece: bytes) -> bytes:
    return piece * (SIZE // len(piece))


DENSE = {
    "prompts": (COMPLETIONS, b'{"model":"m","prompt":[' + much(b'"a",') + b'"a"]}'),
    "prompts of ids": (COMPLETIONS, b'{"model":"m","prompt":[' + much(b"[1],") + b"[1]]}"),
    "prompts behind spaces": (EMBEDDINGS, b'{"model":"m","input":[' + b" " * 100 + much(b'"",') + b'""]}'),
    "one prompt of ids": (COMPLETIONS, b'{"model":"m","prompt":[' + much(b"1,") + b"1]}"),
    "messages": (CHAT, b'{"model":"m","messages":[' + much(b"{},") + b'"base64"]}'),
    "members": (CHAT, b'{"model":"m",' + b",".join(b'"k%d":0' % at for at in range(SIZE // 12)) + b"}"),
    "null members": (CHAT, b'{"model":"m",' + b",".join(b'"%d":null' % at for at in range(SIZE // 12)) + b"}"),
    "stream options": (
        CHAT,
        b'{"model":"m","stream":true,"messages":[],"stream_options":{'
        + b",".join(b'"k%d":0' % at for at in range(SIZE // 12)) + b"}}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_a_body_of_very_many_parts_becomes_no_objects(case: str) -> None:
    """Objects take memory and time by the million; what is read of a body takes no more than some copies of it."""
    route, body = DENSE[case]
    tracemalloc.start()
    try:
        with contextlib.suppress(BadRequest):
            call_of(body, route)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(body)


def test_as_many_prompts_as_allowed_are_counted_and_one_more_is_refused() -> None:
    for text in ('"a"', '"a,b"', "[1,2]"):
        for count in (1, 2, MAX_PROMPTS - 1, MAX_PROMPTS):
            body = f'{{"model":"m","input":[{",".join([text] * count)}]}}'.encode()
            assert call_of(body, EMBEDDINGS).sequences == count
        with pytest.raises(BadRequest, match="more than 2048") as refused:
            call_of(f'{{"model":"m","input":[{",".join([text] * (MAX_PROMPTS + 1))}]}}'.encode(), EMBEDDINGS)
        assert refused.value.param == "input"


def test_a_large_body_may_have_many_colons() -> None:
    text = "a: b, " * 30_000
    assert call_of(json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()).model == "m"
