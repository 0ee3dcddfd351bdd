"""Naming the stage in which something went wrong."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from moec.errors import CompileError, MoecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.request import Log


@contextmanager
def stage(name: str, log: Log) -> Iterator[None]:
    """Report a stage, and turn a failure that nobody foresaw into an error that names it.

    Raises:
        CompileError: something in the stage raised an error that is neither typed, nor the operating system's,
            nor about a package that is not installed.
    """
    with log.stage(name):
        try:
            yield
        except (MoecError, OSError, ModuleNotFoundError):
            raise
        except Exception as error:
            raise CompileError(
                f"The stage `{name}` failed.",
                f"{type(error).__name__}: {str(error)[:1000]}",
                "This is a bug in moec or a model it has not met: please report it with the model's config.json.",
            ) from error
