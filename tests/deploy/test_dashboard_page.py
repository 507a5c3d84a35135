"""The dashboards as pages: every panel drawn with its lines' names, and what is not there said so."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from deploy.observability.dashboard_page import POINTS, UNITS, Floats, lines, main, named, page, stacked
from deploy.observability.dashboards import BOARDS, Query, panels

AT_S = np.linspace(86_340.0, 86_520.0, POINTS)  # over midnight
Found = Sequence[tuple[Mapping[str, str], Floats]]


def two_lines(expr: str) -> Found:
    rising = np.linspace(0.0, 0.25, POINTS)
    return [({"worker": "b", "tenant": "<b>"}, rising), ({"worker": "a", "tenant": "a"}, 2 * rising)]


def nothing(expr: str) -> Found:
    return []


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_is_drawn(name: str) -> None:
    html = page(BOARDS[name], two_lines, AT_S)
    for panel in panels(BOARDS[name]):
        assert panel.title in html and panel.unit in UNITS
    pictures = [panel for panel in panels(BOARDS[name]) if not panel.number]
    assert html.count("<svg") == len(pictures) and "Nothing in this time" not in html
    assert "1970-01-01 23:59:00 to 00:02:00 UTC" in html
    assert "<script" not in html and '<b>"' not in html and "http" not in re.sub(r"<style>.*</style>", "", html)


@pytest.mark.parametrize("name", BOARDS)
def test_a_panel_without_data_says_so(name: str) -> None:
    html = page(BOARDS[name], nothing, AT_S)
    assert html.count("Nothing in this time") == len([panel for panel in panels(BOARDS[name]) if not panel.number])
    assert html.count("<b>–</b>") == len([panel for panel in panels(BOARDS[name]) if panel.number])


def test_lines_have_grafanas_names_in_the_same_order_everywhere() -> None:
    assert named("{{worker}} ({{role}})", {"worker": "w", "role": "prefill"}) == "w (prefill)"
    assert named("{{route}}", {}) == "(none)"
    assert [name for name, _ in lines([Query("x", "{{worker}} 1"), Query("y", "{{worker}} 2")], two_lines)] == [
        *("a 1", "b 1", "a 2", "b 2")
    ]


def test_lines_are_put_upon_each_other_where_they_have_a_value() -> None:
    gap = np.full(POINTS, 1.0)
    gap[3] = np.nan
    (_, low, high), (_, middle, top) = stacked([("a", gap), ("b", np.full(POINTS, 2.0))])
    assert low.max() == 0 and high[2] == 1 and high[3] == 0
    assert (middle == high).all() and top[2] == 3 and top[3] == 2


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("bytes", 3 * 1024**2, "3 MiB"),
        ("Bps", 1023, "1,020 B/s"),
        ("percentunit", 0.125, "12.5%"),
        ("s", 0.25, "250 ms"),
    ],
)
def test_figures_have_their_units(unit: str, value: float, text: str) -> None:
    assert UNITS[unit][1](value) == text


def test_without_a_prometheus_it_says_where_it_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert "no dashboards from http://127.0.0.1:9: " in capsys.readouterr().err


def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--minutes", "0"])
    assert "--minutes: 0 is not more than 0" in capsys.readouterr().err
