"""The element-wise middle of an expert as data: ``["mul", ["silu", "gate"], "up"]``.

One expression serves the reference (numpy), the CPU kernels and the GPU kernels, so that no model needs a
kernel of its own for its activation.
"""

from __future__ import annotations

from typing import TypeAlias

Expression: TypeAlias = "str | float | tuple[Expression, ...]"
"""``"gate"``, ``"up"``, a number, or ``(operator, operand, ...)``. Experts without a gate use ``"up"``
alone."""

VARIABLES = ("gate", "up")

ARITY: dict[str, int] = {
    "neg": 1,
    "exp": 1,
    "tanh": 1,
    "sigmoid": 1,
    "silu": 1,
    "relu": 1,
    "gelu": 1,  # exact, with erf
    "gelu_tanh": 1,
    "erf": 1,
    "sqrt": 1,
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "min": 2,
    "max": 2,
    "pow": 2,
}
"""Every operator an expression may use, with its operand count."""


def check_expression(expression: Expression) -> None:
    """Raise ``ValueError`` where ``expression`` is not well formed."""
    if isinstance(expression, str):
        if expression not in VARIABLES:
            raise ValueError(
                f"unknown variable {expression!r} in an activation; known: {', '.join(VARIABLES)}"
            )
        return
    if isinstance(expression, (int, float)):
        return
    if not expression or not isinstance(expression[0], str) or expression[0] not in ARITY:
        raise ValueError(f"unknown operator in an activation: {expression!r}")
    operator, *operands = expression
    if len(operands) != ARITY[str(operator)]:
        raise ValueError(f"{operator} takes {ARITY[str(operator)]} operands, not {len(operands)}")
    for operand in operands:
        check_expression(operand)
