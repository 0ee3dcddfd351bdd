"""Write what is in the documentation and in the code alike; ``make docs`` runs it.

``docs/cli.md`` is from the commands' own help and the errors' exit codes, ``docs/models.md`` from the table of types
and from what ``benchmarks/compile_models.py`` and ``benchmarks/gpu_correctness.py`` measured last.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec import errors
from moec.__main__ import INTERRUPTED, TERMINATED
from moec.cli import BROKEN_PIPE, COMMANDS, moec
from moec.compiler.supported import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
MEASURED = RESULTS / "compile_models.json"
ON_GPUS = "gpu_correctness-cuda*.json"
PASSED = ("ok", "as transformers")
"""What ``benchmarks/gpu_correctness.py`` says of a way that is right."""
OTHER_NAMES = {"deepseek_v2_lite": "deepseek_v2", "nllb_moe": "nllb-moe"}
"""Tiny models whose name is not their type; ``<type>_selecting`` is one more of ``<type>``."""
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
    rows = [(0, "success"), (1, "a bug in moec: please report it with its traceback")]
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.MoecError) and kind is not errors.MoecError:
            rows.append((kind.exit_code, (kind.__doc__ or "").splitlines()[0]))
    rows += [
        (INTERRUPTED, "interrupted (SIGINT)"),
        (BROKEN_PIPE, "the reader of stdout went away"),
        (TERMINATED, "terminated (SIGTERM)"),
    ]
    lines = [f"| {code} | {meaning} |" for code, meaning in sorted(rows)]
    return "\n".join(["## Exit codes\n", "| code | meaning |", "|---|---|", *lines, ""])


def models() -> str:
    """The whole of ``docs/models.md``."""
    supported = sum(state.state == "supported" for state in MODELS.values())
    ran = ran_on_gpus()
    rows = [
        f"| `{name}` | {state.state} | {ran.get(name, '')} | {state.reason or state.note} |"
        for name, state in MODELS.items()
    ]
    parts = [
        "# Models\n",
        "Written by `make docs` from the table that `moec models` prints; do not edit.\n",
        f"{supported} of {len(MODELS)} Mixture-of-Experts types (`model_type` in `config.json`) are supported:",
        "a tiny random checkpoint of each, laid out like the real ones, is compiled and run by the tests; its greedy",
        "tokens are those of the reference, and its logits within 1e-4 of it, relative, in float32. The reference is",
        "transformers' eager code, or one of our own where transformers has no such model (Grok-1, Arctic) or computes",
        "another than was published (NLLB-MoE). A type that is not here is tried in the same way if transformers has",
        "experts in it: see [adding a model](adding-a-model.md).\n",
        f"{len(ran)} types ran on a GPU as well, in 16 bits (`benchmarks/gpu_correctness.py`): resident, and with a",
        "quarter of their experts there. Over the link alone that gives the bits of the resident run, with the CPU's",
        "help its likeliest tokens. Kernels are the same for all: a type that did not run there compiles for a GPU.\n",
        "| model type | state | ran on a GPU | note |",
        "|---|---|---|---|",
        *rows,
        "",
        *_measured(),
    ]
    return "\n".join(parts)


def ran_on_gpus() -> dict[str, str]:
    """By model type: the GPU on which tiny models of it passed, with all experts and with a part of them."""
    ways: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for path in sorted(RESULTS.glob(ON_GPUS)):
        result = json.loads(path.read_text(encoding="utf-8"))
        gpu = result["machine"]["gpus"][0]["name"].removeprefix("NVIDIA ")
        for row in result["rows"]:
            ways.setdefault(type_of(row["model"]), []).append((row, gpu))
    return {
        name: ", ".join(dict.fromkeys(gpu for _, gpu in rows))
        for name, rows in ways.items()
        if name in MODELS
        and any("25 %" in row["way"] for row, _ in rows)
        and all(row["verdict"] in PASSED for row, _ in rows)
    }


def type_of(name: str) -> str:
    """The model type of a tiny model."""
    if name in MODELS:
        return name
    return OTHER_NAMES.get(name, name.removesuffix("_selecting").partition("-")[0])


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
