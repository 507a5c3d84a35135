"""Reads tenants from a YAML or JSON file, a hundred thousand within a few seconds.

A wrong file is refused as a whole, with one sentence that says where it is wrong and quotes nothing: a line may hold a
key.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from server.request.tenants import TenantRecord, index_of, sentence

_STR = "tag:yaml.org,2002:str"
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "timestamp"))
_MOST_KEPT = 10_000  # scalars whose values are remembered: numbers and words that come again
_AT_BYTE = re.compile(r"\(byte (\d+)\)")
_INDEX = re.compile(r"^tenants\[(\d+)\]")
_Scalar, _MappingEnd, _SequenceEnd = yaml.ScalarEvent, yaml.MappingEndEvent, yaml.SequenceEndEvent
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times faster, where PyYAML was built with it


class _TenantFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenants: tuple[TenantRecord, ...]


class _Rows(msgspec.Struct):
    tenants: list[msgspec.Raw]


class _Unusual(Exception):
    """YAML beyond plain mappings, sequences and scalars, such as an alias; or no file of tenants at all."""


_decode = msgspec.json.Decoder(_TenantFile).decode


def read_file(path: Path) -> tuple[TenantRecord, ...]:
    """The tenants of a file. ValueError with a sentence if it is missing, neither YAML nor JSON, or wrong."""
    try:
        content = path.read_bytes()
        records = _from_json(content) if content[:1] == b"{" else _from_yaml(content.decode())
        index_of(records)
    except OSError as error:
        raise ValueError(f"tenant file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"tenant file {path} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"tenant file {path}: it is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"tenant file {path}: {sentence(error)}") from None
    except yaml.YAMLError as error:
        # The error's own text quotes the line, and the line may hold a key.
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"tenant file {path}{f', line {mark.line + 1}' if mark else ''}: this is not YAML") from None
    except ValueError as error:
        raise ValueError(f"tenant file {path}{', ' if str(error).startswith('line ') else ': '}{error}") from None
    return records


def _from_json(content: bytes) -> tuple[TenantRecord, ...]:
    """ValueError with a sentence that begins with the line, where that is known."""
    try:
        return _decode(content).tenants
    except msgspec.ValidationError as error:
        said = sentence(error)
        raise ValueError(f"{_line_in_json(content, said)}{said}") from None
    except msgspec.DecodeError as error:  # `{` may begin YAML as well, in its flow style
        at = _AT_BYTE.search(str(error))
        line = content.count(b"\n", 0, int(at.group(1)) if at else len(content)) + 1
        raise ValueError(f"line {line}: this is not JSON, though the file begins with a brace") from None


def _line_in_json(content: bytes, said: str) -> str:
    """Where the tenant begins that a sentence is about."""
    index = _INDEX.match(said)
    if index is None:
        return ""
    at, begin = content.index(b"["), -1
    try:
        for row in msgspec.json.decode(content, type=_Rows).tenants[: int(index.group(1)) + 1]:
            begin = content.index(row, at)
            at = begin + len(bytes(row))
    except ValueError:  # the rest of the file is not JSON, or it says `tenants` twice
        return ""
    if begin < 0:
        return ""
    line = content.count(b"\n", 0, begin) + 1
    return f"line {line}: "


def _from_yaml(text: str) -> tuple[TenantRecord, ...]:
    """As PyYAML reads it. What PyYAML needs a tree of nodes for, such as aliases, is read with one."""
    loader = _LOADER(text)
    try:
        return tuple(_YamlRows(loader).read())
    except _Unusual:
        return msgspec.convert(yaml.load(text, Loader=_LOADER), _TenantFile).tenants  # noqa: S506 - both are safe
    finally:
        loader.dispose()


class _YamlRows:
    """The tenants of a YAML file, one after the other from the parser's events: no tree of the whole is ever built."""

    def __init__(self, loader: Any) -> None:
        """loader: PyYAML's; its stubs do not know what the one in C can do."""
        self._next: Callable[[], Any] = loader.get_event
        self._loader = loader
        self._kept: dict[str, Any] = {}

    def read(self) -> list[TenantRecord]:
        """ValueError with the line for a wrong tenant; _Unusual, YAMLError."""
        for kind in (yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.MappingStartEvent):
            self._expect(kind)
        if self._value(self._next()) != "tenants":
            raise _Unusual
        self._expect(yaml.SequenceStartEvent)
        records = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            line, row = event.start_mark.line, self._value(event)
            try:
                records.append(msgspec.convert(row, TenantRecord))
            except msgspec.ValidationError as error:
                said = sentence(error, f"tenants[{len(records)}]")
                raise ValueError(f"line {line + 1}: {said}") from None
        for end in (yaml.MappingEndEvent, yaml.DocumentEndEvent, yaml.StreamEndEvent):
            self._expect(end)
        return records

    def _expect(self, kind: type) -> None:
        event = self._next()
        if type(event) is not kind or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise _Unusual

    def _value(self, event: Any) -> Any:
        """What begins with this event."""
        kind = type(event)
        if kind is yaml.AliasEvent or event.anchor is not None or event.tag is not None:
            raise _Unusual
        if kind is _Scalar:
            return self._scalar(event.value) if event.implicit[0] else event.value
        if kind is yaml.SequenceStartEvent:
            return self._sequence()
        if kind is yaml.MappingStartEvent:
            return self._mapping()
        raise _Unusual

    def _sequence(self) -> list[Any]:
        values = []
        while type(event := self._next()) is not _SequenceEnd:
            values.append(self._value(event))
        return values

    def _mapping(self) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        following, value = self._next, self._value
        while type(event := following()) is not _MappingEnd:
            if type(event) is not _Scalar:
                raise _Unusual
            key = value(event)
            values[key] = value(following())
        return values

    def _scalar(self, text: str) -> Any:
        """An unquoted scalar, as PyYAML resolves it."""
        if text and text[0] not in self._loader.yaml_implicit_resolvers:
            return text
        if text in self._kept:
            return self._kept[text]
        value = self._resolved(text)
        if len(self._kept) < _MOST_KEPT:
            self._kept[text] = value
        return value

    def _resolved(self, text: str) -> Any:
        tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag == _STR:
            return text
        if tag not in _PLAIN_TAGS:
            raise _Unusual
        try:
            return self._loader.construct_object(yaml.ScalarNode(tag, text))
        except (ValueError, yaml.YAMLError):
            raise _Unusual from None  # the error as PyYAML itself tells it
        finally:
            self._loader.constructed_objects.clear()
