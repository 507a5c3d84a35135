"""What `evenhand bench disaggregation` asks, measured and simulated, and what counts as served."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from pathlib import Path
from random import Random
from statistics import geometric_mean, mean

from loadtest.records import Record
from loadtest.report.report import Objective, goodput
from loadtest.traces.formats import read
from loadtest.traces.workload import Fit, Shape, mean_lengths, shapes

WORKERS = 2
CONTEXT_TOKENS = 8192  # what is longer, prompt and answer together, is cut to it
TRACES = {"Mooncake": "mooncake_conversation_trace.first2000.jsonl", "Azure code": "AzureLLMInferenceTrace_code.csv"}
MEAN_PROMPT_TOKENS = 1500  # lengths are scaled to it
# The objectives, as multiples of what an idle engine takes: how long for a prompt of mean length, and per later token.
TTFT_SLOWDOWN, TPOT_SLOWDOWNS = 5.0, (1.5, 2.5, 5.0)


@dataclass(frozen=True)
class Idle:
    """What one request takes alone: seconds to the first token of a prompt of mean length, and for each later one."""

    ttft_s: float
    tpot_s: float

    def objectives(self) -> list[Objective]:
        """From tight to loose."""
        return [Objective(TTFT_SLOWDOWN * self.ttft_s, slowdown * self.tpot_s) for slowdown in TPOT_SLOWDOWNS]


Runs = list[tuple[float, Sequence[Record]]]  # (requests a second, what came of them)


def goodputs(runs: Runs, objectives: Sequence[Objective]) -> list[float]:
    """Requests a second for each worker, under each objective."""
    return [
        goodput([(rate, mean(map(objective.met, records)) if records else 0.0) for rate, records in runs]) / WORKERS
        for objective in objectives
    ]


def told_of(records: Sequence[Record], objective: Objective) -> str:
    """How many are inside, and which of its two bounds the others miss."""
    judged = [
        (record.ttft_s is None or record.ttft_s > objective.ttft_s, not objective.met(record)) for record in records
    ]
    late, missed = (sum(column) for column in zip(*judged, strict=True)) if judged else (0, 0)
    share = 1 - missed / len(judged) if judged else 0.0
    return f"{share:.2f} (late first token {late}, slow {missed - late})"


def mixes(traces: Path | None, rng: Random) -> Mapping[str, list[Shape]]:
    """Lengths of requests, scaled so that prompts have the mean that they should, and cut to the context."""
    if traces is None:
        return {"made up (C)": scaled(list(islice(shapes("C", rng), 2000)))}
    return {
        name: scaled([Shape(row.prompt_tokens, row.output_tokens) for row in islice(read(traces / file), 2000)])
        for name, file in TRACES.items()
    }


def scaled(drawn: Sequence[Shape]) -> list[Shape]:
    """Prompts and answers by the same factor."""
    fit = Fit(length_scale=MEAN_PROMPT_TOKENS / mean_lengths(drawn)[0], context_tokens=CONTEXT_TOKENS)
    return [fit(shape) for shape in drawn]


def ratio_of(goodput: float, other: float) -> float:
    """1 where nobody serves anybody in time."""
    return goodput / other if other else inf if goodput else 1.0


def means_of(ratios: Sequence[float]) -> str:
    """What is said of several ratios: a mean that a zero or an infinity would make is none."""
    mean = f"{geometric_mean(ratios):.2f}" if 0.0 < min(ratios) and max(ratios) < inf else "not defined"
    return f"geometric mean {mean}, least {min(ratios):.2f}"
