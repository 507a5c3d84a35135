"""Tenants and their keys: who is let in, what a file may say, and that nothing of a key is ever told."""

import json
import logging
import os
import re
import traceback
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from server.app import GatewayServer
from server.request.directory import TenantFile, Tenants
from server.request.errors import NoWorker, UnknownKey
from server.request.tenant_files import read_file
from server.request.tenants import OPEN, hashed, new_key, read_record
from server.settings import Settings
from tests.server.conftest import chat, eventually, over_fake

KEY = "sk-test-0123456789abcdef"
OTHER = "sk-test-fedcba9876543210"
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC).timestamp()


def tenants(*records: dict[str, object], wall: float = NOON) -> Tenants:
    found = Tenants(lambda: wall)
    found.set_file(tuple(read_record(record) for record in records))
    return found


def bearer(key: str) -> bytes:
    return b"Bearer " + key.encode()


def write(path: Path, text: str) -> None:
    """Writes a file that is told from the one before even within one tick of the file system's clock."""
    path.write_text(text)
    mark = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(mark, mark))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_is_found_in_the_authorization_header_whatever_the_case_of_its_scheme(scheme: str) -> None:
    found = tenants({"name": "acme", "keys": [KEY], "weight": 3})
    tenant = found.identify(f"{scheme} {KEY}".encode(), None)
    assert (tenant.name, tenant.weight) == ("acme", 3.0)


def test_a_key_is_found_in_the_header_that_anthropic_clients_send() -> None:
    assert tenants({"name": "acme", "keys": [KEY]}).identify(None, KEY.encode()).name == "acme"


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        (None, None),
        (b"", None),
        (b"Bearer ", None),
        (b"Bearer " + OTHER.encode(), None),
        (b"Basic " + KEY.encode(), None),
        (KEY.encode(), None),
        (None, KEY[:-1].encode()),
        (None, KEY.encode() + b"0"),
        (None, hashed(KEY).encode()),
        (b"Bearer \xff\xfe\x00", None),
    ],
)
def test_whoever_has_no_known_key_is_refused(authorization: bytes | None, api_key: bytes | None) -> None:
    with pytest.raises(UnknownKey) as refused:
        tenants({"name": "acme", "keys": [KEY]}).identify(authorization, api_key)
    assert KEY not in refused.value.message and OTHER not in refused.value.message


def test_a_tenant_has_several_keys_plain_or_hashed_and_each_is_its_own() -> None:
    found = tenants({"name": "acme", "keys": [KEY, hashed(OTHER)]})
    assert found.identify(bearer(KEY), None) == found.identify(bearer(OTHER), None)


def test_a_key_opens_until_it_expires() -> None:
    record = {"name": "acme", "keys": [{"key": KEY, "expires": "2025-06-01T12:00:00Z"}, OTHER]}
    assert tenants(record, wall=NOON - 1).identify(bearer(KEY), None).name == "acme"
    with pytest.raises(UnknownKey, match="expired"):
        tenants(record, wall=NOON).identify(bearer(KEY), None)
    assert tenants(record, wall=NOON).identify(bearer(OTHER), None).name == "acme"


def test_a_plain_key_is_not_kept() -> None:
    record = read_record({"name": "acme", "keys": [KEY]})
    found = tenants({"name": "acme", "keys": [KEY]})
    assert KEY not in repr(record) + str(msgspec.json.encode(record)) + repr(found)


def test_fresh_keys_are_long_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and all(len(key) > 40 for key in keys)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keys": ["short-secret"]}, "16 characters"),
        ({"keys": ["sha256:abc"]}, "64 lower-case"),
        ({"keys": [7]}, "key"),
        ({"keys": [{"key": KEY, "expires": "soon"}]}, "expires"),
        ({"weight": 0}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"requests_per_minute": True}, "requests_per_minute"),
        ({"concurrency": True}, "concurrency"),
        ({"budget": {"tokens_per_day": False}}, "tokens_per_day"),
        ({"concurrency": 0}, "concurrency"),
        ({"name": "a b"}, "name"),
        ({"budget": {"tokens_per_year": 3}}, "budget.tokens_per_year"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_record_is_refused_with_the_field_and_without_its_content(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        read_record({"name": "acme", "keys": [KEY]} | wrong)
    told = "".join(traceback.format_exception(refused.value))
    assert "short-secret" not in told and KEY not in told


@pytest.mark.parametrize(
    "text",
    [
        f"tenants: [{{name: a, keys: [{KEY}]",
        f"tenants:\n- name: a\n  keys: [{KEY}]\n- name: b\n  keys: [{KEY}]\n",
        f"tenants:\n- name: a\n  keys: [{KEY}]\n- name: a\n",
        f"tenants:\n- {KEY}\n",
        f"{KEY}\n",
        "",
        "tenants: 3",
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_without_a_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="tenants.yaml") as refused:
        read_file(path)
    assert KEY not in "".join(traceback.format_exception(refused.value))


def test_a_file_that_is_not_there_stops_the_start() -> None:
    with pytest.raises(ValueError, match="No such file"):
        TenantFile(Path("/nowhere/tenants.yaml"), Tenants(lambda: NOON))


def test_a_changed_file_is_in_force_at_the_next_look(tmp_path: Path) -> None:
    path, found = tmp_path / "tenants.yaml", Tenants(lambda: NOON)
    write(path, f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    file = TenantFile(path, found)
    write(path, f"tenants: [{{name: acme, keys: [{OTHER}], weight: 2}}]")
    file.look()
    assert found.identify(bearer(OTHER), None).weight == 2
    with pytest.raises(UnknownKey):
        found.identify(bearer(KEY), None)


def test_a_broken_new_file_leaves_the_old_tenants_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, found = tmp_path / "tenants.yaml", Tenants(lambda: NOON)
    write(path, f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    file = TenantFile(path, found)
    for text in (f"tenants: [{{name: acme, keys: [{OTHER}], weight: -1}}]", f"}}{OTHER}{{"):
        write(path, text)
        caplog.clear()
        file.look()
        file.look()
        assert found.identify(bearer(KEY), None).name == "acme"
        assert "stay in force" in file.problem
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert OTHER not in caplog.text and OTHER not in file.problem
    path.unlink()
    file.look()
    assert found.identify(bearer(KEY), None).name == "acme" and file.problem
    write(path, f"tenants: [{{name: acme, keys: [{OTHER}]}}]")
    file.look()
    assert not file.problem and found.identify(bearer(OTHER), None)


def test_without_tenants_everybody_is_the_open_tenant_until_the_first_one_comes() -> None:
    found = Tenants(lambda: NOON)
    assert found.identify(None, None) is OPEN
    found.set_stored({"acme": read_record({"name": "acme", "keys": [KEY]})})
    with pytest.raises(UnknownKey):
        found.identify(None, None)
    found.set_stored({})
    with pytest.raises(UnknownKey):
        found.identify(None, None)


def test_an_empty_tenant_file_lets_nobody_in() -> None:
    with pytest.raises(UnknownKey):
        tenants().identify(None, None)


def test_until_the_store_has_said_whether_there_are_tenants_nobody_is_let_in_openly() -> None:
    found = Tenants(lambda: NOON, learned=False)
    with pytest.raises(NoWorker):
        found.identify(None, None)
    found.set_stored({})
    assert found.identify(None, None) is OPEN


def test_the_file_counts_where_the_store_has_a_tenant_of_the_same_name_or_key() -> None:
    found = tenants({"name": "acme", "keys": [KEY], "weight": 2})
    found.set_stored(
        {
            "acme": read_record({"name": "acme", "keys": [OTHER], "weight": 9}),
            "thief": read_record({"name": "thief", "keys": [KEY]}),
        }
    )
    assert found.identify(bearer(KEY), None).name == "acme"
    with pytest.raises(UnknownKey):
        found.identify(bearer(OTHER), None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gateway.example"])
def test_an_open_gateway_that_others_can_reach_does_not_start(host: str) -> None:
    with pytest.raises(ValueError, match="--allow-open"):
        GatewayServer(Settings(host=host))
    GatewayServer(Settings(host=host, allow_open=True))


def test_a_cache_salt_is_a_tenant_s_own_and_nobody_can_guess_it() -> None:
    acme, renamed = ({"name": name, "keys": [KEY, OTHER]} for name in ("acme", "other"))
    salts = {read_record(record).tenant().cache_salt for record in (acme, renamed, {"name": "acme", "keys": [OTHER]})}
    assert len(salts) == 3 and all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)
    again = read_record({"name": "acme", "keys": [hashed(KEY), "another-key-0123456789"], "weight": 2.0})
    assert again.tenant().cache_salt in salts, "it outlives new keys, as long as the oldest one stays"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_an_open_gateway_on_loopback_starts(host: str) -> None:
    GatewayServer(Settings(host=host))


async def test_an_open_gateway_says_so_loudly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with over_fake() as (gateway, _):
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 200
    assert "OPEN" in caplog.text


async def test_over_http_a_key_opens_and_none_of_it_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tenants.yaml"
    write(
        path, f"tenants: [{{name: acme, keys: [{KEY}], models: [fake]}}, {{name: poor, keys: [{OTHER}], models: []}}]"
    )
    with caplog.at_level(logging.DEBUG):
        async with over_fake(tenants=path) as (gateway, _):
            asked = {"authorization": f"Bearer {KEY}"}
            assert (await gateway.ask("/v1/chat/completions", chat(), headers=asked)).status == 200
            listed = await gateway.ask("/v1/models", method="GET", headers=asked)
            assert [entry["id"] for entry in listed.json()["data"]] == ["fake"]

            wrong = await gateway.ask("/v1/chat/completions", chat(), headers={"authorization": "Bearer wrong-wrong"})
            assert (wrong.status, wrong.error["code"]) == (401, "invalid_api_key")
            assert (await gateway.ask("/v1/chat/completions", chat())).status == 401
            assert (await gateway.ask("/v1/models", method="GET")).status == 401

            barred = await gateway.ask("/v1/chat/completions", chat(), headers={"x-api-key": OTHER})
            assert (barred.status, barred.error["code"]) == (404, "model_not_found")
            assert (await gateway.ask("/v1/models", method="GET", headers={"x-api-key": OTHER})).json()["data"] == []

            text = (await gateway.ask("/metrics", method="GET")).body + (await gateway.ask("/ready", method="GET")).body
    assert KEY not in caplog.text and "wrong-wrong" not in caplog.text
    assert KEY.encode() not in text


async def test_a_file_that_breaks_while_serving_is_told_in_ready(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    async with over_fake(tenants=path) as (gateway, _):
        assert "tenants" not in (await gateway.ask("/ready", method="GET")).json()
        write(path, "tenants: 3")
        await eventually(lambda: gateway.server.shared.notes(), "the broken file was seen")
        told = (await gateway.ask("/ready", method="GET")).json()
        assert told["status"] == "ready" and "stay in force" in told["tenants"]["problem"]
        reply = await gateway.ask("/v1/chat/completions", chat(), headers={"authorization": f"Bearer {KEY}"})
        assert reply.status == 200


def test_a_file_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "tenants.json"
    path.write_text(
        json.dumps({"tenants": [{"name": "acme", "keys": [{"key": KEY, "expires": "2025-06-01T12:00:00Z"}]}]})
    )
    (record,) = read_file(path)
    assert record.name == "acme" and record.credentials[0].expires_at == NOON


@pytest.mark.parametrize(
    "text",
    ['{"tenants": [{"name": 1}], "tenants": []}', '{"tenants": [{"name": 1}, {"na', '{"tenants": ' + "[" * 5000],
)
def test_what_is_wrong_in_two_ways_is_one_sentence_too(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tenants.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="^tenant file .*tenants.json"):
        read_file(path)


def test_one_wrong_record_of_many_is_named_and_nothing_of_the_file_is_used(tmp_path: Path) -> None:
    path, found = tmp_path / "tenants.json", Tenants(lambda: NOON)
    records: list[dict[str, object]] = [{"name": f"t{number}"} for number in range(1000)]
    write(path, json.dumps({"tenants": records}))
    file = TenantFile(path, found)
    records[777]["weight"] = -1
    write(path, json.dumps({"tenants": [*records, {"name": "new"}]}))
    file.look()
    assert "tenants[777].weight: expected `float` > 0" in file.problem and "stay in force" in file.problem
    assert found.named("new") is None and found.named("t777") is not None
