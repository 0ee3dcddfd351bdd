"""Which products write an activation of their results for the one product that reads them."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pytest
from tvm.script import from_source, ir
from tvm.script import relax as script_relax

from moec.artifacts.model import TensorSpec
from moec.artifacts.program import HOPPER
from moec.compiler.kernels.rows.product import Product
from moec.compiler.lowering.links import Link
from moec.compiler.lowering.lower import packed_functions
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated
from tests.support.lowered import run_segment

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


APART = """@I.ir_module
class Module:
    @R.function
    def first(
        x: R.Tensor((1, "T", 64), "float32"),
        gate: R.Tensor((64, 64), "bfloat16"),
        up: R.Tensor((64, 64), "bfloat16"),
    ):
        R.func_attr({{"num_input": 1}})
        with R.dataflow():
            a = R.matmul(x, R.permute_dims(gate, axes=[1, 0]), out_dtype="float32")
            b = R.matmul(x, R.permute_dims(up, axes=[1, 0]), out_dtype="float32")
            gv = {made}
            R.output(gv)
        return gv

    @R.function
    def second(
        a: R.Tensor((1, "T", 64), "float32"),
        b: R.Tensor((1, "T", 64), "float32"),
        down: R.Tensor((32, 64), "bfloat16"),
    ):
        R.func_attr({{"num_input": 2}})
        with R.dataflow():
            h = R.multiply(R.multiply(a, R.sigmoid(a)), b)
            y = R.matmul(h, R.permute_dims(down, axes=[1, 0]), out_dtype="float32")
            gv = (y,)
            R.output(gv)
        return gv
"""
LINK = Link("first", "second", ((0, 0), (1, 1)))


def apart(made: str, target: str, *links: Link) -> tuple[Any, dict[str, Product]]:
    """Two functions, after all passes."""
    names = {"I": ir, "R": script_relax, "T_": TypeVar("T_")}
    found: dict[str, Product] = {}
    source = from_source(APART.format(made=made), extra_vars=names)
    return run_passes(source, pipeline(parse_target(target), found, links), None), found


def test_a_gated_network_in_two_functions_passes_on_what_is_rounded_in_the_memory_of_a_result() -> None:
    _, found = apart("(a, b)", "cuda-sm_80", LINK)
    first, second = found.values()
    assert first.activation is not None
    assert first.activation.beyond
    assert first.activation.places == (0, 1)
    assert second.held == first.activation.results[0]
    assert not second.given


@pytest.mark.parametrize(
    ("made", "links"), [("(a, b)", ()), ("(a, R.add(a, b))", (LINK,)), ("(a, b, a)", (LINK,))]
)
def test_what_is_not_passed_on_alone_is_stored_by_both(made: str, links: tuple[Link, ...]) -> None:
    _, found = apart(made, "cuda-sm_80", *links)
    assert all(product.activation is None and product.held is None for product in found.values())


@pytest.mark.parametrize("hopper", [False, True], ids=["any GPU", "Hopper"])
def test_two_functions_compute_the_same_whether_linked_or_not(*, hopper: bool) -> None:
    """For few tokens results are float32 numbers, for many the second function finds what it multiplies."""
    random = np.random.default_rng(0)
    weights = [aligned_empty(shape, np.uint16) for shape in ((64, 64), (64, 64), (32, 64))]
    for weight in weights:
        weight[...] = random.standard_normal(weight.shape).astype(np.float32).view(np.uint32) >> 16
    inputs = [aligned_empty((1, tokens, 64), np.float32) for tokens in (3, 40)]
    for x in inputs:
        x[...] = random.standard_normal(x.shape)
    results = []
    for links in ((), (LINK,)):
        module, _ = apart("(a, b)", "cuda-sm_90" if hopper else "cuda-sm_80", *links)
        first, second = (
            read_segment("first", module["first"], 1, "M"),
            read_segment("second", module["second"], 2, "M"),
        )
        functions = packed_functions(module, [first, second], {})
        emulated = Emulated(*(function for _, function in functions.functions_items()))

        def call(function: str, operands: list[Any], emulated: Emulated = emulated) -> None:
            emulated(function + HOPPER if hopper else function, *operands)

        middle = (TensorSpec("float32", (1, "T", 64)),) * 2
        for x in inputs:
            made = run_segment(first, call, [x], weights[:2], middle, x.shape[1])
            (y,) = run_segment(
                second, call, made, weights[2:], (TensorSpec("float32", (1, "T", 32)),), x.shape[1]
            )
            results.append(y.tobytes())
    assert results[:2] == results[2:]
