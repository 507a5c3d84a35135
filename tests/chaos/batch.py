"""A gateway that is killed again and again while it runs a batch: no line may be lost, doubled or wrong."""

import asyncio
import json
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from tests.chaos.figures import Figure
from tests.chaos.site import engine, gateway, metrics, running, summed

MODEL = "fake"
BETWEEN_S = (0.05, 1.0)  # a gateway lives so long once it serves again
OVER = ("completed", "failed", "expired", "cancelled")


@dataclass
class Report:
    """missing, doubled: lines without an answer in the output, and with more than one. extra: requests that the engine
    computed beyond one a line."""

    lines: int
    kills: int = 0
    status: str = ""
    missing: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    extra: float = 0.0

    def figures(self) -> list[Figure]:
        return [
            Figure(f"lines of a batch, gateway killed {self.kills} times", str(self.lines), "", True),
            Figure("batch ends as", self.status, "completed", self.status == "completed"),
            Figure("lines without an answer", str(self.missing), "0", not self.missing),
            Figure("lines with two answers", str(self.doubled), "0", not self.doubled),
            Figure("answers that are not the line's", str(len(self.wrong)), "0", not self.wrong),
            Figure("requests computed again, of all", f"{self.extra / self.lines:.1%}", "", True),
        ]


class BatchChaos:
    """One batch, one gateway, `kills` kills at random moments of every status that it can be in."""

    def __init__(self, seed: int, kills: int, lines: int) -> None:
        self.random = random.Random(seed)
        self.kills = kills
        self.report = Report(lines)

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            worker = engine(folder, 0, "--cost", "quick")
            front = gateway(folder, 0, [f"{worker.url},slots=64"], {"batch": {"folder": str(folder / "batch")}})
            client = AsyncOpenAI(base_url=f"{front.url}/v1", api_key="any", max_retries=20)
            async with running(worker, front), client:
                batch_id = await self._submit(client)
                for _ in range(self.kills):
                    await asyncio.sleep(self.random.uniform(*BETWEEN_S))  # the gateway's life
                    await front.kill()
                    self.report.kills += 1
                    await front.start()
                await self._judge(client, await self._ended(client, batch_id))
                asked = summed(await metrics(worker.port), "vllm:request_success_total")
                self.report.extra = max(0.0, asked - self.report.lines)
        return self.report

    async def _submit(self, client: AsyncOpenAI) -> str:
        lines = [
            {
                "custom_id": f"id-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {
                    "model": MODEL,
                    "prompt": [number % 1000, 7, 9],
                    "max_tokens": 1 + number % 7,
                    "ignore_eos": True,
                },
            }
            for number in range(self.report.lines)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        return batch.id

    @staticmethod
    async def _ended(client: AsyncOpenAI, batch_id: str) -> Any:
        while True:
            try:
                batch = await client.batches.retrieve(batch_id)
                if batch.status in OVER:
                    return batch
            except (APIConnectionError, APIStatusError):
                pass  # it is on its way back
            await asyncio.sleep(0.1)  # between two questions

    async def _judge(self, client: AsyncOpenAI, batch: Any) -> None:
        self.report.status = batch.status
        text = (await client.files.content(batch.output_file_id)).text if batch.output_file_id else ""
        answers: dict[str, int] = {}
        for line in map(json.loads, text.splitlines()):
            answers[line["custom_id"]] = answers.get(line["custom_id"], 0) + 1
            number = int(line["custom_id"].removeprefix("id-"))
            if line["response"]["body"]["usage"]["completion_tokens"] != 1 + number % 7:
                self.report.wrong.append(line["custom_id"])
        self.report.missing = self.report.lines - len(answers)
        self.report.doubled = sum(count > 1 for count in answers.values())
