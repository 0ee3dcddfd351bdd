"""Headers of safetensors files, written before the data is made, and small files read without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.artifacts.files.safetensors import DTYPES, PADDING_PREFIX
from moec.artifacts.model import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HEADER_ALIGNMENT = 4096
NAMES: dict[str, str] = {ours: theirs for theirs, ours in DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Of its data."""
        return self.values * DTYPE_BYTES[self.dtype]


def header(tensors: Sequence[NewTensor], alignment: int = 1) -> tuple[bytes, list[int]]:
    """Lay tensors one after the other.

    Args:
        tensors: in the order of the file.
        alignment: bytes; each begins at a multiple of it, as in a bundle. A published checkpoint has no gaps.

    Returns:
        What the file begins with, and the filler bytes before each tensor.
    """
    entries: dict[str, Any] = {}
    gaps, position = [], 0
    for number, tensor in enumerate(tensors):
        gap = -position % alignment
        if gap:
            entries[f"{PADDING_PREFIX}{number}"] = _entry("uint8", (gap,), position, position + gap)
        begin = position + gap
        position = begin + tensor.size_bytes
        entries[tensor.name] = _entry(tensor.dtype, tensor.shape, begin, position)
        gaps.append(gap)
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size), gaps


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def read_small(path: Path) -> dict[str, bytes]:
    """The data of each tensor of a small file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in table.items()
        if name != "__metadata__"
    }
