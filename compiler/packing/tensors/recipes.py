"""Recipes: how a weight of the bundle is made from parameters of the model, as ATen operations by name."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.packing import DenseTensor

ATEN = torch.ops.aten

OPERATIONS: dict[str, Callable[..., Any]] = {
    "aten._to_copy.default": lambda x, dtype: x.to(getattr(torch, dtype)),
    "aten.add.Scalar": ATEN.add.Scalar,
    "aten.add.Tensor": ATEN.add.Tensor,
    "aten.cat.default": ATEN.cat.default,
    "aten.clone.default": lambda x: x,
    "aten.constant_pad_nd.default": ATEN.constant_pad_nd.default,
    "aten.div.Scalar": ATEN.div.Scalar,
    "aten.div.Tensor": ATEN.div.Tensor,
    "aten.exp.default": ATEN.exp.default,
    "aten.expand.default": ATEN.expand.default,
    "aten.index_select.default": ATEN.index_select.default,
    "aten.mul.Scalar": ATEN.mul.Scalar,
    "aten.mul.Tensor": ATEN.mul.Tensor,
    "aten.neg.default": ATEN.neg.default,
    "aten.permute.default": ATEN.permute.default,
    "aten.select.int": ATEN.select.int,
    "aten.sigmoid.default": ATEN.sigmoid.default,
    "aten.slice.Tensor": ATEN.slice.Tensor,
    "aten.softplus.default": ATEN.softplus.default,
    "aten.split.Tensor": ATEN.split.Tensor,
    "aten.split_with_sizes.default": ATEN.split_with_sizes.default,
    "aten.squeeze.default": ATEN.squeeze.default,
    "aten.squeeze.dim": ATEN.squeeze.dim,
    "aten.squeeze.dims": ATEN.squeeze.dims,
    "aten.stack.default": ATEN.stack.default,
    "aten.sub.Tensor": ATEN.sub.Tensor,
    "aten.t.default": ATEN.t.default,
    "aten.tanh.default": ATEN.tanh.default,
    "aten.transpose.int": ATEN.transpose.int,
    "aten.unsqueeze.default": ATEN.unsqueeze.default,
    "aten.view.default": ATEN.reshape.default,  # storage order is no matter between files
    "getitem": operator.getitem,
}
"""Every operation a recipe may use. Casts take the dtype's name; clones change nothing."""


def evaluate(dense: DenseTensor, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Make one tensor of the bundle.

    Args:
        dense: its recipe.
        load: gives a source by name, at the dtype that ``PackingRecord.parameter_dtypes`` says.

    Returns:
        A contiguous tensor of the recorded dtype and shape. It may share memory with a source.

    Raises:
        ValueError: an operation is not in ``OPERATIONS``, or the result is not what was recorded.
    """
    values: list[Any] = [load(source) for source in dense.sources]
    for step in dense.steps:
        if step.op not in OPERATIONS:
            raise ValueError(f"{dense.name}: unknown operation {step.op} in a packing recipe")
        values.append(OPERATIONS[step.op](*(_resolve(argument, values) for argument in step.arguments)))
    result: torch.Tensor = values[-1].contiguous()
    if tuple(result.shape) != dense.shape or result.dtype != getattr(torch, dense.dtype):
        raise ValueError(
            f"{dense.name}: made as {result.dtype} {tuple(result.shape)}, "
            f"recorded as {dense.dtype} {dense.shape}"
        )
    return result


def _resolve(argument: Any, values: list[Any]) -> Any:
    if isinstance(argument, dict):
        return values[argument["ref"]]
    if isinstance(argument, (tuple, list)):
        return [_resolve(item, values) for item in argument]
    return argument
