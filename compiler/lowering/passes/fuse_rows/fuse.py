"""The pass itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from moec.compiler.lowering.passes.fuse_rows.writing import FunctionWriter, Makers

if TYPE_CHECKING:
    from moec.compiler.kernels.rows.product import Product
    from moec.compiler.lowering.passes.fuse_rows.writing import ProductFactory, RowsFactory


@tvm.transform.module_pass(opt_level=0, name="FuseRows")
class FuseRows:
    """Regions of row-wise operators become kernels.

    Args:
        rows: makes the kernel of a region.
        product: makes the kernel of products.
        products: gets what each kernel of products multiplies, by the kernel's name.
    """

    def __init__(
        self, rows: RowsFactory, product: ProductFactory, products: dict[str, Product] | None = None
    ) -> None:
        self.make = Makers(rows, product, {} if products is None else products)

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        builder = relax.BlockBuilder(module)
        kernels: dict[int, Any] = {}
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewritten = FunctionWriter(module, builder, kernels, self.make, function).write()
                builder.update_func(name, rewritten.with_attr("global_symbol", name.name_hint))
        return relax.transform.DeadCodeElimination()(builder.get())
