"""What goes together on a GPU, by what the fused program computes in the emulator."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from tvm.script import from_source, ir
from tvm.script import relax as script_relax

from moec.artifacts.model import TensorSpec
from moec.compiler.lowering.lower import packed_functions
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated
from tests.support.lowered import run_segment

TURNED = """@I.ir_module
class Module:
    @R.function
    def main(
        x: R.Tensor((1, "T", 32), "float32"), p: R.Tensor((1, "T", 16), "float32"), w: R.Tensor((16, 32), "bfloat16")
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            turn = R.cos(p)
            wt = R.permute_dims(w, axes=[1, 0])
            y = R.matmul(x, wt, out_dtype="float32")
            z = R.multiply(y, turn)
            gv = (z, turn)
            R.output(gv)
        return gv
"""


def test_a_result_that_is_read_behind_a_product_is_computed_once_and_written() -> None:
    names = {"I": ir, "R": script_relax, "T_": TypeVar("T_")}
    module = run_passes(from_source(TURNED, extra_vars=names), pipeline(parse_target("cuda-sm_80"), {}), None)
    segment = read_segment("main", module["main"], 2, "Model")
    functions = packed_functions(module, [segment], {})
    emulated = Emulated(*(function for _, function in functions.functions_items()))
    random, tokens = np.random.default_rng(0), 3
    x, p = (aligned_empty((1, tokens, width), np.float32) for width in (32, 16))
    x[...], p[...] = random.standard_normal(x.shape), random.standard_normal(p.shape)
    weight = aligned_empty((16, 32), np.uint16)
    weight[...] = random.standard_normal(weight.shape).astype(np.float32).view(np.uint32) >> 16
    outputs = (TensorSpec("float32", (1, "T", 16)),) * 2

    def call(function: str, operands: list[Any]) -> None:
        emulated(function, *operands)

    z, turn = run_segment(segment, call, [x, p], [weight], outputs, tokens)
    values = (weight.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(turn, np.cos(p), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z, (x @ values.T) * np.cos(p), rtol=1e-3, atol=1e-3)
