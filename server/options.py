"""Command-line options made from settings, so that name, description and default are written down once."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class CliOption:
    """The option of one setting.

    setting: its name, behind that of its group if it is in one: "record.folder".
    metavar: what stands for the value in `--help`.
    flag: where it is not the setting's name.
    """

    setting: str
    metavar: str = ""
    flag: str = ""


def add_options(parser: argparse.ArgumentParser, settings: type[BaseModel], options: Iterable[CliOption]) -> None:
    """Adds them all. Values stay text: the settings parse and check them, wherever they come from."""
    for option in options:
        field = _field(settings, option.setting)
        kind = get_origin(field.annotation) or field.annotation
        how: dict[str, Any] = {"metavar": option.metavar}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        elif kind in (list, dict):
            how["action"] = "append"
        flag = option.flag or "--" + option.setting.replace("_", "-")
        parser.add_argument(flag, dest=option.setting, help=_help(field, kind), **how)


def given(args: argparse.Namespace, settings: type[BaseModel], options: Iterable[CliOption]) -> dict[str, Any]:
    """What the command line says, as settings. ValueError for a pair that is not KEY=VALUE."""
    found: dict[str, Any] = {}
    for option in options:
        value = getattr(args, option.setting)
        if value is None:
            continue
        field = _field(settings, option.setting)
        if get_origin(field.annotation) is dict:
            value = dict(_pair(option, text) for text in value)
        group, _, name = option.setting.rpartition(".")
        (found.setdefault(group, {}) if group else found)[name] = value
    return found


def _field(settings: type[BaseModel], name: str) -> FieldInfo:
    group, _, rest = name.partition(".")
    field = settings.model_fields[group]
    if not rest:
        return field
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return _field(field.annotation, rest)


def _help(field: FieldInfo, kind: object) -> str:
    if kind in (list, dict):
        return f"{field.description}; may be repeated"
    return (
        str(field.description)
        if field.default in (None, "", False)
        else f"{field.description} (default: {field.default})"
    )


def _pair(option: CliOption, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{option.flag} {text!r}: write it as {option.metavar}")
    return key, value
