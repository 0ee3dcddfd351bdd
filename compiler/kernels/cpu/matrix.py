"""What a dense product takes: a weight, and activations wherever their lines begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Buffer, Expr

SERIAL_PRODUCTS = 1 << 14
"""Matrices up to this many elements are not worth waking other threads for."""


@dataclass(frozen=True)
class Matrix:
    """A weight ``[rows, columns]``, or one for each of a batch."""

    weight: Buffer
    dtype: str
    rows: int
    columns: int
    batch: int
    bias: Buffer | None = None

    @property
    def parallel(self) -> bool:
        """Whether a product with many tokens is worth waking other threads for."""
        return self.batch * self.rows * self.columns > SERIAL_PRODUCTS


@dataclass(frozen=True)
class Lines:
    """Float32 activations: where a token's begin, given its number in the batch and the token; elements, int64."""

    buffer: Buffer
    start: Callable[[Expr, Expr], Expr]
