"""Conversations as rows: each answer of a transcript becomes a request whose prompt is everything said before it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtest.traces.opening import csv_rows
from loadtest.traces.rows import BadRow, Count, Message, Skipped, TraceRow, given, tokens

ASKS, ANSWERS = frozenset({"human", "user"}), frozenset({"gpt", "chatgpt", "assistant", "bard", "bing", "model", "bot"})
_KEYS = ("conversations", "conversation", "items", "dialog", "dialogue")
_ROLES, _TEXTS = ("from", "role", "speaker"), ("value", "content", "text", "message")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a transcript. message: None where only its length is known."""

    role: str
    tokens: int
    message: Message | None = None


def role_of(name: object) -> str:
    """A role as OpenAI's API names it."""
    role = str(name).lower()
    if role in ASKS:
        return "user"
    return "assistant" if role in ANSWERS else "tool" if role in ("tool", "function") else "system"


def transcript_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The conversation that an object holds under one of the names in use, None if it holds none."""
    for key in _KEYS:
        if isinstance(row.get(key), list):
            found: list[Any] = row[key]
            return found
    return None


def text_of(content: object) -> str:
    """The text of a message's content: a string, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(text_of(part) for part in content)
    if isinstance(content, dict):
        return text_of(content.get("text") or "")
    return ""


def messages_of(said: Iterable[object]) -> list[Message]:
    """ShareGPT's and OpenAI's messages as OpenAI's. Raises BadRow for one that has no role or nothing said."""
    messages: list[Message] = []
    for one in said:
        if not isinstance(one, dict):
            raise BadRow("a message is not a JSON object")
        role = next((one[name] for name in _ROLES if one.get(name)), None)
        if role is None:
            raise BadRow("a message has no role")
        content = next((one[name] for name in _TEXTS if name in one), None)
        rest = {name: one[name] for name in ("tool_calls", "tool_call_id", "name") if one.get(name)}
        messages.append({"role": role_of(role), "content": content if content is not None else "", **rest})
    return messages


def transcript_rows(said: Iterable[object], session: str, count: Count) -> list[TraceRow]:
    """A row per answer. Raises BadRow where no question has one."""
    messages = messages_of(said)
    turns = [Turn(str(one["role"]), _length(one, count), one) for one in messages]
    rows = turns_as_rows(session, turns)
    if not rows:
        raise BadRow("no question with an answer")
    return rows


def _length(message: Message, count: Count) -> int:
    text = text_of(message["content"])
    return count(text) if text else 0


def turns_as_rows(session: str, turns: Sequence[Turn]) -> list[TraceRow]:
    """A row for each answer to a question; its prompt is all that was said before it."""
    rows: list[TraceRow] = []
    said_tokens, asked = 0, False
    answers: list[int] = []
    for place, turn in enumerate(turns):
        if turn.role == "assistant" and asked:
            if said_tokens and turn.tokens:
                messages = tuple(one.message for one in turns[:place] if one.message is not None)
                rows.append(
                    TraceRow(
                        None, said_tokens, turn.tokens, session=session, turn=len(rows), messages=messages,
                        answers=tuple(answers), estimated=bool(messages),
                    )
                )  # fmt: skip
                answers.append(place)
            asked = False
        elif turn.role == "user":
            asked = True
        said_tokens += turn.tokens
    return _ended(rows)


def _ended(rows: list[TraceRow]) -> list[TraceRow]:
    if rows:
        rows[-1] = replace(rows[-1], last=True)
    return rows


def question_rows(questions: Sequence[object], session: str, kind: str, count: Count) -> list[TraceRow]:
    """MT-bench's `turns`: questions whose answers are the model's, so a later prompt's length counts only questions."""
    texts = [text_of(question) for question in questions]
    if not texts or not all(texts):
        raise BadRow("turns has an empty question")
    rows: list[TraceRow] = []
    messages: list[Message] = []
    answers: list[int] = []
    said_tokens = 0
    for turn, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        said_tokens += count(text)
        rows.append(
            TraceRow(
                None, said_tokens, 0, session=session if len(texts) > 1 else "", turn=turn, messages=tuple(messages),
                answers=tuple(answers), kind=kind, estimated=True,
            )
        )  # fmt: skip
        answers.append(len(messages))
        messages.append({"role": "assistant", "content": ""})
    return _ended(rows)


def sharegpt_lengths(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """ShareGPT as lengths: conv_id,turn,role,num_chars,num_tokens; a new conversation begins where turn falls to 0."""
    session, number, turns = "", 0, list[Turn]()
    for line, row in csv_rows(path):
        try:
            turn = tokens(given(row, "turn"), "turn", least=0)
            one = Turn(role_of(given(row, "role")), tokens(given(row, "num_tokens"), "num_tokens", least=0))
        except BadRow as bad:
            skipped.add(line, str(bad))
            continue
        if turn == 0 and turns:
            yield from turns_as_rows(f"{session}#{number}", turns)
            turns, number = [], number + 1
        session = str(row.get("conv_id", ""))
        turns.append(one)
    yield from turns_as_rows(f"{session}#{number}", turns)
