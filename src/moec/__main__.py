"""``python -m moec`` and the ``moec`` command: the one place where errors become exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import click

from moec.cli import moec
from moec.errors import BudgetError, MissingDependencyError, MoecError, OutputError

INTERRUPTED = 130
SERVING = {"fastapi", "prometheus_client", "starlette", "uvicorn"}
"""Packages of the extra ``serve``."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with the error's own code (``docs/cli.md`` lists them)."""
    _open_streams()
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        return moec.main(args=arguments, prog_name="moec", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except MoecError as error:
        return _report(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "moec":
            raise
        return _report(_missing(error.name))
    except MemoryError as error:
        return _report(
            BudgetError("Memory ran out.", str(error), "Give --host-memory, or ask for fewer tokens at once.")
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        where = error.filename or "the output"
        return _report(
            OutputError(
                f"Cannot write {where}.", f"{error.strerror}.", "Free space, or choose another place."
            )
        )


def _open_streams() -> None:
    """Streams that the caller closed are empty ones, and characters that a stream's encoding lacks are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - as long as we run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _missing(module: str) -> MissingDependencyError:
    package = module.partition(".")[0]
    return MissingDependencyError(
        f"The Python package {package} is not installed.",
        "`moec` alone has what the runtime needs; compiling, comparing with transformers and serving need more.",
        f"Run: pip install 'moec[{'serve' if package in SERVING else 'compile'}]'.",
    )


def _report(error: MoecError) -> int:
    click.secho(f"error: {error.what}", err=True, fg="red")
    for line in (error.why, error.do):
        if line:
            click.echo(f"  {line}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
