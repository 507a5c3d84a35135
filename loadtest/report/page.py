"""Runs → one HTML page that stands alone: no script, nothing fetched, light and dark, for a desk and for a phone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from math import isfinite
from statistics import median

from loadtest.records import LATE_S, Run
from loadtest.report import pictures, report
from loadtest.report.comparison import (
    MEASURES,
    Measure,
    Side,
    amount,
    base_of,
    exact,
    load_warning,
    measure,
    measured,
    not_ok,
    ratio,
    times,
)
from loadtest.report.efficiency import Efficiency
from loadtest.report.page_style import STYLE
from loadtest.report.pictures import colour
from loadtest.report.trust import trust

_TILES = (
    ("TTFT, median", "TTFT, P99", "to the first token, median", "P99"),
    ("TPOT, median", "TPOT, P99", "per output token, median", "P99"),
    ("E2E, median", "E2E, P99", "end to end, median", "P99"),
)
_MOST_TENANTS = 30
_ALIKE = 1.02
_MOST_BESIDE = 4  # runs whose table leaves room for the picture beside it


def page(
    sides: Sequence[Side],
    objective: report.Objective | None = None,
    *,
    title: str = "",
    command: str = "",
    lead: str = "",
) -> str:
    """The whole page. The first side is the baseline; title: "" for the workload's name; lead: HTML to begin with."""
    title = title or _title(sides)
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{_subtitle(sides)}</p>', *_trust(sides), lead, _keys(sides)]
    parts += _headline(sides)
    parts += _section("How long they waited", _READ_QUANTILES, pictures.distributions(sides))
    parts += _section("Over time", _first_repetition(sides), pictures.over_time(sides))
    parts += _objectives(sides, objective)
    if any(len(summary.by_tenant) > 1 for side in sides for summary in side.summaries):
        parts += _section("Between tenants", _READ_TENANTS + _first_repetition(sides), pictures.tenants(sides))
        parts.append(_scroll(_tenant_table(sides)))
    parts += ["<h2>EfficientLLM’s metrics</h2>", _scroll(_efficient(sides)), f'<p class="note">{_READ_EFFICIENT}</p>']
    parts += ["<h2>How it was measured</h2>", _provenance(sides, command)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _trust(sides: Sequence[Side]) -> Iterator[str]:
    """How far each run can be trusted; what is the same of all is said once."""
    said: dict[str, list[str]] = {}
    for side in sides:
        for at, run in enumerate(side.runs, 1):
            name = side.name if len(side.runs) == 1 else f"{side.name} {at}"
            said.setdefault(str(trust(run)), []).append(name)
    doubtful = any(trust(run).doubts for side in sides for run in side.runs)
    for words, names in said.items():
        whose = f"{', '.join(names)}: " if len(said) > 1 else ""
        yield f'<p class="{"doubt" if doubtful else "trust"}">{escape(whose + words)}</p>'
    warning = load_warning(sides)
    if warning:
        yield f'<p class="doubt">{escape(warning)}</p>'


_READ_QUANTILES = (
    "Read upwards from P99: 99 of 100 fared at least as well as the curve there. The scale is logarithmic, so equal "
    "distances are equal ratios."
)
_READ_TENANTS = (
    "Service is in weighted tokens (prompt × 1 + output × 2), as in VTC. The service difference counts, at every "
    "moment, how far each tenant is behind the best served one, up to what it asked for. "
)
_READ_EFFICIENT = (
    "As EfficientLLM (2025) defines them: AL in seconds per request, AT as output tokens per second of wall time. "
    "Memory, compute, power and compression are what the engines told meanwhile in their own metrics (evenhand replay "
    "--metrics ENGINE): the share of the KV cache, how busy NVML says the GPUs were, the power of GPUs (NVML) or CPU "
    "packages (RAPL), and 16 bits over the bits that a parameter takes, without the paper’s weighing by quality."
)


def _title(sides: Sequence[Side]) -> str:
    names = {run.run.workload for side in sides for run in side.runs if run.run}
    what = ", ".join(sorted(names)) or "a run"
    return f"{' · '.join(side.name for side in sides)}: {what}" if len(sides) > 1 else f"{sides[0].name}: {what}"


def _subtitle(sides: Sequence[Side]) -> str:
    summary = sides[0].summaries[0]
    repeated = f", {len(sides[0].runs)} repetitions" if len(sides[0].runs) > 1 else ""
    sent_s = max((one.due_s for one in sides[0].runs[0].records), default=0.0)
    offered = f", {summary.requests / sent_s:.3g} requests/s offered" if sent_s else ", closed loop"
    started = sorted(run.run.started_at for side in sides for run in side.runs if run.run and run.run.started_at)
    when = " · " + escape(started[0].replace("T", " ").replace("+00:00", " UTC")) if started else ""
    return f"{summary.requests:,} requests{offered}{repeated}{when}"


def _keys(sides: Sequence[Side]) -> str:
    if len(sides) == 1:
        return ""
    keys = "".join(
        f'<span class="key {colour(at, len(sides))}"><i></i>{escape(side.name)}</span>' for at, side in enumerate(sides)
    )
    return f'<div class="keys">{keys}</div>'


def _section(title: str, about: str, figures: Iterable[str]) -> list[str]:
    note = f'<p class="note">{about}</p>' if about else ""
    shown = list(figures)
    return [f"<h2>{title}</h2>{note}", f'<div class="panels {rows_of(len(shown))}">{"".join(shown)}</div>']


def rows_of(number: int) -> str:
    """The class that fills the last row of so many pictures: three to a row, but no row with a single one."""
    if number in (2, 4):
        return "by2"
    return "by4" if number > 4 and number % 3 == 1 else ""


def _first_repetition(sides: Sequence[Side]) -> str:
    return "Curves over time are of the first repetition." if max(len(side.runs) for side in sides) > 1 else ""


# In one look


def _headline(sides: Sequence[Side]) -> Iterator[str]:
    if len(sides) == 1:
        yield f'<div class="tiles">{"".join(_tiles(sides[0]))}</div>'
        return
    yield f"<p>{' '.join(_verdict(base, side) for side in sides if (base := base_of(side, sides)) is not side)}</p>"
    look = "look" if len(sides) <= _MOST_BESIDE else ""
    yield f'<div class="{look}">{pictures.overview(sides)}{_scroll(_table(sides))}</div>'
    yield (
        f'<p class="note">Under each number: how many times better than {escape(pictures.baseline(sides))}, and its '
        f"interval. Bold: at least 1 % better or worse, and the whole interval is on that side. "
        f"{pictures.interval_words(sides)}</p>"
    )


def _tiles(side: Side) -> Iterator[str]:
    for name, tail, label, tail_label in _TILES:
        middle, high = measure(name).value(side), measure(tail).value(side)
        yield _tile(exact(middle), f"{label}<br>{tail_label} {exact(high)}")
    summary = side.summaries[0]
    ok = sum(one.endings.get("ok", 0) for one in side.summaries)
    sent = sum(one.requests for one in side.summaries)
    yield _tile(f"{summary.output_tokens_per_s:,.0f}", f"output tokens/s<br>{summary.requests_per_s:.3g} requests/s")
    if summary.attainment:
        yield _tile(f"{summary.attainment.share:.1%}", f"inside the objective<br>{summary.attainment.per_s:.3g}/s")
    if summary.fairness and len(summary.by_tenant) > 1:
        even = summary.fairness
        yield _tile(
            f"{even.jain_mean:.3f}",
            f"Jain’s index, mean over time<br>service difference ≤ {even.difference.maximum:,.0f}/s",
        )
    yield _tile(f"{sent - ok:,}", f"of {sent:,} did not end well{_bad_endings(side)}")


def _tile(number: str, label: str) -> str:
    return f'<div class="tile"><b>{number}</b><span>{label}</span></div>'


def _bad_endings(side: Side) -> str:
    bad: dict[str, int] = {}
    for summary in side.summaries:
        for name, number in summary.endings.items():
            if name != "ok":
                bad[name] = bad.get(name, 0) + number
    return "<br>" + ", ".join(f"{number} {name}" for name, number in bad.items()) if bad else ""


def _verdict(base: Side, side: Side) -> str:
    """A run's largest gain and largest loss against the baseline, in a sentence."""
    found = [(one.name, ratio(one, base, side)) for one in MEASURES if one.name in pictures.OVERVIEW]
    known = sorted((made.value, name) for name, made in found if made is not None)
    if not known:
        return ""
    (worst, worst_name), (best, best_name) = known[0], known[-1]
    if max(best, 1 / worst) <= _ALIKE:
        return f"<b>{escape(side.name)}</b> is like {escape(base.name)}."
    gains = f"{times(best)} better in {best_name}" if best > _ALIKE else "better in nothing"
    losses = f"{times(1 / worst)} worse in {worst_name}" if 1 / worst > _ALIKE else "worse in nothing"
    return f"<b>{escape(side.name)}</b> against {escape(base.name)}: {gains}, {losses}."


_GROUPS = frozenset({"ITL, median", "TPOT, median", "E2E, mean", "requests/s", "service difference, max"})


def _table(sides: Sequence[Side]) -> str:
    head = "".join(f'<th class="{colour(at, len(sides))}">{escape(side.name)}</th>' for at, side in enumerate(sides))
    rows = [f"<tr><th></th>{head}</tr>"]
    for one in measured(sides):
        cells = "".join(_cell(one, base_of(side, sides), side) for side in sides)
        gap = ' class="gap"' if one.name in _GROUPS else ""
        rows.append(f"<tr{gap}><td>{escape(one.name)}</td>{cells}</tr>")
    endings = "".join(f"<td>{not_ok(side):,}</td>" for side in sides)
    rows.append(f'<tr class="gap"><td>did not end well</td>{endings}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _cell(of: Measure, base: Side, side: Side) -> str:
    value = amount(of.value(side), of.unit)
    made = ratio(of, base, side) if side is not base else None
    if made is None:
        return f"<td>{value}</td>"
    shown = f"<b>{times(made.value)}</b>" if made.clear else times(made.value)
    if made.low is not None and made.high is not None:
        shown += f'<span class="interval"> {times(made.low)[:-1]}–{times(made.high)[:-1]}</span>'
    return f"<td>{value}<small>{shown}</small></td>"


def _scroll(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


# Objectives and tenants


def _objectives(sides: Sequence[Side], objective: report.Objective | None) -> list[str]:
    if objective is None:
        return []
    limits = [
        f"{name} ≤ {exact(value)}"
        for name, value in (("TTFT", objective.ttft_s), ("TPOT", objective.tpot_s))
        if isfinite(value)
    ]
    about = (
        f"{' and '.join(limits)}, both by one and the same request (DistServe’s definition); a request that did not "
        f"end well is outside. {_first_repetition(sides)}"
    )
    return _section("Inside the objective", about, pictures.objectives(sides, objective))


def _tenant_table(sides: Sequence[Side]) -> str:
    """A row per tenant, those who asked for most first."""
    first = sides[0].summaries[0].by_tenant
    ranked = sorted(first, key=lambda name: -first[name].demand)
    names = "".join(f'<th class="{colour(at, len(sides))}">{escape(one.name)}</th>' for at, one in enumerate(sides))
    rows = [f"<tr><th>tenant</th><th>requests</th><th>asked for</th>{names}</tr>"]
    for tenant in ranked[:_MOST_TENANTS]:
        asked = first[tenant]
        cells = "".join(_tenant_cell(side, tenant) for side in sides)
        rows.append(f"<tr><td>{escape(tenant)}</td><td>{asked.requests:,}</td><td>{asked.demand:,.0f}</td>{cells}</tr>")
    if len(ranked) > _MOST_TENANTS:
        rows.append(f'<tr><td class="none" colspan="{3 + len(sides)}">… {len(ranked) - _MOST_TENANTS} more</td></tr>')
    note = '<p class="note">By run: median TTFT; under it P99, and the share of what it asked for that was served.</p>'
    return f"<table>{''.join(rows)}</table>{note}"


def _tenant_cell(side: Side, tenant: str) -> str:
    of = [summary.by_tenant[tenant] for summary in side.summaries if tenant in summary.by_tenant]
    if not of:
        return '<td class="none">–</td>'
    middle, high = median(one.ttft.p50 for one in of), median(one.ttft.p99 for one in of)
    share = median(one.service / one.demand if one.demand else 1.0 for one in of)
    return f"<td>{exact(middle)}<small>{exact(high)} · {share:.0%}</small></td>"


# EfficientLLM, and where it all comes from


NOT_TOLD = "not measured"


def _efficient(sides: Sequence[Side]) -> str:
    names = "".join(f'<th class="{colour(at, len(sides))}">{escape(side.name)}</th>' for at, side in enumerate(sides))
    rows = [f"<tr><th></th>{names}</tr>"]
    for name, cells in (
        ("AMU, memory in use, mean", [_memory(side) for side in sides]),
        ("PCU, compute utilisation", [_compute(side) for side in sides]),
        ("AL, latency", [exact(median(one.e2e.mean for one in side.summaries)) for side in sides]),
        ("AT, throughput", [f"{median(one.output_tokens_per_s for one in side.summaries):,.0f}/s" for side in sides]),
        ("AEC, power, mean", [_power(side) for side in sides]),
        ("MCR, compression", [_compression(side) for side in sides]),
    ):
        row = "".join(f'<td class="{"none" if "not" in cell else ""}">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{name}</td>{row}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _told(side: Side, pick: Callable[[Efficiency], float | None]) -> float | None:
    """The median of a side's repetitions, None where no engine told it."""
    known = [value for one in side.summaries if (value := pick(one.efficiency)) is not None]
    return median(known) if known else None


def _memory(side: Side) -> str:
    used = _told(side, lambda one: one.memory)
    return NOT_TOLD if used is None else f"{used:.0%}<small>of the KV cache</small>"


def _compute(side: Side) -> str:
    """How busy the GPUs say that they were; else how full the batch was, which is another thing and so in small."""
    busy, batch = _told(side, lambda one: one.compute), _told(side, lambda one: one.batch)
    full = "" if batch is None else f"<small>{batch:.0%} of the batch</small>"
    return f"{NOT_TOLD if busy is None else f'{busy:.0%}'}{full}"


def _power(side: Side) -> str:
    watts = _told(side, lambda one: one.watts)
    return NOT_TOLD if watts is None else f"{watts:,.1f} W"


def _compression(side: Side) -> str:
    times = _told(side, lambda one: one.compression)
    return NOT_TOLD if times is None else f"{times:.2f}<small>of 16 bits a parameter</small>"


def _provenance(sides: Sequence[Side], command: str) -> str:
    runs = [(side, run.run) for side in sides for run in side.runs if run.run is not None]
    facts: list[tuple[str, str]] = [("this page", f"<code>{escape(command)}</code>")] if command else []
    if not runs:
        facts.append(("runs", "the files do not say how they were made"))
    facts += [(label, text) for label, text in _shared(runs) if text]
    for side in sides:
        facts.append((side.name, "<br>".join(_of_side(side))))
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{text}</dd>' for name, text in facts)}</dl>"


def _shared(runs: Sequence[tuple[Side, Run]]) -> Iterator[tuple[str, str]]:
    """What all runs have in common is said once."""
    lines = [run for _, run in runs]
    yield (
        "command",
        "<br>".join(f"<code>{escape(text)}</code>" for text in dict.fromkeys(one.command for one in lines) if text),
    )
    yield "machine", escape("; ".join(dict.fromkeys(one.machine for one in lines if one.machine)))
    written = [", ".join(f"{name} {version}" for name, version in one.versions.items()) for one in lines]
    yield "versions", escape("; ".join(dict.fromkeys(text for text in written if text)))
    yield "left out of the trace", escape("; ".join(dict.fromkeys(one.skipped for one in lines if one.skipped)))


def _of_side(side: Side) -> Iterator[str]:
    lines = [run.run for run in side.runs if run.run is not None]
    options = dict.fromkeys(f"{key} {value}" for one in lines for key, value in one.options.items())
    targets = ", ".join(dict.fromkeys(one.target for one in lines))
    yield escape(", ".join([targets, *options]))
    sent, late = sum(len(run.records) for run in side.runs), sum(one.late for one in lines)
    if any(one.lag_max_s or one.loop_max_s for one in lines):  # virtual time has no lag
        lag_s, loop_s = max(one.lag_p99_s for one in lines), max(one.loop_p99_s for one in lines)
        yield (
            f"{late:,} of {sent:,} requests were sent more than {exact(LATE_S)} late (P99 {exact(lag_s)}); "
            f"the client’s own event loop woke {exact(loop_s)} late at P99"
        )
