import re
from math import log10
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.report.charts import Axis, Dot, Panel, Series, apart, dot_plot, linear, logarithmic
from loadtest.report.pictures import time_axis


def text(value: float) -> str:
    return f"{value:g}"


def panel() -> Panel:
    return Panel("Rate & speed", linear([0.0, 10.0], text), linear([0.0, 4.0], text))


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def test_a_linear_axis_has_few_round_ticks_and_holds_its_values() -> None:
    axis = linear([0.0, 873.0], text)
    assert [label for _, label in axis.ticks] == ["0", "250", "500", "750", "1000"]
    assert axis.at(500.0) == pytest.approx(0.5)


def test_an_axis_of_nothing_can_still_be_drawn() -> None:
    assert linear([], text).high > 0
    assert logarithmic([], text, floor_at=0.1).at(0.1) == 0.0


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_every_value_and_names_at_least_one(values: list[float]) -> None:
    axis = logarithmic(values, text, floor_at=1e-4)
    assert axis.low <= max(min(values), 1e-4) * (1 + 1e-9)
    assert axis.high >= max(values) * (1 - 1e-9)
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)
    assert 0.0 <= axis.at(values[0]) <= 1.0


def test_ticks_of_a_time_axis_are_times_that_people_count_in() -> None:
    assert [label for _, label in time_axis(315.0).ticks] == ["0", "1 min", "2 min", "3 min", "4 min", "5 min"]


def test_equal_ratios_are_equal_distances() -> None:
    axis = Axis(0.01, 100.0, [], log10)
    assert axis.at(1.0) - axis.at(0.1) == pytest.approx(axis.at(10.0) - axis.at(1.0))


def test_a_line_goes_through_its_points_and_is_named_at_its_end() -> None:
    made = panel()
    made.line(Series("vtc", "s2", np.array([0.0, 10.0]), np.array([0.0, 4.0])))
    figure = made.figure()
    assert f"M{made.px(0):.1f} {made.py(0):.1f}L{made.px(10):.1f} {made.py(4):.1f}" in figure
    names = [element for element in parsed(figure).iter() if element.get("class") == "name s2"]
    assert [element.text for element in names] == ["vtc"]


def test_what_is_no_number_breaks_the_line() -> None:
    made = panel()
    made.line(Series("", "s1", np.arange(5.0), np.array([1.0, 2.0, np.nan, 3.0, 4.0])))
    path = re.search(r'class="line s1 " d="([^"]*)"', made.figure())
    assert path is not None
    assert path[1].count("M") == 2


def test_a_line_of_nothing_is_not_drawn() -> None:
    made = panel()
    made.line(Series("x", "s1", np.arange(2.0), np.array([np.nan, np.nan])))
    assert "line s1" not in made.figure()


def test_words_are_escaped() -> None:
    made = panel()
    made.line(Series("<b>", "s1", np.arange(2.0), np.arange(2.0)))
    assert "&lt;b&gt;" in made.figure()


def test_labels_that_would_overlap_are_left_out() -> None:
    crowded = Axis(0.0, 1.0, [(at / 100, "a long label") for at in range(101)])
    figure = Panel("t", crowded, linear([1.0], text)).figure()
    assert 1 < figure.count("a long label") < 7


@given(st.lists(st.floats(0, 100), max_size=8).map(sorted))
def test_names_are_moved_apart_within_the_panel(places: list[float]) -> None:
    moved = apart(places, 10.0, 0.0, 100.0)
    assert all(later - earlier >= 10.0 - 1e-6 for earlier, later in zip(moved, moved[1:], strict=False))
    assert not moved or moved[-1] <= 100.0 + 1e-6


def test_a_dot_beyond_the_axis_is_told_as_a_number() -> None:
    axis = Axis(0.1, 10.0, [(1.0, "1×")], log10)
    figure = dot_plot([("TTFT", [Dot("s1", 2.0, 1.5, 2.5), Dot("s2", 0.02)])], axis, "t", "a")
    parsed(figure)
    assert "0.02×" in figure
    assert figure.count("whisker") == 1
