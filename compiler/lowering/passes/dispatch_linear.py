"""Products with a weight become calls of the target's own kernel.

Before::

    lv = R.permute_dims(w)                              # w [N, K], bfloat16
    lv1 = R.matmul(x, lv, out_dtype="float32")          # x [1, T, K]
    gv = R.add(lv1, b)                                  # where there is a bias

After::

    lv = R.reshape(x, (T, K))
    lv1 = R.call_tir(cls.linear_N_K_bfloat16_bias, (lv, w, b), out_ty=R.Tensor((T, N), "float32"))
    gv = R.reshape(lv1, (1, T, N))

The reshapes cost nothing at run time. A weight ``[B, N, K]`` (one matrix a head) is a batch of B products, with x
``[B, T, K]``. Only weights may be of a narrower type than float32. Products of two activations are left alone.

A product with a quantized weight comes as ``R.call_dps_packed("moec.linear.int8-g128", (x, w))``, with w its bytes
``[N, row_bytes]``, and goes the same way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from moec.compiler.kernels.linear_shape import PRODUCT, LinearShape
from moec.compiler.lowering.converters import QUANTIZED_LINEAR
from moec.compiler.lowering.passes.kernel_block import as_private_block

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class LinearMatch:
    """A product found in a function."""

    shape: LinearShape
    arguments: tuple[Any, ...]
    """x, weight and, where there is one, bias: variables of the function."""


@tvm.transform.module_pass(opt_level=0, name="DispatchLinear")
class DispatchLinear:
    """Replace products with a weight by ``linear`` kernels.

    Args:
        linear: makes the kernel for a shape: ``(x, w, [bias], y)``, destination last.
    """

    def __init__(self, linear: Callable[[LinearShape], tvm.tirx.PrimFunc]) -> None:
        self.linear = linear

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        rewriter = _Rewriter(module, self.linear)
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.matches = find_linears(function)
                rewriter.builder_.update_func(name, rewriter.visit_expr(function))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


def find_linears(function: relax.Function) -> dict[Any, LinearMatch]:
    """The products with a weight in ``function``, by the variable that holds their result."""
    values = dict(relax.analysis.get_var2val(function).items())
    users = {
        var: list(used_by)
        for block in function.body.blocks
        for var, used_by in relax.analysis.udchain(block).items()
    }
    parameters = set(function.params)
    found = (_match(var, values, users, parameters) for var in values)
    return dict(match for match in found if match is not None)


def _calls(value: Any, operator: str) -> bool:
    return isinstance(value, relax.Call) and value.op == tvm.ir.Op.get(operator)


def _match(var: Any, values: Any, users: Any, parameters: set[Any]) -> tuple[Any, LinearMatch] | None:
    """The product ``var`` with its bias, or ``None`` where it is none, or its right side is no weight."""
    product = _quantized_product(values[var]) or _plain_product(values[var], values)
    if product is None or product[1] not in parameters:
        return None
    x, weight, columns, dtype = product
    *leading, rows = (int(extent) for extent in list(weight.ty.shape)[:-1])
    batch = leading[0] if leading else None
    bias = None
    follower = _only_user(var, users, values)
    if batch is None and follower is not None and _calls(values[follower], "relax.add"):
        bias = _bias(values[follower].args[1], parameters)
        if bias is not None:
            var = follower
    assert str(x.ty.dtype.dtype) == "float32", "graphs compute in float32"
    shape = LinearShape(rows, columns, dtype, batch, bias is not None)
    return var, LinearMatch(shape, (x, weight) if bias is None else (x, weight, bias))


def _plain_product(value: Any, values: Any) -> tuple[Any, Any, int, str] | None:
    """x, weight, columns and element type of a product with a transposed matrix."""
    if not _calls(value, "relax.matmul"):
        return None
    x, right = value.args
    rank, transpose = len(right.ty.shape), values.get(right)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if not _calls(transpose, "relax.permute_dims") or [int(i) for i in transpose.attrs.axes] != swapped:
        return None
    weight = transpose.args[0]
    return x, weight, int(list(weight.ty.shape)[-1]), str(weight.ty.dtype.dtype)


def _quantized_product(value: Any) -> tuple[Any, Any, int, str] | None:
    """x, weight, columns and format of a product with a quantized weight."""
    if not _calls(value, "relax.call_dps_packed"):
        return None
    name = str(value.args[0].global_symbol)
    if not name.startswith(QUANTIZED_LINEAR):
        return None
    x, weight = value.args[1].fields
    return x, weight, int(list(x.ty.shape)[-1]), name.removeprefix(QUANTIZED_LINEAR)


def _only_user(var: Any, users: Any, values: Any) -> Any:
    used_by = [user for user in users.get(var, ()) if user in values]
    return used_by[0] if len(used_by) == 1 else None


def _bias(value: Any, parameters: set[Any]) -> Any:
    return value if value in parameters and len(value.ty.shape) == 1 else None


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]  # TVM has no stubs
    """Replaces the bindings in ``matches`` by kernel calls."""

    matches: dict[Any, LinearMatch]

    def __init__(self, module: tvm.IRModule, linear: Callable[[LinearShape], tvm.tirx.PrimFunc]) -> None:
        super().__init__(module)
        self.linear = linear
        self.kernels: dict[LinearShape, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        match = self.matches.get(binding.var)
        if match is None:
            super().visit_var_binding_(binding)
            return
        result = self._call(match, list(binding.var.ty.shape))
        self.set_var_remap(binding.var, result)

    def _call(self, match: LinearMatch, shape: list[Any]) -> Any:
        spec, emit = match.shape, self.builder_.emit
        if spec not in self.kernels:
            kernel = as_private_block(self.linear(spec)).with_attr(PRODUCT, json.dumps(asdict(spec)))
            self.kernels[spec] = self.builder_.add_func(kernel, spec.name)
        x, *weights = (self.visit_expr(argument) for argument in match.arguments)
        leading = [] if spec.batch is None else [spec.batch]
        tokens = x.ty.shape[-2] if spec.batch is not None else _product(list(x.ty.shape)[:-1])
        flat = [*leading, tokens, spec.columns]
        if len(flat) != len(x.ty.shape):
            x = emit(relax.op.reshape(x, flat))
        out = relax.TensorType([*leading, tokens, spec.rows], "float32")
        result = emit(relax.call_tir(self.kernels[spec], [x, *weights], out))
        return result if len(shape) == len(flat) else emit(relax.op.reshape(result, shape))


def _product(extents: list[Any]) -> Any:
    result: Any = 1
    for extent in extents:
        result = result * extent
    return result
