"""``python -m moec`` and the ``moec`` command: the one place where errors become exit codes."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.cli import moec
from moec.cli.packages import extra_of
from moec.errors import BudgetError, MissingDependencyError, MoecError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Termination(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half done is put right or removed."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with the error's own code (``docs/cli.md`` lists them)."""
    _open_streams()
    with _terminated_gently():
        code = run(arguments)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        return moec.main(args=arguments, prog_name="moec", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo("interrupted", err=True)
        return TERMINATED if isinstance(error.__cause__ or error, Termination) else INTERRUPTED
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


@contextmanager
def _terminated_gently() -> Iterator[None]:
    """The first SIGTERM raises `Termination`; a second one ends the process at once."""

    def terminate(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Termination

    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        f"Run: pip install 'moec[{extra_of(package)}]'.",
    )


def _report(error: MoecError) -> int:
    click.secho(f"error: {error.what}", err=True, fg="red")
    for line in (error.why, error.do):
        if line:
            click.echo(f"  {line}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
