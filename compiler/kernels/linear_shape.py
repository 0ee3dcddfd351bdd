"""What kernels of products with a weight are made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moec.formats import format_of, row_bytes

VECTOR = 8
"""Columns that kernels of products take at a time."""
NARROW_ROWS = 512
"""Most experts of a router."""
ROUNDED_TYPE = "float16"
PRODUCT = "moec.product"
"""Attribute of a kernel that `DispatchLinear` chose: its `LinearShape`."""


def rounded_type(dtype: str) -> str:
    """The type that x is rounded to for tensor cores: the weight's, or float16 for quantized ones."""
    return dtype if format_of(dtype) is None else ROUNDED_TYPE


def is_fast(dtype: str, columns: int) -> bool:
    """Whether tensor cores multiply weights of this type, or format, with rows of so many columns."""
    return dtype != "float32" and columns % VECTOR == 0


def padded(columns: int) -> int:
    """16-bit numbers of a row of rounded activations: columns up to a multiple of 8; those beyond are zeros."""
    return -(-columns // VECTOR) * VECTOR


@dataclass(frozen=True)
class LinearShape:
    """What a linear kernel is compiled for: ``y [.., T, rows] = x [.., T, columns] @ w [.., rows, columns]^T``."""

    rows: int
    columns: int
    dtype: str
    """Of the weight, or its format's name (`moec.formats.FORMATS`); all else is float32."""
    batch: int | None
    bias: bool

    @property
    def weight(self) -> tuple[tuple[int, ...], str]:
        """Shape and element type of the weight in memory: of a quantized one its bytes, ``[rows, row_bytes]``."""
        kind = format_of(self.dtype)
        if kind is not None:
            return (self.rows, row_bytes(kind, self.columns)), "uint8"
        return (*(() if self.batch is None else (self.batch,)), self.rows, self.columns), self.dtype

    @property
    def on_tensor_cores(self) -> bool:
        """See `is_fast`."""
        return is_fast(self.dtype, self.columns)

    @classmethod
    def of(cls, function: Any) -> LinearShape | None:
        """The shape that ``function`` was made for, where it is a kernel of a product."""
        text = function.attrs.get(PRODUCT)
        return None if text is None else cls(**json.loads(str(text)))

    @property
    def terms(self) -> int:
        """16-bit numbers that stand for one of x where there are many tokens and tensor cores take 16 bits.

        Routers choose by small differences: rounded to one number of 16 bits, x would choose other experts now and
        then. What is as narrow as a router is bound by reading x: it takes two, as for few tokens.
        """
        return 2 if self.rows <= NARROW_ROWS and self.batch is None else 1

    @property
    def name(self) -> str:
        """A name for the kernel, the same in every segment that needs it."""
        batch = () if self.batch is None else (f"batch{self.batch}",)
        bias = ("bias",) if self.bias else ()
        dtype = self.dtype.replace("-", "_")
        return "_".join(("linear", *batch, str(self.rows), str(self.columns), dtype, *bias))
