"""Where things lie in a bundle, and which paths a manifest may name."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from moec.errors import BundleError

WEIGHTS_FOLDER = "weights"
DENSE_NAME = "weights/dense.safetensors"
CONSTANTS_NAME = "constants.safetensors"
"""Tensors that packing.json's recipes name as ``constant:<name>``."""
ACCURACY_NAME = "accuracy.json"
"""How close the bundle computes to its checkpoint, once that was measured."""
PROGRAM_NAME = "program.json"
"""In the folder of each target."""


def program_name(target: str) -> str:
    """The program of a target."""
    return f"modules/{target}/{PROGRAM_NAME}"


def experts_name(layer: int) -> str:
    """The file with the routed experts of one MoE layer."""
    return f"weights/experts-{layer:05d}.bin"


def is_safe(path: str) -> bool:
    """Whether a path from a manifest stays inside the bundle: relative, normal, printable."""
    if not path or "\\" in path or not path.isprintable():
        return False
    return not path.startswith("/") and all(part not in ("", ".", "..") for part in path.split("/"))


def list_files(folder: Path) -> dict[str, int]:
    """Every file below ``folder``, by relative path with ``/``, with its size in bytes.

    Raises:
        BundleError: something is neither a folder nor a plain file; a link could lead out of the bundle.
    """
    found: dict[str, int] = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            state = path.lstat()
            relative = PurePosixPath(path.relative_to(folder)).as_posix()
            if stat.S_ISREG(state.st_mode):
                found[relative] = state.st_size
            elif not stat.S_ISDIR(state.st_mode):
                raise BundleError(
                    f"{folder} holds {relative}, which is not a plain file.",
                    "A link could lead out of the bundle, so none is followed.",
                    "Copy the bundle with its files (cp -rL), or compile it again.",
                )
    return found
