"""One request of a trace, and what all readers of traces share: how fields are parsed, and what was left out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

CHARS_PER_TOKEN = 4.2  # English text under a byte-pair tokenizer, where a trace has text and no counts
_KEPT_EXAMPLES = 5

Message = Mapping[str, Any]  # as OpenAI's chat API has it: role, content, …
Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    at_s: arrival, seconds since the trace's first row; None where the trace has no times.
    output_tokens: length of the answer; 0 where the trace does not say.
    prefix_hashes: ids of the prompt's blocks, equal where two prompts begin alike (`block_tokens` each).
    session, turn: which conversation, and where in it. last: no further turn follows.
    prompt: the text of a plain prompt. messages: a chat, whole, as far as it has come with this turn. Both are empty
    where the trace has lengths only. answers: places in `messages` of the answers to the session's earlier turns.
    kind: which application it belongs to, where the trace says so.
    body: further fields of the request (tools, temperature, …). duration_s: how long the traced answer took.
    estimated: the lengths are estimated from the text.
    """

    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    session: str = ""
    turn: int = 0
    last: bool = False
    prefix_hashes: tuple[int, ...] = ()
    block_tokens: int = 0
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    answers: tuple[int, ...] = ()
    kind: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float = 0.0
    estimated: bool = False

    @property
    def has_text(self) -> bool:
        return bool(self.prompt or self.messages)


@dataclass(slots=True)
class Skipped:
    """What a reader left out: how often, and the first few with line (or item) number and reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.examples) < _KEPT_EXAMPLES:
            self.examples.append(f"{number}: {reason}")

    def __str__(self) -> str:
        if not self.count:
            return "no row skipped"
        more = f" and {self.count - len(self.examples):,} more" if self.count > len(self.examples) else ""
        noun = "row" if self.count == 1 else "rows"
        return f"{self.count:,} {noun} skipped (line {'; '.join(self.examples)}{more})"


class BadRow(ValueError):
    """A row that is left out; the message is the reason."""


def tokens(value: object, name: str, *, least: int = 1) -> int:
    """A count: `5`, `"5"` and `5.0` are all five. Raises BadRow."""
    if type(value) is int:
        count = value
    else:
        number_ = number(value, name)
        if number_ != int(number_):
            raise BadRow(f"{name} is {value!r}, not a whole number")
        count = int(number_)
    if count < least:
        raise BadRow(f"{name} is {count}, less than {least}")
    return count


def number(value: object, name: str) -> float:
    """A finite number. Raises BadRow."""
    try:
        parsed = float(str(value))
    except ValueError:
        raise BadRow(f"{name} is {value!r}, not a number") from None
    if not math.isfinite(parsed):
        raise BadRow(f"{name} is {parsed}")
    return parsed


def given(row: Mapping[str, Any], name: str) -> object:
    """A field that must be there. Raises BadRow."""
    value = row.get(name)
    if value is None:
        raise BadRow(f"{name} is missing")
    return value


def hashes(row: Mapping[str, Any], name: str = "hash_ids") -> tuple[int, ...]:
    """Ids of a prompt's blocks. Raises BadRow."""
    ids = row.get(name) or []
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        raise BadRow(f"{name} is not a list of whole numbers")
    return tuple(ids)


def kept(
    rows: Iterable[tuple[int, Any]], parse: Callable[[Any], TraceRow | Iterable[TraceRow]], skipped: Skipped
) -> Iterator[TraceRow]:
    """Every row that can be parsed, from lines that hold one or several; arrivals count from the first of them."""
    first_s: float | None = None
    for line, row in rows:
        try:
            parsed = parse(row)
            found = [parsed] if isinstance(parsed, TraceRow) else list(parsed)
        except BadRow as bad:
            skipped.add(line, str(bad))
            continue
        for one in found:
            if one.at_s is None:
                yield one
                continue
            first_s = one.at_s if first_s is None else first_s
            yield replace(one, at_s=one.at_s - first_s) if first_s else one


def estimate_tokens(text: str) -> int:
    """Tokens of a text, where nobody counted them."""
    return max(1, round(len(text) / CHARS_PER_TOKEN))
