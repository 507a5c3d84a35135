"""What is asked for: interactive requests at their times, and jobs of a batch without end."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice, takewhile
from pathlib import Path
from random import Random

from loadtest.call import TraceCall
from loadtest.traces.arrivals import poisson
from loadtest.traces.formats import TraceRow, read
from loadtest.traces.prompts import Prompts, token_prompts
from loadtest.traces.workload import Fit, Maker, Shape, shapes

PROMPT_TOKENS, OUTPUT_TOKENS, SIGMA = 512, 128, 0.8  # answers are lognormal, and this is their mean
BURST_PER_S, CALM_PER_S = 15.0, 1.0
CHAT, MOONCAKE = "AzureLLMInferenceTrace_conv.csv", "mooncake_conversation_trace.first2000.jsonl"
CHAT_PER_S = 5.5  # of the Azure trace
CHAT_RATE = 0.5  # of its pace: at its own it asks for all that the engine of the cost model can do
CONTEXT_TOKENS = 8192
READ_AHEAD = 512  # lines that the gateway orders by their beginnings
# Where the Mooncake trace is not at hand: prompts of its median length behind one of a few long beginnings.
_LONG_PROMPT, _LONG_OUTPUT, _BLOCK_TOKENS, _BEGINNINGS = 6900, 340, 512, 20


@dataclass(frozen=True, slots=True)
class Size:
    """How large the load is. seconds: of a burst, and of the calm after it. rate: a factor for arrivals; length: for
    prompts and answers. traces: a folder with the published traces; None: drawn like them."""

    seconds: float
    rounds: int
    rate: float = 1.0
    length: float = 1.0
    traces: Path | None = None

    @property
    def whole_s(self) -> float:
        """Of all bursts and calms."""
        return 2 * self.rounds * self.seconds

    @property
    def fit(self) -> Fit:
        return Fit(self.length, CONTEXT_TOKENS)


def output_length(rng: Random) -> int:
    """Of one answer, in tokens."""
    return max(2, min(1024, round(rng.lognormvariate(math.log(OUTPUT_TOKENS) - SIGMA**2 / 2, SIGMA))))


def _plain(rng: Random) -> Iterator[Shape]:
    while True:
        yield Shape(PROMPT_TOKENS, output_length(rng))


def _times(rng: Random, size: Size) -> Iterator[float]:
    """Poisson arrivals, fast and slow in turns."""
    at_s = 0.0
    while (phase := int(at_s / size.seconds)) < 2 * size.rounds:
        at_s += rng.expovariate(size.rate * (CALM_PER_S if phase % 2 else BURST_PER_S))
        yield at_s


def bursts(rng: Random, size: Size) -> Iterator[TraceCall]:
    """15 a second and 1 a second in turns, prompts of 512 tokens (llm-d-batch-gateway, issue 491)."""
    maker = Maker(_prompts(rng), size.fit, {"people": 1}, "interactive")
    return maker.calls(_plain(rng), _times(rng, size), rng)


def azure(rng: Random, size: Size) -> Iterator[TraceCall]:
    """Azure's chat requests at their own times, half as fast, from a moment in the trace that `rng` chooses."""
    rate = CHAT_RATE * size.rate
    maker = Maker(_prompts(rng), size.fit, {"people": 1}, "interactive")
    if size.traces is None:
        drawn = (shape for shape in shapes("C", rng) if shape.kind == "chat")
        return _within(size, maker.calls(drawn, poisson(CHAT_PER_S * rate, rng), rng))
    timed = [(row.at_s, row) for row in read(size.traces / CHAT) if row.at_s is not None]
    first_s, last_s = timed[0][0], timed[-1][0]
    begun_s = rng.uniform(first_s, max(first_s, last_s - size.whole_s * rate))
    timed = [((at_s - begun_s) / rate, row) for at_s, row in timed if at_s >= begun_s]
    return _within(size, maker.replay((row for _, row in timed), (at_s for at_s, _ in timed), rng))


def _within(size: Size, calls: Iterable[TraceCall]) -> Iterator[TraceCall]:
    return takewhile(lambda call: call.at_s < size.whole_s, calls)


def short(rng: Random, size: Size) -> Iterator[TraceCall]:
    """Jobs that are like the interactive requests of the bursts."""
    maker = Maker(_prompts(rng), size.fit, {"batch": 1}, "job")
    return maker.calls(_plain(rng), cycle([0.0]), rng)


def mooncake(rng: Random, size: Size) -> Iterator[TraceCall]:
    """Long prompts, many of which begin alike, in the order in which a gateway starts them."""
    maker = Maker(_prompts(rng), size.fit, {"batch": 1}, "job")
    rows = _long_rows(rng) if size.traces is None else cycle(list(read(size.traces / MOONCAKE)))
    calls = maker.replay(rows, cycle([0.0]), rng)
    while ahead := list(islice(calls, READ_AHEAD)):
        yield from sorted(ahead, key=lambda call: call.prompt)


def _long_rows(rng: Random) -> Iterator[TraceRow]:
    number = 1
    while True:
        prompt = min(CONTEXT_TOKENS, round(rng.lognormvariate(math.log(_LONG_PROMPT), 0.8)))
        shared, own = rng.randrange(_BEGINNINGS), prompt // _BLOCK_TOKENS
        blocks = (*(shared * 1000 + at for at in range(min(4, own))), *(10**6 * number + at for at in range(own - 4)))
        output = max(2, round(rng.lognormvariate(math.log(_LONG_OUTPUT) - SIGMA**2 / 2, SIGMA)))
        yield TraceRow(None, prompt, output, prefix_hashes=blocks, block_tokens=_BLOCK_TOKENS)
        number += 1


def _prompts(rng: Random) -> Prompts:
    return token_prompts(rng.randrange(1 << 30))


Load = Callable[[Random, Size], Iterator[TraceCall]]
PEOPLE: Mapping[str, Load] = {"bursts": bursts, "azure": azure}
JOBS: Mapping[str, Load] = {"short": short, "mooncake": mooncake}
