"""Write ``docs/cli.md`` from the commands' own help and the errors' exit codes; ``make docs`` runs it."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from moec import errors
from moec.__main__ import BROKEN_PIPE, INTERRUPTED
from moec.cli import COMMANDS, moec

TARGET = Path(__file__).with_name("cli.md")
WIDTH = 100
"""Columns of the terminal that the help is laid out for."""


def render() -> str:
    """The whole of ``docs/cli.md``."""
    context = click.Context(moec, info_name="moec", terminal_width=WIDTH, **moec.context_settings)
    parts = [
        "# The command line\n",
        "Written by `make docs` from `--help`; do not edit. Data goes to stdout, progress to stderr; with `--json`",
        "every command prints one JSON document (`chat` one a line for each answer).\n",
        _help("moec", moec, context),
    ]
    for name in COMMANDS:
        command = moec.get_command(context, name)
        assert command is not None
        child = click.Context(command, context, info_name=name)
        parts.append(_help(f"moec {name}", command, child))
    parts.append(_exit_codes())
    return "\n".join(parts)


def _help(title: str, command: click.Command, context: click.Context) -> str:
    return f"## {title}\n\n```text\n{command.get_help(context).strip()}\n```\n"


def _exit_codes() -> str:
    rows = [(0, "success"), (1, "a bug in moec: please report it with its traceback"), (2, "wrong usage")]
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.MoecError) and kind is not errors.MoecError:
            rows.append((kind.exit_code, (kind.__doc__ or "").splitlines()[0]))
    rows += [(INTERRUPTED, "interrupted"), (BROKEN_PIPE, "the reader of stdout went away")]
    lines = [f"| {code} | {meaning} |" for code, meaning in sorted(rows)]
    return "\n".join(["## Exit codes\n", "| code | meaning |", "|---|---|", *lines, ""])


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
