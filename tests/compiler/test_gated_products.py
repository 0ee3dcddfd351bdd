"""Which products write an activation of their results for the one product that reads them."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm.script import from_source, ir
from tvm.script import relax as script_relax

from moec.compiler.kernels.rows.product import Product
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.targets import parse_target

GATED = """@I.ir_module
class Module:
    @R.function
    def main(
        x: R.Tensor((1, "T", 64), "float32"),
        gate: R.Tensor((32, 64), "bfloat16"),
        up: R.Tensor((32, 64), "bfloat16"),
        down: R.Tensor((64, 32), "bfloat16"),
    ):
        R.func_attr({{"num_input": 1}})
        with R.dataflow():
            a = R.matmul(x, R.permute_dims(gate, axes=[1, 0]), out_dtype="float32")
            b = R.matmul(x, R.permute_dims(up, axes=[1, 0]), out_dtype="float32")
            h = {between}
            y = R.matmul(h, R.permute_dims(down, axes=[1, 0]), out_dtype="float32")
            gv = {result}
            R.output(gv)
        return gv
"""
SILU = "R.multiply(R.multiply(a, R.sigmoid(a)), b)"


def products(between: str, result: str) -> list[Product]:
    names = {"I": ir, "R": script_relax, "T_": TypeVar("T_")}
    source = GATED.format(between=between, result=result)
    found: dict[str, Product] = {}
    run_passes(from_source(source, extra_vars=names), pipeline(parse_target("cuda-sm_80"), found), None)
    return list(found.values())


def test_a_gated_network_is_two_products_that_pass_on_what_is_rounded() -> None:
    first, second = products(SILU, "y")
    assert first.activation is not None
    assert len(first.shapes) == 2
    assert first.activation.reader == second.shapes[0]
    assert second.given


def test_what_is_no_part_of_it_is_a_result_as_before() -> None:
    first, second = products("R.multiply(a, a)", "(y, b)")
    assert first.activation is not None
    assert first.activation.places == (0,)
    assert len(first.shapes) == 2
    assert second.given


@pytest.mark.parametrize(
    ("between", "result"),
    [
        (SILU, "(y, a)"),
        (SILU, "R.add(y, R.concat((a, b), axis=2))"),
        ("R.multiply(a, R.sum(b, axis=2, keepdims=True))", "y"),
        ("R.multiply(a, R.flip(b, axis=2))", "y"),
    ],
    ids=["a result", "another reader", "a sum", "other places"],
)
def test_what_others_read_or_other_places_need_is_stored(between: str, result: str) -> None:
    found = products(between, result)
    assert all(product.activation is None for product in found)
    assert not any(product.given for product in found)
