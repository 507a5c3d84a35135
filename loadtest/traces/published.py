"""Readers of published traces that have a form of their own."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.traces.opening import csv_rows, json_lines
from loadtest.traces.rows import BadRow, Skipped, TraceRow, given, hashes, kept, number, tokens

_STAMP = re.compile(r"(\d{4}-[01]\d-[0-3]\d[ T][0-2]\d:[0-5]\d:[0-5]\d)(\.\d+)?(?:\+00:00|Z)?")


def time_s(stamp: str, name: str) -> float:
    """A date and time in UTC, with up to nine digits of a second, as seconds since 1970. Raises BadRow."""
    parts = _STAMP.fullmatch(stamp.strip())
    if parts is None:
        raise BadRow(f"{name} is {stamp!r}, not a time")
    return datetime.fromisoformat(parts[1]).replace(tzinfo=UTC).timestamp() + float(f"0{parts[2] or '.0'}")


def azure(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Azure LLM inference 2023 (Splitwise) and 2024 (DynamoLLM): TIMESTAMP,ContextTokens,GeneratedTokens.

    Times have up to seven digits of a second, or none, and in 2024 a time zone, which is always UTC.
    """

    def parse(row: Mapping[str, Any]) -> TraceRow:
        at_s = time_s(str(given(row, "TIMESTAMP")), "TIMESTAMP")
        prompt, output = given(row, "ContextTokens"), given(row, "GeneratedTokens")
        return TraceRow(at_s, tokens(prompt, "ContextTokens"), tokens(output, "GeneratedTokens"))

    return kept(csv_rows(path), parse, skipped)


def vtc_arena(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """The VTC paper's arena trace: req_id,adapter_dir,prompt_len,output_len,req_time; each adapter is a tenant."""

    def parse(row: Mapping[str, Any]) -> TraceRow:
        return TraceRow(
            number(given(row, "req_time"), "req_time"),
            tokens(given(row, "prompt_len"), "prompt_len"),
            tokens(given(row, "output_len"), "output_len"),
            tenant=str(given(row, "adapter_dir")),
        )

    return kept(csv_rows(path), parse, skipped)


def mooncake(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Mooncake (FAST 2025): timestamp in milliseconds, input_length, output_length, hash_ids of 512-token blocks."""

    def parse(row: Mapping[str, Any]) -> TraceRow:
        return TraceRow(
            number(given(row, "timestamp"), "timestamp") / 1000.0,
            tokens(given(row, "input_length"), "input_length"),
            tokens(given(row, "output_length"), "output_length"),
            prefix_hashes=hashes(row),
            block_tokens=512,
        )

    return kept(json_lines(path, skipped), parse, skipped)


_MOST_CHATS = 1 << 16  # remembered to find their roots: a chat that is gone on with after so many others begins anew


def qwen_bailian(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """Qwen-Bailian (Alibaba): chat_id, parent_chat_id (-1 at the root), timestamp in seconds, turn, hash_ids of
    16-token blocks. A conversation is named after its root."""
    roots: dict[object, str] = {}

    def parse(row: Mapping[str, Any]) -> TraceRow:
        chat, parent = given(row, "chat_id"), row.get("parent_chat_id", -1)
        session = roots.get(parent, str(chat))
        parsed = TraceRow(
            number(given(row, "timestamp"), "timestamp"),
            tokens(given(row, "input_length"), "input_length"),
            tokens(given(row, "output_length"), "output_length"),
            session=session,
            turn=max(0, tokens(row.get("turn", 1), "turn", least=0) - 1),
            prefix_hashes=hashes(row),
            block_tokens=16,
            kind=str(row.get("type", "")),
        )
        roots[chat] = session
        if len(roots) > _MOST_CHATS:
            del roots[next(iter(roots))]
        return parsed

    return kept(json_lines(path, skipped), parse, skipped)


def burstgpt(path: Path, skipped: Skipped) -> Iterator[TraceRow]:
    """BurstGPT, all versions, columns by name: Timestamp in seconds, Request and Response tokens, Log Type; the third
    has Session ID and Elapsed time too. Failed requests have no response tokens, and are left out."""
    turns: dict[str, int] = {}

    def parse(row: Mapping[str, Any]) -> TraceRow:
        session = str(row.get("Session ID") or "").strip()
        turn = turns.get(session, -1) + 1 if session else 0
        elapsed = str(row.get("Elapsed time") or "").strip()
        parsed = TraceRow(
            number(given(row, "Timestamp"), "Timestamp"),
            tokens(given(row, "Request tokens"), "Request tokens"),
            tokens(given(row, "Response tokens"), "Response tokens"),
            session=session,
            turn=turn,
            kind=str(row.get("Log Type") or "").partition(" ")[0].lower(),
            duration_s=number(elapsed, "Elapsed time") if elapsed else 0.0,
        )
        if session:
            turns[session] = turn
            if len(turns) > _MOST_CHATS:
                del turns[next(iter(turns))]
        return parsed

    return kept(csv_rows(path), parse, skipped)
