"""Write what is in the documentation and in the code alike; ``make docs`` runs it.

``docs/cli.md`` is from the commands' own help and the errors' exit codes, ``docs/models.md`` from the table of types
and from what ``benchmarks/compile_models.py`` measured last.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec import errors
from moec.__main__ import BROKEN_PIPE, INTERRUPTED
from moec.cli import COMMANDS, moec
from moec.compiler.supported import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parent
MEASURED = DOCS.parent / "benchmarks" / "results" / "compile_models.json"
WIDTH = 100
"""Columns of the terminal that the help is laid out for."""


def command_line() -> str:
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


def models() -> str:
    """The whole of ``docs/models.md``."""
    supported = sum(state.state == "supported" for state in MODELS.values())
    rows = [f"| `{name}` | {state.state} | {state.reason or state.note} |" for name, state in MODELS.items()]
    parts = [
        "# Models\n",
        "Written by `make docs` from the table that `moec models` prints; do not edit.\n",
        f"{supported} of {len(MODELS)} Mixture-of-Experts types (`model_type` in `config.json`) are supported:",
        "a tiny random checkpoint of each, laid out like the real ones, is compiled and run by the tests; its greedy",
        "tokens are those of the reference, and its logits within 1e-4 of it, relative, in float32. The reference is",
        "transformers' eager code, or one of our own where transformers has no such model (Grok-1, Arctic) or computes",
        "another than was published (NLLB-MoE). A type that is not here is tried in the same way if transformers has",
        "experts in it: see [adding a model](adding-a-model.md).\n",
        "| model type | state | note |",
        "|---|---|---|",
        *rows,
        "",
        *_measured(),
    ]
    return "\n".join(parts)


def _measured() -> list[str]:
    if not MEASURED.is_file():
        return []
    result = json.loads(MEASURED.read_text(encoding="utf-8"))
    machine = result["machine"]
    lines = [
        "## Compiled at their real size\n",
        f"`moec compile --modules-only` (no weights) of a published config or the type's default, {result['date']},",
        f"on {machine['cores']} cores ({machine['processor']}) that did other work as well: seconds are those of the",
        "clock, CPU seconds say more.\n",
        "| model type | target | seconds | CPU seconds | peak memory, GiB | steps | distinct segments |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "error" not in row:
            cells = (
                row["seconds"],
                row["CPU seconds"],
                row["peak GiB"],
                row["steps"],
                row["distinct segments"],
            )
            lines.append(f"| `{row['model']}` | {row['target']} | " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


PAGES: dict[Path, Callable[[], str]] = {DOCS / "cli.md": command_line, DOCS / "models.md": models}
"""File -> what makes its text."""


if __name__ == "__main__":
    for path, render in PAGES.items():
        path.write_text(render(), encoding="utf-8")
