"""The figures of a batch beside interactive traffic, each with its goal and the best that has been published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.bench.batch.work import Outcome
from loadtest.bench.gateway.relay_load import BenchmarkError
from loadtest.bench.table import markdown, spread

# llm-d-batch-gateway, issue 491, one engine: a concurrency cap, and priority order. HyGen: NeurIPS 2025, on an engine
# that it patches.
RELEASED_TTFT, RELEASED_GAP = "2.2 (cap), 7.7 (priority)", "2.4 (cap), 3.3 (priority)"
RELEASED_SLACK, RELEASED_TOTAL = "0.84 (HyGen)", "3.87 (HyGen)"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table. goal: in words, "" for what is only reported. beside: the same of other ways, by name."""

    what: str
    where: str
    measured: str
    goal: str = ""
    released: str = ""
    met: bool | None = None
    beside: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound, if there is one, and how figures are written."""

    most: float | None = None
    least: float | None = None
    unit: str = ""

    @property
    def text(self) -> str:
        if self.most is None:
            return "" if self.least is None else f"≥ {self.least:g}{self.unit}"
        return f"≤ {self.most:g}{self.unit}"

    def met(self, values: Sequence[float]) -> bool | None:
        """Whether the median keeps to it; None without a bound."""
        middle = median(values)
        if self.most is None:
            return None if self.least is None else middle >= self.least
        return middle <= self.most

    def told(self, values: Sequence[float], digits: int = 2) -> str:
        """The value, or median and spread of several."""
        if len(values) == 1:
            return f"{values[0]:.{digits}f}{self.unit}"
        return spread(values, self.unit, digits)


def table(figures: Sequence[Figure]) -> str:
    """All figures."""
    rows = [
        [
            figure.what,
            figure.where,
            figure.goal or "report",
            figure.released,
            figure.measured,
            "; ".join(f"{name}: {value}" for name, value in (figure.beside or {}).items()),
            {None: "", True: "met", False: "**missed**"}[figure.met],
        ]
        for figure in figures
    ]
    return markdown(["figure", "where", "goal", "best released", "Evenhand", "beside it, in the same run", ""], rows)


@dataclass(frozen=True, slots=True)
class Scene:
    """What ways are compared with, in one outcome for each seed: the interactive requests alone, the batch alone on
    stock vLLM, and such interactive requests as many as the engine can do. The last two are empty where there are none.
    """

    alone: Sequence[Outcome]
    batch_only: Sequence[Outcome]
    endless: Sequence[Outcome]

    def __post_init__(self) -> None:
        if not all(alone.firsts and alone.gaps for alone in self.alone):
            raise BenchmarkError("no interactive request was answered in the time that is measured: make it longer")

    def ttft(self, way: Sequence[Outcome]) -> list[float]:
        """P99, as a ratio to the interactive requests alone."""
        return [one.ttft_p99_s / alone.ttft_p99_s for one, alone in zip(way, self.alone, strict=True)]

    def gap(self, way: Sequence[Outcome]) -> list[float]:
        return [one.gap_p99_s / alone.gap_p99_s for one, alone in zip(way, self.alone, strict=True)]

    def slack(self, way: Sequence[Outcome]) -> list[float]:
        """The batch's tokens/s, of those that the part of the engine makes that the interactive requests leave.

        That part is what is left of 1 when the engine's output with such requests alone, as many as it can do, is 1.
        """
        if any(
            alone.people_per_s >= endless.batch_per_s for alone, endless in zip(self.alone, self.endless, strict=True)
        ):
            raise BenchmarkError("the interactive requests fill the engine by themselves: nothing is left for a batch")
        return [
            one.batch_per_s / (full.batch_per_s * (1.0 - alone.people_per_s / endless.batch_per_s))
            for one, alone, full, endless in zip(way, self.alone, self.batch_only, self.endless, strict=True)
        ]

    def total(self, way: Sequence[Outcome]) -> list[float]:
        """Output tokens/s of all, as a ratio to those of the interactive requests alone."""
        return [
            (one.people_per_s + one.batch_per_s) / alone.people_per_s
            for one, alone in zip(way, self.alone, strict=True)
        ]

    def figures(self, where: str, ours: str, ways: Mapping[str, Sequence[Outcome]]) -> list[Figure]:
        """The rows of `ours`, the others beside it; what concerns the batch beside those that have one."""
        people = [
            ("interactive P99 TTFT with batch ÷ alone", self.ttft, Goal(most=1.2), RELEASED_TTFT),
            ("interactive P99 ITL with batch ÷ alone", self.gap, Goal(most=1.3), RELEASED_GAP),
            ("all tokens/s ÷ interactive alone", self.total, Goal(), RELEASED_TOTAL),
        ]
        batch = [
            ("batch tokens/s ÷ what is left", self.slack, Goal(least=0.84), RELEASED_SLACK),
            ("batch tokens computed again", again, Goal(most=5.0, unit=" %"), ""),
        ]
        with_batch = {name: way for name, way in ways.items() if name == ours or any(one.batch_tokens for one in way)}
        asked = [(ways, one) for one in people] + [(with_batch, one) for one in batch if self.batch_only]
        rows = []
        for shown, (what, measure, goal, released) in asked:
            found = {name: goal.told(measure(way)) for name, way in shown.items()}
            rows.append(Figure(what, where, found.pop(ours), goal.text, released, goal.met(measure(ways[ours])), found))
        return rows


def again(way: Sequence[Outcome]) -> list[float]:
    """Tokens of the batch that were computed again, of all that were computed, in percent."""
    return [100.0 * one.again for one in way]


WAY_HEAD = ["way", "P99 TTFT, ms", "P99 ITL, ms", "interactive tokens/s", "batch tokens/s"]


def way_rows(ways: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Of the longer table: a line for each way."""
    plain = Goal()
    return [
        [
            name,
            plain.told([1000.0 * one.ttft_p99_s for one in way], 0),
            plain.told([1000.0 * one.gap_p99_s for one in way], 1),
            plain.told([one.people_per_s for one in way], 0),
            plain.told([one.batch_per_s for one in way], 0),
        ]
        for name, way in ways.items()
    ]
