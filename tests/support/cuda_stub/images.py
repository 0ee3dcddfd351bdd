"""Modules of bundles made to run on the stub."""

from __future__ import annotations

from pathlib import Path

from tests.support.cuda_emulator import compile_kernels


def write_image(path: Path, source: str) -> None:
    """Write what stands for a fat binary made of ``source``: where the emulator's library is, which runs often."""
    path.write_bytes(str(compile_kernels(source, "-O1")).encode() + b"\0")
