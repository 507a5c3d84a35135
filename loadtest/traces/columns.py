"""Traces of any other form: CSV columns and JSON keys, found by their usual names or by `--columns`.

A JSON object may be one request with its lengths or its text, a request body of OpenAI's API (also wrapped, as batch
files have it), a conversation, or several requests of one moment (AIBrix).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtest.traces.conversations import messages_of, question_rows, text_of, transcript_of, transcript_rows
from loadtest.traces.opening import csv_rows, json_items, json_lines
from loadtest.traces.published import time_s
from loadtest.traces.rows import (
    BadRow,
    Count,
    Skipped,
    TraceRow,
    estimate_tokens,
    hashes,
    kept,
    number,
    tokens,
)

# What a trace calls it, in small letters and digits only.
NAMES: Mapping[str, frozenset[str]] = {
    "prompt": frozenset(
        "prompttokens inputtokens inputlength promptlen promptlength numprefilltokens contexttokens requesttokens "
        "inputlen isl numprompttokens numinputtokens prefilltokens promptsize".split()
    ),
    "output": frozenset(
        "outputtokens outputlength outputlen numdecodetokens generatedtokens responsetokens completiontokens osl "
        "numoutputtokens decodetokens maxtokens maxcompletiontokens maxoutputtokens outputsize responselength".split()
    ),
    "at": frozenset(
        "ats arrivedat arrivaltime timestamp time reqtime requesttime arrival arrivaltimestamp starttime ats "
        "timestampms arrivaltimems".split()
    ),
    "session": frozenset("session sessionid conversationid convid chatid".split()),
    "tenant": frozenset("tenant tenantid user userid customer adapterdir".split()),
    "text": frozenset("prompt text question instruction inputtext promptext".split()),
    "kind": frozenset("kind category type".split()),
    "turn": frozenset(("turn",)),
}
COLUMNS = tuple(NAMES)
_PLAIN = re.compile(r"[^a-z0-9]")
# Fields of a request body that make a difference to what the server does; what we set ourselves is not among them.
_BODY = (
    "tools", "tool_choice", "response_format", "temperature", "top_p", "stop", "seed", "reasoning_effort",
    "parallel_tool_calls", "frequency_penalty", "presence_penalty", "logit_bias",
)  # fmt: skip
_MILLISECONDS_FROM, _MICROSECONDS_FROM = 1e11, 1e14  # of a time since 1970 in these units


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=a,output=b` → {"prompt": "a", "output": "b"}. ValueError says what may stand there."""
    named: dict[str, str] = {}
    for part in text.split(","):
        key, equals, name = part.partition("=")
        if not equals or not name or key.strip() not in NAMES:
            raise ValueError(
                f"--columns has {part!r}: write prompt=NAME,output=NAME and, where the trace has them, "
                f"{', '.join(f'{key}=NAME' for key in COLUMNS[2:])}."
            )
        named[key.strip()] = name.strip()
    return named


@dataclass(slots=True)
class Columns:
    """Which column or key holds what: those named, else those whose names are known."""

    named: Mapping[str, str] = field(default_factory=dict)
    _found: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def of(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """Meaning → name, for the names that this row has."""
        names = tuple(row)
        found = self._found.get(names)
        if found is None:
            found = self._search(names)
            if len(self._found) < 1024:  # of a file in which every row has keys of its own, none is worth keeping
                self._found[names] = found
        return found

    def _search(self, names: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        present = [name for name in names if isinstance(name, str)]  # a row that is too long has one without
        for meaning, known in NAMES.items():
            if meaning in self.named:
                if self.named[meaning] in present:
                    found[meaning] = self.named[meaning]
                continue
            for name in present:
                if _PLAIN.sub("", name.lower()) in known:
                    found[meaning] = name
                    break
        return found


@dataclass(frozen=True, slots=True)
class Objects:
    """Turns the rows of a file into requests. count: tokens of a text, where the trace has no counts."""

    columns: Columns = field(default_factory=Columns)
    count: Count = estimate_tokens

    def rows(self, number_: int, row: Mapping[str, Any]) -> TraceRow | list[TraceRow]:
        """The requests of one object, which is the `number_`-th of its file. Raises BadRow."""
        if isinstance(row.get("requests"), list):
            return self._at_one_moment(number_, row)
        if isinstance(row.get("body"), dict):  # a line of a batch file
            return self._with_time(self._request(row["body"]), row)
        said = transcript_of(row)
        messages = row.get("messages")
        if said is None and isinstance(messages, list) and _is_transcript(messages):
            said = messages
        if said is not None:
            # The id alone would join two conversations into one where it repeats.
            session = f"{row.get('id', row.get('conversation_id', ''))}#{number_}"
            return [self._told(one, row) for one in transcript_rows(said, session, self.count)]
        if isinstance(row.get("turns"), list):
            kind = str(row.get("category", ""))
            return question_rows(row["turns"], f"{row.get('question_id', '')}#{number_}", kind, self.count)
        return self._with_time(self._request(row), row)

    def _told(self, parsed: TraceRow, row: Mapping[str, Any]) -> TraceRow:
        """A turn with the tenant of its conversation; its time is the conversation's, so turns wait for each other."""
        at = self.columns.of(row)
        parsed = replace(parsed, tenant=str(row[at["tenant"]])) if row.get(at.get("tenant", "")) else parsed
        return replace(parsed, at_s=self._time_s(row, at)) if "at" in at else parsed

    def _at_one_moment(self, number_: int, row: Mapping[str, Any]) -> list[TraceRow]:
        """AIBrix: {"timestamp": milliseconds, "requests": [{…}]}."""
        at_s = number(row["timestamp"], "timestamp") / 1000.0 if row.get("timestamp") is not None else None
        found: list[TraceRow] = []
        for one in row["requests"]:
            if not isinstance(one, dict):
                raise BadRow("a request is not a JSON object")
            parsed = self.rows(number_, one)
            found += [parsed] if isinstance(parsed, TraceRow) else parsed
        return [replace(one, at_s=at_s) for one in found]

    def _with_time(self, parsed: TraceRow, row: Mapping[str, Any]) -> TraceRow:
        at = self.columns.of(row)
        if parsed.at_s is None and row.get(at.get("at", "")) is not None:
            return replace(parsed, at_s=self._time_s(row, at))
        return parsed

    def _time_s(self, row: Mapping[str, Any], at: Mapping[str, str]) -> float | None:
        name = at.get("at")
        value = row.get(name) if name is not None else None
        if name is None or value is None or value == "":
            return None
        if isinstance(value, str) and ":" in value:
            return time_s(value, name)
        seconds = number(value, name)
        if _PLAIN.sub("", name.lower()).endswith("ms") or seconds >= _MILLISECONDS_FROM:
            return seconds / (1e6 if seconds >= _MICROSECONDS_FROM else 1e3)
        return seconds

    def _request(self, row: Mapping[str, Any]) -> TraceRow:
        """One request, by its lengths or its text."""
        at = self.columns.of(row)
        messages = tuple(messages_of(row["messages"])) if isinstance(row.get("messages"), list) else ()
        text = row.get(at["text"]) if "text" in at else None
        prompt = text if isinstance(text, str) and not messages else ""
        said = "\n".join(text_of(one["content"]) for one in messages) or prompt
        prompt_name, output_name = at.get("prompt", ""), at.get("output", "")
        counted = row.get(prompt_name)
        prompt_tokens = tokens(counted, prompt_name) if counted not in (None, "") else self.count(said) if said else 0
        if not prompt_tokens:
            raise BadRow(f"{prompt_name or 'prompt_tokens'} is missing, and so is the prompt's text")
        asked = row.get(output_name)
        if asked in (None, "") and not said:
            raise BadRow(f"{output_name or 'output_tokens'} is missing")
        return TraceRow(
            self._time_s(row, at),
            prompt_tokens,
            tokens(asked, output_name) if asked not in (None, "") else 0,
            tenant=_text(row, at, "tenant"),
            session=_text(row, at, "session"),
            turn=tokens(row[at["turn"]], "turn", least=0) if "turn" in at else 0,
            prefix_hashes=hashes(row, "prefix_hashes") if "prefix_hashes" in row else (),
            block_tokens=tokens(row.get("block_tokens", 0), "block_tokens", least=0),
            prompt=prompt,
            messages=messages,
            kind=_text(row, at, "kind"),
            body={name: row[name] for name in _BODY if name in row} if said else {},
            duration_s=number(row.get("e2e_s") or 0, "e2e_s"),
            estimated=counted in (None, ""),
        )


def _text(row: Mapping[str, Any], at: Mapping[str, str], meaning: str) -> str:
    value = row.get(at[meaning]) if meaning in at else None
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _is_transcript(messages: list[Any]) -> bool:
    """Whether messages end with an answer: then they are a transcript, not a prompt."""
    last = messages[-1] if messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def json_array(path: Path, skipped: Skipped, objects: Objects) -> Iterator[TraceRow]:
    """A JSON array of such objects, read one at a time; ShareGPT is one."""
    return kept(((at, (at, row)) for at, row in json_items(path, skipped)), lambda row: objects.rows(*row), skipped)


def json_objects(path: Path, skipped: Skipped, objects: Objects) -> Iterator[TraceRow]:
    """Such an object a line."""
    return kept(((at, (at, row)) for at, row in json_lines(path, skipped)), lambda row: objects.rows(*row), skipped)


def csv_columns(path: Path, skipped: Skipped, objects: Objects) -> Iterator[TraceRow]:
    """CSV with a column for the prompt's length, or its text, and one for the answer's."""
    return kept(((at, (at, row)) for at, row in csv_rows(path)), lambda row: objects.rows(*row), skipped)
