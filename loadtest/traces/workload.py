"""Workloads: combines lengths, tenants, prompts and times into calls.

Named workloads, from the traces if they are there, else drawn from quantiles of the same traces:
S, ShareGPT's first turns (answers alike in length, where preempting cannot win); C, 60 % of Azure's code and 40 % of
its chat requests (CV of answers 1.4); R, C with 5 % long answers of a reasoning model (CV above 3); and M, whole
conversations of ShareGPT, in which a question waits for the answer before it and all said before is its prompt.

And answers by a law, after prompts of 20 to 400 tokens that tell nothing of them: constant, uniform and exponential,
for which no order beats first come, first served by much, and pareto, whose tail is heavy.
"""

import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, tee
from pathlib import Path
from random import Random

from loadtest.call import TraceCall
from loadtest.records import Fidelity
from loadtest.traces.formats import TraceRow, read
from loadtest.traces.prompts import Prompts

# Quantiles of the traces: share of requests, then prompt and output tokens at it. Azure LLM inference 2023 (CC BY 4.0,
# Patel et al., Splitwise); ShareGPT_V3 counted with SmolLM2's tokenizer, the first turns under the usual filter.
_AT = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_QUANTILES: Mapping[str, tuple[Sequence[int], Sequence[int]]] = {
    "code": (
        (3, 17, 75, 147, 385, 770, 1075, 1469, 1909, 2433, 3192, 5187, 7303, 7436, 7437),
        (6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 251, 1899),
    ),
    "chat": (
        (2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 14050),
        (7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000),
    ),
    "sharegpt": (
        (4, 5, 7, 11, 17, 30, 66, 152, 303, 401, 551, 751, 856, 958, 1019),
        (4, 11, 33, 74, 133, 196, 257, 310, 363, 426, 535, 720, 817, 949, 1205),
    ),
    # Any turn: questions of 106 tokens in the mean, answers of 314.
    "turn": (
        (1, 1, 3, 5, 8, 11, 14, 18, 25, 39, 68, 146, 431, 1743, 20877),
        (1, 4, 25, 59, 119, 176, 232, 281, 330, 385, 468, 635, 777, 913, 1240),
    ),
}
_TURNS = (1, 1, 1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 8, 12, 26)  # of a conversation, 3.4 in the mean
_FILES: Mapping[str, str] = {
    "code": "AzureLLMInferenceTrace_code.csv",
    "chat": "AzureLLMInferenceTrace_conv.csv",
    "sharegpt": "sharegpt_v3_lengths.first2000convs.csv",
}
CONVERSATIONS = "M"
# Answers of a reasoning model: log-normal with a mean of 4,000 tokens and a CV of 0.5.
_REASONING_MU, _REASONING_SIGMA = 8.18, 0.472
_MEAN_OF = 20_000

MIXES: Mapping[str, Mapping[str, float]] = {
    "S": {"sharegpt": 1.0},
    "C": {"code": 0.6, "chat": 0.4},
    "R": {"code": 0.57, "chat": 0.38, "reasoning": 0.05},
    "constant": {"constant": 1.0},
    "uniform": {"uniform": 1.0},
    "exponential": {"exponential": 1.0},
    "pareto": {"pareto": 1.0},
}
# Answers of 60 tokens in the mean, the law of Pareto cut at 4,000.
_LAWS: Mapping[str, Callable[[Random], float]] = {
    "constant": lambda rng: 60,
    "uniform": lambda rng: rng.randint(1, 120),
    "exponential": lambda rng: rng.expovariate(1 / 60),
    "pareto": lambda rng: min(4000, 12 * (1 - rng.random()) ** (-1 / 1.2)),
}


WORKLOADS = (*MIXES, CONVERSATIONS)


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of one request in tokens, and which application it belongs to."""

    prompt_tokens: int
    output_tokens: int
    kind: str = ""


Draw = Callable[[Random], Shape]


def conversations(rng: Random, traces: Path | None = None) -> Iterator[TraceRow]:
    """An endless stream of conversations, turn after turn, none with a time."""
    file = traces / _FILES["sharegpt"] if traces is not None else None
    seen = _by_session(read(file)) if file is not None and file.is_file() else []
    number = 0
    while True:
        rows = rng.choice(seen) if seen else _conversation(rng)
        yield from (replace(row, session=f"conversation-{number}") for row in rows)
        number += 1


def _conversation(rng: Random) -> list[TraceRow]:
    questions, answers = _QUANTILES["turn"]
    rows, said_tokens = [], 0
    for turn in range(_at(_TURNS, rng.random())):
        said_tokens += _at(questions, rng.random())
        rows.append(TraceRow(None, said_tokens, _at(answers, rng.random()), turn=turn, kind="chat"))
        said_tokens += rows[-1].output_tokens
    return rows


def _by_session(rows: Iterable[TraceRow]) -> list[list[TraceRow]]:
    return [list(of) for _, of in groupby(rows, key=lambda row: row.session)]


def starting(rows: Iterable[TraceRow], times_s: Iterable[float]) -> Iterator[TraceRow]:
    """Each conversation at a time of its own, all its turns at the same: they wait for each other."""
    for (_, of), at_s in zip(groupby(rows, key=lambda row: row.session), times_s, strict=False):
        yield from (replace(row, at_s=at_s) for row in of)


def mean_turns(traces: Path | None = None) -> float:
    """Of a conversation."""
    drawn = islice(conversations(Random(0), traces), _MEAN_OF)
    numbers = Counter(row.session for row in drawn)
    return sum(numbers.values()) / len(numbers)


def shapes(name: str, rng: Random, traces: Path | None = None) -> Iterator[Shape]:
    """An endless stream of one workload's requests. ValueError for a workload that there is not."""
    mix = MIXES.get(name)
    if mix is None:
        raise ValueError(f"There is no workload {name!r}: choose one of {', '.join(MIXES)}.")
    draws = [_draw(kind, traces) for kind in mix]
    weights = list(mix.values())
    while True:
        yield rng.choices(draws, weights)[0](rng)


def _draw(kind: str, traces: Path | None) -> Draw:
    if kind == "reasoning":
        chat = _draw("chat", traces)
        return lambda rng: replace(chat(rng), output_tokens=_reasoning_tokens(rng), kind="reasoning")
    if kind in _LAWS:
        law = _LAWS[kind]
        return lambda rng: Shape(rng.randint(20, 400), max(1, round(law(rng))), kind)
    file = traces / _FILES[kind] if traces is not None else None
    if file is not None and file.is_file():
        seen = [
            Shape(row.prompt_tokens, row.output_tokens, kind) for row in read(file) if kind != "sharegpt" or _usual(row)
        ]
        return lambda rng: rng.choice(seen)
    prompts, outputs = _QUANTILES[kind]
    return lambda rng: Shape(_at(prompts, rng.random()), _at(outputs, rng.random()), kind)


def _usual(row: TraceRow) -> bool:
    """The filter that ShareGPT benchmarks share: first turns, prompts of 4 to 1024 tokens, 2048 in all."""
    total = row.prompt_tokens + row.output_tokens
    return row.turn == 0 and 4 <= row.prompt_tokens <= 1024 and row.output_tokens >= 4 and total <= 2048


def _reasoning_tokens(rng: Random) -> int:
    return max(1, round(rng.lognormvariate(_REASONING_MU, _REASONING_SIGMA)))


def _at(quantiles: Sequence[int], share: float) -> int:
    """The inverse of a distribution given by its quantiles, straight lines between them."""
    above = min(bisect_right(_AT, share), len(_AT) - 1)
    low, high = _AT[above - 1], _AT[above]
    part = (share - low) / (high - low)
    return max(1, round(quantiles[above - 1] + part * (quantiles[above] - quantiles[above - 1])))


@dataclass(frozen=True, slots=True)
class Fit:
    """Scales lengths, then cuts what does not fit a context, and nothing else.

    context_tokens: of prompt and answer together; 0: not known, so nothing is cut. A prompt is cut to what the answer
    leaves, but to no less than half of the context; then the answer to the rest.
    prompt_scale: a further factor for prompts alone. On a CPU a prompt token costs a larger part of a decode step than
    on a GPU; scaled by that ratio, a prompt takes as many steps as it would there.
    """

    length_scale: float = 1.0
    context_tokens: int = 0
    prompt_scale: float = 1.0

    def scaled(self, shape: Shape) -> Shape:
        """Lengths before anything is cut."""
        prompt = max(1, round(shape.prompt_tokens * self.length_scale * self.prompt_scale))
        return Shape(prompt, max(1, round(shape.output_tokens * self.length_scale)), shape.kind)

    def cut(self, shape: Shape) -> Shape:
        """Scaled lengths as they fit the context."""
        room, prompt, output = self.context_tokens, shape.prompt_tokens, shape.output_tokens
        if not room or prompt + output <= room:
            return shape
        prompt = min(prompt, max(room - output, room // 2))
        return Shape(prompt, max(1, min(output, room - prompt)), shape.kind)

    def __call__(self, shape: Shape) -> Shape:
        return self.cut(self.scaled(shape))


def mean_lengths(drawn: Iterable[Shape]) -> tuple[float, float]:
    """Mean prompt and output tokens of some requests."""
    seen = list(drawn)
    return sum(shape.prompt_tokens for shape in seen) / len(seen), sum(shape.output_tokens for shape in seen) / len(
        seen
    )


def parse_shares(text: str) -> dict[str, float]:
    """`a=3,b=1` → shares of the requests by tenant; a name alone has a share of 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            raise ValueError(f"The share in {part!r} is no number: write NAME=SHARE,NAME=SHARE.") from None
        if not name or shares[name] <= 0:
            raise ValueError(f"{part!r} is no tenant with a share above 0: write NAME=SHARE,NAME=SHARE.")
    return shares


_SESSION_BLOCK_TOKENS = 64
_MOST_SESSIONS = 1 << 16


def _of_session(row: TraceRow) -> TraceRow:
    """The row with blocks that all turns of its conversation share."""
    if not row.session or row.prefix_hashes:
        return row
    first = zlib.crc32(row.session.encode()) << 20
    blocks = range(first, first + row.prompt_tokens // _SESSION_BLOCK_TOKENS)
    return replace(row, prefix_hashes=tuple(blocks), block_tokens=_SESSION_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Maker:
    """Turns lengths and times into calls. shares: of the requests, or of the conversations where there are some, by
    tenant; a trace's own tenants go first.

    wait: a conversation's next turn waits for the answer to the one before. text: send a trace's own text where it has
    some. open_tokens: length of an answer where the trace has none; 0
    leaves it to the model. fidelity: counts how the calls differ from the trace.
    """

    prompts: Prompts
    fit: Fit = Fit()
    shares: Mapping[str, float] | None = None
    name: str = "call"
    wait: bool = True
    text: bool = True
    open_tokens: int = 0
    fidelity: Fidelity = field(default_factory=Fidelity)

    def calls(self, drawn: Iterable[Shape], times_s: Iterable[float], rng: Random) -> Iterator[TraceCall]:
        """One call per time, as long as both last."""
        for number, (shape, at_s) in enumerate(zip(drawn, times_s, strict=False)):
            yield self._lengths(
                number, at_s, TraceRow(None, shape.prompt_tokens, shape.output_tokens, kind=shape.kind), rng
            )

    def replay(self, rows: Iterable[TraceRow], times_s: Iterable[float], rng: Random) -> Iterator[TraceCall]:
        """The rows of a trace, each at its time. Turns of one conversation begin alike, where the trace does not say
        itself what is shared."""
        latest: OrderedDict[str, TraceRow] = OrderedDict()
        for number, (row, at_s) in enumerate(zip(rows, times_s, strict=False)):
            call = self._text(number, at_s, row, rng) if self.text and row.has_text else None
            if call is None and self.text and row.has_text:
                continue
            if call is None:
                call = self._lengths(number, at_s, _of_session(row), rng)
            if row.session:
                before = latest.pop(row.session, None)
                call = replace(call, session=row.session, waits=self.wait, last=row.last, idle_s=_idle_s(before, row))
                if not row.last:
                    latest[row.session] = row
                if len(latest) > _MOST_SESSIONS:
                    latest.popitem(last=False)
            yield call

    def conversations(self, rows: Iterable[TraceRow], times_s: Iterable[float], rng: Random) -> Iterator[TraceCall]:
        """Conversations that begin at these times, with turns as long as the context takes what was said before."""
        fitting = (row for row in rows if row.turn == 0 or self._fits(row))
        for_rows, for_times = tee(starting(fitting, times_s))
        yield from self.replay(for_rows, (row.at_s or 0.0 for row in for_times), rng)

    def _fits(self, row: TraceRow) -> bool:
        shape = self.fit.scaled(Shape(row.prompt_tokens, row.output_tokens))
        return not self.fit.context_tokens or shape.prompt_tokens + shape.output_tokens <= self.fit.context_tokens

    def _lengths(self, number: int, at_s: float, row: TraceRow, rng: Random) -> TraceCall:
        """A prompt of the row's length that is made up."""
        asked = self.fit.scaled(Shape(row.prompt_tokens, row.output_tokens or self.open_tokens or 1, row.kind))
        sent = self.fit.cut(asked)
        self._count(row, asked, sent)
        self.fidelity.made_up += 1
        prompt = self.prompts(number, sent.prompt_tokens, row.prefix_hashes, row.block_tokens)
        output = sent.output_tokens if row.output_tokens or self.open_tokens else 0
        call_id = f"{self.name}-{number}"
        return TraceCall(
            call_id, at_s, self._tenant(row, rng), prompt, sent.prompt_tokens, output, row.kind, row.session
        )

    def _text(self, number: int, at_s: float, row: TraceRow, rng: Random) -> TraceCall | None:
        """The row's own text; None where it does not fit the context, for text cannot be cut to a length."""
        asked = Shape(row.prompt_tokens, row.output_tokens or self.open_tokens, row.kind)
        room = self.fit.context_tokens
        if room and asked.prompt_tokens >= room:
            self.fidelity.requests += 1
            self.fidelity.dropped += 1
            self.fidelity.prompt_tokens += asked.prompt_tokens
            self.fidelity.output_tokens += asked.output_tokens
            return None
        sent = replace(asked, output_tokens=min(asked.output_tokens, room - asked.prompt_tokens)) if room else asked
        self._count(row, asked, sent)
        return TraceCall(
            f"{self.name}-{number}", at_s, self._tenant(row, rng), row.prompt, sent.prompt_tokens, sent.output_tokens,
            row.kind, row.session, messages=row.messages, answers=row.answers, body=row.body,
        )  # fmt: skip

    def _count(self, row: TraceRow, asked: Shape, sent: Shape) -> None:
        seen = self.fidelity
        seen.requests += 1
        seen.prompt_tokens += asked.prompt_tokens
        seen.sent_prompt_tokens += sent.prompt_tokens
        seen.prompts_cut += sent.prompt_tokens < asked.prompt_tokens
        if row.output_tokens or self.open_tokens:
            seen.output_tokens += asked.output_tokens
            seen.sent_output_tokens += sent.output_tokens
            seen.answers_cut += sent.output_tokens < asked.output_tokens
        seen.answers_open += not row.output_tokens
        seen.lengths_estimated += row.estimated

    def _tenant(self, row: TraceRow, rng: Random) -> str:
        """The trace's own, else drawn by the shares; all turns of a conversation have the same."""
        if row.tenant:
            return row.tenant
        shares = self.shares or {"default": 1.0}
        if len(shares) == 1:
            return next(iter(shares))
        drawn = rng if not row.session else Random(f"{self.name}:{row.session}")
        return drawn.choices(list(shares), list(shares.values()))[0]


def _idle_s(before: TraceRow | None, row: TraceRow) -> float:
    """How long the trace's user waited after the answer before, as far as the trace says how long that took."""
    if before is None or before.at_s is None or row.at_s is None:
        return 0.0
    return max(0.0, row.at_s - before.at_s - before.duration_s)
