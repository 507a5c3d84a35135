"""Command-line options made from settings."""

import argparse
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from server.options import CliOption, add_options, given


class Group(BaseModel):
    folder: Path | None = Field(None, description="a folder")


class Several(BaseModel):
    host: str = Field("here", description="an address")
    engines: list[str] = Field(default_factory=list, description="an engine")
    pairs: dict[str, str] = Field(default_factory=dict, description="a pair")
    open: bool = Field(False, description="for all")
    group: Group = Group()


OPTIONS = (
    CliOption("host", "HOST"),
    CliOption("engines", "URL", "--engine"),
    CliOption("pairs", "KEY=VALUE", "--pair"),
    CliOption("open"),
    CliOption("group.folder", "FOLDER", "--folder"),
)


def parsed(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_options(parser, Several, OPTIONS)
    return given(parser.parse_args(argv), Several, OPTIONS)


def test_only_what_the_command_line_says_is_given() -> None:
    assert parsed() == {}


def test_options_become_settings_of_their_kind() -> None:
    found = parsed("--host", "there", "--engine=a", "--engine=b", "--pair", "x=1=2", "--open", "--folder", "f")
    assert Several.model_validate(found) == Several(
        host="there", engines=["a", "b"], pairs={"x": "1=2"}, open=True, group=Group(folder=Path("f"))
    )


@pytest.mark.parametrize("text", ["x", "=1"])
def test_a_pair_without_its_key_or_sign_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--pair .*: write it as KEY=VALUE"):
        parsed("--pair", text)


def test_the_help_has_descriptions_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Several, OPTIONS)
    said = parser.format_help()
    assert "an address (default: here)" in said and "an engine; may be repeated" in said and "a folder\n" in said
