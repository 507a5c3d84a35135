"""Model names: aliases, canaries, fallbacks and visibility, over engines of different models."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from server.relay.renamed import RenamedAnswer, model_span
from server.request.names import NameTable, read_name, table_of
from server.settings import Settings, read_settings
from tests.server.batch.test_batches import client_of, ended, jsonl, lines_of, submit
from tests.server.conftest import (
    INSTANT,
    SLOW,
    Reply,
    Running,
    chat,
    completion,
    eventually,
    over_script,
    plain,
    request,
    says,
    serving,
    streamed,
)
from tests.server.test_admin import ADMIN_KEY, admin
from tests.server.test_shared import OwnRedis, own_redis, two_gateways  # noqa: F401 - a fixture
from tests.server.test_tenants import KEY, OTHER

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    TEXT: completion(),
    RESPONSES: {"input": "Hello there", "max_output_tokens": 8},
    MESSAGES: {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 8},
}


@contextlib.asynccontextmanager
async def two_models(**settings: Any) -> AsyncIterator[tuple[Running, FakeEngine, FakeEngine]]:
    """A gateway over an engine of model `old` and one of model `new`."""
    old, new = (FakeEngine(replace(INSTANT, model=name)) for name in ("old", "new"))
    async with old, new, serving(old.url, new.url, **settings) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == 2, "both are ready")
        yield gateway, old, new


def models_in(reply: Reply) -> set[str]:
    """Every name that an answer, or a stream, goes by."""
    told = reply.events if reply.headers["content-type"].startswith("text/event-stream") else [reply.json()]
    found = [
        part["model"]
        for event in told
        if event != "[DONE]"
        for part in (event, event.get("response", {}), event.get("message", {}))
        if "model" in part
    ]
    assert found
    return set(found)


def keyed(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ── aliases ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_answer_goes_by_the_name_that_was_asked() -> None:
    async with two_models(models={"gpt-4o-mini": "new"}) as (gateway, _, new):
        for path, stream in product(BODIES, (False, True)):
            asked = await gateway.ask(path, BODIES[path] | {"model": "gpt-4o-mini", "stream": stream})
            own = await gateway.ask(path, BODIES[path] | {"model": "new", "stream": stream})
            assert (asked.status, own.status) == (200, 200), asked.body
            assert models_in(asked) == {"gpt-4o-mini"} and models_in(own) == {"new"}
            assert new.seen[-1].body["model"] == new.seen[-2].body["model"] == "new"
            if path in (CHAT, TEXT) and stream:
                assert asked.text == own.text


async def test_embeddings_and_token_counts_follow_the_name_too() -> None:
    async with two_models(models={"any-name": "old"}) as (gateway, *_):
        embedded = await gateway.ask("/v1/embeddings", {"model": "any-name", "input": ["one", "two"]})
        assert embedded.json()["model"] == "any-name" and len(embedded.json()["data"]) == 2
        assert (await gateway.ask("/tokenize", {"model": "any-name", "prompt": "one"})).status == 200


async def test_one_name_can_stand_for_all_that_nobody_serves() -> None:
    async with two_models(models={"*": "old", "chat": "new"}) as (gateway, old, new):
        for name, engine in (("gpt-5", old), ("chat", new), ("new", new), ("o" * 300, old)):
            reply = await gateway.ask(CHAT, chat(model=name))
            assert (reply.status, reply.json()["model"]) == (200, name)
            assert engine.seen[-1].body["model"] == engine.setup.model
        asked = {
            dict(labels)["name"] for name, labels in await gateway.metrics() if name == "evenhand_model_requests_total"
        }
        assert asked == {"*", "chat", "new"}, "no label is a client's own words"


async def test_a_batch_may_ask_for_a_name(tmp_path: Path) -> None:
    async with two_models(models={"chat": "new"}, batch={"folder": tmp_path}) as (gateway, _, new):
        async with client_of(gateway) as client:
            batch = await ended(client, (await submit(client, jsonl(5, model="chat"))).id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 5)
            output = await lines_of(client, batch.output_file_id)
            assert {line["response"]["body"]["model"] for line in output} == {"chat"} and len(new.seen) == 5
            refused = await ended(client, (await submit(client, jsonl(1, model="nothing"))).id)
            assert refused.status == "failed"


async def test_names_that_hold_json_are_written_as_json() -> None:
    name = 'a "quoted" \\ näme'
    async with two_models(models={name: "old"}) as (gateway, *_):
        for stream in (False, True):
            assert models_in(await gateway.ask(CHAT, chat(model=name, stream=stream))) == {name}


async def test_v1_models_shows_names_and_hides_what_is_behind_them() -> None:
    models = {"gpt-4o-mini": "old", "old": {"tenants": []}, "nothing": "gone", "*": "new"}
    async with two_models(models=models) as (gateway, *_):
        listed = (await gateway.ask("/v1/models", method="GET")).json()["data"]
        assert {entry["id"] for entry in listed} == {"gpt-4o-mini", "new"}
        assert "old" not in json.dumps(listed)
        assert (await gateway.ask("/v1/models/gpt-4o-mini", method="GET")).json()["id"] == "gpt-4o-mini"
        hidden = await gateway.ask(CHAT, chat(model="old"))
        assert (hidden.status, hidden.error["code"]) == (404, "model_not_found")
        assert "'old' is not served here; available: gpt-4o-mini, new" in hidden.error["message"]


async def test_a_name_is_for_the_tenants_that_may_use_it(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(
        f"tenants: [{{name: acme, keys: [{KEY}], models: [chat]}}, {{name: zenith, keys: [{OTHER}]}}]"
    )
    models = {"chat": "old", "lab": {"targets": "new", "tenants": ["zenith"]}}
    async with two_models(tenants=tmp_path / "tenants.yaml", models=models) as (gateway, *_):
        seen = {}
        for key in (KEY, OTHER):
            listed = await gateway.ask("/v1/models", method="GET", headers=keyed(key))
            seen[key] = {entry["id"] for entry in listed.json()["data"]}
        assert seen == {KEY: {"chat"}, OTHER: {"chat", "lab", "old", "new"}}
        for key, name, status in ((KEY, "chat", 200), (KEY, "old", 404), (KEY, "lab", 404), (OTHER, "lab", 200)):
            assert (await gateway.ask(CHAT, chat(model=name), headers=keyed(key))).status == status, (key, name)


# ── canaries ────────────────────────────────────────────────────────────────────────────────────────────────────────


def share_of(table: NameTable, name: str, tenants: int = 2000) -> float:
    """The part of the tenants that gets the model `new`."""
    return sum(table.chain(table.names[name], f"t{n}", "") == ("new",) for n in range(tenants)) / tenants


def named(**targets: float) -> NameTable:
    return table_of({"chat": read_name("chat", {"targets": targets})})


def test_weights_are_kept_over_tenants_and_a_tenant_stays_with_its_model() -> None:
    five, ten = named(old=95, new=5), named(old=90, new=10)
    assert share_of(five, "chat") == pytest.approx(0.05, abs=0.02)
    assert share_of(ten, "chat") == pytest.approx(0.10, abs=0.03)
    for tenant in map(str, range(2000)):
        if five.chain(five.names["chat"], tenant, "") == ("new",):
            assert ten.chain(ten.names["chat"], tenant, "other") == ("new",), "raising a weight sends nobody back"


async def test_a_canary_is_sticky_by_tenant_and_spread_by_request_where_there_is_no_tenant(tmp_path: Path) -> None:
    crowd = [f"sk-crowd-0123456789-{n:03}" for n in range(40)]
    tenants = ", ".join(f"{{name: t{n}, keys: [{key}]}}" for n, key in enumerate(crowd))
    (tmp_path / "tenants.yaml").write_text(f"tenants: [{tenants}]")
    half = {"targets": {"old": 1, "new": 1}}
    async with two_models(tenants=tmp_path / "tenants.yaml", models={"chat": half}) as (gateway, old, new):
        for _ in range(2):
            for key in crowd:
                assert (await gateway.ask(CHAT, chat(model="chat", user=key), headers=keyed(key))).status == 200
        sides = [{request.body["user"] for request in engine.seen} for engine in (old, new)]
        assert not sides[0] & sides[1] and min(map(len, sides)) > 8
    async with two_models(models={"chat": half}) as (gateway, old, new):
        for _ in range(40):
            assert (await gateway.ask(CHAT, chat(model="chat"))).status == 200
        assert min(len(old.seen), len(new.seen)) > 4


async def test_a_model_can_have_a_canary_of_its_own_name() -> None:
    models = {"old": {"targets": {"old": 0, "new": 1}}, "alias": "old"}
    async with two_models(models=models) as (gateway, old, new):
        for name in models:
            assert (await gateway.ask(CHAT, chat(model=name))).json()["model"] == name
        assert len(new.seen) == 2 and not old.seen


# ── fallbacks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_is_replaced_by_the_fallback_before_the_first_byte(stream: bool) -> None:
    models = {"chat": {"targets": "old", "fallbacks": ["gone", "new"]}}
    async with two_models(models=models) as (gateway, old, new):
        old.faults = Faults(error_status=500)
        reply = await gateway.ask(CHAT, chat(model="chat", stream=stream))
        assert reply.status == 200 and models_in(reply) == {"chat"}
        assert [engine.seen[-1].body["model"] for engine in (old, new)] == ["old", "new"]
        assert new.seen[-1].body["model"] == "new"
        metrics = await gateway.metrics()
        step = {"name": "chat", "model": "old", "fallback": "gone", "outcome": "engine_500"}
        assert metrics["evenhand_fallbacks_total", tuple(sorted(step.items()))] == 1
        ended = {"name": "chat", "model": "new", "outcome": "ok"}
        assert metrics["evenhand_model_requests_total", tuple(sorted(ended.items()))] == 1


async def test_a_stream_that_has_begun_never_changes_its_model() -> None:
    models = {"old": {"fallbacks": ["new"]}}
    async with two_models(models=models) as (gateway, old, new):
        old.faults = Faults(error_event_after_tokens=3)
        reply = await gateway.ask(CHAT, chat(model="old", stream=True, max_tokens=20, ignore_eos=True))
        assert reply.status == 200 and "error" in reply.events[-2] and not new.seen


async def test_without_a_worker_and_with_a_full_line_the_fallback_is_asked() -> None:
    models = {"chat": {"targets": "old", "fallbacks": ["new"]}}
    slow, new = FakeEngine(replace(SLOW, model="old")), FakeEngine(replace(INSTANT, model="new"))
    limits = {"max_waiting": 0, "ahead": 0}
    async with slow, new, serving(slow.url, new.url, slots=1, models=models, admission=limits) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == 2)
        long = await gateway.send(request(CHAT, chat(model="chat", stream=True, max_tokens=4000, ignore_eos=True)))
        await long.head()
        assert (await gateway.ask(CHAT, chat(model="chat"))).json()["model"] == "chat"
        assert len(new.seen) == 1
        assert (await gateway.ask(CHAT, chat(model="old"))).status == 429, "a model without a fallback stays full"
        gateway.server.fleet.drain("worker-0")
        assert (await gateway.ask(CHAT, chat(model="chat"))).status == 200
        assert len(new.seen) == 2
        gateway.server.fleet.drain("worker-1")
        none = await gateway.ask(CHAT, chat(model="chat"))
        assert (none.status, none.error["code"]) == (503, "no_worker")
        await long.close()


async def test_one_worker_that_failed_is_counted_once_however_many_fallbacks_have_none() -> None:
    """The third model is asked: one failure does not blame the request."""
    models = {"chat": {"targets": "old", "fallbacks": ["gone", "lost", "new"]}}
    async with two_models(models=models) as (gateway, old, new):
        old.faults = Faults(error_status=500)
        assert (await gateway.ask(CHAT, chat(model="chat"))).status == 200
        assert len(new.seen) == 1


async def test_a_request_that_is_wrong_is_not_asked_again_elsewhere() -> None:
    models = {"chat": {"targets": "old", "fallbacks": ["new"]}}
    async with two_models(models=models) as (gateway, old, new):
        old.faults = Faults(error_status=400)
        assert (await gateway.ask(CHAT, chat(model="chat"))).status == 400
        assert not new.seen


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = [
    ({"a": "b", "b": "a"}, "model names form a cycle: a → b → a"),
    (
        {"a": "b", "b": {"targets": {"c": 1, "x": 1}}, "c": "b"},
        "model names form a cycle: a → b → c → b",
    ),
    ({"a": {"targets": "x", "fallbacks": ["a"]}}, "model name 'a': its fallback is itself"),
    ({"a": {"targets": "x", "fallbacks": ["*"]}}, "model name 'a': its fallback is '*'"),
    ({"*": {"fallbacks": ["x"]}}, "model name '*': it needs a target"),
    ({"a": {"targets": {"x": 0}}}, "model name 'a': at least one target needs a weight above 0"),
    ({"a": {"targets": {"x": -1}}}, "model name 'a': targets[...]: expected `float` >= 0.0"),
    ({"a": {"targets": {"x": float("inf")}}}, "model name 'a': at least one target needs a weight above 0"),
    ({"a": {"target": "x"}}, "model name 'a': object contains unknown field `target`"),
    ({"a": {"targets": "x", "sticky": "user"}}, "model name 'a': sticky: invalid enum value 'user'"),
    ({"a": 7}, "model name 'a': write a model, or targets, fallbacks and tenants"),
    ({"a": ""}, "model name 'a'"),
]


@pytest.mark.parametrize("models, sentence", WRONG, ids=[sentence for _, sentence in WRONG])
def test_at_the_start_one_sentence_says_what_is_wrong(models: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        table_of({name: read_name(name, value) for name, value in models.items()})
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_the_command_line_and_the_file_make_one_table(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("models: {chat: {targets: {old: 95, new: 5}, fallbacks: [tiny]}, a: old}")
    settings = read_settings({"models": {"a": "new"}}, tmp_path / "gateway.yaml", Settings)
    table = table_of({name: read_name(name, value) for name, value in settings.models.items()})
    assert table.names["chat"].models == (("old", 0.95), ("new", 0.05)) and table.names["chat"].fallbacks == ("tiny",)
    assert table.names["a"].models == (("new", 1.0),)


async def test_a_name_that_points_to_nothing_is_told_of_and_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "evenhand.names")
    async with two_models(models={"chat": "gone", "ok": {"targets": "old", "fallbacks": ["lost"]}}) as (gateway, *_):
        problems = (await gateway.ask("/ready", method="GET")).json()["model_names"]["problems"]
        assert problems == [
            "model name 'chat': no worker serves 'gone'",
            "model name 'ok': no worker serves 'lost'",
        ]
        assert [record.getMessage() for record in caplog.records].count(problems[0]) == 1
        refused = await gateway.ask(CHAT, chat(model="chat"))
        assert (refused.status, refused.error["code"]) == (503, "no_worker")
        assert "gone" not in refused.error["message"], "what is behind a name is the operator's business"
        assert (await gateway.ask(CHAT, chat(model="ok"))).status == 200


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.fixed_dictionaries(
            {
                "targets": st.dictionaries(st.sampled_from("abcdxyz"), st.floats(0.01, 100), max_size=3),
                "fallbacks": st.lists(st.sampled_from("abcdxyz"), max_size=3).map(tuple),
            }
        ),
    )
)
def test_every_table_is_refused_or_leads_each_name_to_models(records: dict[str, Any]) -> None:
    try:
        table = table_of({name: read_name(name, value) for name, value in records.items()})
    except ValueError:
        return
    for name in table.names.values():
        assert sum(share for _, share in name.models) == pytest.approx(1.0)
        chain = table.chain(name, "acme", "")
        assert chain[0] in dict(name.models) and len(set(chain)) == len(chain) <= 1 + len(name.fallbacks or "xyz")


# ── changed while it runs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_an_operator_sets_changes_and_removes_names() -> None:
    async with two_models(admin_key=ADMIN_KEY, models={"fixed": "old"}) as (gateway, old, new):
        put = await admin(gateway, "PUT", "/models/org/chat", {"targets": {"old": 3, "new": 1}, "sticky": "request"})
        assert put.json() == {
            "name": "org/chat",
            "targets": {"old": 3.0, "new": 1.0},
            "fallbacks": [],
            "tenants": None,
            "sticky": "request",
            "models": {"old": 0.75, "new": 0.25},
            "source": "store",
        }
        assert (await gateway.ask(CHAT, chat(model="org/chat"))).status == 200
        listed = (await admin(gateway, "GET", "/models")).json()
        assert [entry["name"] for entry in listed["names"]] == ["fixed", "org/chat"] and listed["served"] == [
            "new",
            "old",
        ]

        assert (await admin(gateway, "PUT", "/models/fixed", {"targets": "new"})).status == 200
        await gateway.ask(CHAT, chat(model="fixed"))
        assert new.seen[-1].body["model"] == "new"
        assert (await admin(gateway, "DELETE", "/models/fixed")).status == 204
        before = len(old.seen)
        await gateway.ask(CHAT, chat(model="fixed"))
        assert len(old.seen) == before + 1, "it is as the settings have it again"
        assert (await admin(gateway, "DELETE", "/models/fixed")).error["code"] == "conflict"
        assert (await admin(gateway, "DELETE", "/models/org/chat")).status == 204
        assert (await admin(gateway, "GET", "/models/org/chat")).status == 404
        assert (await gateway.ask(CHAT, chat(model="org/chat"))).status == 404


REFUSED = [
    ({"targets": "fixed"}, "model names form a cycle: fixed → a → fixed"),
    ({"targets": "gone"}, "model name 'a': no worker serves 'gone'; available: new, old."),
    ({"targets": "old", "fallbacks": ["lost"]}, "model name 'a': no worker serves 'lost'; available: new, old."),
    ({"targets": "old", "fallbacks": "new"}, "model name 'a': fallbacks: expected `array`, got `str`."),
]


async def test_an_operator_is_told_in_a_sentence_what_cannot_be() -> None:
    async with two_models(admin_key=ADMIN_KEY, models={"fixed": "a"}) as (gateway, *_):
        for body, sentence in REFUSED:
            refused = await admin(gateway, "PUT", "/models/a", body)
            assert refused.status == 400 and refused.error["message"].startswith(sentence)
            assert (await admin(gateway, "GET", "/models/a")).status == 404


async def test_names_are_shared_over_the_store(own_redis: OwnRedis) -> None:  # noqa: F811 - the fixture
    async with two_gateways(own_redis.url) as (one, other):
        assert (await admin(one, "PUT", "/models/chat", {"targets": "fake"})).status == 200
        await eventually(lambda: "chat" in other.server.lines.names.table.names, "the other knows it")
        assert (await other.ask(CHAT, chat(model="chat"))).json()["model"] == "chat"
        assert (await admin(other, "DELETE", "/models/chat")).status == 204
        await eventually(lambda: not one.server.lines.names.table.names, "it is gone at both")


# ── how an answer is renamed ────────────────────────────────────────────────────────────────────────────────────────


class Written:
    """The client's side of an answer, on paper."""

    def __init__(self) -> None:
        self.begun, self.length, self.data, self.pieces = False, None, b"", 0

    def begin(self, status: int, content_type: bytes, length: int | None) -> None:
        self.begun, self.length = True, length  # type: ignore[assignment]  # None at first

    def write(self, data: bytes) -> None:
        self.data += data
        self.pieces += 1

    def forward(self, chunk: bytes, at: int) -> None:
        raise AssertionError("a renamed piece has another length")

    def end(self) -> None: ...
    def flows_from(self, connection: object) -> None: ...


def test_an_answer_in_pieces_is_renamed_where_its_model_stands() -> None:
    out = Written()
    answer = RenamedAnswer(out, "asked")
    body = json.dumps(
        {"id": '"model": "x"', "data": {"model": "inner"}, "model": "own", "text": "y" * 100_000}
    ).encode()
    answer.begin(200, b"application/json", len(body))
    assert answer.begun and not out.begun
    for at in range(0, len(body), 1000):
        answer.write(body[at : at + 1000])
    answer.end()
    assert out.length == len(out.data) == len(body) + 2
    assert json.loads(out.data) == json.loads(body) | {"model": "asked"}


def test_the_first_piece_of_an_answer_of_unknown_length_is_renamed() -> None:
    out = Written()
    answer = RenamedAnswer(out, "asked")
    answer.begin(200, b"application/json", None)
    answer.write(b'{"id":"1","model":"own","choices":[')
    answer.write(b"]}")
    answer.end()
    assert json.loads(out.data)["model"] == "asked" and out.length is None


async def test_words_of_a_model_are_never_taken_for_its_name() -> None:
    trap = '"model":"own"'
    event = {"id": "1", "choices": [{"index": 0, "delta": {"content": trap}, "finish_reason": None}], "model": "own"}
    events = [b"data: " + json.dumps(event | {"id": str(n)}).encode() + b"\n\n" for n in range(3)]
    async with over_script(says(streamed(*events, b"data: [DONE]\n\n")), models={"asked": "fake"}) as (gateway, _):
        reply = await gateway.ask(CHAT, chat(model="asked", stream=True))
        assert models_in(reply) == {"asked"} and reply.text == trap * 3


async def test_an_answer_without_a_model_goes_on_as_it_is() -> None:
    bodies = [b"", b"no JSON", b'{"id":1}', b"[1]", b'{"model":7}', b'{"model":"own"']
    async with over_script(*(says(plain(body)) for body in bodies), models={"asked": "fake"}) as (gateway, _):
        for body in bodies:
            reply = await gateway.ask(CHAT, chat(model="asked"))
            assert reply.status == 200
            assert reply.body == body or json.loads(reply.body) == {"model": "asked"}


JSON = st.recursive(st.none() | st.floats(allow_nan=False) | st.text(max_size=9), st.lists, max_leaves=4)


@given(st.dictionaries(st.text(max_size=9), JSON, max_size=4), st.text(max_size=9), st.booleans())
def test_the_span_of_model_is_where_json_has_it(members: dict[str, Any], model: str, escaped: bool) -> None:
    whole = {name: value for name, value in members.items() if name != "model"} | {"model": model, "z": 1}
    data = json.dumps(whole, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    span = model_span(data)
    assert span is not None and json.loads(data[span[0] : span[1]]) == model
