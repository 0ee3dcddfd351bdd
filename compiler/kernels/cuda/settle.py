"""Variables that TVM's analysis cannot look through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import registers
from moec.compiler.kernels.emit import load, store

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr


def settle(number: Expr) -> Expr:
    """``number``, computed once, here, through a register, so that TVM cannot see what it is.

    FlattenBuffer's analyzer writes out what a variable is bound to: a chain of scans took it more than ten minutes.
    """
    number = number if hasattr(number, "ty") else number.asobject()
    if str(number.ty.dtype) == "bool":
        return T.bind(number)
    place = registers(1, str(number.ty.dtype))
    store(place, 0, number)
    return T.bind(load(place, 0))
