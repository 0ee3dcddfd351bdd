"""Whole tensors to float32 scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.kernels.cpu.emit import Buffer, Expr, div, either, i64, keep, loop, mod, scratch, store
from moec.compiler.kernels.cpu.numeric import widen

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine

PIECE = 4096
"""Elements that one thread converts at a time."""


def to_float32(source: Buffer, dtype: str, size: Expr, machine: Machine) -> Buffer:
    """A float32 copy of ``size`` elements; ``source`` itself where it is float32."""
    if dtype == "float32":
        return source
    target = scratch(size)
    pieces = keep(div(size, PIECE))

    def piece(number: Expr) -> None:
        with loop(PIECE // machine.lanes) as step:
            _copy(
                source, dtype, target, number * i64(PIECE) + step * i64(machine.lanes), machine.lanes, machine
            )

    def shared() -> None:
        with loop(pieces, parallel=True) as number:
            piece(number)

    def alone() -> None:
        with loop(pieces) as number:
            piece(number)

    either(pieces >= i64(32), shared, alone)
    rest = keep(pieces * i64(PIECE))
    with loop(div(size - rest, machine.lanes)) as step:
        _copy(source, dtype, target, rest + step * i64(machine.lanes), machine.lanes, machine)
    tail = keep(mod(size, machine.lanes))
    with loop(tail) as step:
        _copy(source, dtype, target, size - tail + step, 1, machine)
    return target


def _copy(source: Buffer, dtype: str, target: Buffer, place: Expr, lanes: int, machine: Machine) -> None:
    store(target, place, widen(source, dtype, place, lanes, native_f16=machine.native_f16), lanes)
