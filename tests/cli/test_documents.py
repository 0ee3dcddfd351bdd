"""Command lines in the documentation are of commands and options that exist, and its policy is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from moec.cli import moec
from moec.cli.formats import read_quantization

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.name != "cli.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHER = re.compile(r"((?:^    .*\n)+)|`(moec [^`]+)`", re.MULTILINE)
"""Indented lines, and commands within a sentence."""


def command_lines(text: str) -> list[list[str]]:
    """The arguments behind each ``moec``."""
    pieces = [found[2] for found in FENCED.finditer(text) if found[1] in ("", "sh")]
    pieces += [found[1] or found[2] for found in OTHER.finditer(FENCED.sub("", text))]
    lines = [line.strip() for piece in pieces for line in piece.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("moec ")]


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if command_lines(path.read_text())], ids=lambda path: path.name
)
def test_command_lines_are_of_commands_and_options_that_there_are(document: Path) -> None:
    context = click.Context(moec, info_name="moec")
    for name, *arguments in command_lines(document.read_text(encoding="utf-8")):
        command = moec.get_command(context, name)
        assert command is not None, name
        options = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        options |= set(context.help_option_names)
        assert {each for each in arguments if each.startswith("-") and each != "-"} <= options, (
            name,
            arguments,
        )


def test_the_readme_has_commands() -> None:
    assert len(command_lines((ROOT / "README.md").read_text(encoding="utf-8"))) >= 3


def test_the_policy_that_is_shown_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    shown = re.search(r"^    \{\n(?:    .*\n)+", text, re.MULTILINE)
    assert shown is not None
    (tmp_path / "policy.json").write_text(shown[0])
    policy = read_quantization(str(tmp_path / "policy.json"))
    assert policy is not None
    assert policy.name == "careful"
    assert len(policy.rules) == 2
