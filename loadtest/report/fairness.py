"""How evenly tenants were served: the metrics of VTC's evaluation (Sheng et al., OSDI 2024) and Jain's index. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.records import Record

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
WINDOW_S = 30.0  # to each side of a tick, as in the paper; less where the run is short, else all windows were one
_WINDOWS = 8.0
TICK_S = 1.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServiceDifference:
    """VTC's service difference over a run, in weighted tokens per second.

    At every tick it is the sum over tenants of min(most served - served, |requested - served|): how much of the
    difference to the best served tenant a tenant really asked for.
    """

    maximum: float
    average: float
    variance: float


@dataclass(frozen=True, slots=True)
class Fairness:
    """service, demand: weighted tokens by tenant, received and asked for.

    window_s: to each side of a tick of the service difference.
    accumulated_gap: largest difference between two tenants' service at any time.
    jain: Jain's index of the share of its demand that each tenant received in the end; 1 is even.
    jain_mean: the same at every moment, of what was asked for until then, on average; lower where someone had to wait.
    """

    service: Mapping[str, float]
    demand: Mapping[str, float]
    difference: ServiceDifference
    window_s: float
    accumulated_gap: float
    jain: float
    jain_mean: float


def service_of(record: Record) -> float:
    """Weighted tokens that a request received."""
    if record.ttft_s is None:
        return 0.0
    return PROMPT_WEIGHT * record.prompt_tokens + OUTPUT_WEIGHT * record.output_tokens


def demand_of(record: Record) -> float:
    """Weighted tokens that a request asked for."""
    return PROMPT_WEIGHT * record.prompt_tokens + OUTPUT_WEIGHT * max(record.asked_tokens, record.output_tokens)


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are alike, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """Service over a run, one row per tenant and one column per tick.

    ticks_s: seconds since the start of the run. served, asked: weighted tokens so far. served_per_s, asked_per_s: their
    rates over `window_s` to each side of a tick.
    """

    tenants: Sequence[str]
    ticks_s: Floats
    window_s: float
    served: Floats
    asked: Floats
    served_per_s: Floats
    asked_per_s: Floats

    def difference(self) -> Floats:
        """The service difference at each tick, weighted tokens per second."""
        most = self.served_per_s.max(axis=0)
        differences: Floats = np.minimum(most - self.served_per_s, np.abs(self.asked_per_s - self.served_per_s)).sum(
            axis=0
        )
        return differences

    def jain(self) -> Floats:
        """Jain's index at each tick of the shares of their demand so far that tenants were served; 1 before any."""
        shares = self.served / np.maximum(self.asked, 1e-9)
        asked = (self.asked > 0).sum(axis=0)
        squares = (shares**2).sum(axis=0)
        index: Floats = np.where(squares > 0, shares.sum(axis=0) ** 2 / np.maximum(asked * squares, 1e-9), 1.0)
        return index


def timeline(records: Sequence[Record], *, tick_s: float = TICK_S) -> Timeline | None:
    """Service tick by tick; None where there are no records."""
    if not records:
        return None
    tenants = sorted({record.tenant for record in records})
    end_s = max(record.sent_s + record.e2e_s for record in records)
    window_s = min(WINDOW_S, end_s / _WINDOWS)
    tick_s = min(tick_s, max(window_s / 4, 1e-3))
    ticks: Floats = np.arange(0.0, end_s + tick_s, tick_s, dtype=np.float64)
    of = {tenant: [record for record in records if record.tenant == tenant] for tenant in tenants}
    served = np.stack([_served(of[tenant], ticks) for tenant in tenants])
    asked = np.stack([_asked(of[tenant], ticks) for tenant in tenants])
    return Timeline(
        tenants, ticks, window_s, served, asked, _rates(served, ticks, window_s), _rates(asked, ticks, window_s)
    )


def fairness(records: Sequence[Record], *, tick_s: float = TICK_S) -> Fairness | None:
    """All of it over one run; None where there are no records."""
    over = timeline(records, tick_s=tick_s)
    if over is None:
        return None
    service, demand = dict.fromkeys(over.tenants, 0.0), dict.fromkeys(over.tenants, 0.0)
    for record in records:
        service[record.tenant] += service_of(record)
        demand[record.tenant] += demand_of(record)
    shares = [service[tenant] / demand[tenant] for tenant in over.tenants if demand[tenant] > 0]
    per_tick = over.difference()
    return Fairness(
        service,
        demand,
        ServiceDifference(float(per_tick.max()), float(per_tick.mean()), float(per_tick.var())),
        over.window_s,
        float(np.max(over.served.max(axis=0) - over.served.min(axis=0))),
        jain(shares),
        float(over.jain().mean()),
    )


def _served(records: Sequence[Record], ticks: Floats) -> Floats:
    """Service received by each tick: a request's is spread evenly from its first token to its end, as in VTC's code."""
    total = np.zeros_like(ticks)
    for record in records:
        if record.ttft_s is None:
            continue
        start, end = record.sent_s + record.ttft_s, record.sent_s + record.e2e_s
        total += service_of(record) * np.clip((ticks - start) / max(end - start, 1e-9), 0.0, 1.0)
    return total


def _asked(records: Sequence[Record], ticks: Floats) -> Floats:
    """Service asked for by each tick: all of a request's at once, when it is sent."""
    at = np.array([record.sent_s for record in records])
    order = np.argsort(at)
    sums = np.concatenate([[0.0], np.cumsum(np.array([demand_of(record) for record in records])[order])])
    totals: Floats = sums[np.searchsorted(at[order], ticks, side="right")]
    return totals


def _rates(totals: Floats, ticks: Floats, window_s: float) -> Floats:
    """Running totals → rates over the window around each tick, cut where the run begins and ends."""
    from_s = np.clip(ticks - window_s, ticks[0], ticks[-1])
    to_s = np.clip(ticks + window_s, ticks[0], ticks[-1])
    spans = np.maximum(to_s - from_s, 1e-9)
    rows = [(np.interp(to_s, ticks, row) - np.interp(from_s, ticks, row)) / spans for row in totals]
    return np.stack(rows)
