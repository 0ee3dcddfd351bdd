"""The activation language of ``artifacts.activation`` in torch: the element-wise middle of an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.artifacts.activation import Expression

OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
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
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
}
"""Every operator of ``artifacts.activation.ARITY``."""


def activate(expression: Expression, variables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of an activation for ``up``, and ``gate`` where there is one, in their type and on their device."""
    if isinstance(expression, str):
        return variables[expression]
    if isinstance(expression, (int, float)):
        up = variables["up"]
        # An operation: of a tensor made here an exported graph would not keep the value.
        return torch.full((), float(expression), dtype=up.dtype, device=up.device)
    operator, *operands = expression
    return OPERATORS[str(operator)](*(activate(operand, variables) for operand in operands))
