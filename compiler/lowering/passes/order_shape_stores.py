"""The stores of a function that computes shapes go in the order of their places.

Before::

    H[T.int64(2)] = T.int64(1024) * H[T.int64(0)]
    H[T.int64(1)] = T.int64(512) * H[T.int64(0)]

After::

    H[T.int64(1)] = T.int64(512) * H[T.int64(0)]
    H[T.int64(2)] = T.int64(1024) * H[T.int64(0)]

``VMShapeLower`` walks a hash table of pointers, so that the order differs from run to run; the same model must give
the same bytes. No store reads what another one wrote: all of them read the step's own dimensions.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx


@tvm.transform.module_pass(opt_level=0, name="OrderShapeStores")
class OrderShapeStores:
    """Sort the body of each ``shape_func``."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite the shape functions of ``module``."""
        ordered = module.clone()
        for name, function in module.functions_items():
            if name.name_hint.startswith("shape_func") and isinstance(function.body, tirx.SeqStmt):
                stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
                ordered.update_func(name, function.with_body(tirx.SeqStmt(stores)))
        return ordered
