"""The log: JSON that machines read, a line for each request that names nobody, and a level that can be changed."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.operators.logs import JsonLines, Pseudonyms, set_level, write_to_standard_error
from tests.server.conftest import SLOW, chat, eventually, over_fake, request
from tests.server.test_admin import ADMIN_KEY, admin
from tests.server.test_tenants import KEY

CHAT = "/v1/chat/completions"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What our loggers write, as JSON; afterwards logging is as it was."""
    root, ours, requests = logging.getLogger(), logging.getLogger("evenhand"), logging.getLogger("evenhand.request")
    before = root.level, ours.level, requests.level
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLines())
    root.addHandler(handler)
    requests.setLevel(logging.INFO)
    yield text
    root.removeHandler(handler)
    for logger, level in zip((root, ours, requests), before, strict=True):
        logger.setLevel(level)


def ended(text: io.StringIO) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in text.getvalue().splitlines()]
    return [line for line in every if line["logger"] == "evenhand.request"]


async def test_each_request_leaves_a_line_that_tells_how_it_went(lines: io.StringIO, tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(f"tenants: [{{name: acme, keys: [{KEY}]}}]")
    options = {"tenants": tmp_path / "tenants.yaml", "admin_key": ADMIN_KEY, "log_format": "json"}
    async with over_fake(SLOW, **options) as (gateway, _):
        key = {"authorization": f"Bearer {KEY}"}
        done = await gateway.ask(CHAT, chat(stream=True, max_tokens=5, ignore_eos=True), headers=key)
        await gateway.ask(CHAT, chat(stop=["x"] * 100, n=200), headers=key)  # refused before it is a call
        gone = await gateway.send(request(CHAT, chat(stream=True, max_tokens=500, ignore_eos=True), headers=key))
        await gone.head()
        await gone.close()
        await eventually(lambda: len(ended(lines)) == 2)
        (tenant,) = (await admin(gateway, "GET", "/tenants")).json()["tenants"]
    first, second = ended(lines)
    assert first["request_id"] == done.headers["x-request-id"] and first["outcome"] == "ok"
    assert (first["route"], first["model"], first["stream"], first["worker"]) == (CHAT, "fake", True, "worker-0")
    assert first["output_tokens"] == 5 and first["prompt_tokens"] > 0
    assert 0 <= first["queue_s"] <= first["ttft_s"] <= first["e2e_s"]
    assert second["outcome"] == "cancelled" and second["e2e_s"] > 0
    assert first["tenant"] == second["tenant"] == tenant["log_name"] != "acme"
    assert "Hello there" not in lines.getvalue() and "acme" not in lines.getvalue() and KEY not in lines.getvalue()


async def test_without_json_nothing_is_written_of_requests(lines: io.StringIO) -> None:
    async with over_fake() as (gateway, _):
        assert (await gateway.ask(CHAT, chat())).status == 200
    assert ended(lines) == []


def test_a_pseudonym_is_the_same_under_the_same_key_and_tells_nothing_without_it() -> None:
    one, same, other = Pseudonyms("k" * 16), Pseudonyms("k" * 16), Pseudonyms("K" * 16)
    assert one.of("acme") == same.of("acme") != other.of("acme")
    assert one.of("acme") != one.of("zenith")
    assert Pseudonyms(None).of("acme") != Pseudonyms(None).of("acme")


def test_an_exception_is_part_of_its_line(lines: io.StringIO) -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("evenhand.gateway").exception("request %s failed", "r-1")
    (line,) = [json.loads(text) for text in lines.getvalue().splitlines()]
    assert (line["level"], line["message"]) == ("error", "request r-1 failed")
    assert line["exception"].endswith("RuntimeError: broken") and line["time"].endswith("+00:00")


async def test_the_level_is_changed_while_it_runs(lines: io.StringIO) -> None:
    async with over_fake(admin_key=ADMIN_KEY) as (gateway, _):
        set_level("warning")
        assert (await admin(gateway, "GET", "/log")).json() == {"level": "warning"}
        assert (await admin(gateway, "PUT", "/log", {"level": "debug"})).json() == {"level": "debug"}
        logging.getLogger("evenhand.fleet").debug("now it is said")
        logging.getLogger("elsewhere").debug("not this")
        for wrong in ({"level": "loud"}, {"level": 3}, {}):
            refused = await admin(gateway, "PUT", "/log", wrong)
            assert refused.status == 400 and "debug, info, warning or error" in refused.error["message"]
        assert (await admin(gateway, "PUT", "/log", {"level": "error"}, key=KEY)).status == 401
    assert "now it is said" in lines.getvalue() and "not this" not in lines.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_standard_error_gets_the_form_that_was_asked_for(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root, requests = logging.getLogger(), logging.getLogger("evenhand.request")
    handlers, level = list(root.handlers), root.level
    try:
        write_to_standard_error(form, "error")
        logging.getLogger("evenhand.fleet").warning("not this")
        logging.getLogger("evenhand.fleet").error("but this")
        requests.info("request ended")
        said = capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        requests.setLevel(logging.NOTSET)
    if form == "json":
        assert [json.loads(line)["message"] for line in said] == ["but this", "request ended"]
    else:
        assert said == ["ERROR evenhand.fleet: but this"]
