"""The pass itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from moec.compiler.lowering.passes.fuse_rows.readers import find_readers_beyond
from moec.compiler.lowering.passes.fuse_rows.writing import FunctionWriter, Makers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.rows.product import Product
    from moec.compiler.lowering.links import Link
    from moec.compiler.lowering.passes.fuse_rows.writing import ProductFactory, RowsFactory


@tvm.transform.module_pass(opt_level=0, name="FuseRows")
class FuseRows:
    """Regions of row-wise operators become kernels.

    Args:
        rows: makes the kernel of a region.
        product: makes the kernel of products.
        products: gets what each kernel of products multiplies, by the kernel's name.
        links: functions that are all that reads some results of another one.
    """

    def __init__(
        self,
        rows: RowsFactory,
        product: ProductFactory,
        products: dict[str, Product] | None = None,
        links: Sequence[Link] = (),
    ) -> None:
        self.make = Makers(rows, product, {} if products is None else products)
        self.links = links

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        builder = relax.BlockBuilder(module)
        kernels: dict[int, Any] = {}
        writers = {
            name: FunctionWriter(module, builder, kernels, self.make, function)
            for name, function in module.functions_items()
            if isinstance(function, relax.Function)
        }
        by_name = {name.name_hint: writer for name, writer in writers.items()}
        for link in self.links:
            _tell(by_name[link.first], by_name[link.reader], link)
        for name, writer in writers.items():
            builder.update_func(name, writer.write().with_attr("global_symbol", name.name_hint))
        return relax.transform.DeadCodeElimination()(builder.get())


def _tell(first: FunctionWriter, reader: FunctionWriter, link: Link) -> None:
    """Groups of two functions of each other."""
    passed = {reader.function.params[number]: first.read.results[output] for output, number in link.passed}
    find_readers_beyond((first.read, first.groups), (reader.read, reader.groups), passed)
