"""The header of a GGUF file: its metadata, and every tensor's type, shape and place.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package would read it too, in ten times the
time and with 0.4 GB for a vocabulary of 150,000; names and sizes of types are the package's.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moec.compiler.checkpoint.record import TensorEntry
from moec.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BYTE_SWAPPED = tuple(version << 24 for version in VERSIONS)
"""Versions as a file for big-endian machines has them."""
ALIGNMENT = 32
"""Of tensors, where the metadata does not say."""

NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Types of values -> numpy's names."""
STRING, ARRAY = 8, 9


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
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            _check_version(path, file.read(8))
            return _Reader(path, file, size).header()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}.", str(error), "Check that the file exists and is readable."
        ) from error


def _check_version(path: Path, start: bytes) -> None:
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


class _Reader:
    """Reads a header front to back, behind its first 8 bytes."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._position = file.tell()

    def header(self) -> Header:
        """All of it."""
        count, pairs = self._whole("<QQ")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._whole("<I")[0])
        found = [self._tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"its alignment is {alignment!r}")
        data = -(-self._position // alignment) * alignment
        tensors = {
            name: self._placed(name, shape, kind, data + offset) for name, shape, kind, offset in found
        }
        if len(tensors) != count:
            raise self._damaged("a tensor's name appears twice")
        return Header(self._path, metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name = self._string()
        (dimensions,) = self._whole("<I")
        shape = self._whole(f"<{min(dimensions, self._size)}Q")
        kind, offset = self._whole("<IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> TensorEntry:
        gguf = gguf_package()
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise self._damaged(
                f"tensor {name} is of a type that the gguf package does not know, {kind}"
            ) from error
        block, size = gguf.GGML_QUANT_SIZES[known]
        if not shape or shape[-1] % block:
            raise self._damaged(f"tensor {name} of {known.name} has the shape {list(shape)}")
        end = begin + math.prod(shape) // block * size
        if end > self._size:
            raise self._damaged(f"tensor {name} ends at byte {end} of {self._size}")
        return TensorEntry(self._path, known.name, shape, begin, end)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._whole("<IQ")
            if inner not in NUMBERS:
                return [self._value(inner) for _ in range(min(count, self._size))]
            return self._numbers(inner, count)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise self._damaged(f"it has a value of the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        numbers: list[Any] = np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
        return numbers

    def _string(self) -> str:
        data = self._bytes(self._whole("<Q")[0])
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string in it is not UTF-8: {data[:40]!r}") from error

    def _whole(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise self._damaged(f"{count} bytes are wanted at byte {self._position} of {self._size}")
        self._position += count
        return self._file.read(count)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} is not a usable GGUF file.",
            f"It is damaged or cut off: {why}.",
            "Download or copy this file again; if it is new, update the gguf package.",
        )
