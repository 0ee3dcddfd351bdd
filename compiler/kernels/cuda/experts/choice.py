"""Which tokens a block of the experts' first launch works for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import remainder
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS, LANES
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, value
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Choice:
    """One expert and the tokens that chose it."""

    first: Expr
    """Whether this block's choice is the first one of its expert."""
    expert: Expr
    """int64."""
    count: Expr
    """Of tokens that chose it; int32."""
    entries: Buffer
    """int32 ``[8]``: their choices' numbers among the T * K, in shared memory."""


def find_tokens(call_: ExpertCall, thread: Expr, entry: Expr) -> Choice:
    """Every warp finds the tokens that chose the expert of ``entry``: lane t looks at token t."""
    lane = T.bind(remainder(thread, LANES))
    chosen = T.bind(T.cast(call_.chosen, "int32"))
    expert = T.bind(load(call_.index, T.cast(entry, "int64")))
    own = registers(1, "int32")
    store(own, i32(0), i32(-1))
    with when(lane < T.cast(call_.tokens, "int32")), T.serial(i32(0), chosen) as step:
        place = T.bind(lane * chosen + (chosen - i32(1) - step))
        with when(load(call_.index, T.cast(place, "int64")) == expert):
            store(own, i32(0), place)
    own_entry = T.bind(load(own, i32(0)))
    mask = value("uint32", "ballot", own_entry >= i32(0))
    below = T.bind(T.bitwise_and(mask, (T.uint32(1) << T.cast(lane, "uint32")) - T.uint32(1)))
    entries = shared(FEW_TOKENS, "int32")
    with when(tirx.all(thread < i32(LANES), own_entry >= i32(0))):
        store(entries, value("int32", "count_bits", below), own_entry)
    lowest = value("int32", "count_bits", T.bitwise_and(mask - T.uint32(1), T.bitwise_not(mask)))
    first = value("int32", "shuffle_int", own_entry, lowest)
    known = call_.has(expert)
    return Choice(
        T.bind(tirx.all(known, first == entry)), expert, value("int32", "count_bits", mask), entries
    )
