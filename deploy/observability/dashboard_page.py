"""The dashboards without Grafana: their panels' queries, asked of a Prometheus and drawn by the report's charts.

python -m deploy.observability.dashboard_page --prometheus http://127.0.0.1:9090 --minutes 30 --out FOLDER

writes one HTML page for each, which stands alone.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import httpx2
import numpy as np

from deploy.observability.dashboards import BOARDS, Board, Panel, Query
from loadtest.report.charts import ALONE, Floats, Series, linear
from loadtest.report.charts import Panel as Picture
from loadtest.report.comparison import exact
from loadtest.report.page_style import STYLE
from loadtest.report.pictures import count, duration, time_axis

POINTS = 180
COLOURS = 8
LIMIT_S = 30.0
GRAFANAS_INTERVAL = "$__rate_interval"
SECONDS_PER_DAY = 86_400
SHORT_S = 300.0  # ticks of a shorter time are not whole minutes

Ask = Callable[[str], Sequence[tuple[Mapping[str, str], Floats]]]


class Prometheus:
    """Asks a server for `POINTS` values from start_s to end_s (Unix seconds); scrape_s: how often it scrapes."""

    def __init__(self, client: httpx2.Client, start_s: float, end_s: float, scrape_s: float) -> None:
        self._client = client
        self.at_s = np.linspace(start_s, end_s, POINTS)
        self._step_s = (end_s - start_s) / (POINTS - 1)
        # As Grafana has it: at least four scrapes, and never less than a step.
        self._interval = f"{max(4 * scrape_s, self._step_s + scrape_s) * 1e3:.0f}ms"

    def __call__(self, expr: str) -> Sequence[tuple[Mapping[str, str], Floats]]:
        """(labels, values at `at_s`, NaN where there is none) of each series. ValueError if it refuses."""
        asked = {
            "query": expr.replace(GRAFANAS_INTERVAL, self._interval),
            "start": self.at_s[0],
            "end": self.at_s[-1] + self._step_s / 2,
            "step": self._step_s,
        }
        answer = self._client.get("/api/v1/query_range", params=asked).json()
        if answer["status"] != "success":
            raise ValueError(f"Prometheus refuses {expr}: {answer['error']}")
        return [(one["metric"], self._values(one["values"])) for one in answer["data"]["result"]]

    def _values(self, points: Sequence[tuple[float, str]]) -> Floats:
        values = np.full(POINTS, np.nan)
        for at_s, text in points:
            values[round((at_s - self.at_s[0]) / self._step_s)] = float(text)
        return values


def share(value: float) -> str:
    return f"{100 * value:.3g}%"


def data(value: float) -> str:
    """Bytes, in the power of 1024 that fits."""
    power = next((power for power in (3, 2, 1) if value >= 1024**power), 0)
    return f"{float(f'{value / 1024**power:.3g}'):,g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


# Grafana's name of a unit: how an axis has it, and how a figure.
UNITS: Mapping[str, tuple[Callable[[float], str], Callable[[float], str]]] = {
    "s": (duration, exact),
    "short": (count, lambda value: count(float(f"{value:.3g}"))),
    "reqps": (lambda value: f"{count(value)}/s", lambda value: f"{value:.3g}/s"),
    "percentunit": (share, share),
    "bytes": (data, data),
    "Bps": (lambda value: f"{data(value)}/s", lambda value: f"{data(value)}/s"),
}


def lines(queries: Sequence[Query], ask: Ask) -> list[tuple[str, Floats]]:
    """(name, values) of every line of a panel, in an order that is the same in all panels."""
    found = [
        (at, named(query.name, labels), values)
        for at, query in enumerate(queries)
        for labels, values in ask(query.expr)
    ]
    return [(name, values) for _, name, values in sorted(found, key=lambda line: line[:2])]


def named(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's legend: {{label}} takes a label's value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found.group(1), ""), template) or "(none)"


def clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at_s))


def hour_and_minute(at_s: float) -> str:
    return time.strftime("%H:%M", time.gmtime(at_s))


def picture(panel: Panel, found: Sequence[tuple[str, Floats]], at_s: Floats) -> str:
    """One panel with its legend below."""
    drawn = list(stacked(found)) if panel.stacked else [(name, None, values) for name, values in found]
    midnight_s = at_s[0] // SECONDS_PER_DAY * SECONDS_PER_DAY
    text = hour_and_minute if at_s[-1] - at_s[0] > SHORT_S else clock
    x = time_axis(at_s[-1] - midnight_s, start_s=at_s[0] - midnight_s, text=text)
    values = np.concatenate([high for _, _, high in drawn]) if drawn else np.zeros(1)
    y = linear(values, UNITS[panel.unit][0])
    about = panel.text.replace("`", "")
    made = Picture(panel.title, x, y, about=about if found else f"{about} Nothing in this time.", right=ALONE)
    for at, (_, low, high) in enumerate(drawn):
        if low is not None:
            made.band(Series("", colour(at), at_s - midnight_s, high), low)
            high = np.where(high > low, high, np.nan)  # noqa: PLW2901  what has no height hides nobody's edge
        made.line(Series("", colour(at), at_s - midnight_s, high))
    keys = "".join(f'<span class="key {colour(at)}"><i></i>{escape(name)}</span>' for at, (name, _) in enumerate(found))
    return f'<div class="panel">{made.figure()}<p class="legend">{keys}</p></div>'


def colour(at: int) -> str:
    return f"s{at % COLOURS + 1}"


def stacked(found: Sequence[tuple[str, Floats]]) -> Iterator[tuple[str, Floats, Floats]]:
    """(name, from, to) of each line put upon those before it; where one has no value it has no height."""
    below = np.zeros(POINTS)
    for name, values in found:
        above = below + np.nan_to_num(values)
        yield name, below, above
        below = above


def tile(panel: Panel, found: Sequence[tuple[str, Floats]]) -> str:
    """One figure: the last value."""
    known = [value for _, values in found for value in values if np.isfinite(value)]
    shown = UNITS[panel.unit][1](known[-1]) if known else "–"
    return f'<div class="tile"><b>{shown}</b><span>{escape(panel.title)}<br>{escape(panel.text)}</span></div>'


def page(board: Board, ask: Ask, at_s: Floats) -> str:
    """The whole dashboard."""
    panels = [panel for row in board.rows for panel in row.panels]
    tiles = "".join(tile(panel, lines(panel.queries, ask)) for panel in panels if panel.number)
    pictures = "".join(picture(panel, lines(panel.queries, ask), at_s) for panel in panels if not panel.number)
    when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(at_s[0]))} to {clock(at_s[-1])} UTC"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(board.title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(board.title)}</h1><p class="sub">{escape(board.text)}<br>{when}</p>'
        f'<div class="tiles">{tiles}</div><div class="panels aligned">{pictures}</div></body></html>\n'
    )


def write(folder: Path, ask: Prometheus) -> list[Path]:
    """One page a dashboard; returns where they are. TransportError if the server is away, ValueError if it refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, board in BOARDS.items():
        written.append(folder / f"{name}.html")
        written[-1].write_text(page(board, ask, ask.at_s), encoding="utf-8")
    return written


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def main(argv: Sequence[str] | None = None, now: Callable[[], float] = time.time) -> int:  # noqa: TID251
    parser = argparse.ArgumentParser(prog="python -m deploy.observability.dashboard_page", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=positive, default=60.0, help="how far back (default: %(default)g)")
    parser.add_argument("--scrape", type=positive, default=15.0, metavar="SECONDS", help="how often Prometheus scrapes")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/dashboards"), metavar="FOLDER", help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    end_s = now()
    try:
        with httpx2.Client(base_url=args.prometheus, timeout=LIMIT_S, trust_env=False) as client:
            pages = write(args.out, Prometheus(client, end_s - 60 * args.minutes, end_s, args.scrape))
    except (httpx2.TransportError, ValueError) as error:
        sys.stderr.write(f"no dashboards from {args.prometheus}: {error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in pages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
