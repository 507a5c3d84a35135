"""Public traces as rows: Azure LLM inference, BurstGPT, ShareGPT, its lengths, Mooncake, Qwen-Bailian, the VTC arena,
our own JSON lines.

A row that cannot be read is left out, and counted with its line number in `Skipped`: never silently.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ijson
import orjson

CHARS_PER_TOKEN = 4.2  # English text under a byte-pair tokenizer, where a trace has text and no counts
ASKS, ANSWERS = frozenset({"human", "user"}), frozenset({"gpt", "chatgpt", "assistant", "bard", "bing"})
_KEPT_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    at_s: arrival, seconds since the trace's first row; None where the trace has no times.
    prefix_hashes: ids of the prompt's blocks, equal where two prompts begin alike (`block_tokens` each).
    session, turn: which conversation, and where in it. prompt: the text, where the trace has it. kind: which
    application it belongs to, where the trace says so.
    """

    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    session: str = ""
    turn: int = 0
    prefix_hashes: tuple[int, ...] = ()
    block_tokens: int = 0
    prompt: str = ""
    kind: str = ""


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
        more = f" and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.count} rows skipped (line {'; '.join(self.examples)}{more})"


Reader = Callable[[Path, Skipped], Iterator[TraceRow]]


class _BadRow(ValueError):
    """A row that is left out; the message is the reason."""


def read(path: Path, *, form: str = "", skipped: Skipped | None = None) -> Iterator[TraceRow]:
    """Rows of a trace in its own order, its form recognised by content unless given.

    Raises FileNotFoundError, and ValueError for a file that is no trace we know.
    """
    reader = READERS.get(form or recognise(path))
    if reader is None:
        raise ValueError(f"Unknown trace form {form!r}: choose one of {', '.join(READERS)}.")
    return reader(path, skipped if skipped is not None else Skipped())


def recognise(path: Path) -> str:
    """The form of a trace file, by its first bytes; ValueError if it is none that we know."""
    with path.open("rb") as file:
        head = file.read(4096).decode("utf-8-sig", errors="replace").lstrip()
    if head.startswith("["):
        return "sharegpt"
    if head.startswith("{"):
        first = head.partition("\n")[0]
        if '"input_length"' in first:
            return "qwen-bailian" if '"chat_id"' in first else "mooncake"
        return "jsonl"
    columns = {column.strip() for column in head.partition("\n")[0].split(",")}
    for form, needed in _COLUMNS.items():
        if needed <= columns:
            return form
    known = ", ".join(READERS)
    raise ValueError(f"{path} is no trace that can be recognised. Known forms: {known}; name one with --form.")


_COLUMNS: Mapping[str, frozenset[str]] = {
    "azure": frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}),
    "burstgpt": frozenset({"Timestamp", "Request tokens", "Response tokens"}),
    "sharegpt-lengths": frozenset({"conv_id", "turn", "role", "num_tokens"}),
    "vtc-arena": frozenset({"adapter_dir", "prompt_len", "output_len", "req_time"}),
}


def _tokens(value: object, name: str, *, least: int = 1) -> int:
    try:
        count = int(str(value))
    except ValueError:
        raise _BadRow(f"{name} is {value!r}, no whole number") from None
    if count < least:
        raise _BadRow(f"{name} is {count}, less than {least}")
    return count


def _number(value: object, name: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        raise _BadRow(f"{name} is {value!r}, no number") from None
    if not math.isfinite(number):
        raise _BadRow(f"{name} is {number}")
    return number


def _field(row: Mapping[str, Any], name: str) -> object:
    value = row.get(name)
    if value is None:
        raise _BadRow(f"{name} is missing")
    return value


def _kept(rows: Iterable[tuple[int, Any]], parse: Callable[[Any], TraceRow], skipped: Skipped) -> Iterator[TraceRow]:
    """Every row that can be parsed; arrivals counted from the first of them."""
    first_s: float | None = None
    for number, row in rows:
        try:
            parsed = parse(row)
        except _BadRow as bad:
            skipped.add(number, str(bad))
            continue
        if parsed.at_s is None:
            yield parsed
            continue
        first_s = parsed.at_s if first_s is None else first_s
        yield replace(parsed, at_s=parsed.at_s - first_s)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            yield reader.line_num, row


def _json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                skipped.add(number, "no JSON")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                skipped.add(number, "no JSON object")


_STAMP = re.compile(r"(\d{4}-[01]\d-[0-3]\d [0-2]\d:[0-5]\d:[0-5]\d)(\.\d+)?(?:\+00:00|Z)?")


def azure(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Azure LLM inference 2023 (Splitwise) and 2024 (DynamoLLM): TIMESTAMP,ContextTokens,GeneratedTokens.

    Times have up to seven digits of a second, or none, and in 2024 a time zone, which is always UTC.
    """

    def parse(row: Mapping[str, Any]) -> TraceRow:
        stamp = str(_field(row, "TIMESTAMP"))
        parts = _STAMP.fullmatch(stamp)
        if parts is None:
            raise _BadRow(f"TIMESTAMP is {stamp!r}, no time")
        at_s = datetime.fromisoformat(parts[1]).replace(tzinfo=UTC).timestamp() + float(f"0{parts[2] or '.0'}")
        prompt, output = _field(row, "ContextTokens"), _field(row, "GeneratedTokens")
        return TraceRow(at_s, _tokens(prompt, "ContextTokens"), _tokens(output, "GeneratedTokens"))

    return _kept(_csv_rows(path), parse, skipped)


def vtc_arena(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """The VTC paper's arena trace: req_id,adapter_dir,prompt_len,output_len,req_time; each adapter is a tenant."""

    def parse(row: Mapping[str, Any]) -> TraceRow:
        return TraceRow(
            _number(_field(row, "req_time"), "req_time"),
            _tokens(_field(row, "prompt_len"), "prompt_len"),
            _tokens(_field(row, "output_len"), "output_len"),
            tenant=str(_field(row, "adapter_dir")),
        )

    return _kept(_csv_rows(path), parse, skipped)


def mooncake(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Mooncake (FAST 2025): timestamp in milliseconds, input_length, output_length, hash_ids of 512-token blocks."""

    def parse(row: Mapping[str, Any]) -> TraceRow:
        hashes = row.get("hash_ids") or []
        if not isinstance(hashes, list) or not all(isinstance(one, int) for one in hashes):
            raise _BadRow("hash_ids is no list of whole numbers")
        return TraceRow(
            _number(_field(row, "timestamp"), "timestamp") / 1000.0,
            _tokens(_field(row, "input_length"), "input_length"),
            _tokens(_field(row, "output_length"), "output_length"),
            prefix_hashes=tuple(hashes),
            block_tokens=512,
        )

    return _kept(_json_lines(path, skipped), parse, skipped)


def qwen_bailian(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Qwen-Bailian (Alibaba): chat_id, parent_chat_id (-1 at the root), timestamp in seconds, turn, hash_ids of
    16-token blocks. A conversation is named after its root."""
    roots: dict[object, str] = {}

    def parse(row: Mapping[str, Any]) -> TraceRow:
        hashes = row.get("hash_ids") or []
        if not isinstance(hashes, list) or not all(isinstance(one, int) for one in hashes):
            raise _BadRow("hash_ids is no list of whole numbers")
        chat, parent = _field(row, "chat_id"), row.get("parent_chat_id", -1)
        roots[chat] = session = roots.get(parent, str(chat))
        return TraceRow(
            _number(_field(row, "timestamp"), "timestamp"),
            _tokens(_field(row, "input_length"), "input_length"),
            _tokens(_field(row, "output_length"), "output_length"),
            session=session,
            turn=max(0, _tokens(row.get("turn", 1), "turn", least=0) - 1),
            prefix_hashes=tuple(hashes),
            block_tokens=16,
            kind=str(row.get("type", "")),
        )

    return _kept(_json_lines(path, skipped), parse, skipped)


def burstgpt(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """BurstGPT, all versions, columns by name: Timestamp in seconds, Request and Response tokens, Log Type; the third
    has Session ID too. Failed requests have no response tokens, and are left out."""
    turns: dict[str, int] = {}

    def parse(row: Mapping[str, Any]) -> TraceRow:
        session = str(row.get("Session ID") or "").strip()
        turn = turns.get(session, -1) + 1 if session else 0
        parsed = TraceRow(
            _number(_field(row, "Timestamp"), "Timestamp"),
            _tokens(_field(row, "Request tokens"), "Request tokens"),
            _tokens(_field(row, "Response tokens"), "Response tokens"),
            session=session,
            turn=turn,
            kind=str(row.get("Log Type") or "").partition(" ")[0].lower(),
        )
        if session:
            turns[session] = turn
        return parsed

    return _kept(_csv_rows(path), parse, skipped)


def own(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Our own form, one JSON object a line: prompt_tokens, output_tokens, and where known at_s, tenant, session, turn,
    prefix_hashes, block_tokens, prompt, kind."""

    def parse(row: Mapping[str, Any]) -> TraceRow:
        prompt = row.get("prompt", "")
        known = _field(row, "prompt_tokens") if "prompt_tokens" in row or not prompt else estimate_tokens(prompt)
        return TraceRow(
            _number(row["at_s"], "at_s") if row.get("at_s") is not None else None,
            _tokens(known, "prompt_tokens"),
            _tokens(_field(row, "output_tokens"), "output_tokens"),
            tenant=str(row.get("tenant", "")),
            session=str(row.get("session", "")),
            turn=_tokens(row.get("turn", 0), "turn", least=0),
            prefix_hashes=tuple(row.get("prefix_hashes", ())),
            block_tokens=_tokens(row.get("block_tokens", 0), "block_tokens", least=0),
            prompt=str(prompt),
            kind=str(row.get("kind", "")),
        )

    return _kept(_json_lines(path, skipped), parse, skipped)


def estimate_tokens(text: str) -> int:
    """Tokens of a text, where nobody counted them."""
    return max(1, round(len(text) / CHARS_PER_TOKEN))


# Conversations. Each answer becomes a row: everything said before it is the prompt.


def _role(name: object) -> str:
    role = str(name).lower()
    if role in ASKS:
        return "user"
    return "assistant" if role in ANSWERS else "system"


def _turns(session: str, turns: Iterable[tuple[str, int, str]]) -> Iterator[TraceRow]:
    """(role, tokens, text) turns → a row per answer; the prompt is what was said so far, the text only the question."""
    said_tokens, turn, question, asked = 0, 0, "", False
    for role, tokens, text in turns:
        if role == "assistant" and asked:
            if said_tokens and tokens:
                yield TraceRow(None, said_tokens, tokens, session=session, turn=turn, prompt=question)
                turn += 1
            asked = False
        elif role == "user":
            question, asked = text, True
        said_tokens += tokens


def sharegpt(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """ShareGPT: [{id, conversations: [{from, value}]}], read one conversation at a time, for the full file has 640 MB.

    Its quirks: conversations that are empty or begin with an answer, ids that repeat, roles of several products.
    Lengths are estimated from characters.
    """
    with path.open("rb") as file:
        for number, item in enumerate(_items(file, skipped), 1):
            turns = item.get("conversations", item.get("items")) if isinstance(item, dict) else None
            if not isinstance(turns, list):
                skipped.add(number, "no conversation")
                continue
            # The id alone would join two conversations into one where it repeats.
            session = f"{item.get('id', '')}#{number}"
            rows = list(_turns(session, _texts(turns)))
            if not rows:
                skipped.add(number, "no question with an answer")
            yield from rows


def _items(file: Any, skipped: Skipped) -> Iterator[Any]:  # a binary file, as ijson takes it
    number = 0
    try:
        for item in ijson.items(file, "item"):
            number += 1
            yield item
    except ijson.JSONError as error:
        skipped.add(number + 1, f"the file ends or breaks here: {error}")


def _texts(turns: Iterable[object]) -> Iterator[tuple[str, int, str]]:
    for turn in turns:
        if isinstance(turn, dict):
            text = str(turn.get("value", turn.get("text", "")) or "")
            yield _role(turn.get("from", turn.get("role"))), estimate_tokens(text) if text else 0, text


def sharegpt_lengths(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """ShareGPT as lengths: conv_id,turn,role,num_chars,num_tokens; a new conversation begins where turn falls to 0."""
    session, number, turns = "", 0, list[tuple[str, int, str]]()
    for line, row in _csv_rows(path):
        try:
            turn = _tokens(_field(row, "turn"), "turn", least=0)
            one = _role(_field(row, "role")), _tokens(_field(row, "num_tokens"), "num_tokens", least=0), ""
        except _BadRow as bad:
            skipped.add(line, str(bad))
            continue
        if turn == 0 and turns:
            yield from _turns(f"{session}#{number}", turns)
            turns, number = [], number + 1
        session = str(row.get("conv_id", ""))
        turns.append(one)
    yield from _turns(f"{session}#{number}", turns)


READERS: Mapping[str, Reader] = {
    "azure": azure,
    "sharegpt": sharegpt,
    "sharegpt-lengths": sharegpt_lengths,
    "mooncake": mooncake,
    "qwen-bailian": qwen_bailian,
    "burstgpt": burstgpt,
    "vtc-arena": vtc_arena,
    "jsonl": own,
}
