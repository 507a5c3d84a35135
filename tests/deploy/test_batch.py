"""`evenhand batch` against a gateway over an engine without a model."""

import asyncio
import json
from pathlib import Path

import pytest

from deploy.cli import main
from tests.server.batch.test_batches import jsonl
from tests.server.conftest import INSTANT, over_fake


async def evenhand(*arguments: str) -> int:
    """The command in a thread, beside the gateway."""
    return await asyncio.to_thread(main, ["batch", *arguments])


async def test_a_file_goes_in_and_the_answers_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(5) + jsonl(1, max_tokens=-1).replace(b"id-0", b"bad"))
    async with over_fake(INSTANT, batch={"folder": tmp_path / "b"}) as (gateway, _):
        assert await evenhand(str(source), "--out", str(out), "--url", gateway.url) == 1
        answers = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
        assert answers == [f"id-{number}" for number in range(5)]
        (failed,) = (tmp_path / "out.errors.jsonl").read_text().splitlines()
        assert json.loads(failed)["custom_id"] == "bad"
        assert "5 of 6 lines answered" in capsys.readouterr().err
        assert await evenhand(str(source), "--out", str(out), "--url", gateway.url) == 2
        assert "exists" in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl.batch").exists()


async def test_an_interrupted_command_goes_on_with_its_batch(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(3))
    async with over_fake(INSTANT, batch={"folder": tmp_path / "b"}) as (gateway, _):
        assert await evenhand(str(source), "--out", str(out), "--url", f"{gateway.url}/v1/") == 0
        runner = gateway.server.batches
        assert runner is not None
        (batch,) = runner.batches.store.batches("open", None, 10)
        (tmp_path / "again.jsonl.batch").write_text(batch.id)
        source.unlink()  # it is not uploaded a second time
        assert await evenhand(str(source), "--out", str(tmp_path / "again.jsonl"), "--url", gateway.url) == 0
        assert (tmp_path / "again.jsonl").read_text() == out.read_text()


async def test_what_is_wrong_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    async with over_fake(INSTANT, batch={"folder": tmp_path / "b"}) as (gateway, _):
        for content, said in (
            (jsonl(2) + b"{oops\n", "line 3: The line is not a batch request"),
            (b"oops\n", "the first line is not a batch request"),
            (jsonl(1, url="/v1/nothing"), "url must be one of"),
        ):
            source.write_bytes(content)
            assert await evenhand(str(source), "--out", out, "--url", gateway.url) == 1
            assert said in capsys.readouterr().err
        assert await evenhand(str(tmp_path / "none"), "--out", out, "--url", gateway.url) == 1
        assert "No such file" in capsys.readouterr().err
    source.write_bytes(jsonl(1))
    assert await evenhand(str(source), "--out", out, "--url", "http://127.0.0.1:9") == 1
    assert "no gateway answers at http://127.0.0.1:9" in capsys.readouterr().err
