"""The header of a GGUF file: its metadata, and every tensor's type, shape and place.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.record import TensorEntry
from moec.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BYTE_SWAPPED = tuple(version << 24 for version in VERSIONS)
"""Versions as a file for big-endian machines has them."""


@dataclass(frozen=True)
class Header:
    """One file."""

    path: Path
    metadata: Mapping[str, Any]
    """By key; numbers, strings, or lists of them."""
    tensors: Mapping[str, TensorEntry]
    """By GGUF's names; rows are the last dimension, as in torch."""


def gguf_package() -> Any:
    """The gguf package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "The gguf package is not installed.", str(error), "Run: pip install 'moec[compile]'."
        ) from error
    return gguf


def read_header(path: Path) -> Header:
    """Read the metadata and the tensors' places of the GGUF file ``path``; no weight is read.

    Raises:
        CheckpointError: the file is unreadable, truncated, no GGUF file or of another version; the message names it.
        MissingDependencyError: the gguf package is not installed.
    """
    gguf = gguf_package()
    _check_version(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
        }
        tensors = {tensor.name: _entry(path, tensor) for tensor in reader.tensors}
    except Exception as error:  # whatever damaged bytes may make the package raise
        raise CheckpointError(
            f"{path} is not a usable GGUF file.",
            f"Its header or its last tensor is damaged or cut off: {str(error)[:200]}.",
            "Download or copy this file again; if it is new, update the gguf package.",
        ) from error
    return Header(path, metadata, tensors)


def _check_version(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}.", str(error), "Check that the file exists and is readable."
        ) from error
    if start[:4] != MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file.", f"It begins with {start[:4]!r}.", "Download it again."
        )
    version = int.from_bytes(start[4:], "little")
    if version in BYTE_SWAPPED:
        raise CheckpointError(
            f"{path} is a GGUF file for big-endian machines.", "", "Use the little-endian file of this model."
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is a GGUF file of version {version}.",
            f"moec reads versions {' and '.join(map(str, VERSIONS))}.",
            "Convert it with llama.cpp's tools, or use a newer file of this model.",
        )


def _entry(path: Path, tensor: Any) -> TensorEntry:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    begin = int(tensor.data_offset)
    return TensorEntry(path, tensor.tensor_type.name, shape, begin, begin + int(tensor.n_bytes))
