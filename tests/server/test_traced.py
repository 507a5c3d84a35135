"""Decisions that one can ask about: the trace of a request, and `evenhand why`."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from loadtest.fake.engine import FakeEngine
from loadtest.fake.faults import Faults
from server.operators.logs import JsonLines
from tests.server.conftest import INSTANT, SLOW, Reply, chat, eventually, over_fake, request, serving
from tests.server.test_names import keyed, two_models
from tests.server.test_tenants import KEY, OTHER

CHAT = "/v1/chat/completions"
TRACE = {"x-evenhand-trace": "1"}
LONG = {"max_tokens": 4000, "ignore_eos": True, "stream": True}


def trace_of(reply: Reply) -> Any:
    """The trace that an answer carries, None without one."""
    if "x-evenhand-trace" in reply.headers:
        return json.loads(reply.headers["x-evenhand-trace"])
    found = [line for line in reply.body.decode().split("\n\n") if line.startswith(": x-evenhand-trace ")]
    return json.loads(found[0].removeprefix(": x-evenhand-trace ")) if found else None


async def test_an_answer_tells_where_it_went_and_a_stream_ends_with_it() -> None:
    async with over_fake() as (gateway, _):
        for stream in (False, True):
            told = await gateway.ask(CHAT, chat(stream=stream), headers=TRACE | {"x-request-id": "mine"})
            trace = trace_of(told)
            assert (trace["request_id"], trace["model"], trace["served_model"]) == ("mine", "fake", "fake")
            (step,) = trace["steps"]
            assert (step["step"], step["worker"]) == ("placed", "worker-0")
            assert step["workers"][0]["free"] > 0 and trace["queue_s"] <= trace["ttft_s"]
            assert trace_of(await gateway.ask(CHAT, chat(stream=stream))) is None
            assert trace_of(await gateway.ask(CHAT, chat(stream=stream), headers={"x-evenhand-trace": "0"})) is None


async def test_a_request_that_waited_tells_behind_how_many_and_that_all_was_full() -> None:
    async with over_fake(SLOW, slots=1, admission={"ahead": 0}) as (gateway, _):
        holding = await gateway.send(request(CHAT, chat(**LONG)))
        await holding.head()
        waiting = [await gateway.send(request(CHAT, chat(max_tokens=1))) for _ in range(2)]
        await eventually(lambda: gateway.waiting == 2)
        asked = await gateway.send(request(CHAT, chat(max_tokens=1), headers=TRACE))
        await eventually(lambda: gateway.waiting == 3)
        await holding.close()
        trace = trace_of(await asked.answer())
        waits, placed = trace["steps"]
        assert (waits["step"], waits["ahead"], waits["workers"][0]["free"]) == ("waits", 2, 0)
        assert placed["step"] == "placed" and placed["after_s"] >= waits["after_s"]
        for wire in waiting:
            await wire.answer()


async def test_failures_and_fallbacks_are_steps_and_an_error_tells_them_too() -> None:
    models = {"chat": {"targets": "old", "fallbacks": ["new"]}}
    async with two_models(models=models) as (gateway, old, new):
        old.faults = Faults(error_status=500)
        trace = trace_of(await gateway.ask(CHAT, chat(model="chat", stream=True), headers=TRACE))
        assert [step["step"] for step in trace["steps"]] == ["placed", "failed", "falls back", "placed"]
        assert trace["steps"][1]["outcome"] == "engine_500" and trace["steps"][2]["model"] == "new"
        assert (trace["model"], trace["served_model"]) == ("chat", "new")
        new.faults = Faults(error_status=500)
        failed = await gateway.ask(CHAT, chat(model="new"), headers=TRACE)
        assert failed.status == 500 and [step["step"] for step in trace_of(failed)["steps"]] == ["placed", "failed"]


async def test_a_header_is_never_too_long_for_a_client() -> None:
    async with FakeEngine(INSTANT) as engine, serving(*[engine.url] * 16, ready=False) as gateway:
        await eventually(lambda: len(gateway.server.fleet.ready()) == 16)
        (step,) = trace_of(await gateway.ask(CHAT, chat(stream=True), headers=TRACE))["steps"]
        assert len(step["workers"]) == 16
        engine.faults = Faults(error_status=500)
        failed = await gateway.ask(CHAT, chat(), headers=TRACE)
        assert len(failed.headers["x-evenhand-trace"]) <= 4096
        steps = [step["step"] for step in trace_of(failed)["steps"]]
        assert steps.count("failed") > 1 and "workers" not in trace_of(failed)["steps"][0]


async def test_only_a_tenant_that_is_granted_it_may_ask(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(
        f"tenants: [{{name: ops, keys: [{KEY}], grants: [x-evenhand-trace]}}, {{name: acme, keys: [{OTHER}]}}]"
    )
    async with over_fake(tenants=tmp_path / "tenants.yaml") as (gateway, _):
        assert trace_of(await gateway.ask(CHAT, chat(), headers=TRACE | keyed(KEY))) is not None
        assert trace_of(await gateway.ask(CHAT, chat(), headers=TRACE | keyed(OTHER))) is None


# ── evenhand why ────────────────────────────────────────────────────────────────────────────────────────────────────


def why(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(["why", *args])
    said = capsys.readouterr()
    return code, said.out + said.err


async def test_why_reads_from_the_log_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "gateway.log"
    handler = logging.FileHandler(log)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    logging.getLogger("evenhand.request").setLevel(logging.INFO)
    try:
        engines = [FakeEngine(replace(INSTANT, model=name)) for name in ("old", "old", "new")]
        models = {"chat": {"targets": "old", "fallbacks": ["new"]}}
        async with engines[0], engines[1], engines[2]:
            async with serving(*(one.url for one in engines), models=models, log_format="json") as gateway:
                await eventually(lambda: len(gateway.server.fleet.ready()) == 3)
                await gateway.ask(CHAT, chat(model="new"), headers={"x-request-id": "easy"})
                engines[0].faults = engines[1].faults = Faults(cut_after_tokens=0)
                await gateway.ask(CHAT, chat(model="chat"), headers={"x-request-id": "hard"})
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        logging.getLogger("evenhand.request").setLevel(logging.NOTSET)
    code, said = why(capsys, "easy", str(log))
    assert code == 0 and "easy: /v1/chat/completions for new at " in said
    assert "did not wait: a worker had room\n  went to worker-2\n  prompt " in said
    code, said = why(capsys, "hard", str(log))
    assert "for chat (answered by the model new)" in said and ": ok\n" in said
    for worker in ("worker-0", "worker-1"):
        assert f"{worker} could not answer: engine_gone" in said
    assert "went to worker-2" in said and "first token after" in said


def test_why_of_what_is_not_there_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text('INFO evenhand: started\n{"message": "request ended", "request_id": "a"\n{"x": 1}\n')
    assert why(capsys, "a", str(tmp_path / "log")) == (
        1,
        "evenhand why: no request 'a' there: give the log of a gateway with --log-format json, which has a request "
        "once it has ended\n",
    )
    assert why(capsys, "a", str(tmp_path / "none"))[0] == 2
    line = {
        "time": "2026-11-21T09:00:00.123+00:00", "message": "request ended", "request_id": "b", "route": CHAT,
        "model": "m", "served_model": "m", "outcome": "overloaded", "worker": None, "ahead": 7, "failures": [],
        "prompt_tokens": 3, "cached_tokens": 0, "output_tokens": 0, "queue_s": None, "ttft_s": None, "e2e_s": 1.5,
    }  # fmt: skip
    alone = line | {"request_id": "c", "outcome": "ok", "worker": "w", "ahead": 0, "queue_s": 0.5}
    log = "".join("gateway-1  | " + json.dumps(one) + "\n" for one in (line, alone))
    monkeypatch.setattr("sys.stdin", io.StringIO(log))
    assert "  waited 0.500 s for a place; no other request was waiting, but no" in why(capsys, "c")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(log))
    code, said = why(capsys, "b")
    assert code == 0 and "overloaded\n  never got a place; 7 were waiting when it came\n" in said
