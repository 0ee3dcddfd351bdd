"""One product alone, as the compiler makes it where nothing is fused with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.compiler.kernels.cuda.dense.product import product
from moec.compiler.kernels.linear_shape import LinearShape, rounded_type
from moec.compiler.kernels.rows.product import Product
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated

NAN_BITS = 0x7FFF


class Linear:
    """``linear(x, weight, bias or None, out)`` in the emulator; the scratch that it needs holds no number."""

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: str,
        batch: int | None = None,
        bias: bool = False,
        *,
        hopper: bool = False,
    ) -> None:
        self.shape = LinearShape(rows, columns, dtype, batch, bias)
        self.item = Product((self.shape,), None, "x")
        self.kernel = Emulated(product(self.item, hopper=hopper))

    def __call__(self, x: Any, weight: Any, bias: Any, out: Any) -> None:
        """Run the kernel; a pair is an array of bits and the dtype that they stand for."""
        given = x[0] if isinstance(x, tuple) else x
        self.kernel("product", x, weight, bias, self._rounded(given.shape), out)

    def _rounded(self, shape: tuple[int, ...]) -> tuple[NDArray[Any], str] | None:
        if self.shape.dtype == "float32":
            return None
        bits = aligned_empty((*shape[:-1], self.item.rounded_columns), np.uint16)
        bits[...] = NAN_BITS
        return bits, rounded_type(self.shape.dtype)
