"""Hourly usage in the store: each gateway writes its own rows, and every gateway can sum all of them.

Rows of an hour are written as totals, so that writing them again changes nothing. A day's rows are one shelf of the
store, which goes a year after it was last written to.
"""

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from server.background import Background
from server.observe.cost import HOUR_S, CostMeter, UsageKey, Used
from server.store.store import Store, StoreAway

WRITE_S = 30.0
KEPT_S = 366 * 86400.0
MOST_DAYS = 366
GROUPS = ("hour", "day", "tenant", "model", "tier")
_Row = tuple[UsageKey, Used]
_read = msgspec.json.Decoder(list[_Row]).decode


@dataclass(slots=True)
class UsageBook:
    """Writes this gateway's rows, and reads everybody's. replica: its own name, which no other ever had."""

    meter: CostMeter
    store: Store
    replica: str
    wall: Callable[[], float]
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def running(self, background: Background) -> AsyncIterator[None]:
        """Writes while the block runs, and once more at its end."""
        task = background.start("write usage", self.run)
        try:
            yield
        finally:
            await Background.stop(task)
            with suppress(StoreAway):
                await self.write()

    async def run(self) -> None:
        """Writes, again and again."""
        while True:
            await asyncio.sleep(WRITE_S)
            try:
                await self.write()
            except StoreAway:
                continue  # the rows stay here until it is back

    async def write(self) -> None:
        """Puts all rows into the store; those of hours that are over are then the store's alone. StoreAway."""
        async with self._one_at_a_time:
            await self._write()

    async def _write(self) -> None:
        rows = self.meter.rows
        present = int(self.wall() // HOUR_S)
        for hour in sorted({key.hour for key in rows}):
            mine = [(key, used) for key, used in rows.items() if key.hour == hour]
            text = msgspec.json.encode(mine).decode()
            await self.store.shelve(shelf_of(hour), f"{hour}|{self.replica}", text, KEPT_S)
            if hour < present - 1:  # a request that ended in the last moment may still be on its way into a row
                for key, _ in mine:
                    del rows[key]

    async def used(self, begin: int, end: int, by: tuple[str, ...]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows from hour `begin` up to `end`, which is not among them, added up by `by`; and their total. StoreAway."""
        await self.write()
        found: dict[tuple[str, ...], Used] = {}
        total = Used()
        for shelf in dict.fromkeys(map(shelf_of, range(begin, end))):
            for text in (await self.store.shelved(shelf)).values():
                for key, used in _read(text):
                    if begin <= key.hour < end:
                        found.setdefault(tuple(_named(key, group) for group in by), Used()).add(used)
                        total.add(used)
        rows = [dict(zip(by, names, strict=True)) | told(used) for names, used in sorted(found.items())]
        return rows, told(total)


def shelf_of(hour: int) -> str:
    """The shelf of an hour's day, which is UTC's."""
    return f"usage:{datetime.fromtimestamp(hour * HOUR_S, UTC):%Y-%m-%d}"


def _named(key: UsageKey, group: str) -> str:
    if group in ("hour", "day"):
        at = datetime.fromtimestamp(key.hour * HOUR_S, UTC)
        return f"{at:%Y-%m-%dT%H:00Z}" if group == "hour" else f"{at:%Y-%m-%d}"
    return str(getattr(key, group))


def told(used: Used) -> dict[str, Any]:
    """What was used, as `/admin/usage` has it."""
    return {
        "requests": used.requests,
        "prompt_tokens": used.prompt_tokens,
        "cached_tokens": used.cached_tokens,
        "output_tokens": used.output_tokens,
        "gpu_seconds": round(used.gpu_s, 3),
        "cost": round(used.cost, 6),
    }


def as_csv(rows: Iterable[dict[str, Any]], by: tuple[str, ...]) -> str:
    """The rows, with a line of names before them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *told(Used())])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def hours(begin: str, end: str, wall: float) -> tuple[int, int]:
    """Hours since 1970 of a range: dates or times in UTC; an end that is a date is its last hour. Without any, the last
    24 hours. ValueError with a sentence."""
    last = datetime.fromtimestamp(wall, UTC) + timedelta(hours=1) if not end else _moment("to", end)
    if len(end) == len("2026-11-29"):
        last += timedelta(days=1)
    first = last - timedelta(days=1) if not begin else _moment("from", begin)
    if first >= last:
        raise ValueError(f"'from' ({first:%Y-%m-%d %H:%M}) must be before 'to' ({last:%Y-%m-%d %H:%M})")
    if last - first > timedelta(days=MOST_DAYS):
        raise ValueError(f"a range may span at most {MOST_DAYS} days")
    return int(first.timestamp() // HOUR_S), -int(-last.timestamp() // HOUR_S) if end else int(
        last.timestamp() // HOUR_S
    )


def _moment(name: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"'{name}' is a date or a time, such as 2026-11-29 or 2026-11-29T07:00, not {text[:40]!r}"
        ) from None
    return moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
