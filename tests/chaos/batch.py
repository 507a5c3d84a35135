"""Gateways that are killed again and again while they run a batch, and a Redis that goes away: no line may be lost,
doubled or wrong."""

import asyncio
import json
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from tests.chaos.figures import Figure
from tests.chaos.site import (
    HEALTH,
    S3_ENVIRONMENT,
    Program,
    engine,
    gateway,
    metrics,
    object_store,
    redis,
    running,
    summed,
    until,
)

MODEL = "fake"
SLOTS = 8  # of all gateways together: few, so that the batch outlasts the kills
ENDS_S = 1800.0
BETWEEN_S = (0.05, 1.0)  # a gateway lives so long once it serves again
OVER = ("completed", "failed", "expired", "cancelled")


BUCKET = "chaos"


def make_bucket(endpoint: str) -> None:
    from s3fs import S3FileSystem

    key, secret, region, _ = S3_ENVIRONMENT.values()
    S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, client_kwargs={"region_name": region}).call_s3(
        "create_bucket", Bucket=BUCKET
    )


@dataclass
class Report:
    """missing, doubled: lines without an answer in the output, and with more than one. extra: requests that the engine
    computed beyond one a line.

    during: kills after which the batch was not yet over. by_gateway: lines that each answered since its last start."""

    lines: int
    gateways: int = 1
    kills: int = 0
    during: int = 0
    away_s: float = 0.0
    status: str = ""
    missing: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    extra: float = 0.0
    by_gateway: list[float] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        return [
            Figure(f"lines of a batch, {self.gateways} gateways, killed {self.kills} times", str(self.lines)),
            Figure("kills while the batch was running", str(self.during)),
            Figure("Redis away, s", f"{self.away_s:g}"),
            Figure("batch ends as", self.status, "completed", self.status == "completed"),
            Figure("lines without an answer", str(self.missing), "0", not self.missing),
            Figure("lines with two answers", str(self.doubled), "0", not self.doubled),
            Figure("answers that are not the line's", str(len(self.wrong)), "0", not self.wrong),
            Figure(
                "requests computed again, of all",
                f"{self.extra / self.lines:.1%}",
                "" if self.kills else "0",
                bool(self.kills) or not self.extra,
            ),
        ]


class BatchChaos:
    """One batch, `kills` kills at random moments of every status that it can be in.

    gateways: with more than one they share the batch through a Redis with an append-only file. away_s: that Redis is
    killed in the middle of the batch, and so long away. bucket: files are in an S3 server.
    """

    def __init__(
        self, seed: int, kills: int, lines: int, *, gateways: int = 1, away_s: float = 0.0, bucket: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.kills = kills
        self.report = Report(lines, gateways, away_s=away_s)
        self.redis: Program | None = None
        self.bucket = bucket

    async def run(self) -> Report:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            worker = engine(folder, 0, "--cost", "gpu-7b")
            shared = self.report.gateways > 1
            settings: dict[str, Any] = {
                "batch": {"folder": str(folder / "batch"), "shared": shared},
                "health": HEALTH | {"canary": "off"},  # the engine counts its requests
            }
            if shared:
                self.redis = redis(folder, kept=True)
                settings["redis_url"] = f"redis://127.0.0.1:{self.redis.port}/0"
            workers = [f"{worker.url},slots={SLOTS // self.report.gateways}"]
            store = object_store(folder)
            env = S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": store.url} if self.bucket else {}
            if self.bucket:
                settings["batch"]["files_url"] = f"s3://{BUCKET}/batches"
            fronts = [gateway(folder, number, workers, settings, env) for number in range(self.report.gateways)]
            client = AsyncOpenAI(base_url=f"{fronts[0].url}/v1", api_key="any", max_retries=20)
            stores = [each for each in (self.redis, store if self.bucket else None) if each is not None]
            async with running(worker, *stores):
                if self.bucket:
                    await asyncio.to_thread(make_bucket, store.url)
                async with running(*fronts), client:
                    await self._disturbed(client, fronts)
                    answered = [summed(await metrics(front.port), "evenhand_batch_lines_total") for front in fronts]
                asked = summed(await metrics(worker.port), "vllm:request_success_total")
                self.report.extra = max(0.0, asked - self.report.lines)
                self.report.by_gateway = answered
        return self.report

    async def _disturbed(self, client: AsyncOpenAI, fronts: list[Program]) -> None:
        batch_id = await self._submit(client)
        if self.redis is not None and self.report.away_s:
            await until(lambda: self._begun(client, batch_id), "lines were answered")
            await self.redis.kill()
            await asyncio.sleep(self.report.away_s)  # nothing to wait for
            await self.redis.start()
        for _ in range(self.kills):
            await asyncio.sleep(self.random.uniform(*BETWEEN_S))  # the gateways' life
            front = self.random.choice(fronts)
            await front.kill()
            self.report.kills += 1
            await front.start()
            self.report.during += await self._status(client, batch_id) not in OVER
        await self._judge(client, await self._ended(client, batch_id))

    @staticmethod
    async def _begun(client: AsyncOpenAI, batch_id: str) -> bool:
        counts = (await client.batches.retrieve(batch_id)).request_counts
        return counts is not None and counts.completed > 0

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
    async def _status(client: AsyncOpenAI, batch_id: str) -> str:
        try:
            return (await client.batches.retrieve(batch_id)).status
        except (APIConnectionError, APIStatusError):
            return "unknown"  # it is on its way back

    async def _ended(self, client: AsyncOpenAI, batch_id: str) -> Any:
        async def over() -> bool:
            return await self._status(client, batch_id) in OVER

        await until(over, "the batch is over", ENDS_S)
        return await client.batches.retrieve(batch_id)

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
