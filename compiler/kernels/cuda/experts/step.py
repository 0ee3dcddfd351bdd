"""What a block of the experts' second launch knows of its step: the distinct experts, and who chose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.lanes import quotient, remainder
from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.experts.call import ExpertCall
    from moec.compiler.kernels.cuda.slots.arrivals import Arrivals
    from moec.compiler.kernels.emit import Buffer, Expr

MOST_CHOSEN = 16
"""Experts that a token may choose here: what is known of every choice lies in shared memory."""
ENTRIES = FEW_TOKENS * MOST_CHOSEN


@dataclass(frozen=True)
class StepExperts:
    """The choices of a step, in shared memory; numbers are int32."""

    tokens: Expr
    chosen: Expr
    chosen_expert: Buffer
    """``[T * K]``: the expert of each choice, -1 for none."""
    weight: Buffer
    """``[T * K]``, float32."""
    experts: Expr
    """How many distinct ones there are."""
    expert: Buffer
    """``[experts]``, by first choice, or as they arrive."""
    address: Buffer
    """``[experts]``, int64."""
    pick: Buffer
    """``[experts, 8]``: a token's first choice of an expert, -1 for none."""


def read_step(call_: ExpertCall, thread: Expr, threads: int, arrivals: Arrivals | None) -> StepExperts:
    """Every block finds the distinct experts of the step, and who chose them."""
    chosen, tokens = T.bind(T.cast(call_.chosen, "int32")), T.bind(T.cast(call_.tokens, "int32"))
    count = T.bind(tokens * chosen)
    chosen_expert, weight = shared(ENTRIES, "int32"), shared(ENTRIES)
    for entry in each_of(thread, threads, count):
        number = T.bind(load(call_.index, T.cast(entry, "int64")))
        known = tirx.all(number >= i64(0), number < call_.count)
        store(chosen_expert, entry, T.Select(known, T.cast(number, "int32"), i32(-1)))
        store(weight, entry, load(call_.weight, T.cast(entry, "int64")))
    sync()
    experts, expert, address = _distinct(call_.table, thread, threads, count, chosen_expert, arrivals)
    pick = shared((ENTRIES + 1) * FEW_TOKENS, "int32")
    for number in each_of(thread, threads, experts * i32(FEW_TOKENS)):
        own, token = T.bind(load(expert, quotient(number, FEW_TOKENS))), T.bind(remainder(number, FEW_TOKENS))
        store(pick, number, i32(-1))
        with when(token < tokens), T.serial(i32(0), chosen) as back:
            entry = T.bind(token * chosen + (chosen - i32(1) - back))
            with when(load(chosen_expert, entry) == own):
                store(pick, number, entry)
    sync()
    return StepExperts(tokens, chosen, chosen_expert, weight, experts, expert, address, pick)


def _distinct(
    table: Buffer,
    thread: Expr,
    threads: int,
    count: Expr,
    chosen_expert: Buffer,
    arrivals: Arrivals | None,
) -> tuple[Expr, Buffer, Buffer]:
    """How many distinct experts there are, which, and where."""
    first, found = shared(ENTRIES, "int32"), shared(1, "int32")
    position = None if arrivals is None else shared(ENTRIES, "int32")
    expert, address = shared(ENTRIES, "int32"), shared(ENTRIES, "int64")
    for entry in each_of(thread, threads, count):
        own = T.bind(load(chosen_expert, entry))
        store(first, entry, T.cast(own >= i32(0), "int32"))
        if arrivals is not None:
            store(position, entry, arrivals.position(entry))
        with T.serial(i32(0), entry) as other, when(load(chosen_expert, other) == own):
            store(first, entry, i32(0))
    sync()
    for entry in each_of(thread, threads, count):
        rank = registers(1, "int32")
        store(rank, i32(0), i32(0))
        if position is None:
            with T.serial(i32(0), entry) as other:
                store(rank, i32(0), load(rank, i32(0)) + load(first, other))
        else:
            with T.serial(i32(0), count) as other, when(load(position, other) < load(position, entry)):
                store(rank, i32(0), load(rank, i32(0)) + load(first, other))
        with when(load(first, entry) == i32(1)):
            own, place = T.bind(load(chosen_expert, entry)), T.bind(load(rank, i32(0)))
            store(expert, place, own)
            store(address, place, load(table, T.cast(own, "int64")))
        last = entry if position is None else load(position, entry)
        with when(last == count - i32(1)):
            store(found, i32(0), load(rank, i32(0)) + load(first, entry))
    sync()
    return T.bind(load(found, i32(0))), expert, address
