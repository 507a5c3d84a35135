"""`evenhand tenant`: what it prints opens the gateway."""

import io

import pytest

from deploy.cli import main
from server.request.directory import Tenants
from server.request.tenants import read_record


def opens(shown: str, key: str) -> bool:
    tenants = Tenants(lambda: 0.0)
    tenants.set_file((read_record({"name": "acme", "keys": [shown]}),))
    return tenants.identify(b"Bearer " + key.encode(), None).name == "acme"


def test_a_new_key_opens_by_the_hash_that_is_shown_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenant", "new-key"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    shown = second.rpartition(" ")[2]
    assert opens(shown, first.rpartition(" ")[2])
    assert third.rpartition(" ")[2] == shown.removeprefix("sha256:")[:8]


def test_a_key_is_hashed_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-0123456789abcdef\n"))
    assert main(["tenant", "hash-key"]) == 0
    assert opens(capsys.readouterr().out.strip(), "sk-0123456789abcdef")


def test_a_short_key_is_refused_without_being_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("swordfish\n"))
    assert main(["tenant", "hash-key"]) == 2
    said = capsys.readouterr()
    assert "16 characters" in said.err and "swordfish" not in said.err + said.out
