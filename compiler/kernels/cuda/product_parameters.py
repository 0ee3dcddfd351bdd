"""The parameters of a kernel of products, in order: what it reads, weights, what it keeps, results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.kernels.emit import Argument, Expr
from moec.compiler.kernels.linear_shape import rounded_type

if TYPE_CHECKING:
    from moec.compiler.kernels.rows.product import Product


def parameters(item: Product, tokens: Expr) -> list[Argument | None]:
    """The kernel's parameters in order; ``None`` stands for one that it does not have."""
    first = item.shapes[0]
    lead = () if first.batch is None else (first.batch,)

    def row(name: str, key: object) -> Argument:
        if item.region is None:
            return Argument("x", (*lead, tokens, first.columns), "float32")
        tensor = item.region.tensors[key]
        shape = tuple(tokens if extent is None else extent for extent in tensor.shape)
        return Argument(name, shape, tensor.dtype)

    groups = [item] if item.beside is None else [item, item.beside]
    declared: list[Argument | None] = [row(f"a{number}", key) for number, key in enumerate(read_keys(item))]
    for shape in (shape for each in groups for shape in each.shapes):
        declared.append(Argument("weight", *shape.weight))
        declared.append(Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None)
    for each in groups:
        kind = each.shapes[0].dtype
        rounded = Argument("rounded", (*lead, tokens, each.rounded_columns), rounded_type(kind))
        declared.append(rounded if kind != "float32" else None)
    if item.activation is not None:
        columns, dtype = item.activation.rounded_columns, rounded_type(item.activation.reader.dtype)
        declared.append(Argument("activated", (tokens, columns), dtype))
    declared += [row(f"kept{number}", key) for number, key in enumerate(kept_keys(item))]
    for shape in (shape for each in reversed(groups) for shape in each.shapes):
        declared.append(Argument("out", (*lead, tokens, shape.rows), "float32"))
    return declared


def read_keys(item: Product) -> tuple[Any, ...]:
    """What the kernel computes its input from, or the input; then what is read behind."""
    return (*(item.region.inputs if item.region else (item.source,)), *item.read_behind)


def kept_keys(item: Product) -> tuple[Any, ...]:
    """What the kernel keeps of the regions before and behind its products."""
    if item.region is None or not item.keeps:
        return ()
    return (*item.region.outputs, *(item.behind.region.outputs if item.behind else ()))
