"""Golden text for each of our passes: the IR before, and the IR after."""

from __future__ import annotations

from typing import Any, TypeVar

import tvm
from tvm import relax
from tvm.script import from_source, ir
from tvm.script import relax as script_relax
from tvm.script import tirx as script_tirx

from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.lowering.kernel_library import CpuKernels
from moec.compiler.lowering.passes.dispatch_linear import DispatchLinear
from moec.compiler.lowering.passes.dispatch_topk import DispatchTopk
from moec.compiler.lowering.passes.schedule_cpu import ScheduleCpu
from moec.compiler.lowering.pipeline import cpu_passes
from moec.compiler.lowering.targets import parse_target

HEADER = """@I.ir_module
class Module:
"""

LINEAR_BEFORE = """
    @R.function
    def main(x: R.Tensor((1, 6, 8), "float32"), w: R.Tensor((4, 8), "bfloat16"), b: R.Tensor((4,), "float32")):
        with R.dataflow():
            wt = R.permute_dims(w, axes=[1, 0])
            product = R.matmul(x, wt, out_dtype="float32")
            y = R.add(product, b)
            gv = (y,)
            R.output(gv)
        return gv
"""

LINEAR_AFTER = [
    "R.reshape(x, R.shape([6, 8]))",
    'R.call_tir(linear_4_8_bfloat16_bias, (lv, w, b), out_ty=R.Tensor((6, 4), dtype="float32"))',
    "R.reshape(lv1, R.shape([1, 6, 4]))",
    "(lv2,)",
]

TAKE_BEFORE = """
    @R.function
    def main(x: R.Tensor((1, 6), "int64"), w: R.Tensor((4, 8), "bfloat16")):
        with R.dataflow():
            rows = R.take(w, x, axis=0, mode="clip")
            wide = R.astype(rows, dtype="float32")
            gv = (wide,)
            R.output(gv)
        return gv
"""

TOPK_BEFORE = """
    @R.function
    def main(x: R.Tensor((3, 4, 8), "float32")):
        with R.dataflow():
            best = R.topk(x, k=2, axis=-1, ret_type="both", largest=True, dtype="int64")
            index = best[1]
            gv = (index,)
            R.output(gv)
        return gv
"""

TOPK_AFTER = [
    "R.reshape(x, R.shape([12, 8]))",
    (
        'R.call_tir(topk_8_2_float32, (lv,), out_ty=[R.Tensor((12, 2), dtype="float32"), '
        'R.Tensor((12, 2), dtype="int64")])'
    ),
]

SCATTER_BEFORE = """
    @R.function
    def main(x: R.Tensor((3, 4), "int64")):
        with R.dataflow():
            places = R.arange(R.prim_value(0), R.prim_value(4), R.prim_value(1), dtype="int64")
            hit = R.equal(x, places)
            y = R.where(hit, R.const(float("-inf"), "float32"), R.const(2.0, "float32"))
            gv = (y,)
            R.output(gv)
        return gv
"""

SUM_BEFORE = """
    @T.prim_func(private=True, s_tir=True)
    def total(x: T.Buffer((T.int64(6), T.int64(64)), "float32"), y: T.Buffer((T.int64(6),), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i, k in T.grid(T.int64(6), T.int64(64)):
            with T.sblock("total"):
                vi, vk = T.axis.remap("SR", [i, k])
                T.reads(x[vi, vk])
                T.writes(y[vi])
                with T.init():
                    y[vi] = T.float32(0.0)
                y[vi] = y[vi] + x[vi, vk]
"""


def parse(body: str) -> tvm.IRModule:
    names = {"I": ir, "R": script_relax, "T": script_tirx, "T_": TypeVar("T_")}
    return from_source(HEADER + body, extra_vars=names)


def apply(step: Any, module: tvm.IRModule) -> tvm.IRModule:
    return step(module)


def bindings(module: tvm.IRModule) -> list[str]:
    """The right-hand sides of ``main``, as text."""
    (block,) = module["main"].body.blocks
    return [str(binding.value).strip() for binding in block.bindings]


def kernels() -> Any:
    return CpuKernels(8, "x86_64")


def test_dispatch_linear() -> None:
    module = apply(DispatchLinear(kernels().linear), parse(LINEAR_BEFORE))
    assert bindings(module) == LINEAR_AFTER
    assert "moec_kernel" in module["linear_4_8_bfloat16_bias"].script()


def test_dispatch_linear_leaves_products_of_activations() -> None:
    body = LINEAR_BEFORE.replace(
        "wt = R.permute_dims(w, axes=[1, 0])", "wt = R.permute_dims(R.exp(w), axes=[1, 0])"
    )
    before = parse(body)
    assert "R.matmul" in str(apply(DispatchLinear(kernels().linear), before)["main"])


def test_legalized_take_fuses_with_the_cast_after_it() -> None:
    module = parse(TAKE_BEFORE)
    for step in cpu_passes(parse_target("cpu-x86-64-v3")):
        module = apply(step, module)
    assert bindings(module) == [
        'R.call_tir(fused_take_cast, (w, x), out_ty=R.Tensor((1, 6, 8), dtype="float32"))',
        "(lv,)",
    ]


def test_numbers_and_ranges_are_in_the_loops_not_in_constant_tensors() -> None:
    module = parse(SCATTER_BEFORE)
    for step in cpu_passes(parse_target("cpu-x86-64-v3")):
        module = apply(step, module)
    call, _ = bindings(module)
    assert call == 'R.call_tir(fused_arange_equal_where, (x,), out_ty=R.Tensor((3, 4), dtype="float32"))'


def test_linear_names_are_distinct() -> None:
    shapes = [
        LinearShape(4, 8, "float32", None, bias=False),
        LinearShape(4, 8, "float32", None, bias=True),
        LinearShape(4, 8, "float32", 2, bias=False),
        LinearShape(8, 4, "float32", None, bias=False),
        LinearShape(4, 8, "float16", None, bias=False),
    ]
    assert len({shape.name for shape in shapes}) == len(shapes)


def test_dispatch_topk() -> None:
    module = relax.transform.DeadCodeElimination()(apply(DispatchTopk(kernels().topk), parse(TOPK_BEFORE)))
    found = bindings(module)
    assert found[:2] == TOPK_AFTER
    assert any(text.endswith("R.shape([3, 4, 2]))") for text in found)


def test_dispatch_topk_leaves_the_smallest() -> None:
    before = parse(TOPK_BEFORE.replace("largest=True", "largest=False"))
    assert "R.topk" in str(apply(DispatchTopk(kernels().topk), before)["main"])


def test_schedule_cpu_sums_in_lanes() -> None:
    text = apply(ScheduleCpu(8), parse(SUM_BEFORE))["total"].script()
    assert "T.vectorized(T.int64(8))" in text
    assert "T.parallel" not in text, "a step this small stays in one thread"


def test_schedule_cpu_keeps_both_forms_where_the_step_decides() -> None:
    rows = SUM_BEFORE.replace("T.Buffer((T.int64(6), T", "T.Buffer((T_, T").replace(
        "T.Buffer((T.int64(6),)", "T.Buffer((T_,)"
    )
    text = apply(ScheduleCpu(8), parse(rows.replace("T.grid(T.int64(6)", "T.grid(T_")))["total"].script()
    assert "if T" in text
    assert "T.parallel" in text
    assert "else:" in text
