"""Operators whose loops we make otherwise than TVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import te, tirx, topi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INJECTIVE = 2
"""TVM's word for a loop in which each result is one element of an input: what follows fuses with it."""


def _take(builder: Any, call: Any) -> Any:
    """TVM takes a loop that looks its index up for opaque: rows of a table would be cast in a loop of their own."""
    return builder.call_te(
        topi.take,
        *call.args,
        call.attrs.axis,
        mode=call.attrs.mode,
        primfunc_attrs={"op_pattern": INJECTIVE},
    )


def _where(builder: Any, call: Any) -> Any:
    """TVM passes a constant as a tensor of no dimensions, which somebody would have to keep: here it is in the code."""
    return builder.call_te(where, *(_number(argument) for argument in call.args))


def where(condition: Any, left: Any, right: Any) -> Any:
    """``left`` where ``condition`` holds, else ``right``; both tensors or numbers."""
    return topi.where(condition, _tensor(left), _tensor(right))


def _number(argument: Any) -> Any:
    """The number that a constant of no dimensions holds; anything else as it is."""
    if not isinstance(argument, tvm.ir.GenericConst) or len(argument.ty.shape):
        return argument
    return tirx.const(argument.value.numpy().item(), str(argument.ty.dtype.dtype))


def _tensor(value: Any) -> Any:
    return value if isinstance(value, te.Tensor) else te.compute((), lambda: value, name="number")


def _arange(builder: Any, call: Any) -> Any:
    """TVM makes a constant tensor of a range of known numbers: here it is a loop, which fuses with what reads it."""
    return builder.call_te(topi.arange, *call.args, call.attrs.dtype)


LEGALIZATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "relax.take": _take,
    "relax.where": _where,
    "relax.arange": _arange,
}
"""Relax operator to ``(block builder, call) -> call of loops``."""
