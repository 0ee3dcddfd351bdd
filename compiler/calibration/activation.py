"""The element-wise middle of an expert, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.activation import Expression

UNARY: dict[str, Callable[..., torch.Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "erf": torch.erf,
    "sqrt": torch.sqrt,
}
BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
}


def apply_expression(expression: Expression, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """Evaluate an activation in float32."""
    if isinstance(expression, str):
        chosen = gate if expression == "gate" else up
        assert chosen is not None
        return chosen.float()
    if isinstance(expression, (int, float)):
        return torch.tensor(float(expression))
    name, *operands = expression
    values = [apply_expression(operand, gate, up) for operand in operands]
    return UNARY[str(name)](*values) if len(values) == 1 else BINARY[str(name)](*values)
