"""``weights/dense.safetensors``: which tensor lies where, and the header that says so. Pure functions.

Data begins at a multiple of 4096 bytes and every tensor at one of 64. The format forbids holes, so what lies
between two tensors is a tensor of its own, ``moec.padding.<n>``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.experts import PART_ALIGNMENT
from moec.artifacts.model import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from moec.artifacts.packing import DenseTensor

DENSE_FILE = "dense.safetensors"
DATA_ALIGNMENT = 4096
SAFETENSORS_TYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and its bytes in the file."""

    tensor: DenseTensor
    begin: int
    end: int


@dataclass(frozen=True)
class DenseFile:
    """The whole file: header, then groups of tensors that share what they are made from."""

    header: bytes
    groups: tuple[tuple[PlacedTensor, ...], ...]
    size_bytes: int


def plan_dense(
    tensors: Iterable[DenseTensor], reads: Callable[[DenseTensor], Sequence[tuple[str, int]]]
) -> DenseFile:
    """Order the tensors as their sources lie in the checkpoint, and place them.

    Args:
        tensors: what the file shall hold.
        reads: the checkpoint's files and offsets that a tensor is made from; none if it is made of constants.
    """
    groups = _groups(list(tensors), reads)
    position, fillers = 0, 0
    entries: dict[str, object] = {}
    placed: list[tuple[PlacedTensor, ...]] = []
    for group in groups:
        row: list[PlacedTensor] = []
        for tensor in group:
            begin = -(-position // PART_ALIGNMENT) * PART_ALIGNMENT
            if begin != position:
                name = f"moec.padding.{fillers}"
                entries[name] = {
                    "dtype": "U8",
                    "shape": [begin - position],
                    "data_offsets": [position, begin],
                }
                fillers += 1
            stored = tensor.spec.stored
            position = begin + math.prod(map(int, stored.shape)) * DTYPE_BYTES[stored.dtype]
            entries[tensor.name] = {
                "dtype": SAFETENSORS_TYPES[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [begin, position],
            }
            row.append(PlacedTensor(tensor, begin, position))
        placed.append(tuple(row))
    header = _header(entries)
    moved = tuple(
        tuple(PlacedTensor(one.tensor, one.begin + len(header), one.end + len(header)) for one in group)
        for group in placed
    )
    return DenseFile(header, moved, len(header) + position)


def _header(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _groups(
    tensors: list[DenseTensor], reads: Callable[[DenseTensor], Sequence[tuple[str, int]]]
) -> list[list[DenseTensor]]:
    """Tensors that read a common place are together, so that it is read once; in the checkpoint's order."""
    places = [sorted(reads(tensor)) for tensor in tensors]
    parent = list(range(len(tensors)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    owner: dict[tuple[str, int], int] = {}
    for number, wanted in enumerate(places):
        for place in wanted:
            parent[root(number)] = root(owner.setdefault(place, number))
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(tensors)):
        groups[root(number)].append(number)
    first = {
        key: min((places[n][0] for n in group if places[n]), default=("", 0)) for key, group in groups.items()
    }
    order = sorted(groups, key=lambda key: (first[key], min(groups[key])))
    return [[tensors[number] for number in sorted(groups[key])] for key in order]
