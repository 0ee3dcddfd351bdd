"""Memory between the launches of ``experts_many``: what is where in its workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.grouping import SLOT_WORDS
from moec.compiler.kernels.cuda.rounding import Rounding
from moec.compiler.kernels.emit import ALIGNMENT_BYTES, STORAGE, i64
from moec.compiler.kernels.linear_shape import padded

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.emit import Buffer, Expr

PART_BYTES = 256
"""Parts of the workspace begin at multiples of this."""
SLICE_BYTES = 32 << 10
"""Of a token's results before they are combined: more columns than fit are made in turns."""
SLICE_COLUMNS = 256
"""A slice is a multiple of this, so that it is whole tiles."""
SMALLEST_ROWS = 32
"""Of a tile: what the length of the tile list is bounded by."""


def rounding_of(body: ExpertBody) -> Rounding:
    """How tensor cores take activations."""
    return Rounding.of(body.dtype, body.format)


def slice_columns(hidden: int, top_k: int) -> int:
    """Columns of the result that are made at a time."""
    fit = max(1, SLICE_BYTES // (4 * top_k * SLICE_COLUMNS))
    return SLICE_COLUMNS * min(fit, -(-hidden // SLICE_COLUMNS))


def workspace_bytes(body: ExpertBody, top_k: int, experts: int) -> tuple[int, int]:
    """What ``emit_experts_many`` needs: bytes in any case, and for each token.

    Args:
        body: one expert.
        top_k: experts of a token.
        experts: the most that a table has.
    """
    fixed = 5 * PART_BYTES + 4 * SLOT_WORDS * experts
    row = 2 * padded(body.hidden)
    pair = 2 * padded(body.intermediate) + 4 * slice_columns(body.hidden, top_k) + 4
    entries = -(-4 * SLOT_WORDS * top_k // SMALLEST_ROWS)
    return fixed, row + top_k * pair + entries


@dataclass(frozen=True)
class Parts:
    """The workspace's parts for T tokens, P = T*K pairs."""

    tiles: Buffer
    """int32, the tile list."""
    order: Buffer
    """int32 ``[P]``."""
    rounded: Buffer
    """16-bit ``[T, padded(H)]``."""
    middle: Buffer
    """16-bit ``[P, padded(I)]``, in the order's places."""
    results: Buffer
    """float32 ``[P, slice]``, by pair."""


def carve(body: ExpertBody, workspace: Buffer, tokens: Expr, pairs: Expr, experts: Expr, width: int) -> Parts:
    """Emit the parts' addresses (on the host); ``width`` is the slice's."""
    sizes = {
        "tiles": ((tirx.truncdiv(pairs, i64(SMALLEST_ROWS)) + experts) * i64(SLOT_WORDS), "int32"),
        "order": (pairs, "int32"),
        "rounded": (tokens * i64(padded(body.hidden)), rounding_of(body).dtype),
        "middle": (pairs * i64(padded(body.intermediate)), rounding_of(body).dtype),
        "results": (pairs * i64(width), "float32"),
    }
    parts = {}
    place = i64(0)
    for name, (elements, dtype) in sizes.items():
        size = T.bind(elements)
        pointer = T.bind(_address(workspace, place))
        parts[name] = T.decl_buffer((size,), STORAGE.get(dtype, dtype), data=pointer, align=ALIGNMENT_BYTES)
        size_bytes = size * i64(4 if dtype in ("int32", "float32") else 2)
        place = T.bind(
            tirx.truncdiv(place + size_bytes + i64(PART_BYTES - 1), i64(PART_BYTES)) * i64(PART_BYTES)
        )
    return Parts(**parts)


def _address(workspace: Buffer, place: Expr) -> Expr:
    return T.address_of(tirx.BufferLoad(workspace, [place]))
