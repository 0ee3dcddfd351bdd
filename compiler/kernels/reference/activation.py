"""Activation expressions: the element-wise middle of an expert."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.artifacts.activation import Expression
    from moec.compiler.kernels.reference.array import Array


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "erf": _erf,
    "sqrt": np.sqrt,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
}
"""Every operator of ``artifacts.activation.ARITY``."""


def activate(expression: Expression, variables: Mapping[str, Array]) -> Array:
    """Evaluate an activation expression on ``gate`` and ``up``."""
    if isinstance(expression, str):
        return variables[expression]
    if isinstance(expression, (int, float)):
        return np.asarray(float(expression))
    operator, *operands = expression
    result: Array = OPERATORS[str(operator)](*(activate(operand, variables) for operand in operands))
    return result
