"""Expressions of stages, written anew for a GPU thread: int32 places, and what they load taken from elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tvm
from tvm import sym, tirx
from tvm.ir.prim import expr as prim
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.compiler.kernels.emit import Expr
    from moec.compiler.kernels.rows.stages import Tensor

LARGEST = (1 << 31) - 1


def rebuild(value: Expr, axes: dict[Any, Expr], element: Callable[[Any, list[Expr]], Expr]) -> Expr:  # noqa: C901
    """``value`` with its axes replaced and its loads by ``element(buffer, indices)``.

    Integers become int32: token ids, positions and places in a row fit. 16-bit floats become float32.
    """

    def visit(node: Expr) -> Expr:  # noqa: C901 - one branch a kind of node
        if isinstance(node, tvm.ir.Var):
            return axes[node]
        if isinstance(node, prim.IntImm):
            return _integer(node)
        if isinstance(node, prim.FloatImm):
            return _float(float(node.value))
        if isinstance(node, tvm.ir.expr.TensorLoad):
            return element(node.source, [visit(index) for index in node.indices])
        if isinstance(node, prim.Cast):
            return T.cast(visit(node.value), narrow(str(node.ty.dtype)))
        if isinstance(node, prim.FloorDiv):
            return T.truncdiv(visit(node.a), visit(node.b))
        if isinstance(node, prim.FloorMod):
            return T.truncmod(visit(node.a), visit(node.b))
        if isinstance(node, (prim.BinaryOpExpr, prim.CmpExpr, prim.LogicalExpr)) and hasattr(node, "b"):
            return type(node)(visit(node.a), visit(node.b))
        if isinstance(node, prim.Not):
            return prim.Not(visit(node.a))
        if isinstance(node, prim.BitwiseNot):
            return prim.Not(visit(node.a)) if str(node.ty.dtype) == "bool" else ~visit(node.a)
        if isinstance(node, prim.Select):
            return T.if_then_else(visit(node.condition), visit(node.true_value), visit(node.false_value))
        if isinstance(node, tvm.ir.Call):
            return _call(node, [visit(argument) for argument in node.args])
        raise TypeError(f"no expression of a stage: {type(node).__name__}")

    return visit(value)


def narrow(dtype: str) -> str:
    """The type in which a kernel computes with values of ``dtype``."""
    return {"int64": "int32", "bfloat16": "float32", "float16": "float32"}.get(dtype, dtype)


def _float(number: float) -> Expr:
    """A float32 constant; infinities by their bits, for which CUDA has no literal."""
    if math.isfinite(number):
        return tirx.FloatImm("float32", number)
    return T.reinterpret("float32", T.uint32(0xFF800000 if number < 0 else 0x7F800000))


def _integer(node: Any) -> Expr:
    dtype, number = str(node.ty.dtype), int(node.value)
    if dtype == "bool":
        return T.bool(bool(number))
    if dtype == "int64":
        return i32(max(-LARGEST, min(LARGEST, number)))
    return node


_PLAIN: dict[str, Callable[..., Expr]] = {
    "if_then_else": T.if_then_else,
    "exp": T.exp,
    "sqrt": T.sqrt,
    "rsqrt": T.rsqrt,
    "sigmoid": lambda x: T.float32(1) / (T.float32(1) + T.exp(-x)),
    "tanh": T.tanh,
    "erf": T.erf,
    "cos": T.cos,
    "sin": T.sin,
    "log": T.log,
    "pow": T.pow,
    "fabs": lambda x: T.max(x, -x),
    "floor": T.floor,
    "bitwise_not": lambda x: prim.Not(x) if str(x.ty.dtype) == "bool" else ~x,
    "bitwise_and": lambda a, b: a & b,
    "bitwise_or": lambda a, b: a | b,
    "shift_left": lambda a, b: a << b,
    "shift_right": lambda a, b: a >> b,
}
"""Intrinsics that TVM's loops use, as a thread computes them."""


def _call(node: Any, arguments: list[Expr]) -> Expr:
    name = str(node.op.name).rpartition(".")[2]
    if name == "reinterpret":
        return T.reinterpret(str(node.ty.dtype), *arguments)
    if name not in _PLAIN:
        raise TypeError(f"no intrinsic of a stage: {name}")
    return _PLAIN[name](*arguments)


def narrowed(index: Expr) -> Expr:
    """An int32 index, computed here where that is more than a name: TVM would divide in 64 bits what is cast to them.

    What reads memory stays where it is, since it may be read under a condition.
    """
    if isinstance(index, (prim.IntImm, tvm.ir.Var)):
        return index
    return settle(sym.Analyzer().simplify(index)) if _is_arithmetic(index) else index


def _is_arithmetic(value: Expr) -> bool:
    if isinstance(value, prim.BinaryOpExpr):
        return _is_arithmetic(value.a) and _is_arithmetic(value.b)
    if isinstance(value, prim.Cast):
        return _is_arithmetic(value.value)
    return isinstance(value, (prim.IntImm, tvm.ir.Var))


def flat_place(tensor: Tensor, indices: Sequence[Expr]) -> Expr:
    """Place within one token's row, int32."""
    place: Expr = i32(0)
    started = False
    for extent, index in zip(tensor.shape, indices, strict=True):
        if extent is None or extent == 1:
            continue
        place = place * i32(extent) + index if started else index
        started = True
    return place


def split_place(tensor: Tensor, place: Expr, token: Expr) -> list[Expr]:
    """Indices of a place within one token's row; the token axis gets ``token``."""
    rest, indices = place, []
    left = sum(1 for extent in tensor.shape if extent not in (None, 1))
    for extent in reversed(tensor.shape):
        if extent is None:
            indices.append(token)
        elif extent == 1:
            indices.append(i32(0))
        else:
            left -= 1
            indices.append(rest if left == 0 else T.truncmod(rest, i32(extent)))
            rest = T.truncdiv(rest, i32(extent))
    return indices[::-1]
