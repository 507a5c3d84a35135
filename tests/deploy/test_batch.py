"""`evenhand batch` against a gateway over an engine without a model."""

import asyncio
import json
from pathlib import Path

import pytest

from deploy.cli import main
from tests.server.batch.test_batches import jsonl
from tests.server.conftest import INSTANT, MODEL, over_fake


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


def example(custom_id: str, system: str) -> str:
    """A line as vLLM's documentation of `vllm run-batch` has it."""
    return (
        f'{{"custom_id": "{custom_id}", "method": "POST", "url": "/v1/chat/completions", "body": {{"model": '
        f'"meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{{"role": "system", "content": "{system}"}},'
        '{"role": "user", "content": "Hello world!"}],"max_completion_tokens": 1000}}\n'
    )


VLLM_EXAMPLE = example("request-1", "You are a helpful assistant.") + example(
    "request-2", "You are an unhelpful assistant."
)


async def results_of_the_example(folder: Path) -> list[str]:
    source, out = folder / "openai_example_batch.jsonl", folder / "results.jsonl"
    source.write_text(VLLM_EXAMPLE)
    models = {"meta-llama/Meta-Llama-3-8B-Instruct": MODEL}
    async with over_fake(INSTANT, batch={"folder": folder / "b"}, models=models) as (gateway, _):
        assert await evenhand(str(source), "--out", str(out), "--url", gateway.url) == 0
    return out.read_text().splitlines()


async def test_a_file_for_vllm_run_batch_runs_unchanged(tmp_path: Path) -> None:
    answers = [json.loads(line) for line in await results_of_the_example(tmp_path)]
    assert [answer["custom_id"] for answer in answers] == ["request-1", "request-2"]
    for answer in answers:
        assert answer["error"] is None and set(answer["response"]) == {"status_code", "request_id", "body"}
        assert answer["response"]["status_code"] == 200 and answer["response"]["body"]["choices"]


@pytest.mark.slow
@pytest.mark.engine
async def test_vllm_s_own_reader_takes_the_example_and_its_results(tmp_path: Path) -> None:
    run_batch = pytest.importorskip("vllm.entrypoints.launchers.run_batch", reason="vLLM is not installed")
    requests = [run_batch.BatchRequestInput.model_validate_json(line) for line in VLLM_EXAMPLE.splitlines()]
    results = [
        run_batch.BatchRequestOutput.model_validate_json(line) for line in await results_of_the_example(tmp_path)
    ]
    assert [result.custom_id for result in results] == [request.custom_id for request in requests]
