"""The layout of one expert in ``weights/experts-<layer>.bin``: parts in canonical order, 64-byte aligned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.artifacts.model import DTYPE_BYTES, ExpertBody
from moec.formats import format_of, row_bytes

PART_ALIGNMENT = 64
EXPERT_ALIGNMENT = 4096


@dataclass(frozen=True)
class ExpertPart:
    """One matrix or bias of an expert."""

    name: str
    shape: tuple[int, ...]
    """Of a quantized matrix of N rows: ``[N, row_bytes]``, bytes."""
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """All parts of an expert; experts follow each other every ``stride_bytes``."""

    parts: tuple[ExpertPart, ...]
    expert_bytes: int
    """Bytes of weights in one expert, without padding."""
    stride_bytes: int

    def part(self, name: str) -> ExpertPart:
        """The part called ``name``; ``KeyError`` where this expert has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)


def layout(body: ExpertBody) -> ExpertLayout:
    """Lay out one expert of ``body``."""
    H, I = body.hidden, body.intermediate  # noqa: E741
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if body.gated:
        shapes.append(("gate", (I, H)))
    shapes.append(("up", (I, H)))
    if body.up_bias:
        shapes += [("gate_bias", (I,)), ("up_bias", (I,))] if body.gated else [("up_bias", (I,))]
    shapes.append(("down", (H, I)))
    if body.down_bias:
        shapes.append(("down_bias", (H,)))
    kind = format_of(body.format)
    parts: list[ExpertPart] = []
    offset = 0
    for name, extents in shapes:
        quantized = kind is not None and len(extents) > 1
        shape = (extents[0], row_bytes(kind, extents[1])) if kind is not None and quantized else extents
        size = math.prod(shape) * (1 if quantized else DTYPE_BYTES[body.dtype])
        parts.append(ExpertPart(name, shape, offset, size))
        offset = _align(offset + size, PART_ALIGNMENT)
    return ExpertLayout(
        tuple(parts), sum(part.size_bytes for part in parts), _align(offset, EXPERT_ALIGNMENT)
    )


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
