"""Records → curves over time: requests in flight, tokens per second, how many met an objective. Pure."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.records import Record

Floats = NDArray[np.float64]


def ticks(end_s: float, count: int = 120) -> Floats:
    """Evenly spread from 0 to the end."""
    return np.linspace(0.0, max(end_s, 1e-3), count, dtype=np.float64)


def in_flight(records: Sequence[Record], at_s: Floats) -> Floats:
    """Requests that were sent and had not ended."""
    sent = np.sort([record.sent_s for record in records])
    ended = np.sort([record.sent_s + record.e2e_s for record in records])
    flying: Floats = (np.searchsorted(sent, at_s, "right") - np.searchsorted(ended, at_s, "right")).astype(np.float64)
    return flying


def token_times_s(records: Sequence[Record]) -> Floats:
    """When each output token arrived, sorted. Tokens that share a chunk count as many as the server's usage says."""
    parts = [_of(record) for record in records if record.ttft_s is not None]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0)


def _of(record: Record) -> Floats:
    first = record.sent_s + (record.ttft_s or 0.0)
    seen = first + np.concatenate([[0.0], np.cumsum(np.asarray(record.gaps_us, dtype=np.float64)) / 1e6])
    if not record.gaps_us and record.output_tokens > 1:  # an answer in one piece
        return np.full(record.output_tokens, record.sent_s + record.e2e_s)
    if record.output_tokens > seen.size:
        seen = np.interp(np.linspace(0, 1, record.output_tokens), np.linspace(0, 1, seen.size), seen)
    return seen


def rate(times_s: Floats, at_s: Floats, window_s: float) -> Floats:
    """Events per second in the window around each tick, cut where the ticks begin and end."""
    low = np.clip(at_s - window_s / 2, at_s[0], at_s[-1])
    high = np.clip(at_s + window_s / 2, at_s[0], at_s[-1])
    counts = np.searchsorted(times_s, high, "right") - np.searchsorted(times_s, low, "left")
    per_s: Floats = counts / np.maximum(high - low, 1e-9)
    return per_s


def windowed(
    records: Sequence[Record], at_s: Floats, window_s: float, measure: Callable[[Sequence[Record]], float]
) -> Floats:
    """A measure of the requests sent in the window around each tick; NaN where none was."""
    ordered = sorted(records, key=lambda record: record.sent_s)
    sent = np.array([record.sent_s for record in ordered])
    low, high = np.searchsorted(sent, at_s - window_s / 2), np.searchsorted(sent, at_s + window_s / 2, "right")
    return np.array(
        [measure(ordered[begin:end]) if end > begin else np.nan for begin, end in zip(low, high, strict=True)]
    )
