"""Activations rounded to bfloat16, each vector once before its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.numeric import narrow_store
from moec.compiler.kernels.cpu.pair_products import LANES, STEP
from moec.compiler.kernels.emit import Buffer, Expr, i64, keep, load, loop, scratch

if TYPE_CHECKING:
    from collections.abc import Callable

APART = STEP
"""Numbers between vectors, so that those of one column lie in different sets of the first-level cache."""


@dataclass(frozen=True)
class Vectors:
    """V vectors of ``columns`` numbers in bfloat16."""

    buffer: Buffer
    """uint16 ``[V, stride]``."""
    columns: int

    @property
    def stride(self) -> int:
        """Numbers from one vector to the next."""
        return stride_of(self.columns)

    def start(self, number: Expr) -> Expr:
        """Where a vector begins."""
        return number * i64(self.stride)

    def store(self, number: Expr, first: Expr, source: Buffer, start: Expr, columns: int) -> None:
        """Round ``columns`` float32 of a buffer from ``start`` to a vector's columns from ``first``."""
        target = keep(self.start(number) + first)
        whole = columns // LANES
        with loop(whole) as step:
            place = keep(step * i64(LANES))
            self._round(target + place, source, start + place, LANES)
        with loop(columns - whole * LANES) as step:
            place = keep(step + i64(whole * LANES))
            self._round(target + place, source, start + place, 1)

    def _round(self, target: Expr, source: Buffer, place: Expr, lanes: int) -> None:
        value = load(source, place, lanes)
        narrow_store(self.buffer, "bfloat16", target, value, lanes, native_f16=True)


def new_vectors(columns: int, count: Expr) -> Vectors:
    """Room for ``count`` vectors in the workspace of this scope."""
    return Vectors(scratch(count * i64(stride_of(columns)), "uint16"), columns)


def stride_of(columns: int) -> int:
    """Numbers from one vector of so many columns to the next."""
    return -(-columns // STEP) * STEP + APART


def rounded(
    source: Buffer, start: Callable[[Expr], Expr], columns: int, count: Expr, *, parallel: bool
) -> Vectors:
    """Emit the rounding of ``count`` float32 vectors, which begin at ``start(number)``."""
    vectors = new_vectors(columns, count)
    with loop(count, parallel=parallel) as number:
        vectors.store(number, i64(0), source, keep(start(number)), columns)
    return vectors
