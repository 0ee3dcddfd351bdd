"""What is between the two products of ``many.py``: the activation of a place's sums, rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.activation import QUICK, evaluate
from moec.compiler.kernels.cuda.experts.layout import rounding_of
from moec.compiler.kernels.cuda.many.panels import PANEL

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.emit import Expr


def activated(body: ExpertBody, row: Expr, variables: dict[str, Expr]) -> Expr:
    """The middle's value of a row (int32) as it is to be rounded; those beyond the last are zeros."""
    value = evaluate(body.activation, {name: T.bind(value) for name, value in variables.items()}, QUICK)
    if body.intermediate % PANEL:
        value = T.Select(row < body.intermediate, value, T.float32(0))
    return rounding_of(body).scaled(value)


def pack_middle(body: ExpertBody, values: list[Expr]) -> Expr:
    """Two values as the second product takes them."""
    return cuda.pack(rounding_of(body).dtype, *values)
