"""Shared memory in which all multiplying threads of a block lay results out, to be copied to global memory in one go.

The copies run behind the threads' backs, so that the next piece's products begin at once; before the memory is written
again it is waited for that they have read it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as cuda
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.emit import load, store, when

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.compiler.kernels.emit import Buffer, Expr

MOST_SHARED_BYTES = 226 << 10
"""Of a block on a Hopper GPU, without some for barriers."""


@dataclass(frozen=True)
class Parcel:
    """What lies in one piece in both memories."""

    start: int
    """In the outbox, bytes, a multiple of 16."""
    target: Expr
    """Address in global memory, a multiple of 16."""
    size_bytes: Expr
    """int32, a multiple of 16."""
    exists: Expr | None = None
    """Whether there is such a parcel; ``None``: always."""


class Outbox:
    """A block's, while it is emitted.

    Args:
        memory: dynamic shared memory.
        start: where in it the outbox begins, bytes.
        thread: number among those that multiply, int32.
        threads: that multiply.
    """

    def __init__(self, memory: Buffer, start: int, thread: Expr, threads: int) -> None:
        self.memory, self.start, self.thread, self.threads = memory, start, thread, threads
        self._free, self._full = cuda.shared(1, "uint64"), cuda.shared(1, "uint64")
        self._turn = cuda.registers(1, "int32")

    def begin(self) -> None:
        """Set the barriers up, in one thread of the block."""
        cuda.call("phase_begin", cuda.element(self._free, 0), i32(1))
        cuda.call("phase_begin", cuda.element(self._full, 0), i32(self.threads))

    def start_counting(self) -> None:
        """Before the first piece, in threads that multiply."""
        store(self._turn, 0, i32(0))

    def open(self) -> None:
        """Until it may be written to: what was sent before is read."""
        with when(self.thread == i32(0)):
            cuda.call("bulk_read")
            cuda.call("phase_arrive", cuda.element(self._free, 0))
        self._wait(self._free)

    def element(self, place: Expr) -> Expr:
        """The address of byte ``place`` (int32)."""
        return cuda.element(self.memory, i32(self.start) + place)

    def send(self, parcels: Sequence[Parcel]) -> None:
        """Begin to copy what all threads have laid out."""
        cuda.call("fence_async")
        cuda.call("phase_arrive", cuda.element(self._full, 0))
        with when(self.thread == i32(0)):
            self._wait(self._full)
            for parcel in parcels:
                with when(parcel.exists) if parcel.exists is not None else nullcontext():
                    self._copy(parcel)
            cuda.call("bulk_commit")
        store(self._turn, 0, load(self._turn, 0) + i32(1))

    def close(self) -> None:
        """Behind the last piece: until everything has arrived."""
        with when(self.thread == i32(0)):
            cuda.call("bulk_arrived")

    def _copy(self, parcel: Parcel) -> None:
        source = cuda.element(self.memory, self.start + parcel.start)
        cuda.call("bulk_store", parcel.target, source, parcel.size_bytes)

    def _wait(self, barrier: Buffer) -> None:
        cuda.call("phase_wait", cuda.element(barrier, 0), T.bind(load(self._turn, 0) % i32(2)))
