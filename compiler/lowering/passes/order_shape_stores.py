"""Functions that compute shapes: stores in the order of their places, equal functions once, numbered by first use.

Before::

    def shape_func(H):
        H[T.int64(2)] = T.int64(1024) * H[T.int64(0)]
        H[T.int64(1)] = T.int64(512) * H[T.int64(0)]

    def shape_func1(H):                        # another segment's, in another order
        H[T.int64(1)] = T.int64(512) * H[T.int64(0)]
        H[T.int64(2)] = T.int64(1024) * H[T.int64(0)]

After::

    def shape_func(H):
        H[T.int64(1)] = T.int64(512) * H[T.int64(0)]
        H[T.int64(2)] = T.int64(1024) * H[T.int64(0)]

``VMShapeLower`` walks a hash table of pointers, so that the order differs from run to run, and with it which
functions are equal; the same model must give the same bytes. No store reads what another one wrote: all of them read
the step's own dimensions.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.transform.module_pass(opt_level=0, name="OrderShapeStores")
class OrderShapeStores:
    """Sort the body of each ``shape_func``, and merge those that are equal then."""

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite the shape functions of ``module``, and their calls."""
        functions = dict(module.functions_items())
        shapes = {name: _ordered(functions.pop(name)) for name in list(functions) if _makes_shapes(name)}
        free = sorted(shapes, key=lambda name: (len(name.name_hint), name.name_hint))
        kept: dict[Any, Any] = {}
        places: dict[Any, Any] = {}
        for name in sorted(functions, key=lambda name: str(name.name_hint)):
            for used in _uses(functions[name]):
                if used in shapes and used not in places:
                    equal = (n for n, other in kept.items() if tvm_ffi.structural_equal(other, shapes[used]))
                    places[used] = next(equal, None) or free[len(kept)]
                    kept[places[used]] = shapes[used]
        renamed = {
            name: _Renamed(places).visit_expr(f) if _is_relax(f) else f for name, f in functions.items()
        }
        return tvm.IRModule(renamed | kept, attrs=module.attrs, global_infos=module.global_infos)


def _makes_shapes(name: Any) -> bool:
    return str(name.name_hint).startswith("shape_func")


def _is_relax(function: Any) -> bool:
    return isinstance(function, relax.Function)


def _ordered(function: tirx.PrimFunc) -> tirx.PrimFunc:
    if not isinstance(function.body, tirx.SeqStmt):
        return function
    return function.with_body(
        tirx.SeqStmt(sorted(function.body.seq, key=lambda store: int(store.indices[0])))
    )


def _uses(function: Any) -> list[Any]:
    """Functions that a Relax function names, in the order of its text."""
    found: list[Any] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, tvm.ir.GlobalVar):
            found.append(expression)

    if _is_relax(function):
        relax.analysis.post_order_visit(function.body, visit)
    return found


@mutator
class _Renamed(PyExprMutator):  # type: ignore[misc]  # TVM has no stubs
    def __init__(self, places: dict[Any, Any]) -> None:
        super().__init__()
        self.places = places

    def visit_global_var_(self, name: Any) -> Any:
        return self.places.get(name, name)
