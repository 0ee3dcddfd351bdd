"""``topk`` becomes a call of our own kernel instead of a sort in the C++ library.

Before::

    lv = R.topk(x, k=8, axis=-1)                        # x [T, 256]

After::

    lv = R.call_tir(cls.topk_256_8_float32, (x,), out_ty=[R.Tensor((T, 8), "float32"), R.Tensor((T, 8), "int64")])

Leading dimensions are flattened with a reshape, as in ``dispatch_linear``. Only the largest entries along the last
axis are taken this way; other uses of ``topk`` keep TVM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from moec.compiler.lowering.passes.kernel_block import as_private_block
from moec.compiler.lowering.passes.rewrite import rewrite_functions

TopkFactory = Callable[[int, int, str], tvm.tirx.PrimFunc]
"""``(entries, count, dtype)`` to a kernel ``(x [R, entries], values [R, count], indices [R, count] int64)``."""


@tvm.transform.module_pass(opt_level=0, name="DispatchTopk")
class DispatchTopk:
    """Replace ``relax.topk`` along the last axis by ``topk`` kernels."""

    def __init__(self, topk: TopkFactory) -> None:
        self.topk = topk

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        return rewrite_functions(module, _Rewriter(module, self.topk))


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]  # TVM has no stubs
    def __init__(self, module: tvm.IRModule, topk: TopkFactory) -> None:
        super().__init__(module)
        self.topk = topk
        self.kernels: dict[str, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op != tvm.ir.Op.get("relax.topk") or not _taken(call):
            return call
        x, count, emit = call.args[0], int(call.attrs.k), self.builder_.emit
        *leading, entries = list(x.ty.shape)
        dtype = str(x.ty.dtype.dtype)
        rows: Any = 1
        for extent in leading:
            rows = rows * extent
        flat = x if len(leading) == 1 else emit(relax.op.reshape(x, [rows, entries]))
        out = [relax.TensorType([rows, count], dtype), relax.TensorType([rows, count], "int64")]
        result = relax.call_tir(self._kernel(int(entries), count, dtype), [flat], out)
        if len(leading) == 1:
            return result
        result = emit(result)
        shape = [*leading, count]
        parts = [emit(relax.op.reshape(emit(relax.TupleGetItem(result, i)), shape)) for i in range(2)]
        return relax.Tuple(parts)

    def _kernel(self, entries: int, count: int, dtype: str) -> Any:
        name = f"topk_{entries}_{count}_{dtype}"
        if name not in self.kernels:
            kernel = as_private_block(self.topk(entries, count, dtype))
            self.kernels[name] = self.builder_.add_func(kernel, name)
        return self.kernels[name]


def _taken(call: Any) -> bool:
    attrs, rank = call.attrs, len(call.args[0].ty.shape)
    plain = attrs.ret_type == "both" and bool(attrs.largest) and str(attrs.dtype) in ("int64",)
    return plain and int(attrs.axis) in (-1, rank - 1)
