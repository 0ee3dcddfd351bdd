"""An expert's activation expression (``artifacts.activation``) as TIRx, scalar or vector, for any target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.artifacts.activation import Expression

Operators = Mapping[str, Callable[..., Any]]
"""What each operator of ``artifacts.activation.ARITY`` emits; a target may have its own ``exp``, ``tanh``, ``erf``."""


def emit(
    expression: Expression,
    variables: Mapping[str, Any],
    operators: Operators,
    constant: Callable[[float], Any],
) -> Any:
    """Evaluate ``expression`` on TIRx expressions.

    Args:
        expression: a checked expression.
        variables: ``gate`` and ``up``.
        operators: by name, see ``Operators``.
        constant: makes a number of the variables' type.
    """
    if isinstance(expression, str):
        return variables[expression]
    if isinstance(expression, (int, float)):
        return constant(float(expression))
    operator, *operands = expression
    return operators[str(operator)](*(emit(operand, variables, operators, constant) for operand in operands))
