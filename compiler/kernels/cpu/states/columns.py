"""How the columns of a state are dealt out: each is advanced by itself, so that threads and vectors take whole ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.emit import i64, splat, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Columns:
    """Blocks of equal width, in vectors of equal width."""

    blocks: int
    vectors: int
    """In a block."""
    lanes: int
    """Of a vector."""

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.vectors * self.lanes


def divide(columns: int, machine: Machine, most_vectors: int) -> Columns:
    """Blocks of the widest power of 2 that divides ``columns``, up to ``most_vectors`` of the machine's vectors."""
    width = min(columns & -columns, machine.lanes * most_vectors)
    lanes = min(width, machine.lanes)
    return Columns(columns // width, width // lanes, lanes)


def begin(position: Expr, state: Buffer, places: list[Expr], lanes: int) -> None:
    """Clear a state's vectors where a sequence begins."""
    with when(position.equal(i64(0))):
        for place in places:
            store(state, place, splat(0.0, lanes), lanes)
