"""A figure beside its goal, and how a run is printed."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.bench.table import markdown


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured. goal: in words, "" for what is only told. met: whether it is reached."""

    what: str
    measured: str
    goal: str = ""
    met: bool = True


def table(figures: Sequence[Figure]) -> str:
    """A line per figure; what misses its goal says so."""
    rows = [[figure.what, figure.measured, figure.goal + ("" if figure.met else ": **missed**")] for figure in figures]
    return markdown(["what", "measured", "goal"], rows)


def none(what: str, problems: Sequence[object]) -> Figure:
    """A count whose goal is 0; the first few are shown."""
    shown = "".join(f"; {str(problem)[:600]}" for problem in problems[:5])
    return Figure(what, f"{len(problems)}{shown}", "0", not problems)


def quantile_ms(values_s: Sequence[float], share: float) -> str:
    """The value below which so large a part lies, in milliseconds; "none" of nothing."""
    ordered = sorted(values_s)
    return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000:.0f} ms" if ordered else "none"
