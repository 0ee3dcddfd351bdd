"""The keys of a layer's slots: whose expert leaves first. Numbers are int32 unless they say otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.policy import key_of
from moec.compiler.kernels.cuda.slots.step import THREADS
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.slots.step import Step
    from moec.compiler.kernels.emit import Buffer, Expr

FREE, FIXED = -1, -2
"""In place of a slot's key: nobody is in it; whoever is in it stays."""
GREATEST = (1 << 63) - 1
_GROUP = 16
assert _GROUP * _GROUP == THREADS


def slot_keys(step: Step, key: Buffer, late: Expr) -> None:
    """Write the key of each slot's expert, shared int64 ``[S]``; where copies are ``late`` (1) nobody leaves."""
    state, thread = step.state, step.thread
    for slot in each_of(thread, THREADS, state.slots):
        owner = settle(T.cast(state.part("owner", slot), "int32"))
        store(key, slot, i64(FREE))
        with when(owner >= i32(0)):
            store(key, slot, T.Select(late == i32(1), i64(FIXED), key_of(state, owner, step.clock)))
            with T.serial(i32(0), step.entries) as entry, when(load(step.expert, entry) == owner):
                store(key, slot, i64(FIXED))
    sync()


def least_key(step: Step, key: Buffer) -> Expr:
    """int64: of the slots that can be given, `FREE` where one is free, `GREATEST` where there is none."""
    least, group = shared(THREADS, "int64"), shared(_GROUP, "int64")
    found = registers(1, "int64")
    store(found, 0, i64(GREATEST))
    for slot in each_of(step.thread, THREADS, step.state.slots):
        its = settle(load(key, slot))
        with when(tirx.all(its != i64(FIXED), its < load(found, 0))):
            store(found, 0, its)
    store(least, step.thread, load(found, 0))
    sync()
    with when(step.thread < i32(_GROUP)):
        _least_of(least, step.thread * i32(_GROUP), found)
        store(group, step.thread, load(found, 0))
    sync()
    _least_of(group, i32(0), found)
    return settle(load(found, 0))


def _least_of(numbers: Buffer, first: Expr, found: Buffer) -> None:
    """Write the least of ``_GROUP`` numbers from ``first`` on."""
    store(found, 0, i64(GREATEST))
    for number in range(_GROUP):
        store(found, 0, T.min(load(found, 0), load(numbers, first + i32(number))))
