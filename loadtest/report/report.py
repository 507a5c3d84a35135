"""Summarises records: latencies, throughput, goodput, fairness; as numbers, text, Markdown or JSON. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtest.records import Record, Recorded, Run
from loadtest.report.efficiency import Efficiency, efficiency
from loadtest.report.fairness import Fairness, ServiceDifference, fairness

PERCENTILES = (50, 90, 95, 99)
ATTAINMENT_GOAL = 0.9  # DistServe's: goodput is the highest rate at which so many requests meet both objectives


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one kind of time, in seconds: how many were seen, their mean and percentiles; zeros where there were none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Objective:
    """A service level: both must be met by one and the same request."""

    ttft_s: float
    tpot_s: float

    @classmethod
    def of(cls, ttft_s: float | None, tpot_s: float | None) -> "Objective | None":
        """From two options: one that is not given is no limit; None if neither is."""
        return cls(ttft_s or float("inf"), tpot_s or float("inf")) if ttft_s or tpot_s else None

    def met(self, record: Record) -> bool:
        tpot_s = record.tpot_s
        return (
            record.ok
            and record.ttft_s is not None
            and record.ttft_s <= self.ttft_s
            and (tpot_s is None or tpot_s <= self.tpot_s)
        )


@dataclass(frozen=True, slots=True)
class Attainment:
    """share: of all requests sent, those inside the objective. per_s: of those, how many per second."""

    objective: Objective
    share: float
    per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run.

    duration_s: from the first request sent to the last answer ended. endings: how many ended how.
    ttft, itl, tpot, e2e: the field's. per_token: E2E / output tokens, queueing included (FastServe's measure).
    longest_gap: the longest wait between two events of one answer. itl is per event with content, tpot per token: where
    an event holds several tokens (`tokens_per_event`), as with speculative decoding, itl is that many times longer.
    """

    requests: int
    endings: Mapping[str, int]
    duration_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    tokens_per_event: float
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    per_token: Spread
    longest_gap: Spread
    fairness: Fairness | None
    attainment: Attainment | None
    by_tenant: Mapping[str, "TenantSummary"]
    efficiency: Efficiency = Efficiency()


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """One tenant of a run. service, demand: weighted tokens."""

    requests: int
    ok: int
    service: float
    demand: float
    ttft: Spread
    per_token: Spread


def spread(values: Iterable[float]) -> Spread:
    """Percentiles by linear interpolation, as numpy's default."""
    seen = np.fromiter(values, dtype=np.float64)
    if not seen.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(seen, PERCENTILES))
    return Spread(int(seen.size), float(seen.mean()), p50, p90, p95, p99, float(seen.max()))


def summarize(records: Sequence[Record], objective: Objective | None = None) -> Summary:
    """All that one run's records say."""
    return summarize_run(Recorded(None, records, []), objective)


def summarize_run(run: Recorded, objective: Objective | None = None) -> Summary:
    """All that one run says. Times and tokens are those of requests that ended well; the others are in `endings`."""
    records, totals = run.records, run.total()
    ok = [record for record in records if record.ok]
    duration_s = totals.duration_s
    even = _scaled(fairness(records), run.every)
    return Summary(
        requests=totals.requests,
        endings=dict(totals.endings),
        duration_s=duration_s,
        requests_per_s=_per_s(totals.endings["ok"], duration_s),
        prompt_tokens_per_s=_per_s(totals.prompt_tokens, duration_s),
        output_tokens_per_s=_per_s(totals.output_tokens, duration_s),
        tokens_per_event=totals.output_tokens / totals.events if totals.events else 1.0,
        ttft=_ttft(ok),
        itl=spread(gap / 1e6 for record in ok for gap in record.gaps_us),
        tpot=spread(record.tpot_s for record in ok if record.tpot_s is not None),
        e2e=spread(record.e2e_s for record in ok),
        per_token=_per_token(ok),
        longest_gap=spread(max(record.gaps_us) / 1e6 for record in ok if record.gaps_us),
        fairness=even,
        attainment=_attainment(records, objective, _per_s(totals.requests, duration_s)) if objective else None,
        by_tenant=_by_tenant(records, even, run.every),
        efficiency=efficiency(run.samples),
    )


def _scaled(even: Fairness | None, every: int) -> Fairness | None:
    """Of a run of which every n-th request is known."""
    if even is None or every == 1:
        return even
    most = even.difference
    return replace(
        even,
        service={tenant: value * every for tenant, value in even.service.items()},
        demand={tenant: value * every for tenant, value in even.demand.items()},
        difference=ServiceDifference(most.maximum * every, most.average * every, most.variance * every**2),
        accumulated_gap=even.accumulated_gap * every,
    )


def goodput(points: Sequence[tuple[float, float]], goal: float = ATTAINMENT_GOAL) -> float:
    """The highest rate that still attains the goal, from (rate, attainment) points of several runs.

    Between two points the crossing is read off a straight line, as DistServe's artifact does. 0 if none attains it.
    """
    best = 0.0
    points = sorted(points)
    for at, (rate, share) in enumerate(points):
        if share < goal:
            if at and points[at - 1][1] >= goal:
                before_rate, before_share = points[at - 1]
                best = before_rate + (rate - before_rate) * (before_share - goal) / (before_share - share)
            continue
        best = rate
    return best


def _per_s(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _ttft(records: Iterable[Record]) -> Spread:
    return spread(record.ttft_s for record in records if record.ttft_s is not None)


def _per_token(records: Iterable[Record]) -> Spread:
    return spread(record.e2e_s / record.output_tokens for record in records if record.output_tokens)


def _attainment(records: Sequence[Record], objective: Objective, per_s: float) -> Attainment:
    share = sum(objective.met(record) for record in records) / len(records) if records else 0.0
    return Attainment(objective, share, share * per_s)


def _by_tenant(records: Sequence[Record], even: Fairness | None, every: int) -> dict[str, TenantSummary]:
    if even is None:
        return {}
    summaries = {}
    for tenant, service in even.service.items():
        of = [record for record in records if record.tenant == tenant]
        ok = [record for record in of if record.ok]
        summaries[tenant] = TenantSummary(
            len(of) * every, len(ok) * every, service, even.demand[tenant], _ttft(ok), _per_token(ok)
        )
    return summaries


# Tables: rows of text, so that one table is the same in a terminal and in a document.

Rows = list[list[str]]


def compare(summaries: Mapping[str, Summary]) -> Rows:
    """One column per run, one row per measure; those of an objective or of fairness where there is
    an objective, or several tenants."""
    shared = any(len(summary.by_tenant) > 1 for summary in summaries.values())
    rows: Rows = [["", *summaries]]
    judged = any(summary.attainment for summary in summaries.values())
    told = any(summary.efficiency != Efficiency() for summary in summaries.values())
    optional = ((_OBJECTIVE, judged), (_FAIRNESS, shared), (_EFFICIENCY, told))
    for name, measure in (*_MEASURES, *(row for rows_, shown in optional if shown for row in rows_)):
        rows.append([name, *(measure(summary) for summary in summaries.values())])
    return rows


def tenants(summary: Summary, most: int = 20) -> Rows:
    """One row per tenant, the most served first."""
    rows: Rows = [["tenant", "requests", "ok", "service", "of demand", "TTFT p50", "TTFT p99", "s/token mean"]]
    served = sorted(summary.by_tenant.items(), key=lambda item: -item[1].service)
    for name, tenant in served[:most]:
        share = tenant.service / tenant.demand if tenant.demand else 1.0
        rows.append(
            [
                name,
                str(tenant.requests),
                str(tenant.ok),
                f"{tenant.service:,.0f}",
                f"{share:.0%}",
                seconds(tenant.ttft.p50),
                seconds(tenant.ttft.p99),
                seconds(tenant.per_token.mean),
            ]
        )
    if len(served) > most:
        rows.append([f"… {len(served) - most} more", *[""] * 7])
    return rows


def text(rows: Rows) -> str:
    """Rows as a plain table: first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def seconds(value: float) -> str:
    """A time for people: milliseconds below one second."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def client_lag(run: Run) -> str:
    """How far to trust the measurement, in one sentence."""
    lag = f"The client sent {seconds(run.lag_p99_s)} late at the 99th percentile ({seconds(run.lag_max_s)} at most)"
    return f"{lag}; its event loop woke {seconds(run.loop_p99_s)} late ({seconds(run.loop_max_s)} at most)."


def _endings(summary: Summary) -> str:
    bad = {name: count for name, count in summary.endings.items() if name != "ok"}
    return ", ".join(f"{count} {name}" for name, count in sorted(bad.items())) or "0"


def _of(pick: Callable[[Summary], Spread], point: str) -> Callable[[Summary], str]:
    return lambda summary: seconds(getattr(pick(summary), point)) if pick(summary).count else "-"


def _even(pick: Callable[[Fairness], float], form: str) -> Callable[[Summary], str]:
    return lambda summary: format(pick(summary.fairness), form) if summary.fairness else "-"


def share_of(value: float | None) -> str:
    """A share as text, "-" where it is unknown."""
    return _told(value, ".0%", "")


def tokens_per_joule(summary: Summary) -> float | None:
    """Output tokens over the energy of the same time, None where that is not known."""
    watts = summary.efficiency.watts
    return summary.output_tokens_per_s / watts if watts else None


def _told(value: float | None, form: str, unit: str) -> str:
    return "-" if value is None else f"{format(value, form)}{unit}"


def _inside(summary: Summary) -> str:
    return f"{summary.attainment.share:.1%}" if summary.attainment else "-"


def _goodput(summary: Summary) -> str:
    return f"{summary.attainment.per_s:.2f}" if summary.attainment else "-"


_MEASURES: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("requests", lambda summary: str(summary.requests)),
    ("not ok", _endings),
    ("duration", lambda summary: seconds(summary.duration_s)),
    ("requests/s", lambda summary: f"{summary.requests_per_s:.2f}"),
    ("prompt tokens/s", lambda summary: f"{summary.prompt_tokens_per_s:,.0f}"),
    ("output tokens/s", lambda summary: f"{summary.output_tokens_per_s:,.0f}"),
    ("output tokens per event", lambda summary: f"{summary.tokens_per_event:.2f}"),
    *(
        (f"{name} {point}", _of(pick, point))
        for name, pick in (
            ("TTFT", lambda summary: summary.ttft),
            ("ITL", lambda summary: summary.itl),
            ("TPOT", lambda summary: summary.tpot),
            ("E2E", lambda summary: summary.e2e),
            ("E2E/token", lambda summary: summary.per_token),
        )
        for point in ("mean", "p50", "p90", "p95", "p99")
    ),
    ("longest gap p99", _of(lambda summary: summary.longest_gap, "p99")),
)
_OBJECTIVE: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("inside objective", _inside),
    ("requests/s inside objective", _goodput),
)
_FAIRNESS: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("service difference max", _even(lambda even: even.difference.maximum, ",.1f")),
    ("service difference avg", _even(lambda even: even.difference.average, ",.1f")),
    ("accumulated service gap", _even(lambda even: even.accumulated_gap, ",.0f")),
    ("Jain of served share", _even(lambda even: even.jain, ".3f")),
)
_EFFICIENCY: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("KV cache in use, mean", lambda summary: share_of(summary.efficiency.memory)),
    ("batch in use, mean", lambda summary: share_of(summary.efficiency.batch)),
    ("GPU computing, mean", lambda summary: share_of(summary.efficiency.compute)),
    ("power, mean", lambda summary: _told(summary.efficiency.watts, ",.1f", " W")),
    ("output tokens per joule", lambda summary: _told(tokens_per_joule(summary), ",.2f", "")),
    ("weights, times smaller than 16 bits", lambda summary: _told(summary.efficiency.compression, ".2f", "")),
)
