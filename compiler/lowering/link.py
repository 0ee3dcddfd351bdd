"""Object files to one shared library, with whatever linker the machine has, and none of its C library."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import CompileError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence

LINK_OPTIONS = ("-shared", "-nostdlib", "-s")
"""Symbols of the C library stay undefined and unversioned: the process that loads the module has them, and a bundle
linked here also loads where the C library is older."""

LINKER_OPTIONS = ("--build-id=none", "-z", "noexecstack", "--hash-style=gnu")
"""A build id would depend on temporary paths: the same objects must give the same bytes."""

COMPILER_DRIVERS = ("cc", "gcc", "clang")
PLAIN_LINKERS = ("ld", "ld.lld")


def link_command() -> list[str]:
    """The start of a command that links a shared library: a compiler driver, a linker, or the one in ``ziglang``.

    Raises:
        MissingDependencyError: there is none.
    """
    through_driver = [f"-Wl,{','.join(LINKER_OPTIONS)}"]
    for name in COMPILER_DRIVERS:
        if shutil.which(name):
            return [name, *LINK_OPTIONS, *through_driver]
    for name in PLAIN_LINKERS:
        if shutil.which(name):
            return [name, *LINK_OPTIONS, *LINKER_OPTIONS]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld", *LINK_OPTIONS, *LINKER_OPTIONS]
    raise MissingDependencyError(
        "There is no linker on this machine.",
        f"None of {', '.join((*COMPILER_DRIVERS, *PLAIN_LINKERS))} is on the path, and ziglang is not installed.",
        "Install moec[compile], or any C compiler.",
    )


def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
    """Link ``objects`` into the shared library ``output``; the signature is the one ``export_library`` calls.

    Raises:
        CompileError: the linker failed; the message has what it said.
        OSError: ``output`` cannot be written. It is copied there, so that a full disk is no failure of the linker.
    """
    with tempfile.TemporaryDirectory() as folder:
        linked = Path(folder, "linked.so")
        _run([*link_command(), "-o", str(linked), *objects, *(options or ())], output)
        shutil.copyfile(linked, output)


def _run(command: list[str], output: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(
            f"Linking {Path(output).name} failed.",
            result.stderr.strip()[-2000:],
            f"The command was: {' '.join(command)}",
        )
