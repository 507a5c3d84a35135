"""Reads traces of any form as rows: published traces, conversations, request bodies, and your own CSV and JSON.

A row that cannot be read is left out, and counted with its line number in `Skipped`: never silently.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import orjson

from loadtest.traces.columns import Columns, Objects, csv_columns, json_array, json_objects
from loadtest.traces.conversations import sharegpt_lengths, transcript_of
from loadtest.traces.opening import first_lines
from loadtest.traces.published import azure, burstgpt, mooncake, qwen_bailian, vtc_arena
from loadtest.traces.rows import CHARS_PER_TOKEN, BadRow, Count, Skipped, TraceRow, estimate_tokens

__all__ = [
    "CHARS_PER_TOKEN",
    "READERS",
    "BadRow",
    "Skipped",
    "TraceRow",
    "estimate_tokens",
    "read",
    "recognise",
]

_LOOKED_AT = 20  # lines: one that is broken must not decide

READERS: Mapping[str, Callable[[Path, Skipped, Objects], Iterator[TraceRow]]] = {
    "azure": lambda path, skipped, _: azure(path, skipped),
    "sharegpt": json_array,
    "sharegpt-lengths": lambda path, skipped, _: sharegpt_lengths(path, skipped),
    "mooncake": lambda path, skipped, _: mooncake(path, skipped),
    "qwen-bailian": lambda path, skipped, _: qwen_bailian(path, skipped),
    "burstgpt": lambda path, skipped, _: burstgpt(path, skipped),
    "vtc-arena": lambda path, skipped, _: vtc_arena(path, skipped),
    "jsonl": json_objects,
    "csv": csv_columns,
}
_COLUMNS: Mapping[str, frozenset[str]] = {
    "azure": frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}),
    "burstgpt": frozenset({"Timestamp", "Request tokens", "Response tokens"}),
    "sharegpt-lengths": frozenset({"conv_id", "turn", "role", "num_tokens"}),
    "vtc-arena": frozenset({"adapter_dir", "prompt_len", "output_len", "req_time"}),
}


def read(
    path: Path,
    *,
    form: str = "",
    skipped: Skipped | None = None,
    columns: Mapping[str, str] | None = None,
    count: Count = estimate_tokens,
) -> Iterator[TraceRow]:
    """Rows of a trace in its own order, its form recognised by content unless given.

    columns: meaning → name, of columns whose names are not known. count: tokens of a text. Raises OSError, and
    ValueError for a file that is not a trace.
    """
    objects = Objects(Columns(columns or {}), count)
    reader = READERS.get(form or recognise(path, columns))
    if reader is None:
        raise ValueError(f"Unknown trace form {form!r}: choose one of {', '.join(READERS)}.")
    return reader(path, skipped if skipped is not None else Skipped(), objects)


def recognise(path: Path, columns: Mapping[str, str] | None = None) -> str:
    """The form of a trace file, by its first lines; ValueError says why it is none."""
    lines = first_lines(path, _LOOKED_AT)
    if not lines:
        raise ValueError(f"{path} is empty.")
    if lines[0].lstrip().startswith("["):
        return "sharegpt"
    if any(line.lstrip().startswith("{") for line in lines):
        return _json_form(path, lines)
    return _csv_form(path, lines[0], columns)


def _json_form(path: Path, lines: list[str]) -> str:
    objects = [row for row in map(_object, lines) if row is not None]
    if not objects and len(lines) > 1:
        raise ValueError(
            f"None of the first {len(lines)} lines of {path} is a JSON object; the first begins {lines[0][:60]!r}. "
            "Give one object a line, or one array of objects."
        )
    for row in objects:
        if "input_length" in row and "chat_id" in row:
            return "qwen-bailian"
        if "input_length" in row and ("hash_ids" in row or "timestamp" in row):
            return "mooncake"
        if transcript_of(row) is not None:
            break
    return "jsonl"


def _object(line: str) -> dict[str, object] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _csv_form(path: Path, head: str, columns: Mapping[str, str] | None) -> str:
    separator = max(",;\t", key=head.count)
    names = [column.strip().strip('"') for column in head.split(separator)]
    for form, needed in _COLUMNS.items():
        if needed <= set(names) and not columns:
            return form
    found = Columns(columns or {}).of(dict.fromkeys(names, ""))
    missing = [name for name in (columns or {}).values() if name not in names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}: its columns are {', '.join(names)}.")
    if "text" in found or {"prompt", "output"} <= set(found):
        return "csv"
    raise ValueError(
        f"{path} is not recognised as a trace. Its first line has {', '.join(name[:40] for name in names[:20])}: say "
        f"which column is which with --columns prompt=NAME,output=NAME[,at=NAME,session=NAME,tenant=NAME], or name "
        f"one of the known forms with --form: {', '.join(READERS)}."
    )
