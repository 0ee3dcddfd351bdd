"""Relax segments to programs: golden records, what cannot be one, and all tiny models."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm.script import from_source, ir
from tvm.script import relax as script_relax
from tvm.script import tirx as script_tirx

from moec.artifacts.files.checks import program_problems
from moec.artifacts.program import Call, LocalSpec, Operand, SegmentProgram
from moec.compiler.lowering.program import read_segment
from moec.errors import CompileError
from tests.support.canaries import most_slow
from tests.support.programs import chain_and_program
from tests.support.tiny_models import TINY

SEGMENT = """@I.ir_module
class Module:
    @T.prim_func(private=True, s_tir=True)
    def best(x: T.Buffer((T_, T.int64(8)), "float32"), w: T.Buffer((T.int64(4), T.int64(8)), "bfloat16"),
             a: T.Buffer((T_, T.int64(4)), "float32"), b: T.Buffer((T_ * T.int64(4),), "int64")):
        T.evaluate(0)

    @T.prim_func(private=True, s_tir=True)
    def loop(i: T.Buffer((T_, T.int64(4)), "int64"), a: T.Buffer((T_, T.int64(4)), "float32"),
             y: T.Buffer((T_, T.int64(8)), "float32")):
        T.evaluate(0)

    @R.function
    def main(x: R.Tensor((1, T_, 8), "float32"), w: R.Tensor((4, 8), "bfloat16")):
        cls = Module
        with R.dataflow():
            flat = R.reshape(x, R.shape([T_, 8]))
            pair = R.call_tir(
                cls.best, (flat, w), out_ty=[R.Tensor((T_, 4), "float32"), R.Tensor((T_ * 4,), "int64")]
            )
            chosen = pair[1]
            grid = R.reshape(chosen, R.shape([T_, 4]))
            scores = pair[0]
            y = R.call_tir(cls.loop, (grid, scores), out_ty=R.Tensor((T_, 8), "float32"))
            z = R.reshape(y, R.shape([1, T_, 8]))
            gv = (y, z, grid, flat)
            R.output(gv)
        return gv
"""
GOLDEN = SegmentProgram(
    "segment_0",
    (LocalSpec("float32", ("T", 4)),),
    (
        Call(
            "best",
            (
                Operand("input", 0, "float32", ("T", 8)),
                Operand("weight", 0, "bfloat16", (4, 8)),
                Operand("local", 0, "float32", ("T", 4)),
                Operand("output", 2, "int64", ("4T",)),
            ),
        ),
        Call(
            "loop",
            (
                Operand("output", 2, "int64", ("T", 4)),
                Operand("local", 0, "float32", ("T", 4)),
                Operand("output", 0, "float32", ("T", 8)),
            ),
        ),
    ),
    (
        Operand("output", 0, "float32", ("T", 8)),
        Operand("output", 0, "float32", (1, "T", 8)),
        Operand("output", 2, "int64", ("T", 4)),
        Operand("input", 0, "float32", ("T", 8)),
    ),
)


def read(text: str) -> SegmentProgram:
    names = {"I": ir, "R": script_relax, "T": script_tirx, "T_": TypeVar("T_")}
    return read_segment(
        "segment_0",
        from_source(text, extra_vars=names, check_well_formed=False)["main"],
        1,
        "TinyForCausalLM",
    )


def test_calls_views_and_tuples_become_a_program() -> None:
    assert read(SEGMENT) == GOLDEN


@pytest.mark.parametrize(
    ("line", "instead", "why"),
    [
        ("R.reshape(y, R.shape([1, T_, 8]))", "R.exp(y)", "relax.exp"),
        ("(y, z, grid, flat)", "(y, z, grid, w)", "output 3"),
        ("(grid, scores)", '(grid, R.const([1.0], "float32"))', "loop"),
    ],
)
def test_what_is_no_program_is_an_error_that_names_it(line: str, instead: str, why: str) -> None:
    assert line in SEGMENT
    with pytest.raises(CompileError, match="segment_0 of TinyForCausalLM") as error:
        read(SEGMENT.replace(line, instead))
    assert why in error.value.what


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("name", most_slow(TINY))
def test_every_model_is_a_consistent_program(name: str, target: str) -> None:
    assert list(program_problems(*chain_and_program(name, target))) == []
