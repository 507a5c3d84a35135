"""Tenant files: YAML as PyYAML reads it, the line of what is wrong, and gateways that have different ones."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.agreement import PATIENCE_S, TENANT_FILE, Agreement
from server.cluster.replicas import KnownRing, Replicas
from server.request.directory import TenantFile, Tenants
from server.request.tenant_files import read_file
from server.request.tenants import TenantRecord, digest_of_all, read_record
from server.store.store import MemoryStore
from tests.server.test_tenants import KEY, NOON, OTHER, write

FORMS = ["block.yaml", "flow.yaml", "lines.json"]
COUNT = 2_000


def text_of(rows: list[Any], form: str) -> str:
    """A file whose n-th tenant, from 0, begins at line n + 2."""
    if form == "block.yaml":
        return "tenants:\n" + "".join(f"- {json.dumps(row)}\n" for row in rows)
    if form == "flow.yaml":
        return "tenants: [\n" + "".join(f"  {json.dumps(row)},\n" for row in rows) + "]\n"
    return '{"tenants": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "t", "weight": -1}, "tenants[1234].weight: expected `float` > 0"),
        ({"name": "t", "wieght": 1}, "tenants[1234].wieght: there is no such field"),
        ({"weight": 1}, "tenants[1234]: object missing required field `name`"),
        ({"name": "t", "keys": ["sha256:" + KEY]}, "tenants[1234]"),
        (KEY, "tenants[1234]: expected `object`, got `str`"),
    ],
)
def test_one_wrong_tenant_of_many_is_named_with_its_line_and_nothing_of_the_file_is_used(
    tmp_path: Path, form: str, wrong: Any, said: str
) -> None:
    path, found = tmp_path / form, Tenants(lambda: NOON)
    rows: list[Any] = [{"name": f"t{number}"} for number in range(COUNT)]
    write(path, text_of(rows, form))
    file = TenantFile(path, found)
    rows[1234] = wrong
    write(path, text_of([*rows, {"name": "new"}], form))
    file.look()
    assert f"tenant file {path}, line 1236: {said}" in file.problem and "stay in force" in file.problem
    assert KEY not in file.problem
    assert found.named("new") is None and found.named("t1234") is not None


@pytest.mark.parametrize("form", FORMS)
def test_a_line_that_is_neither_yaml_nor_json_is_named(tmp_path: Path, form: str) -> None:
    lines = text_of([{"name": f"t{number}"} for number in range(COUNT)], form).splitlines()
    lines[500] = f"  }}{{{KEY}"
    path = tmp_path / form
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 50[12]: this is not") as refused:
        read_file(path)
    assert KEY not in str(refused.value)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "weight": st.sampled_from(["1", "0.5", "1_000", "0x10", "1e3", "1.5e+3", ".5", "3:20", "'2'", "null", "~", ""]),
        "keys": st.sampled_from(
            [f"[{KEY}]", f"['{OTHER}']", f'["{KEY}", {{key: {OTHER}, expires: 2025-06-01}}]', "[]"]
        ),
        "models": st.sampled_from(["[a, yes]", "[a, b]", "[]", "['1']", "[1]", "\n  - x\n  - |\n    y", "*shared"]),
        "budget": st.sampled_from(
            ["{tokens_per_day: 5}", "{tokens_per_day: 010, tokens_per_month: 7}", "{}", "!!map {}", "{<<: *shared}"]
        ),
        "max_tokens": st.sampled_from(["7", "+7", "0b11", "!!int 7", "7.0", "0"]),
        "grants": st.sampled_from(["&shared [seed]", "[n, 'on', \"off\"]", "!!set {seed}", "{a: b}"]),
    },
)
NAMES = st.sampled_from(["a", "'007'", "007", "yes", "t-1", "2025-06-01", "=", "? b", '"c"', "1.0", "~"])


def outcome(read: Any) -> Any:
    try:
        return {record.name: record for record in read()}
    except (ValueError, yaml.YAMLError):
        return "refused"


@given(st.lists(st.tuples(NAMES, FIELDS), max_size=3), st.sampled_from(["", "---\n", "other: 1\n", "--- !x\n"]))
def test_yaml_is_read_as_pyyaml_reads_it(rows: list[tuple[str, dict[str, str]]], before: str) -> None:
    text = before + "tenants:\n" + ("" if rows else "  []\n")
    for name, fields in rows:
        text += f"- name: {name}\n" + "".join(f"  {field}: {value}\n" for field, value in fields.items())

    def plainly() -> tuple[TenantRecord, ...]:
        whole = yaml.safe_load(text)
        assert_plain(whole)
        return msgspec.convert(whole["tenants"], tuple[TenantRecord, ...])

    def assert_plain(whole: Any) -> None:
        if whole.keys() != {"tenants"} or len({row["name"] for row in whole["tenants"]}) < len(whole["tenants"]):
            raise ValueError
        keys = [str(key) for row in whole["tenants"] for key in row.get("keys") or ()]
        if sum(KEY in key for key in keys) > 1 or sum(OTHER in key for key in keys) > 1:
            raise ValueError

    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / "evenhand-test-tenants.yaml"  # noqa: S108
    path.write_text(text)
    assert outcome(lambda: read_file(path)) == outcome(plainly)


def test_the_digest_of_tenants_is_that_of_what_they_say(tmp_path: Path) -> None:
    one, other = (
        {"name": "a", "keys": [KEY], "models": ["x", "y", "z"], "weight": 2},
        {"name": "b", "grants": ["seed", "bad_words"]},
    )
    two_keys = [{"key": KEY, "expires": "2030-01-01T00:00:00"}, OTHER]
    swapped = [OTHER, {"key": KEY, "expires": "2030-01-01T01:00:00+01:00"}]
    assert digest_of_all([read_record({**one, "keys": two_keys})]) == digest_of_all(
        [read_record({**one, "keys": swapped})]
    )
    said = digest_of_all(map(read_record, (one, other)))
    again = [other, {**one, "weight": 2.0, "models": ["z", "y", "x"]}]
    assert digest_of_all(map(read_record, again)) == said
    for field, value in (("weight", 3), ("keys", [OTHER]), ("name", "c"), ("models", None)):
        assert digest_of_all(map(read_record, ({**one, field: value}, other))) != said


class Site:
    """Gateways of one store, each with a tenant file's digest of its own, on a clock that is moved by hand."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.now = 100.0
        self.digests = digests
        store = MemoryStore(lambda: self.now)
        self.agreements = {
            name: Agreement(TENANT_FILE, lambda name=name: self.digests[name], lambda: self.now)  # type: ignore[misc]
            for name in digests
        }
        self.replicas = {
            name: Replicas(name, store, KnownRing(), (agreement,), clock=lambda: self.now)
            for name, agreement in self.agreements.items()
        }

    async def go_on(self, seconds: float, without: str = "") -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            for name, replica in self.replicas.items():
                if name != without:
                    await replica.exchange()

    def told(self) -> Iterator[str]:
        return (agreement.problem() for agreement in self.agreements.values())


async def test_gateways_with_different_tenant_files_say_so_until_they_have_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "evenhand.agreement")
    site = Site({"a": "1", "b": "1", "c": "1"})
    await site.go_on(2 * PATIENCE_S)
    assert not any(site.told()) and not caplog.records
    site.digests["c"] = "2"
    await site.go_on(PATIENCE_S - 1)
    assert not any(site.told()), "a new file takes a while until it is everywhere"
    await site.go_on(5)
    one, other, third = site.told()
    assert one == other and one.startswith("1 other gateway has a different tenant file")
    assert third.startswith("2 other gateways have a different tenant file")
    said = [record.getMessage().partition("They are ")[2] for record in caplog.records]
    assert sorted(said) == ["a, b.", "c.", "c."]
    site.digests["c"] = "1"
    await site.go_on(2)
    assert not any(site.told())
    assert [record.getMessage() for record in caplog.records[3:]] == [
        "all gateways of the store have the same tenant file again"
    ] * 3


async def test_a_gateway_that_is_gone_differs_from_nobody() -> None:
    site = Site({"a": "1", "b": ""})
    await site.go_on(PATIENCE_S + 5)
    assert all(site.told())
    await site.go_on(PATIENCE_S, without="b")
    assert next(site.told()) == ""
