"""Rows of quantized tables become loops, which fuse with what reads them.

Before::

    lv = R.call_dps_packed("moec.lookup.int8-g128", (table, ids))     # table [V, row_bytes], ids [1, T]

After::

    lv = R.call_tir(cls.lookup, (table, ids), out_ty=R.Tensor((1, T, H), "float32"))

Ids are clipped, so that a wrong one cannot read outside the table.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from moec.compiler.lowering.converters import QUANTIZED_LOOKUP
from moec.compiler.lowering.legalize import INJECTIVE
from moec.compiler.lowering.passes.rewrite import rewrite_functions
from moec.compiler.lowering.quantized_value import value_at
from moec.formats import FORMATS


@tvm.transform.module_pass(opt_level=0, name="LowerLookup")
class LowerLookup:
    """Replace lookups in quantized tables by loops."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        return rewrite_functions(module, _Rewriter(module))


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]  # TVM has no stubs
    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op != tvm.ir.Op.get("relax.call_dps_packed"):
            return call
        name = str(call.args[0].global_symbol)
        if not name.startswith(QUANTIZED_LOOKUP):
            return call
        kind = FORMATS[name.removeprefix(QUANTIZED_LOOKUP)]
        table, ids = call.args[1].fields
        columns = int(list(call.ty_args[0].shape)[-1])

        def lookup(table: Any, ids: Any) -> Any:
            last = int(table.shape[0]) - 1

            def element(*place: Any) -> Any:
                *token, column = place
                row = tirx.max(
                    tirx.min(ids[tuple(token)], tirx.const(last, ids.dtype)), tirx.const(0, ids.dtype)
                )
                return value_at(kind, columns, lambda byte: table[row, byte], column)

            return te.compute((*ids.shape, columns), element, name="lookup")

        return self.builder_.call_te(lookup, table, ids, primfunc_attrs={"op_pattern": INJECTIVE})
