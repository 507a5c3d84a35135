"""Line charts, scatters and dot plots as inline SVG: no script, no font, no colour of their own (the page has those).

A panel is 360 units wide and is meant to be shown near that size, several to a row, so that its text stays text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, isfinite, log10

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 360.0, 200.0
NAMED, ALONE = 66.0, 18.0  # margins to the right: with the lines' names, without
_LEFT, _TOP, _BOTTOM = 44.0, 10.0, 24.0
_LINE_HEIGHT = 11.0
_CHAR_WIDTH = 5.6
_ROW_CHAR_WIDTH = 5.9  # of the larger names of rows, in a wide font
_DOT_STEP = 7.5
_MOST_TICKS = 5
_NAME_CHARS = 11


@dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud. css: class of its colour. name: written at its end, where not empty."""

    name: str
    css: str
    x: Floats
    y: Floats


@dataclass(frozen=True, slots=True)
class Axis:
    """From low to high, through `scale`. ticks: (value, text)."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    scale: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """Where on the axis, 0 to 1; what lies outside is put on its edge."""
        low, high = self.scale(self.low), self.scale(self.high)
        place = (self.scale(min(max(value, self.low), self.high)) - low) / (high - low)
        return min(1.0, max(0.0, place))


def linear(values: Iterable[float], text: Callable[[float], str], *, low: float = 0.0, high: float = 0.0) -> Axis:
    """From `low` to the largest value or `high`, with round ticks."""
    top = max([high, *(value for value in values if isfinite(value))])
    if top <= low:
        top = low + 1.0
    step = _round_step((top - low) / (_MOST_TICKS - 1))
    top = low + step * ceil((top - low) / step - 1e-9)
    count = round((top - low) / step)
    return Axis(low, top, [(low + step * at, text(low + step * at)) for at in range(count + 1)])


def _round_step(rough: float) -> float:
    power = 10.0 ** floor(log10(rough))
    return next(power * nice for nice in (1.0, 2.0, 2.5, 5.0, 10.0) if power * nice >= rough * (1 - 1e-9))


def logarithmic(values: Iterable[float], text: Callable[[float], str], *, floor_at: float) -> Axis:
    """From the least to the largest value, cut below `floor_at`; ticks at 1, and at 2 and 5 where decades are few."""
    seen = [max(value, floor_at) for value in values if isfinite(value)] or [floor_at, 10 * floor_at]
    low, high = min(seen), max(seen)
    if high < low * 1.5:
        low, high = low / 1.3, high * 1.3
    wide = log10(high / low) > 2.2
    marks = [
        10.0**power * digit
        for power in range(floor(log10(low)), ceil(log10(high)) + 1)
        for digit in ((1,) if wide else (1, 2, 5))
    ]
    if sum(low <= mark <= high for mark in marks) < 2:
        low = max((mark for mark in marks if mark <= low), default=low)
        high = min((mark for mark in marks if mark >= high), default=high)
    return Axis(low, high, [(mark, text(mark)) for mark in marks if low <= mark <= high], log10)


@dataclass(slots=True)
class Panel:
    """One picture: a title in words, axes, and what is drawn into it, in order."""

    title: str
    x: Axis
    y: Axis
    about: str = ""
    height: float = HEIGHT
    right: float = NAMED
    _drawn: list[str] = field(default_factory=list)
    _ends: list[tuple[float, str, str]] = field(default_factory=list)

    def px(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (WIDTH - _LEFT - self.right)

    def py(self, value: float) -> float:
        return self.height - _BOTTOM - self.y.at(value) * (self.height - _BOTTOM - _TOP)

    def line(self, series: Series, *, extra: str = "") -> None:
        """A line through the points; a point that is no number breaks it."""
        parts, pen = [], "M"
        for x, y in zip(series.x, series.y, strict=True):
            if not isfinite(y):
                pen = "M"
                continue
            parts.append(f"{pen}{self.px(x):.1f} {self.py(y):.1f}")
            pen = "L"
        if not parts:
            return
        self._drawn.append(f'<path class="line {series.css} {extra}" d="{"".join(parts)}"/>')
        if series.name:
            known = series.y[np.isfinite(series.y)]
            self._ends.append((self.py(float(known[-1])), series.name, series.css))

    def cloud(self, series: Series) -> None:
        """A dot per point."""
        dots = "".join(f"M{self.px(x):.1f} {self.py(y):.1f}h0" for x, y in zip(series.x, series.y, strict=True))
        self._drawn.append(f'<path class="cloud {series.css}" d="{dots}"/>')

    def mark(self, x: float, y: float, css: str, text: str = "") -> None:
        """One dot, with a text beside it."""
        at_x, at_y = self.px(x), self.py(y)
        self._drawn.append(f'<circle class="mark {css}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.6"/>')
        if text:
            self._drawn.append(
                f'<text class="value" x="{at_x:.1f}" y="{at_y - 6:.1f}" text-anchor="middle">{text}</text>'
            )

    def rule(self, *, x: float | None = None, y: float | None = None, text: str = "") -> None:
        """A dotted reference line across the panel, with its name."""
        if x is not None and self.x.low <= x <= self.x.high:
            at = self.px(x)
            self._drawn.append(f'<path class="rule" d="M{at:.1f} {_TOP}V{self.height - _BOTTOM:.1f}"/>')
            self._drawn.append(
                f'<text class="value" x="{at + 3:.1f}" y="{self.height - _BOTTOM - 4:.1f}">{escape(text)}</text>'
            )
        if y is not None and self.y.low <= y <= self.y.high:
            at = self.py(y)
            self._drawn.append(f'<path class="rule" d="M{_LEFT} {at:.1f}H{WIDTH - self.right:.1f}"/>')
            self._drawn.append(
                f'<text class="value" x="{WIDTH - self.right:.1f}" y="{at - 3:.1f}" text-anchor="end">'
                f"{escape(text)}</text>"
            )

    def area(self, x: float, y: float) -> None:
        """The part of the panel below and left of a point, shaded."""
        top, right = self.py(y), self.px(x)
        self._drawn.append(
            f'<rect class="inside" x="{_LEFT}" y="{top:.1f}" width="{right - _LEFT:.1f}" '
            f'height="{self.height - _BOTTOM - top:.1f}"/>'
        )

    def figure(self) -> str:
        """The whole picture with its title."""
        about = f'<span class="about">{escape(self.about)}</span>' if self.about else ""
        body = "".join([*self._axes(), *self._drawn, *self._names()])
        size = f'viewBox="0 0 {WIDTH:g} {self.height:g}" role="img" aria-label="{escape(self.title)}"'
        return f"<figure><figcaption>{escape(self.title)}{about}</figcaption><svg {size}>{body}</svg></figure>"

    def _axes(self) -> list[str]:
        bottom, right = self.height - _BOTTOM, WIDTH - self.right
        parts = []
        for value, text in self.y.ticks:
            at = self.py(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
        free_from = 0.0
        for value, text in self.x.ticks:
            at, half = self.px(value), len(text) * _CHAR_WIDTH / 2
            parts.append(f'<path class="axis" d="M{at:.1f} {bottom:.1f}v3"/>')
            if at - half < free_from:
                continue
            parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text}</text>')
            free_from = at + half + _CHAR_WIDTH
        parts.append(f'<path class="axis" d="M{_LEFT} {bottom:.1f}H{right:.1f}"/>')
        return parts

    def _names(self) -> list[str]:
        """The series' names at their lines' ends, moved apart where they would overlap."""
        ends = sorted(self._ends)
        places = apart([end[0] for end in ends], _LINE_HEIGHT, _TOP + 4, self.height - _BOTTOM)
        return [
            f'<text class="name {css}" x="{WIDTH - self.right + 4:.1f}" y="{at + 3.5:.1f}">{escape(short(name))}</text>'
            for (_, name, css), at in zip(ends, places, strict=True)
        ]


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Sorted places moved as little as needed to be `least` apart, within low and high as far as they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least) if moved else max(place, low))
    over = moved[-1] - high if moved else 0.0
    for at in range(len(moved) - 1, -1, -1):
        limit = high if at == len(moved) - 1 else moved[at + 1] - least
        if over > 0 and moved[at] > limit:
            moved[at] = limit
    return moved


def short(name: str) -> str:
    """A name that fits beside a line."""
    return name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"


@dataclass(frozen=True, slots=True)
class Dot:
    """One estimate with its interval (None: not known)."""

    css: str
    value: float
    low: float | None = None
    high: float | None = None


def dot_plot(rows: Sequence[tuple[str, Sequence[Dot]]], x: Axis, title: str, about: str) -> str:
    """A row per measure, a dot and whisker per run, and a rule at 1 (Cleveland's dot plot)."""
    left = _ROW_CHAR_WIDTH * max((len(name) for name, _ in rows), default=0) + 12.0
    right, step = 16.0, 10.0 + _DOT_STEP * max((len(dots) for _, dots in rows), default=1)
    height = _TOP + step * len(rows) + _BOTTOM + 4
    width, parts = WIDTH * 1.2, []

    def px(value: float) -> float:
        return left + x.at(value) * (width - left - right)

    bottom = height - _BOTTOM
    for value, text in x.ticks:
        css = "axis" if value == 1 else "grid"
        parts.append(f'<path class="{css}" d="M{px(value):.1f} {_TOP}V{bottom:.1f}"/>')
        parts.append(f'<text class="tick" x="{px(value):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text}</text>')
    for at, (name, dots) in enumerate(rows):
        middle = _TOP + step * (at + 0.5)
        parts.append(
            f'<text class="row" x="{left - 10}" y="{middle + 3.5:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for number, dot in enumerate(dots):
            level = middle + _DOT_STEP * (number - (len(dots) - 1) / 2)
            parts += _dot(dot, level, px, x)
    size = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"'
    caption = f'<figcaption>{escape(title)}<span class="about">{escape(about)}</span></figcaption>'
    return f'<figure class="wide">{caption}<svg {size}>{"".join(parts)}</svg></figure>'


def _dot(dot: Dot, level: float, px: Callable[[float], float], x: Axis) -> Iterable[str]:
    """What lies beyond the axis is a hollow dot at its edge, with its number."""
    if not x.low <= dot.value <= x.high:
        side = -1 if dot.value > x.high else 1
        anchor = "end" if side < 0 else "start"
        at = px(dot.value)
        yield f'<circle class="beyond {dot.css}" cx="{at:.1f}" cy="{level:.1f}" r="2.6"/>'
        text = f"{dot.value:.2g}×"
        yield f'<text class="value" x="{at + 6 * side:.1f}" y="{level + 3:.1f}" text-anchor="{anchor}">{text}</text>'
        return
    if dot.low is not None and dot.high is not None:
        yield f'<path class="whisker {dot.css}" d="M{px(dot.low):.1f} {level:.1f}H{px(dot.high):.1f}"/>'
    yield f'<circle class="mark {dot.css}" cx="{px(dot.value):.1f}" cy="{level:.1f}" r="3"/>'
