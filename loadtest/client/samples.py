"""Samples a server's `/metrics` once a second during a run."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import httpx2

from loadtest.records import Sample

PERIOD_S = 1.0
_ANSWER_S = 5.0

# Prometheus name → field of a Sample; several series of one name add up, but for shares, whose mean is taken.
_FIELDS: Mapping[str, str] = {
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_requests_running": "running",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_preemptions_total": "preemptions",
    "evenhand_queue_depth": "waiting",
    "evenhand_worker_in_flight": "running",
    "evenhand_engine_slots": "slots",
    "evenhand_engine_gpu_use": "gpu_use",
    "evenhand_engine_weight_compression": "compression",
}
_SHARES = frozenset({"kv_usage", "gpu_use", "compression"})
_ENERGY = re.compile(r'^evenhand_engine_energy_joules\{[^}]*device="([^"]{1,100})"[^}]*\} (\S+)$', re.MULTILINE)


def sample_of(pages: Sequence[str], at_s: float) -> Sample:
    """Pages in Prometheus' text format → one sample; what none of them names is None."""
    seen: dict[str, list[float]] = {}
    for page in pages:
        for line in page.splitlines():
            field = _FIELDS.get(line.partition("{")[0].partition(" ")[0])
            if field is not None:
                seen.setdefault(field, []).append(float(line.rpartition(" ")[2]))
    values = {field: sum(all_) / (len(all_) if field in _SHARES else 1) for field, all_ in seen.items()}
    return Sample(round(at_s, 3), joules=_joules(pages), **values)


def _joules(pages: Sequence[str]) -> dict[str, float]:
    """By device. Engines of one machine tell of the same CPU, and those that share a GPU of the same GPU."""
    joules: dict[str, float] = {}
    for device, value in (found for page in pages for found in _ENERGY.findall(page)):
        joules[device] = max(float(value), joules.get(device, 0.0))
    return joules


class Sampler:
    """Reads the metrics of the servers at `urls` once a second, and passes them to `note`. Skips servers that do not
    answer.

    Entering it asks once for nothing: the first question takes tens of milliseconds, in which a run would send nothing.
    """

    def __init__(
        self,
        urls: Sequence[str],
        note: Callable[[Sample], None],
        clock: Callable[[], float],
        *,
        period_s: float = PERIOD_S,
        headers: Mapping[str, str] | None = None,
        begin_s: float = 0.0,
    ) -> None:
        """begin_s: what the clock of the run says when it begins."""
        self._urls = [url if url.endswith("/metrics") else f"{url.rstrip('/')}/metrics" for url in urls]
        self._note = note
        self._clock = clock
        self._period_s = period_s
        self._begin_s = begin_s
        self._client = httpx2.AsyncClient(timeout=_ANSWER_S, headers=dict(headers or {}))

    async def __aenter__(self) -> Self:
        for url in self._urls:
            await _page(self._client, url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(self) -> None:
        """Until cancelled."""
        began = self._clock() - self._begin_s
        while True:
            at_s = self._clock() - began
            pages = [page for url in self._urls if (page := await _page(self._client, url))]
            sample = sample_of(pages, at_s)
            if sample != Sample(sample.at_s):
                self._note(sample)
            await asyncio.sleep(max(0.0, self._period_s - (self._clock() - began - at_s)))


async def _page(client: httpx2.AsyncClient, url: str) -> str:
    try:
        answer = await client.get(url)
    except httpx2.HTTPError:  # a server under load, or one without metrics: the picture has a gap there
        return ""
    return answer.text if answer.status_code == 200 else ""
