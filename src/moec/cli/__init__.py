"""The command line: one file per command; each parses, calls a room, prints.

Data goes to stdout, progress and logs to stderr. A command's module is imported when the command is run, so that
``moec generate`` never loads the compiler.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from moec import __version__

COMMANDS: dict[str, str] = {
    "compile": "moec.cli.compile",
    "pack": "moec.cli.pack",
    "plan": "moec.cli.plan",
    "simulate": "moec.cli.simulate",
    "inspect": "moec.cli.inspect",
    "verify": "moec.cli.verify",
    "generate": "moec.cli.generate",
    "chat": "moec.cli.chat",
    "serve": "moec.cli.serve",
    "bench": "moec.cli.bench",
    "models": "moec.cli.models",
    "doctor": "moec.cli.doctor",
    "kit": "moec.cli.kit",
}
"""Every command, in the order in which help lists it; each module has a ``command``."""

BROKEN_PIPE = 141
"""The exit code where the reader of stdout has gone: a shell's for SIGPIPE."""


class Commands(click.Group):
    """A group that imports a command when it is named."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named; click would end with 1 where the reader of stdout has gone."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(BROKEN_PIPE)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Every command, in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command called ``cmd_name``, or ``None``."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command


@click.command(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="moec")
def moec() -> None:
    """Compile Mixture-of-Experts models ahead of time, and run them with experts kept off the GPU.

    \b
    Example:
      moec compile examples/tiny-deepseek-v2 -o tiny.moec
      moec generate tiny.moec "In the beginning God"
    """
