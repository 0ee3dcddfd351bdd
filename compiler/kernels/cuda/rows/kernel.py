"""Kernels of regions: a row of every tensor that a region makes, for each token.

Parts of a region that share nothing get blocks of their own, and so do pieces of a row whose elements stand for
themselves: a step of one token waits for the slowest thread. What one block does is in `block`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rows.block import AT_ONCE, Place, RowBlock
from moec.compiler.kernels.emit import Argument, Buffer, Expr, arguments, build, either, symbol
from moec.compiler.kernels.rows.region import is_flat, sections
from moec.compiler.kernels.rows.stages import Key, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tvm import tirx

    from moec.compiler.kernels.rows.region import Region

PIECE = 4
"""Elements of a row that a thread computes one after the other where others could."""


def rows(region: Region, name: str) -> tirx.PrimFunc:
    """The kernel ``name(inputs..., outputs...)`` of a region: blocks for each section of each token's rows."""

    def body() -> None:
        tokens = symbol("T")
        keys = (*region.inputs, *region.outputs)
        declared = [
            Argument(
                f"a{number}",
                tuple(tokens if extent is None else extent for extent in tensor.shape),
                tensor.dtype,
            )
            for number, tensor in enumerate(region.tensors[key] for key in keys)
        ]
        emit_rows(region, dict(zip(keys, arguments(*declared), strict=True)), tokens)

    return build(name, body)


def emit_rows(
    region: Region,
    buffers: Mapping[Key, Buffer],
    tokens: Expr,
    also: Mapping[Key, Callable[[Expr, Expr, Expr], None]] | None = None,
) -> None:
    """Emit the launch that computes a region.

    Args:
        region: what to compute.
        buffers: of every input, and of every output that is to be in memory.
        tokens: T, a host value (int64).
        also: what else is done with each element of an output: the token, the place in its row (int32), the value.
    """
    threads = _threads(region)
    parts = sections(region)
    pieces = [_pieces(part, threads) for part in parts]
    with gpu.launch((tokens, sum(pieces)), threads) as ((token, number), thread):
        gpu.launch_next()

        def emit(which: int, first: int) -> None:
            place = Place(token, T.bind(number - i32(first)), pieces[which])
            puts = {key: partial(put, token) for key, put in (also or {}).items()}
            block = RowBlock(
                parts[which], buffers, tokens, place, thread, threads, at_once=AT_ONCE, also=puts
            )
            end = first + pieces[which]

            def own() -> None:
                block.preload()
                gpu.wait_previous()
                block.emit()

            if which + 1 == len(parts):
                own()
            else:
                either(number < i32(end), own, lambda: emit(which + 1, end))

        emit(0, 0)


def _pieces(section: Region, threads: int) -> int:
    """Blocks that compute a section of one token."""
    if not is_flat(section):
        return 1
    return max(1, -(-math.prod(section.tensors[section.order[0]].row) // (PIECE * threads)))


def _threads(region: Region) -> int:
    """As many as there are elements to work on at once, within reason."""
    sizes = [math.prod(region.tensors[key].row) for key in region.order]
    for key in region.order:
        definition = region.definitions[key]
        if isinstance(definition, Stage) and definition.reduction is not None:
            sizes.append(math.prod(extent for _, extent in definition.reduction.axes))
    return next((threads for threads in (512, 256) if max(sizes) >= 2 * threads), 128)
