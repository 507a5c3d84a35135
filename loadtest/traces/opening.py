"""A trace file as lines, rows or items, plain or compressed; gzip and Zstandard are told by their first bytes."""

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import ijson
import orjson

from loadtest.traces.rows import Skipped

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 1 << 20
_LONGEST_CELL = 1 << 24  # a whole prompt may be one


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed. Raises OSError."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(_GZIP):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if magic == _ZSTANDARD:
        import zstandard  # needed for such files only

        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(cast(Any, stream), 1 << 16)
    return path.open("rb")


def first_lines(path: Path, most: int) -> list[str]:
    """The first lines that are not blank, decompressed; the last may be cut off where lines are very long."""
    with opened(path) as file:
        head = file.read(_HEAD_BYTES)
    lines = head.decode("utf-8-sig", errors="replace").splitlines()
    return [line for line in lines if line.strip()][:most]


def csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, columns by name); the separator is a comma, a semicolon or a tab, whichever the first line has most of."""
    csv.field_size_limit(_LONGEST_CELL)
    first = next(iter(first_lines(path, 1)), "")
    separator = max(",;\t", key=first.count)
    with io.TextIOWrapper(opened(path), "utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True, delimiter=separator)
        for row in reader:
            yield reader.line_num, row


def json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object); other lines are skipped."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                skipped.add(number, "not JSON")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                skipped.add(number, "not a JSON object")


def json_items(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of a JSON array, read one at a time: ShareGPT's file has 640 MB."""
    number = 0
    with opened(path) as file:
        try:
            for number, item in enumerate(ijson.items(file, "item", use_float=True), 1):  # noqa: B007 - used below
                if isinstance(item, dict):
                    yield number, item
                else:
                    skipped.add(number, "not a JSON object")
        except ijson.JSONError as error:
            skipped.add(number + 1, f"the file ends or breaks here: {error}")
