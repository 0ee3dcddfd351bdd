"""The activation language of ``artifacts.activation`` in CUDA's own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import value

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.activation import Expression


def _sigmoid(x: Any) -> Any:
    return T.float32(1) / (T.float32(1) + T.exp(-x))


def _gelu_tanh(x: Any) -> Any:
    inner = T.float32(0.7978845608028654) * (x + T.float32(0.044715) * x * x * x)
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": lambda x: -x,
    "exp": T.exp,
    "tanh": T.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: T.max(x, T.float32(0)),
    "gelu": lambda x: T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(0.7071067811865476))),
    "gelu_tanh": _gelu_tanh,
    "erf": T.erf,
    "sqrt": T.sqrt,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "min": T.min,
    "max": T.max,
    "pow": T.pow,
}


def _quick_exp(x: Any) -> Any:
    return value("float32", "exp2", x * T.float32(1.4426950408889634))


def _quick_sigmoid(x: Any) -> Any:
    return value("float32", "reciprocal", T.float32(1) + _quick_exp(-x))


QUICK = OPERATORS | {"exp": _quick_exp, "sigmoid": _quick_sigmoid, "silu": lambda x: x * _quick_sigmoid(x)}
"""To some parts in a million, for values that are rounded to 16 bits next: a tile has many of them."""


def evaluate(
    expression: Expression, values: dict[str, Any], operators: dict[str, Callable[..., Any]] = OPERATORS
) -> Any:
    """Emit the value of ``expression`` for float32 variables."""
    if isinstance(expression, str):
        return values[expression]
    if isinstance(expression, (int, float)):
        return T.float32(expression)
    operator, *operands = expression
    given = (T.bind(evaluate(operand, values, operators)) for operand in operands)
    return operators[str(operator)](*given)
