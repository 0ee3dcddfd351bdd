"""What kernels of products of the dense segments are called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.kernels.emit import Argument
from moec.compiler.kernels.linear_shape import rounded_type

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Expr
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

    declared: list[Argument | None] = [row(f"a{number}", key) for number, key in enumerate(read_by(item))]
    for shape in item.shapes:
        declared.append(Argument("weight", *shape.weight))
        declared.append(Argument("bias", (*lead, shape.rows), "float32") if shape.bias else None)
    rounded = Argument("rounded", (*lead, tokens, item.rounded_columns), rounded_type(first.dtype))
    declared.append(rounded if first.dtype != "float32" else None)
    if item.activation is not None:
        columns, dtype = item.activation.rounded_columns, rounded_type(item.activation.reader.dtype)
        declared.append(Argument("activated", (tokens, columns), dtype))
    declared += [row(f"kept{number}", key) for number, key in enumerate(kept_by(item))]
    declared += [Argument("out", (*lead, tokens, shape.rows), "float32") for shape in item.shapes]
    return declared


def read_by(item: Product) -> tuple[Any, ...]:
    """What the kernel computes its input from, or the input."""
    return item.region.inputs if item.region else (item.source,)


def kept_by(item: Product) -> tuple[Any, ...]:
    """What the kernel keeps of its region."""
    return item.region.outputs if item.region and item.keeps else ()
