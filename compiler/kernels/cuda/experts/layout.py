"""Memory between the launches of ``many.py``: what is where in its workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.experts.results import RESULT_BYTES
from moec.compiler.kernels.cuda.experts.tile_list import SLOT_WORDS
from moec.compiler.kernels.cuda.many.panels import in_panels
from moec.compiler.kernels.cuda.many.rounding import Rounding
from moec.compiler.kernels.emit import ALIGNMENT_BYTES, STORAGE, i64

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.emit import Buffer, Expr

PART_BYTES = 256
"""Parts of the workspace begin at multiples of this."""
SLICE_BYTES = 64 << 10
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
    fit = max(1, SLICE_BYTES // (RESULT_BYTES * top_k * SLICE_COLUMNS))
    return SLICE_COLUMNS * min(fit, -(-hidden // SLICE_COLUMNS))


def workspace_bytes(body: ExpertBody, top_k: int, experts: int) -> tuple[int, int]:
    """What ``emit_experts_many`` needs: bytes in any case, and for each token.

    Args:
        body: one expert.
        top_k: experts of a token.
        experts: the most that a table has.
    """
    fixed = 7 * PART_BYTES + 4 * (SLOT_WORDS + 2) * experts
    width = slice_columns(body.hidden, top_k)
    pair = 2 * in_panels(body.intermediate) + _operand_or_result_bytes(body, width) + 8
    entries = -(-4 * SLOT_WORDS * top_k // SMALLEST_ROWS)
    return fixed, top_k * pair + entries


def _operand_or_result_bytes(body: ExpertBody, width: int) -> int:
    """Of a pair: what the first product reads and what the second one makes are never there together."""
    return max(2 * in_panels(body.hidden), RESULT_BYTES * width)


@dataclass(frozen=True)
class Parts:
    """The workspace's parts for T tokens, P = T*K pairs, E experts."""

    spans: Buffer
    """int32 ``[E, 2]``, see `grouping.Grouping`."""
    tiles: Buffer
    """uint32, the tile list."""
    order: Buffer
    """int32 ``[P]``: the token at each place."""
    places: Buffer
    """int32 ``[P]``: the place of each pair."""
    rounded: Buffer
    """16-bit ``[T, padded(H)]``."""
    gathered: Buffer
    """Or 16-bit ``[P, H]`` in the order's places, in panels."""
    middle: Buffer
    """16-bit ``[P, padded(I)]``, in the order's places; or in panels."""
    results: Buffer
    """float16 ``[P, slice]``, in the order's places, see `results`."""


def carve(body: ExpertBody, workspace: Buffer, pairs: Expr, experts: Expr, width: int) -> Parts:
    """Emit the parts' addresses (on the host); ``width`` is the slice's."""
    shared = T.bind(pairs * i64(_operand_or_result_bytes(body, width)))
    dtype = rounding_of(body).dtype
    sizes = {
        "spans": (experts * i64(2), "int32"),
        "tiles": ((tirx.truncdiv(pairs, i64(SMALLEST_ROWS)) + experts) * i64(SLOT_WORDS), "uint32"),
        "order": (pairs, "int32"),
        "places": (pairs, "int32"),
        "middle": (pairs * i64(in_panels(body.intermediate)), dtype),
        "rounded": (tirx.truncdiv(shared, i64(2)), dtype),
    }
    parts = {}
    place = i64(0)
    for name, (elements, kind) in sizes.items():
        size_bytes = elements * i64(4 if kind in ("int32", "uint32") else 2)
        parts[name] = _at(workspace, place, elements, kind)
        last = place
        place = T.bind(
            tirx.truncdiv(place + size_bytes + i64(PART_BYTES - 1), i64(PART_BYTES)) * i64(PART_BYTES)
        )
    gathered = _at(workspace, last, tirx.truncdiv(shared, i64(2)), dtype)
    results = _at(workspace, last, tirx.truncdiv(shared, i64(RESULT_BYTES)), "float16")
    return Parts(**parts, gathered=gathered, results=results)


def _at(workspace: Buffer, place: Expr, elements: Expr, dtype: str) -> Buffer:
    pointer = T.bind(_address(workspace, place))
    return T.decl_buffer((T.bind(elements),), STORAGE.get(dtype, dtype), data=pointer, align=ALIGNMENT_BYTES)


def _address(workspace: Buffer, place: Expr) -> Expr:
    return T.address_of(tirx.BufferLoad(workspace, [place]))
