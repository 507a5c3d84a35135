"""The figures of `evenhand bench gateway` as a Markdown table: medians and spread, ratios taken within a repetition."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtest.bench.gateway.relay_load import Observed
from loadtest.bench.table import markdown, spread

YARDSTICK = "nginx"
STREAMS = 512  # of the crowded phase; with 50 chunks/s each, 25,600 are offered
OTHERS_MATTER = 0.1  # of a core

HEAD = (
    "gateway", "requests/s", "÷ nginx", "CPU per chunk, µs", "÷ nginx", "added TTFB p50, ms", "p99, ms",
    "25,600 chunks/s offered: carried", "delay p99, ms", "memory, MB",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TableRun:
    """One repetition of one gateway: what each phase showed, by its name."""

    phases: Mapping[str, Observed]

    def requests_per_s(self) -> float:
        """Of answers in one piece."""
        load = self.phases["whole"].load
        return float(load["requests"]) / float(load["seconds"])

    def chunk_cpu_us(self) -> float:
        """Processor time of the gateway per relayed chunk, at a pace that it can easily keep."""
        paced = self.phases["paced"]
        return 1e6 * paced.gateway_cpu_s / max(1, int(paced.load["all_chunks"]))

    def first_byte_ms(self, quantile: str) -> float:
        """Request to the first byte of the body, at 50 requests/s."""
        return float(self.phases["idle"].load["first_byte_us"][quantile]) / 1e3

    def carried_per_s(self) -> float:
        """Chunks relayed in the crowded phase."""
        load = self.phases["many"].load
        return float(load["chunks"]) / float(load["seconds"])

    def chunk_delay_ms(self) -> float:
        """The engine writes a chunk → the client has it: p99 in the crowded phase."""
        return float(self.phases["many"].load["chunk_delay_us"]["p99"]) / 1e3

    def errors(self) -> list[str]:
        """Phases in which something went wrong, with the first thing that did."""
        return [
            f"{seen.load['errors']} errors in phase '{name}', the first: {seen.load['error']}"
            for name, seen in self.phases.items()
            if seen.load["errors"]
        ]


Runs = dict[str, list[TableRun]]


def table(runs: Mapping[str, Sequence[TableRun]], direct: str) -> str:
    """One line per gateway, nginx first. `direct`: the name of the runs without a gateway."""
    base, alone = runs[YARDSTICK], runs[direct]
    rows = [_row(name, mine, base, alone) for name, mine in runs.items() if name != direct and mine]
    return markdown(HEAD, rows)


def _row(name: str, mine: Sequence[TableRun], base: Sequence[TableRun], alone: Sequence[TableRun]) -> list[str]:
    def ratio(figure: Callable[[TableRun], float]) -> str:
        pairs = zip(mine, base, strict=False)  # a gateway that was left out has fewer
        return spread([figure(one) / max(1e-9, figure(other)) for one, other in pairs])

    def added(quantile: str) -> str:
        pairs = zip(mine, alone, strict=False)
        return spread([one.first_byte_ms(quantile) - other.first_byte_ms(quantile) for one, other in pairs])

    return [
        name,
        spread([one.requests_per_s() for one in mine], digits=0),
        ratio(TableRun.requests_per_s),
        spread([one.chunk_cpu_us() for one in mine], digits=1),
        ratio(TableRun.chunk_cpu_us),
        added("p50"),
        added("p99"),
        spread([one.carried_per_s() for one in mine], digits=0),
        spread([one.chunk_delay_ms() for one in mine], digits=1),
        _memory(mine),
    ]


def _memory(mine: Sequence[TableRun]) -> str:
    seen = [run.phases["open"] for run in mine if "open" in run.phases]
    if not seen:
        return ""
    return f"{seen[0].pss_bytes / 1e6:.0f} with {seen[0].load['open']:,} streams"


def notes(runs: Mapping[str, Sequence[TableRun]], asked: int, streams: int, one_core: bool) -> Iterator[str]:
    """What a reader must know beside the table."""
    repetitions = max(len(mine) for mine in runs.values())
    yield f"{repetitions} repetition{'s' * (repetitions > 1)} in turns, median (least–most); memory is read once."
    if streams < asked:
        yield f"{streams:,} streams in place of {asked:,}: the limit of open files here has room for no more."
    if one_core:
        yield "There is one core for all: gateway, engine and load generator stood in each other's way."
    others = max(seen.others for mine in runs.values() for run in mine for seen in run.phases.values())
    if others > OTHERS_MATTER:
        yield f"Other programs used up to {others:.1f} cores in a phase: these figures are theirs too."
    for name, mine in runs.items():
        for number, run in enumerate(mine):
            for error in run.errors():
                yield f"{name}, repetition {number + 1}: {error}."
