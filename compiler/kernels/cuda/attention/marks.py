"""Tokens that other kernels of the same call take care of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import LANES, i32, registers, value
from moec.compiler.kernels.emit import Expr, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.attention.operands import Done

LEFT = 3
"""Word of the plan's head that says how many tokens are left."""


def some_left(done: Done | None) -> Expr:
    """Whether any token of the step is left."""
    return T.bool(True) if done is None else T.bind(load(done.head, i32(LEFT)) > i32(0))


def is_done(done: Done | None, token: Expr) -> Expr:
    """Whether a token of the step is somebody else's."""
    return T.bool(False) if done is None else load(done.marks, T.cast(token, "int64")) != i32(0)


def any_left(done: Done | None, first: Expr, end: Expr, most: int, lane: Expr) -> Expr:
    """Whether one of the tokens ``first .. end - 1``, which are at most ``most``, is left; all lanes take part."""
    if done is None:
        return T.bool(True)
    found = registers(1, "uint32")
    store(found, 0, T.uint32(0))
    with when(some_left(done)):
        for start in range(0, most, LANES):
            token = T.bind(T.min(first + lane + i32(start), end - i32(1)))
            left = T.bind(T.Not(is_done(done, token)))
            store(found, 0, load(found, 0) | value("uint32", "ballot", left))
    return T.bind(load(found, 0) != T.uint32(0))
