"""The header of a safetensors file, read without the safetensors package.

The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.artifacts.ids import TensorName
from moec.artifacts.model import DTYPE_BYTES
from moec.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.model import DType

DTYPES: dict[str, DType] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Element types that a bundle may hold: name in safetensors to ours."""

PADDING_PREFIX = "moec.padding."
"""Filler tensors (U8): safetensors allows no holes, and tensors begin at multiples of 64 bytes."""

TENSOR_ALIGNMENT = 64
LARGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a safetensors file."""

    dtype: DType
    shape: tuple[int, ...]
    offset_bytes: int
    """From the beginning of the file."""
    size_bytes: int


def read_table(path: Path) -> dict[TensorName, TensorPlace]:
    """The tensors of a safetensors file by name, padding left out.

    Raises:
        BundleError: the file is damaged, or a tensor in it is of an unknown type, misplaced or unaligned.
    """
    header, data_start, data_bytes = _read_header(path)
    table: dict[TensorName, TensorPlace] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        place = _place(path, name, entry, data_start, data_bytes)
        if place is not None:
            table[TensorName(name)] = place
    return table


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER_BYTES:
                raise _error(path, f"its header would be {length} bytes long")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise _error(path, f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _error(path, "its header is not an object")
    return header, 8 + length, path.stat().st_size - 8 - length


def _place(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorPlace | None:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise _error(path, f"tensor {name} is not described") from error
    if not all(type(number) is int and number >= 0 for number in numbers) or not begin <= end <= data_bytes:
        raise _error(path, f"tensor {name} lies outside the file")
    if name.startswith(PADDING_PREFIX):
        return None
    if dtype not in DTYPES:
        raise _error(path, f"tensor {name} is of type {dtype}")
    size = DTYPE_BYTES[DTYPES[dtype]]
    for extent in shape:
        size *= extent
    if end - begin != size:
        raise _error(path, f"tensor {name} has {end - begin} bytes instead of {size}")
    if (data_start + begin) % TENSOR_ALIGNMENT:
        raise _error(path, f"tensor {name} is not aligned to {TENSOR_ALIGNMENT} bytes")
    return TensorPlace(DTYPES[dtype], tuple(shape), data_start + begin, size)


def _error(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} cannot be used.", f"{why[0].upper()}{why[1:]}.", "Compile the model again.")
