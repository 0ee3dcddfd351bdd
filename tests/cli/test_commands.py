"""Every command has help with an example, is documented, and parses what it says it does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from examples.translate import parse
from moec.cli import COMMANDS, moec

ROOT = Path(__file__).parents[2]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def context() -> click.Context:
    return click.Context(moec, info_name="moec")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_has_help_and_an_example(name: str, context: click.Context) -> None:
    command = moec.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert command.help is not None
    assert f"moec {name}" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_has_json(name: str, context: click.Context) -> None:
    command = moec.get_command(context, name)
    assert command is not None
    assert "as_json" in {parameter.name for parameter in command.params}


def test_documentation_is_current() -> None:
    generator = load_generator()
    for path, render in generator.PAGES.items():
        assert path.read_text(encoding="utf-8") == render(), "run `make docs`"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_documentation_is_what_the_terminal_shows(name: str) -> None:
    generator = load_generator()
    shown = CliRunner().invoke(moec, [name, "--help"], prog_name="moec", terminal_width=generator.WIDTH)
    assert shown.exit_code == 0
    assert (
        f"## moec {name}\n\n```text\n{shown.output.strip()}\n```" in (generator.DOCS / "cli.md").read_text()
    )


def test_the_translator_takes_its_sentences_before_its_options_and_after() -> None:
    for arguments in (
        ["nllb.moec", "--target", "fra_Latn", "The library", "closes."],
        ["nllb.moec", "The library", "closes.", "--target", "fra_Latn"],
    ):
        options = parse(arguments)
        assert (options.sentences, options.target) == (["The library", "closes."], "fra_Latn")
