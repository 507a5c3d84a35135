"""The progress line of a replay, drawn seldom because drawing happens on the loop that measures."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from loadtest.client.client import Client
from loadtest.report import report

_REFRESH_S = 0.5


class _Numbers(ProgressColumn):
    max_refresh = _REFRESH_S

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    def render(self, task: Task) -> Text:
        progress = self._client.progress
        elapsed_s = task.elapsed or 1e-9
        ttft = report.seconds(median(progress.ttft_s)) if progress.ttft_s else "-"
        lag = report.seconds(progress.lag_s.latest(100)) if len(progress.lag_s) else "-"
        rate = progress.output_tokens / elapsed_s
        return Text(
            f"{progress.done:,}/{progress.sent:,} done  {progress.in_flight:,} in flight  {rate:,.0f} tok/s  "
            f"TTFT {ttft}  errors {progress.errors:,}  lag {lag}"
        )


def bar(client: Client, screen: Console) -> AbstractContextManager[Progress]:
    columns = (TextColumn("replay"), BarColumn(bar_width=20), TimeElapsedColumn(), _Numbers(client))
    return Progress(*columns, console=screen, auto_refresh=False, transient=True)


async def watch(client: Client, bar: Progress, total: int) -> None:
    """Until cancelled. total: of the requests, 0 if unknown."""
    task = bar.add_task("", total=total or None)
    refresh: Callable[[], None] = bar.refresh
    while True:
        bar.update(task, completed=client.progress.done)
        refresh()
        await asyncio.sleep(_REFRESH_S)
